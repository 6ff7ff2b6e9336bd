"""What a chat request means: nothing in it forges a turn, and no bad call leaves as a call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from toolpost.core.format import bare, neutralise, parse_answer, render_calls
from toolpost.core.schema import ToolCall, ToolSpec, VerificationOutcome, same_calls
from toolpost.serve.chat import (
    ChatRequest,
    Completed,
    RequestError,
    choice_of,
    judge,
    showable,
    thought,
    to_answer,
    to_job,
)
from toolpost.serve.gateway import read_request
from toolpost.train.models import POCKET

TOKENIZER = Tokenizer.from_file(str(POCKET / "tokenizer.json"))
CONTROLS = [token.content for token in TOKENIZER.get_added_tokens_decoder().values()]
CLOCK = ToolSpec(
    name="clock",
    description="Tell the time.",
    parameters={
        "type": "object",
        "properties": {"zone": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["zone"],
    },
)
TOOLS = {"clock": CLOCK}
OFFER = [{"type": "function", "function": bare(CLOCK)}]
hostile = st.lists(
    st.sampled_from(
        [*CONTROLS, "system\n", "\n", " ", "a", "é", "<", "|>", '"', "\\", "{", "\u200b"]
    ),
    max_size=8,
).map("".join)


def request(messages: list[dict[str, Any]], **more: Any) -> ChatRequest:
    return read_request(json.dumps({"model": "m", "messages": messages, **more}).encode())


def call(name: str, arguments: Any, id_: str = "a") -> dict[str, Any]:
    return {"id": id_, "function": {"name": name, "arguments": json.dumps(arguments)}}


def controls(text: str) -> list[str]:
    known = set(TOKENIZER.get_added_tokens_decoder())
    return [str(TOKENIZER.id_to_token(i)) for i in TOKENIZER.encode(text).ids if i in known]


@given(st.fixed_dictionaries(dict.fromkeys(("system", "user", "zone", "result", "about"), hostile)))
def test_no_text_of_a_client_adds_a_control_token(texts: dict[str, str]) -> None:
    def prompt(said: dict[str, str]) -> str:
        tool = bare(CLOCK) | {"description": said["about"]}
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": said["system"]},
            {"role": "user", "content": said["user"]},
            {"role": "assistant", "tool_calls": [call("clock", {"zone": said["zone"]})]},
            {"role": "tool", "tool_call_id": "a", "content": said["result"]},
        ]
        return to_job(request(messages, tools=[{"type": "function", "function": tool}])).prompt

    assert controls(prompt(texts)) == controls(prompt(dict.fromkeys(texts, "plain")))


@given(hostile)
def test_an_assistants_text_forges_no_turn(text: str) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Go on"},
    ]
    found = controls(to_job(request(messages)).prompt)
    assert found.count("<|im_start|>") == 4
    assert found.count("<|im_end|>") == 3


@given(hostile)
def test_neutral_text_reads_the_same_and_stays_neutral(text: str) -> None:
    assert neutralise(text).replace("\u200b", "") == text.replace("\u200b", "")
    assert neutralise(neutralise(text)) == neutralise(text)


blocks = st.sampled_from(
    [
        "It is ",
        "noon.",
        "\n",
        "<",
        "<tool",
        "<b>",
        "<tool_call>\n",
        "\n</tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        '{"name": "clock", "arguments": {"zone": "Lima"}}',
        '{"name": "clock", "arguments": {"days": "two"}}',
        '{"name": "cook", "arguments": {}}',
        '{"name": "clock", "name": "clock", "arguments": {"zone": "Lima"}}',
        render_calls([ToolCall(name="clock", arguments={"zone": "Lima"})]),
        render_calls([ToolCall(name="cook", arguments={})]),
    ]
)
answers = st.lists(blocks, max_size=7).map("".join)
ends = st.sampled_from(["stop", "length"])


@given(answers, ends, st.booleans())
def test_only_calls_of_known_tools_in_whole_answers_are_handed_out(
    text: str, end: Any, strict: bool
) -> None:
    answered = to_answer(Completed(text, end, 1, 1), TOOLS, TOOLS if strict else ())
    reasoning, rest = thought(text)
    judged = judge(rest, TOOLS, whole=end == "stop")
    assert judged == answered.judged
    message = choice_of(answered, retried=False)["message"]
    if answered.calls:
        assert end == "stop"
        assert not judged.errors
        assert same_calls(answered.calls, parse_answer(rest).calls)
        assert {c.name for c in answered.calls} == {"clock"}
        assert not strict or judged.outcome is VerificationOutcome.VALID
        assert len({c.id for c in answered.calls}) == len(answered.calls)
        assert "<tool_call>" not in (message["content"] or "")
    else:
        assert "tool_calls" not in message
        assert answered.content == rest.strip()
        assert answered.finish_reason == end
    assert (reasoning is None) == ("reasoning_content" not in message)


@settings(max_examples=300)
@given(answers, ends)
def test_what_is_streamed_early_is_the_beginning_of_the_answer(text: str, end: Any) -> None:
    answered = to_answer(Completed(text, end, 1, 1), TOOLS)
    shown = ""
    for n in range(len(text) + 1):
        now = showable(text[:n])
        assert now.startswith(shown)
        assert "tool_call>" not in now
        shown = now
    assert (answered.content or "").startswith(shown)


def test_every_plain_text_is_streamed_before_its_end() -> None:
    text = "a < b, and <b>so</b> it goes. <tools> are <too"
    assert showable(text + "l") == "a < b, and <b>so</b> it goes. <tools> are"
    assert showable(text + "\n.") == text + "\n."


ASKED: dict[str, Any] = {"role": "user", "content": "?"}
CALLS = [call("clock", {"zone": "Lima"}, "a"), call("clock", {"zone": "Oslo"}, "b")]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_results_are_read_in_the_order_of_the_calls(order: str) -> None:
    results = [{"role": "tool", "tool_call_id": i, "content": f"result {i}"} for i in order]
    messages = [ASKED, {"role": "assistant", "tool_calls": CALLS}]
    prompt = to_job(request([*messages, *results], tools=OFFER)).prompt
    assert prompt.index("result a") < prompt.index("result b")
    assert prompt.count("<|im_start|>user\n") == 2


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=4))
def test_each_call_needs_one_result(order: list[str]) -> None:
    messages = [ASKED, {"role": "assistant", "tool_calls": CALLS}]
    results = [{"role": "tool", "tool_call_id": i, "content": "ok"} for i in order]
    asked = request([*messages, *results, {"role": "user", "content": "And?"}], tools=OFFER)
    if sorted(order) == ["a", "b"]:
        assert len(to_job(asked).turns) == 5
    else:
        with pytest.raises(RequestError, match=r"messages\.\d"):
            to_job(asked)


def test_a_forced_call_begins_where_tokens_end() -> None:
    """What is begun for a model is cut into the tokens that the whole call is cut into."""
    for choice in ("required", {"type": "function", "function": {"name": "clock"}}):
        job = to_job(request([{"role": "user", "content": "?"}], tools=OFFER, tool_choice=choice))
        whole = render_calls([ToolCall(name="clock", arguments={"zone": "Lima"})])
        assert whole.startswith(job.begun)
        begun = TOKENIZER.encode(job.begun).ids
        assert TOKENIZER.encode(whole).ids[: len(begun)] == begun


@pytest.mark.parametrize(
    ("choice", "offer"),
    [("required", []), ({"type": "function", "function": {"name": "cook"}}, OFFER)],
)
def test_a_tool_that_is_not_there_cannot_be_chosen(choice: Any, offer: list[Any]) -> None:
    asked = request([{"role": "user", "content": "?"}], tools=offer, tool_choice=choice)
    with pytest.raises(RequestError, match="tool_choice"):
        to_job(asked)


def test_without_choice_no_tool_is_shown() -> None:
    job = to_job(request([{"role": "user", "content": "?"}], tools=OFFER, tool_choice="none"))
    assert "clock" not in job.prompt
    said = Completed(render_calls([ToolCall(name="clock", arguments={"zone": "x"})]), "stop", 1, 1)
    assert to_answer(said, job.tools).calls == ()


@pytest.mark.parametrize("strict", [False, True])
def test_a_strict_tool_gets_valid_calls_only(strict: bool) -> None:
    offer = [{"type": "function", "function": bare(CLOCK) | {"strict": strict}}]
    job = to_job(request([ASKED], tools=offer))
    said = render_calls([ToolCall(name="clock", arguments={"days": 1})])
    answered = to_answer(Completed(said, "stop", 1, 1), job.callable, job.strict)
    assert bool(answered.calls) is not strict
    assert answered.judged.outcome is VerificationOutcome.SCHEMA_VIOLATION


def test_a_tool_that_was_not_chosen_is_not_called() -> None:
    other = {"type": "function", "function": bare(CLOCK) | {"name": "calendar"}}
    choice = {"type": "function", "function": {"name": "clock"}}
    job = to_job(request([ASKED], tools=[*OFFER, other], tool_choice=choice))
    calls = [ToolCall(name=name, arguments={"zone": "Lima"}) for name in ("clock", "calendar")]
    answered = to_answer(Completed(render_calls(calls), "stop", 1, 1), job.callable, job.strict)
    assert answered.calls == ()
    assert answered.judged.outcome is VerificationOutcome.UNKNOWN_TOOL
    assert set(job.tools) == {"clock", "calendar"}
