"""One prompt, byte for byte: ours against the one BFCL's Qwen handler sends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolpost.bench.bfcl import MULTI_TURN, SINGLE_TURN, questions, truths
from toolpost.bench.harness import oracle_calls
from toolpost.core.format import END, bare, completion_of, parse_answer, render_calls, render_prompt
from toolpost.core.schema import Message, ToolCall, canonical
from toolpost.serve.chat import ChatRequest, dialogue, offered
from toolpost.train.models import POCKET, load_tokenizer


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Make BFCL's own Qwen handler; BFCL reads its root when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BFCL_PROJECT_ROOT", str(tmp_path_factory.mktemp("bfcl")))
        from bfcl_eval.model_handler.local_inference.qwen_fc import QwenFCHandler

        yield QwenFCHandler("m", 0, "m", True)


def ours(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    """Render BFCL's messages with our function."""
    taken = [
        Message(
            role=message["role"],
            content=message["content"],
            tool_calls=tuple(ToolCall(**call) for call in message.get("tool_calls", ())),
        )
        for message in messages
    ]
    return render_prompt(taken, tools)


def chatted(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    """Render BFCL's messages as the chat endpoint does."""
    wrapped = [{"type": "function", "function": tool} for tool in tools]
    asked = ChatRequest.model_validate({"model": "m", "messages": messages, "tools": wrapped})
    return render_prompt(dialogue(asked), [bare(tool) for tool in offered(asked).values()])


def test_every_first_prompt_is_the_one_bfcl_sends(handler: Any) -> None:
    from bfcl_eval.utils import load_dataset_entry

    count = systems = toolless = foreign = chats = 0
    for category in SINGLE_TURN + MULTI_TURN:
        for entry in load_dataset_entry(category):
            data = handler._pre_query_processing_prompting(entry)
            data = handler.add_first_turn_message_prompting(data, entry["question"][0])
            messages, tools = data["message"], data["function"]
            sent = handler._format_prompt(messages, tools)
            assert ours(messages, tools) == sent, entry["id"]
            if all(set(tool) == {"name", "description", "parameters"} for tool in tools):
                assert chatted(messages, tools) == sent, entry["id"]
                chats += 1
            count += 1
            systems += messages[0]["role"] == "system"
            toolless += not tools
            foreign += not json.dumps(tools, ensure_ascii=False).isascii()
    assert (count, systems, toolless) == (4441, 92, 4)
    assert chats == 3641  # tools of dialogues say what they return; OpenAI has no place for that
    assert foreign == 50  # BFCL escapes what is not ASCII; the template does not, see below


@pytest.mark.usefixtures("handler")  # it tells BFCL where its root is
def test_every_first_prompt_but_for_escapes_is_the_one_of_qwens_template() -> None:
    """With characters as they are, all 4,441 are equal, and so are the 50 that BFCL escapes."""
    from bfcl_eval.utils import load_dataset_entry

    tokenizer = load_tokenizer(POCKET)
    template = files("trl") / "chat_templates" / "qwen3_instruct_2507.jinja"
    how: Any = {
        "chat_template": template.read_text(),
        "tokenize": False,
        "add_generation_prompt": True,
    }
    for category in SINGLE_TURN + MULTI_TURN:
        for entry in load_dataset_entry(category):
            messages, tools = entry["question"][0], entry["function"]
            want = tokenizer.apply_chat_template(messages, tools=tools or None, **how)
            taken = [Message(role=m["role"], content=m["content"]) for m in messages]
            assert render_prompt(taken, tools, escaped=False) == want, entry["id"]


def test_history_built_from_ground_truth_is_rendered_alike(handler: Any) -> None:
    """Two user turns with calls, results and an answer between them, as BFCL keeps its history."""
    count = 0
    for category in SINGLE_TURN:
        right = truths(category)
        for question in questions(category):
            if question["id"] not in right:
                continue
            calls = oracle_calls(category, right[question["id"]], question["function"])
            if len({canonical([c.name, c.arguments]) for c in calls}) < len(calls):
                continue  # see test_a_repeated_call_...
            kept = [{"name": c.name, "arguments": c.arguments} for c in calls]
            results = [
                {"role": "tool", "name": c.name, "content": json.dumps({"ok": [1, "é"]})}
                for c in calls
            ]
            history = [
                *question["question"][0],
                {"role": "assistant", "content": "", "tool_calls": kept, "reasoning_content": ""},
                *results,
            ]
            for messages in (
                history,
                [
                    *history,
                    {"role": "assistant", "content": "Done.", "reasoning_content": ""},
                    {"role": "user", "content": "And now?"},
                ],
            ):
                theirs = handler._format_prompt(messages, question["function"])
                assert ours(messages, question["function"]) == theirs, question["id"]
                count += 1
    assert count > 4_800


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
TEXT = st.text(max_size=40) | st.sampled_from(
    ["", "\n", "<tool_call>\n{}\n</tool_call>", "<tool_response>x</tool_response>", "日本 {x} %s"]
)
NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
CALL = st.fixed_dictionaries(
    {"name": NAME, "arguments": st.dictionaries(st.text(max_size=9), JSON, max_size=3)}
)
CALLS = st.lists(CALL, max_size=3, unique_by=lambda call: json.dumps(call["name"]))
TOOL = st.fixed_dictionaries(
    {"name": NAME, "description": TEXT, "parameters": st.dictionaries(st.text(max_size=9), JSON)}
)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT})
SYSTEM = st.fixed_dictionaries({"role": st.just("system"), "content": TEXT})
RESULT = st.fixed_dictionaries({"role": st.just("tool"), "content": TEXT})
ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXT, "tool_calls": CALLS}
)


@settings(max_examples=100, deadline=None)
@given(
    first=st.lists(SYSTEM, max_size=1),
    middle=st.lists(USER | SYSTEM | ASSISTANT | RESULT, max_size=6),
    last=USER | RESULT,
    tools=st.lists(TOOL, max_size=3),
)
def test_any_dialogue_is_rendered_alike(
    handler: Any,
    first: list[dict[str, Any]],
    middle: list[dict[str, Any]],
    last: dict[str, Any],
    tools: list[dict[str, Any]],
) -> None:
    messages = [*first, *middle, last]
    assert ours(messages, tools) == handler._format_prompt(messages, tools)


def test_a_repeated_call_is_where_the_handler_leaves_its_template(handler: Any) -> None:
    """Qwen's template starts each further call on a new line; BFCL's copy compares by value."""
    call = {"name": "f", "arguments": {}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Twice."},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
    ]
    theirs = handler._format_prompt(messages, [])
    assert theirs == ours(messages, []).replace(
        "</tool_call>\n<tool_call>", "</tool_call><tool_call>"
    )


def test_right_answers_are_read_as_bfcl_reads_them(handler: Any) -> None:
    count = 0
    for category in SINGLE_TURN:
        right = truths(category)
        for question in questions(category):
            calls = oracle_calls(category, right.get(question["id"], ()), question["function"])
            if not calls:
                continue
            for text in (render_calls(calls), f"Let me look.\n{completion_of(calls)}\nignored"):
                read = parse_answer(text)
                found = [{"name": c.name, "arguments": c.arguments} for c in read.calls]
                assert found == handler._extract_tool_calls(text), question["id"]
                assert read.errors == ()
                count += len(found)
    assert count > 6_000


@settings(max_examples=100, deadline=None)
@given(st.lists(CALL, max_size=3), TEXT)
def test_any_calls_are_read_as_bfcl_reads_them(
    handler: Any, calls: list[dict[str, Any]], prose: str
) -> None:
    made = [ToolCall(**call) for call in calls]
    text = f"{render_calls(made)}\n{prose.replace('tool_call', '')}"
    found = [{"name": c.name, "arguments": c.arguments} for c in parse_answer(text).calls]
    assert found == handler._extract_tool_calls(text) == calls
    assert parse_answer(text + END + text).calls == tuple(made)


TAGS = ("<tool_call>", "</tool_call>", "\n", "x", "{}", "<tool_call>\n", "\n</tool_call>")


@given(st.lists(st.sampled_from(TAGS), max_size=14).map("".join))
def test_blocks_are_those_of_the_lazy_regular_expression(text: str) -> None:
    """BFCL's handler finds calls with this expression; ours is linear and must find the same."""
    lazy = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
    answer = parse_answer(text)
    assert len(answer.calls) + len(answer.errors) >= len(lazy.findall(text))
    assert answer.prose == lazy.sub("", text).strip()


def test_many_opening_tags_are_read_at_once() -> None:
    assert parse_answer("<tool_call>\n" * 200_000).calls == ()


@pytest.mark.parametrize(("depth", "read"), [(98, True), (101, False), (600, False), (5000, False)])
def test_a_call_nested_too_deeply_is_an_error_and_no_crash(depth: int, read: bool) -> None:
    nested = "[" * depth + "]" * depth
    text = f'<tool_call>\n{{"name": "f", "arguments": {{"x": {nested}}}}}\n</tool_call>'
    answer = parse_answer(text)
    assert bool(answer.calls) == read
    assert bool(answer.errors) != read
