"""No training row may be a question of BFCL, nor show one of its tools."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolpost.bench.bfcl import SINGLE_TURN, benchmark_texts, questions
from toolpost.core.decontaminate import (
    OPENING,
    Benchmark,
    benchmark,
    contamination,
    known_question,
    known_tool,
    words_of,
)
from toolpost.core.schema import Conversation, Message, ToolCall, ToolSpec
from toolpost.core.xlam import normalize_xlam
from toolpost.data.build import conversations, items
from toolpost.data.pocketset import rows as practice_rows

XLAM = Path(__file__).parents[1].parent / "shared" / "data" / "xlam_rows.json"


@pytest.fixture(scope="module")
def index() -> Benchmark:
    return benchmark(*benchmark_texts())


def row(query: str, *tools: ToolSpec, history: tuple[Message, ...] = ()) -> Conversation:
    return Conversation(
        id=0,
        source="test",
        query=query,
        tools={tool.name: tool for tool in tools},
        gold_calls=(),
        answer="No.",
        history=history,
    )


def other_case(text: str) -> str:
    return re.sub("[A-Za-z]", lambda letter: letter[0].swapcase(), text)


def other_marks(text: str) -> str:
    draw = random.Random(text)
    return re.sub(r"\W+", lambda _: draw.choice([" ", "\n\n", " -- ", "?! ", "\t… "]), text)


def in_the_middle(text: str) -> str:
    return f"Good morning, my friend of old! {text}\nThank you — 非常感谢, and see you soon."


def test_everything_that_ships_is_read() -> None:
    asked, shown = benchmark_texts()
    ids = {name for name, _ in asked}
    assert {q["id"] for category in SINGLE_TURN for q in questions(category)} <= ids
    for group, count in {"multi_turn": 800, "memory_prereq": 37, "web_search": 100}.items():
        assert sum(name.startswith(group) for name in ids) == count
    assert len(ids) == 3641 + 800 + 155 + 37 + 100
    assert {"gorilla_file_system", "web_search", "memory_kv"} <= {name for name, _ in shown}
    assert {tool.name for name, tool in shown if name == "simple_python_0"} == {
        "calculate_triangle_area"
    }


@pytest.mark.parametrize("change", [str, other_case, other_marks, in_the_middle])
def test_every_planted_question_is_found(index: Benchmark, change: Callable[[str], str]) -> None:
    count = 0
    for name, text in benchmark_texts()[0]:
        words = words_of(text)
        if words and (change is not in_the_middle or len(words) >= OPENING):
            found = contamination(row(change(text)), index)
            assert found is not None, (name, text)
            assert found.reason == "benchmark_question"
            count += 1
    assert count > (7_000 if change is in_the_middle else 7_300)


def test_a_question_in_the_history_is_found(index: Benchmark) -> None:
    text = questions("live_simple")[0]["question"][0][0]["content"]
    turns = (Message(role="user", content=text), Message(role="assistant", content="Yes."))
    found = contamination(row("And now?", history=turns), index)
    assert found is not None
    assert "live_simple_0-0-0" in found.detail
    said = (Message(role="assistant", content=text),)
    assert contamination(row("And now?", history=said), index) is None


def test_every_planted_tool_is_found(index: Benchmark) -> None:
    own = ToolSpec(name="own", description="", parameters={"type": "object"})
    for name, tool in benchmark_texts()[1]:
        renamed = tool.model_copy(
            update={
                "name": other_case(tool.name.replace(".", "_")),
                "description": other_marks(tool.description),
            }
        )
        for planted in (tool, renamed):
            found = contamination(row("Something else altogether.", own, planted), index)
            assert found is not None, (name, planted)
            assert found.reason == "benchmark_tool"


def test_the_practice_set_is_clean(index: Benchmark) -> None:
    found = conversations(items("practice", practice_rows(2400, 0)))
    assert {kept.id for kept in found} == set(range(2400))
    for kept in found:
        assert contamination(kept, index) is None, kept.query


@pytest.mark.skipif(not XLAM.is_file(), reason=f"the real rows are not at {XLAM}")
def test_real_rows_that_are_nearly_benchmark_questions(index: Benchmark) -> None:
    found = {}
    for at, raw in enumerate(json.loads(XLAM.read_text("utf-8"))):
        for kept in normalize_xlam(raw, at).conversations:
            if why := contamination(kept, index):
                found[kept.id] = why
    assert "simple_python_9" in found[541].detail  # a circle with a radius of 5 units
    assert "simple_python_0" in found[98].detail  # its triangle has other sides
    assert "parallel_multiple_95" in found[752].detail  # one half of a double question
    reasons = [why.reason for why in found.values()]
    assert (reasons.count("benchmark_question"), reasons.count("benchmark_tool")) == (10, 33)


def test_common_phrases_are_no_questions(index: Benchmark) -> None:
    for query in (
        "Could you provide me with the latest population figures for the city of Ghent?",
        "What time is it in the town where my grandmother lives?",  # "What time is it?" is BFCL's
        "Can you help me find a flat that is close to the railway station and not too loud?",
    ):
        assert known_question(query, index) is None


def test_a_tool_is_more_than_a_common_name(index: Benchmark) -> None:
    def tool(name: str, *parameters: str, description: str = "") -> ToolSpec:
        properties: dict[str, object] = {parameter: {} for parameter in parameters}
        return ToolSpec(
            name=name,
            description=description,
            parameters={"type": "object", "properties": properties},
        )

    assert known_tool([tool("getUserInfo", "user_id")], index) is None
    assert known_tool([tool("calculate_triangle_area", "radius", "height")], index) is None
    assert known_tool([tool("calculate_triangle_area", "unit", "base", "height")], index)
    odd = ToolSpec(name="final_velocity", description="", parameters={"properties": 3})
    assert known_tool([odd], index) is None


@given(st.text(), st.text())
def test_a_text_repeats_itself_and_what_stands_in_it(text: str, around: str) -> None:
    words = words_of(text)
    own = benchmark([("q", text)], [])
    assert bool(known_question(text, own)) == bool(words)
    if len(words) >= OPENING:
        assert known_question(f"{around}\n{text}\n{around}", own)


def test_a_gold_call_alone_is_not_compared(index: Benchmark) -> None:
    call = ToolCall(name="calculate_triangle_area", arguments={"base": 10, "height": 5})
    kept = row("How large is my sail?").model_copy(update={"gold_calls": (call,)})
    assert contamination(kept, index) is None
