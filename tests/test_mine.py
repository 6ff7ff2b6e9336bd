"""Sampled log-probabilities are those of a plain pass and of TRL; mined pairs are what they say."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer

from toolpost.core.format import END, completion_of, parse_answer, prompt_of
from toolpost.core.pairs import MAKERS, OPPOSITES, Mistake, mistake_of, refusal_of
from toolpost.core.schema import Conversation, ToolCall, ToolSpec
from toolpost.data.build import conversations, items
from toolpost.data.pocketset import rows as practice_rows
from toolpost.train.mine import (
    Dropped,
    Harvest,
    Mined,
    MinePlan,
    dpo_rows,
    draft,
    fault_of,
    judged,
    mine,
    read_pairs,
    write_pairs,
)
from toolpost.train.models import POCKET, ModelSpec, load_model, load_tokenizer, lora
from toolpost.train.sample import Sample, draw, encode, sample, score

PROMPTS: Final = ["One prompt.\n", "Another prompt, and it is longer than the first:\n", "x"] * 2
CALL: Final = ToolCall(name="f", arguments={"x": 1})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(POCKET)


@functools.cache
def policy(attention: str = "sdpa") -> Any:
    """Make a small Qwen3 that says the tokens of a few answers, in any order, and often ends."""
    tokenizer = load_tokenizer(POCKET)
    said = [completion_of((CALL,)), "No tool does that." + END, " yes no\n"]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    made: Any = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        head = torch.nn.Linear(config.hidden_size, config.vocab_size)  # with a bias
        head.weight.normal_(std=0.3)
        head.bias.fill_(-20.0)
        head.bias[tokenizer("".join(said))["input_ids"]] = 0.0
        head.bias[tokenizer(END)["input_ids"]] = 1.5
    made.lm_head = head
    return made.train()


def plain_logp(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Score a completion by a pass of its own, without padding, cache or anything clever."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    scores = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(sum(scores[at, token] for at, token in enumerate(completion)))


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_log_probability_is_that_of_a_plain_pass_at_temperature_one(
    tokenizer: PreTrainedTokenizerBase, attention: str, temperature: float
) -> None:
    model = policy(attention)
    found = sample(
        model, tokenizer, PROMPTS, count=3, temperature=temperature, max_new_tokens=12, batch=9
    )
    ends = {one.finished for group in found for one in group}
    lengths = {len(one.token_ids) for group in found for one in group}
    assert ends == {True, False}
    assert len(lengths) > 4  # ragged
    for prompt, group in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for one in group:
            assert one.logp == pytest.approx(
                plain_logp(model, ids, one.token_ids), abs=2e-5, rel=2e-6
            )
            assert one.finished == one.text.endswith(END)
            assert one.finished or len(one.token_ids) == 12
            assert END not in one.text.removesuffix(END)


def test_what_is_drawn_does_not_depend_on_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = functools.partial(sample, policy(), tokenizer, count=3, max_new_tokens=12, seed=5)
    once = drawn(PROMPTS, batch=64)
    for batch in (1, 7, 9):
        other = drawn(PROMPTS, batch=batch)
        assert [[s.token_ids for s in g] for g in other] == [[s.token_ids for s in g] for g in once]
    assert [s.token_ids for s in drawn(PROMPTS[:1])[0]] == [s.token_ids for s in once[0]]
    assert drawn(PROMPTS, batch=64) == once
    texts = {s.text for s in once[0]} | {s.text for s in once[3]}
    assert len(texts) > 3  # the prompts are equal, and the draws are not
    assert sample(policy(), tokenizer, PROMPTS, count=3, max_new_tokens=12, seed=6) != once


def test_tokens_come_as_often_as_they_should(tokenizer: PreTrainedTokenizerBase) -> None:
    model, count = policy(), 4_000
    (found,) = sample(
        model, tokenizer, ["x"], count=count, temperature=0.6, max_new_tokens=1, batch=count
    )
    ids = torch.tensor([tokenizer("x")["input_ids"]])
    with torch.no_grad():
        expected = (model(input_ids=ids).logits[0, -1] / 0.6).softmax(-1)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in found]), minlength=len(expected))
    common = expected > 5 / count
    error = (counts[common] - count * expected[common]) / (count * expected[common]).sqrt()
    assert int(common.sum()) > 8
    assert float((error**2).sum()) < int(common.sum()) + 5 * math.sqrt(2 * int(common.sum()))


def test_a_token_without_probability_is_never_drawn() -> None:
    scores = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, -1)
    assert draw(
        scores, 1.0, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    ).tolist() == [1, 3, 3]


def test_the_model_is_left_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    """In evaluation mode bitsandbytes repacks 4-bit weights, and later merges are garbage."""
    from bitsandbytes.functional import dequantize_4bit

    model = load_model(ModelSpec(quantize="nf4"))
    weights = {n: p for n, p in model.named_parameters() if hasattr(p, "quant_state")}
    before = {n: dequantize_4bit(p.data, p.quant_state).clone() for n, p in weights.items()}
    prompt = "The weather in Lima is"
    ((one, _),) = sample(model, tokenizer, [prompt], count=2, max_new_tokens=6)
    ids = tokenizer(prompt)["input_ids"]
    assert one.logp == pytest.approx(plain_logp(model, ids, one.token_ids), abs=1e-4)
    assert model.training
    assert len(before) > 10
    for name, weight in before.items():
        now = weights[name]
        assert torch.equal(dequantize_4bit(now.data, now.quant_state), weight)


def test_what_cannot_be_sampled_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        sample(policy(), tokenizer, PROMPTS, temperature=0.0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        sample(policy(), tokenizer, ["x", ""])
    model = load_model(ModelSpec())
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        sample(model, tokenizer, ["x"], max_new_tokens=2)
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        score(model, tokenizer, PROMPTS[:1], ["y"])


# ------------------------------------------------------------------------------------------ scoring


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_scores_are_those_of_plain_passes(tokenizer: PreTrainedTokenizerBase, batch: int) -> None:
    completions = ["yes" + END, "no, not at all" + END, END, "a", completion_of((CALL,)), END]
    found = score(policy(), tokenizer, PROMPTS, completions, batch=batch)
    for prompt, completion, logp in zip(PROMPTS, completions, found, strict=True):
        row = encode(tokenizer, prompt, completion)
        assert row
        assert logp == pytest.approx(plain_logp(policy(), *row), abs=2e-5, rel=2e-6)


def test_a_token_across_the_border_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="row 1"):
        score(policy(), tokenizer, ["x", "The wea"], [END, "ther" + END])
    assert encode(tokenizer, "x", "") is None


# ------------------------------------------------------------------------------------------- mining

PLAN: Final = MinePlan(pairs=40, prompts=24, samples=4, max_new_tokens=24, batch=32)


@functools.cache
def training_rows() -> list[Conversation]:
    """Give rows that leave room for any answer to them; some are steps of a dialogue."""
    rows = conversations(items("practice", practice_rows(160, 0)))
    lengths = map(len, load_tokenizer(POCKET)([prompt_of(row) for row in rows])["input_ids"])
    return [row for row, n in zip(rows, lengths, strict=True) if n <= PLAN.max_length - 200]


@functools.cache
def harvest() -> Harvest:
    return mine(policy(), load_tokenizer(POCKET), training_rows(), PLAN, say=lambda _: None)


def test_every_mined_pair_is_what_it_says() -> None:
    by_prompt = {prompt_of(row): row for row in training_rows()}
    assert len(harvest().pairs) == PLAN.pairs
    assert {pair.pair.origin for pair in harvest().pairs} == {"on-policy", "perturbed"}
    for pair in harvest().pairs:
        row = by_prompt[pair.prompt]
        assert pair.pair.chosen == row.gold_calls
        assert (
            pair.chosen == completion_of(row.gold_calls, row.answer) or pair.chosen_by == "policy"
        )
        assert mistake_of(parse_answer(pair.chosen), row) is None
        assert mistake_of(parse_answer(pair.rejected), row) == pair.kind
        assert fault_of(pair) is None
        if pair.pair.origin == "perturbed":
            assert refusal_of(pair.pair) is None


def test_the_rejected_is_the_likeliest_wrong_answer_that_ended() -> None:
    """The answers are drawn again, each prompt for itself, and judged here."""
    by_prompt = {prompt_of(row): row for row in training_rows()}
    mined = [pair for pair in harvest().pairs if pair.pair.origin == "on-policy"]
    assert len(mined) >= 10
    tokenizer, hits = load_tokenizer(POCKET), 0
    prompts = [p.prompt for p in mined]
    drawn = sample(policy(), tokenizer, prompts, count=30, max_new_tokens=24, seed=3)
    for pair, group in zip(mined, drawn, strict=True):
        row = by_prompt[pair.prompt]
        again = judged(row, group)
        made = draft(row, again, tokenizer)
        wrong = [
            s
            for s in group
            if s.finished
            and mistake_of(parse_answer(s.text), row) is not None
            and encode(tokenizer, pair.prompt, s.text) is not None
        ]
        if wrong:
            assert not isinstance(made, Dropped)
            assert made.rejected.text == max(wrong, key=lambda s: s.logp).text
        hits += bool(wrong)
    assert hits >= 10


def test_the_report_adds_up() -> None:
    report, pairs = harvest().report, harvest().pairs
    assert report.samples == PLAN.prompts * PLAN.samples
    assert report.right + report.alike + sum(report.wrong.values()) == report.samples
    assert sum(report.mined.values()) + sum(report.added.values()) == len(pairs)
    assert Mistake.RAN_AWAY not in report.mined
    assert report.wrong[Mistake.RAN_AWAY] > 0
    assert report.all_right + report.all_wrong <= report.prompts
    one, two = (report.mined.get(kind, 0) + report.added.get(kind, 0) for kind in OPPOSITES)
    assert one > 0
    assert abs(one - two) <= max(1, *(report.mined.get(kind, 0) for kind in OPPOSITES))


def test_mining_follows_from_the_seed() -> None:
    plan = PLAN.model_copy(update={"prompts": 4, "pairs": 8})
    tokenizer, rows = load_tokenizer(POCKET), training_rows()
    one, two = (mine(policy(), tokenizer, rows, plan, say=lambda _: None) for _ in range(2))
    assert one == two
    other = plan.model_copy(update={"seed": 1})
    assert mine(policy(), tokenizer, rows, other, say=lambda _: None).pairs != one.pairs


def test_without_prompts_all_pairs_are_perturbed() -> None:
    plan = PLAN.model_copy(update={"prompts": 0})
    found = mine(policy(), load_tokenizer(POCKET), training_rows(), plan, say=lambda _: None)
    assert len(found.pairs) == plan.pairs
    assert found.report.samples == 0
    assert {pair.pair.origin for pair in found.pairs} == {"perturbed"}


def test_too_many_errors_are_cut_to_their_shares() -> None:
    plan = PLAN.model_copy(update={"pairs": 6})
    found = mine(policy(), load_tokenizer(POCKET), training_rows(), plan, say=lambda _: None)
    assert len(found.pairs) == 6


# ----------------------------------------------------------------------------------- which is which

TOOL: Final = ToolSpec(
    name="f",
    description="",
    parameters={"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
)
ROW: Final = Conversation(
    id=0, source="t", query="Do f with 1.", tools={"f": TOOL}, gold_calls=(CALL,)
)
IDLE: Final = ROW.model_copy(update={"gold_calls": (), "answer": "No tool does that."})
RIGHT: Final = completion_of((CALL,))
SPACED: Final = RIGHT.replace('"x": 1', '"x":1')
WRONG: Final = completion_of((ToolCall(name="f", arguments={"x": 2}),))


def said(text: str, logp: float, finished: bool = True) -> Sample:
    return Sample(text, tuple(load_tokenizer(POCKET)(text)["input_ids"]), logp, finished)


def drafted(row: Conversation, *samples: Sample, **options: Any) -> Any:
    return draft(row, judged(row, samples), load_tokenizer(POCKET), **options)


def test_the_likeliest_right_sample_is_chosen_and_keeps_its_text() -> None:
    samples = said(WRONG, -3.0), said(RIGHT, -5.0), said(SPACED, -4.0)
    made = drafted(ROW, *samples)
    assert (made.chosen.text, made.chosen.logp, made.chosen_by) == (SPACED, -4.0, "policy")
    made = drafted(ROW, *samples, chosen_by="gold")
    assert (made.chosen.text, made.chosen.logp, made.chosen_by) == (RIGHT, -5.0, "gold")
    assert drafted(ROW, samples[0]).chosen.logp is None


def test_right_calls_with_prose_are_no_chosen_answer() -> None:
    chatty = "I call it. " + RIGHT
    made = drafted(ROW, said(chatty, -0.5), said(WRONG, -3.0))
    assert made.chosen.text == RIGHT
    made = drafted(IDLE, said("The answer is 42." + END, -0.5), said(WRONG, -3.0))
    assert made.chosen.text == "No tool does that." + END
    assert made.pair.rejection_reason == Mistake.CALL_WHEN_NONE


def test_what_means_the_same_is_on_neither_side() -> None:
    tool = TOOL.model_copy(
        update={
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string"}},
                "required": ["x"],
            }
        }
    )
    gold = ToolCall(name="f", arguments={"x": "New York"})
    row = ROW.model_copy(update={"tools": {"f": tool}, "gold_calls": (gold,)})
    alike = completion_of((ToolCall(name="f", arguments={"x": "new york"}),))
    (one,) = judged(row, [said(alike, -1.0)])
    assert (one.mistake, one.right) == (None, False)
    made = drafted(row, said(alike, -1.0), said(WRONG, -9.0))
    assert (made.chosen_by, made.rejected.text) == ("gold", WRONG)


def test_an_answer_that_ran_away_is_no_rejected_one() -> None:
    endless = said(RIGHT.removesuffix(END) * 3, -0.1, finished=False)
    assert drafted(ROW, endless) is Dropped.RAN_AWAY
    assert drafted(ROW, endless, said(WRONG, -9.0)).rejected.text == WRONG


def test_a_broken_call_may_be_rejected() -> None:
    broken = "<tool_call>\n{'name': f}\n</tool_call>" + END
    made = drafted(ROW, said(broken, -1.0))
    assert made.pair.rejection_reason == Mistake.UNPARSEABLE
    assert made.rejected.logp == -1.0


def test_what_does_not_survive_as_tokens_is_dropped_or_scored_again() -> None:
    assert drafted(ROW, said(WRONG, -1.0), most=10) is Dropped.TOO_LONG
    assert drafted(ROW, said("\ufffd" + END, -1.0)) is Dropped.LOST
    tokenizer = load_tokenizer(POCKET)
    letters = [i for c in "No tool" for i in tokenizer(c)["input_ids"]]
    split = Sample("No tool" + END, (*letters, *tokenizer(END)["input_ids"]), -1.0, True)
    assert tokenizer.decode(list(split.token_ids)) == split.text
    made = drafted(ROW, split)
    assert made.rejected.logp is None  # the trainer will see other tokens
    joined = [t for t in ("\n", "\n\n", " ") if encode(tokenizer, prompt_of(ROW), t) is None]
    for start in joined:
        assert drafted(ROW, said(start + END, -1.0)) is Dropped.BORDER


# ------------------------------------------------------------------------------------ TRL and files


def test_the_log_probabilities_are_those_of_trl(tmp_path: Path) -> None:
    pairs, tokenizer = harvest().pairs, load_tokenizer(POCKET)
    tokenizer.eos_token = END
    made: Any = DPOTrainer(
        model=copy.deepcopy(policy()),
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            max_length=768,
            precompute_ref_log_probs=False,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(dpo_rows(pairs)),
        processing_class=tokenizer,
        peft_config=lora(4),  # without it TRL would load a reference model by name
    )
    assert len(made.train_dataset) == len(pairs)
    found: list[tuple[float, float]] = []
    for start in range(0, len(pairs), 8):
        rows = [made.train_dataset[at] for at in range(start, min(start + 8, len(pairs)))]
        batch = made.data_collator(rows)
        chosen, rejected = made.compute_ref_log_probs(made.model, batch)
        found += zip(chosen.tolist(), rejected.tolist(), strict=True)
        assert batch["ref_chosen_logps"].tolist() == pytest.approx(
            [pair.ref_chosen_logp for pair in pairs[start : start + 8]], rel=1e-6
        )
    for pair, (chosen, rejected) in zip(pairs, found, strict=True):
        assert pair.ref_chosen_logp == pytest.approx(chosen, abs=1e-4, rel=1e-6)
        assert pair.ref_rejected_logp == pytest.approx(rejected, abs=1e-4, rel=1e-6)


def test_pairs_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pairs.jsonl"
    write_pairs(path, harvest().pairs)
    assert read_pairs(path) == harvest().pairs
    assert [p.name for p in path.parent.iterdir()] == ["pairs.jsonl"]


DAMAGE: Final[dict[str, tuple[Callable[[dict[str, Any]], Any], str]]] = {
    "chosen is another text": (lambda row: row.update(chosen="Hm." + END), "chosen calls"),
    "no end": (lambda row: row.update(rejected=row["rejected"][:-3]), "only <"),
    "two ends": (lambda row: row.update(rejected=END + row["rejected"]), "only <"),
    "rejected is right": (lambda row: row.update(rejected=row["chosen"]), "is right"),
    "another reason": (
        lambda row: row["pair"].update(rejection_reason="wrong_type"),
        "not wrong_type",
    ),
    "no reason": (lambda row: row["pair"].update(rejection_reason="bad"), "not bad"),
    "positive": (lambda row: row.update(ref_chosen_logp=1.5), "no log-probabilities"),
    "no number": (lambda row: row.update(ref_chosen_logp=None), "ref_chosen_logp"),
    "a field too many": (lambda row: row.update(more=1), "more"),
    "tools are gone": (lambda row: row["pair"].update(tools={}), "chosen is invalid"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_pair_is_named(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    path = tmp_path / "pairs.jsonl"
    with_calls = [p for p in harvest().pairs if p.pair.chosen and p.kind is not Mistake.WRONG_TYPE]
    write_pairs(path, with_calls[:3])
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[1])
    damage(row)
    path.write_text("\n".join([lines[0], json.dumps(row), lines[2]]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 2: .*{message}"):
        read_pairs(path)


def test_a_perturbed_pair_with_two_mistakes_is_refused() -> None:
    pair = next(p for p in harvest().pairs if p.kind is Mistake.WRONG_TOOL or p.kind in MAKERS)
    assert fault_of(pair) is None
    assert isinstance(pair, Mined)
    other = pair.model_copy(update={"ref_rejected_logp": math.nan})
    assert "no log-probabilities" in str(fault_of(other))
