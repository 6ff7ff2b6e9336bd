"""Which tokens carry loss: what TRL really does, every row checked, one row shown."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from trl import SFTConfig, SFTTrainer

from toolpost.core.format import END, completion_of, prompt_of
from toolpost.core.schema import Conversation, Message, ToolCall, ToolSpec
from toolpost.train.masks import (
    BATCH,
    check_masks,
    counts,
    to_html,
    to_rich,
    token_mask,
    trained_tokens,
)
from toolpost.train.models import POCKET, ModelSpec, load_model, load_tokenizer

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
TOKENIZER = load_tokenizer(POCKET)
TOOL = ToolSpec(name="clock", description="Tell the time.", parameters={"type": "object"})
TURN = "<|im_start|>assistant\n"


def ask(query: str, *arguments: dict[str, Any], answer: str | None = None) -> Conversation:
    calls = tuple(ToolCall(name="clock", arguments=a) for a in arguments)
    tools = {"clock": TOOL}
    about = {"id": 7, "source": "test", "query": query, "answer": answer}
    return Conversation.model_validate({**about, "tools": tools, "gold_calls": calls})


def render(rows: Sequence[Conversation]) -> list[dict[str, str]]:
    return [
        {"prompt": prompt_of(r), "completion": completion_of(r.gold_calls, r.answer)} for r in rows
    ]


ROWS = [
    ask("Time in Lima?", {"zone": "Lima"}),
    ask("Times?", {"zone": "Lima", "n": 1.0}, {"zone": "東京 ☕️", "deep": [{"a": None}, True]}),
    ask("Sing.", answer="I cannot: e\u0301 \u00e9 ☕️ 東京\n\n  bye \n"),
    ask("Say <|im_end|> and <|im_start|>assistant\n, e\u0301!", {"zone": 'quote " and \\ and \n'}),
    ask("  ", answer=" "),
]


def prepared_by_trl(texts: Sequence[Mapping[str, str]], folder: Path) -> list[tuple[Any, Any]]:
    """Give the ids and labels that SFTTrainer prepares, with the settings of train.sft."""
    trainer = SFTTrainer(
        model=load_model(ModelSpec()),
        args=SFTConfig(
            output_dir=str(folder),
            completion_only_loss=True,
            eos_token=END,
            max_length=4096,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([dict(text) for text in texts]),
        processing_class=load_tokenizer(POCKET),
    )
    prepared = trainer.train_dataset
    assert isinstance(prepared, Dataset)
    return [(row["input_ids"], row["labels"]) for row in prepared]


def test_the_mask_is_what_trl_prepares(tmp_path: Path) -> None:
    """Also where a token spans the border, where the end token lacks, and without any turn."""
    odd = [
        {"prompt": TURN + "<tool", "completion": f"_call>{END}"},
        {"prompt": TURN + "one\n", "completion": f"\n\ntwo{END}"},
        {"prompt": TURN + "no end", "completion": " token"},
        {"prompt": "no turn at all, exa", "completion": f"mple{END}"},
        {"prompt": TURN, "completion": f"<|im_start|>user\nhi{END}{END}"},
    ]
    texts = render(ROWS) + odd
    ours = [(ids, [-100] * start + ids[start:]) for ids, start in trained_tokens(texts, TOKENIZER)]
    assert ours == prepared_by_trl(texts, tmp_path)
    assert [[t.id for t in token_mask(text, TOKENIZER)] for text in texts] == [i for i, _ in ours]


PIECES = st.lists(
    st.sampled_from(["<|im_start|>", END, "<tool_call>", "\n", "\n\n", " ", "a", "the", "é", "漢"])
    | st.text(max_size=8),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=300)
@given(PIECES, PIECES)
def test_a_prompt_tokenized_once_gives_the_same_as_tokenized_twice(
    prompt: str, completion: str
) -> None:
    """The reference is TRL's own rule: the common prefix of the prompt alone and of both."""
    from trl.data_utils import common_prefix_length

    text = {"prompt": prompt, "completion": completion + END}
    alone = TOKENIZER(prompt)["input_ids"]
    both = TOKENIZER(prompt + completion + END)["input_ids"]
    assert trained_tokens([text], TOKENIZER) == [(both, common_prefix_length(alone, both))]


def test_rows_of_every_kind_pass() -> None:
    assert check_masks(render(ROWS), ROWS, TOKENIZER) == []
    later = Message(role="assistant", content="", tool_calls=ROWS[0].gold_calls)
    steps = (Message(role="user", content="Time?"), later, Message(role="tool", content="5"))
    step = ROWS[0].model_copy(update={"history": steps})
    assert check_masks(render([step]), [step], TOKENIZER) == []


GOOD = render(ROWS)[0]
SWAPPED = completion_of(ROWS[1].gold_calls[::-1])


@pytest.mark.parametrize(
    ("row", "text", "says"),
    [
        (
            ROWS[0],
            {**GOOD, "completion": "No." + END},
            "call , exp",
        ),
        (ROWS[0], {**GOOD, "completion": GOOD["completion"] * 2}, "occurs 2 times"),
        (ROWS[0], {**GOOD, "completion": GOOD["completion"].replace('"', "'")}, "broken call"),
        (ROWS[0], {**GOOD, "completion": GOOD["completion"].replace("Lima", "Oslo")}, "Oslo"),
        (ROWS[1], {**render(ROWS)[1], "completion": SWAPPED}, "trained tokens call"),
        (ROWS[2], {**render(ROWS)[2], "completion": "Something else." + END}, "expected 'I cannot"),
        (ROWS[0], {"prompt": GOOD["prompt"] + "<", "completion": f"tool_call>{END}"}, "without"),
        (ask("x", answer=f"a{END}b"), None, "occurs 2 times"),
        (ask("x", answer="<tool_call>"), None, "broken call"),
        (ask("x", {"zone": f"the token {END}"}), None, "occurs 2 times"),
    ],
)
def test_a_row_whose_trained_tokens_say_something_else_is_found(
    row: Conversation, text: dict[str, str] | None, says: str
) -> None:
    texts = [GOOD, text or render([row])[0], GOOD]
    faults = check_masks(texts, [ROWS[0], row, ROWS[0]], TOKENIZER)
    assert [(f.at, f.id) for f in faults] == [(1, 7)]
    assert says in faults[0].detail


def test_every_row_of_many_batches_is_checked() -> None:
    count = 2 * BATCH + 3
    texts, rows = [GOOD] * count, [ROWS[0]] * count
    for at in (0, BATCH, count - 1):
        texts[at] = {**GOOD, "completion": "No." + END}
    assert [f.at for f in check_masks(texts, rows, TOKENIZER)] == [0, BATCH, count - 1]
    with pytest.raises(ValueError, match="zip"):
        check_masks(texts, rows[:-1], TOKENIZER)


@pytest.mark.skipif(not SHARED.exists(), reason=f"no real rows in {SHARED.name}/")
def test_every_real_xlam_row_passes() -> None:
    raw = json.loads((SHARED / "xlam_rows.json").read_text(encoding="utf-8"))
    rows = []
    for row in raw:
        tools = {
            t["name"]: ToolSpec(name=t["name"], description=t["description"], parameters={})
            for t in json.loads(row["tools"])
        }
        calls = tuple(ToolCall(**call) for call in json.loads(row["answers"]))
        about = {"id": row["id"], "source": "xlam", "query": row["query"], "tools": tools}
        rows.append(Conversation.model_validate({**about, "gold_calls": calls}))
    assert check_masks(render(rows), rows, TOKENIZER) == []


@given(st.sampled_from(ROWS), st.text(max_size=20))
@settings(deadline=None, max_examples=50)
def test_the_pieces_join_to_the_text(row: Conversation, query: str) -> None:
    (text,) = render([row.model_copy(update={"query": query})])
    tokens = token_mask(text, TOKENIZER)
    assert "".join(t.piece for t in tokens) == text["prompt"] + text["completion"]
    trained = "".join(t.piece for t in tokens if t.trained)
    assert trained == text["completion"]


HOSTILE = ask("</pre><script>alert(1)</script> \x1b[31mred\x07 \u202eback &amp;", {"z": "<b>"})


def test_the_terminal_shows_loss_without_colour_and_obeys_no_row() -> None:
    tokens = token_mask(render([HOSTILE])[0], TOKENIZER)
    out = io.StringIO()
    Console(file=out, width=60).print(to_rich(tokens), soft_wrap=True)
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\\x1b" in text
    assert "\\u202e" in text
    assert len(re.findall("«[^»]*»", text)) == sum(t.trained for t in tokens) + 1  # the legend
    assert "«<tool_call>»«↵»" in text
    assert counts(tokens) in text
    colour = io.StringIO()
    Console(file=colour, force_terminal=True, color_system="standard").print(to_rich(tokens))
    assert "\x1b[7;32m«<tool_call>»" in colour.getvalue()


class Page(HTMLParser):
    """Collects tags and the tokens that are marked."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.marked = 0
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        about = dict(attrs)
        self.marked += about.get("class") == "token loss" and "title" in about

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_everything_and_runs_nothing() -> None:
    tokens = token_mask(render([HOSTILE])[0], TOKENIZER)
    page = to_html(tokens, "Row <7>")
    parsed = Page()
    parsed.feed(page)
    assert set(parsed.tags) == {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "pre", "span")
    }
    assert parsed.marked == sum(t.trained for t in tokens)
    assert "</pre><script>alert(1)</script>" in parsed.text.replace("·", " ")
    assert "Row <7>" in parsed.text
    assert counts(tokens) in parsed.text
    assert "\x1b" not in page
    assert "http" not in page
    assert "color-scheme: light dark" in page
