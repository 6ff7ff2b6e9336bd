"""Rewards: the gold answer gets all, anything else less, and no text gets round them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolpost.core.format import END, completion_of
from toolpost.core.metrics import grade
from toolpost.core.pairs import MAKERS, Mistake
from toolpost.core.reward import BOUNDS, REWARDS, binary, calls_of, decomposed
from toolpost.core.schema import Conversation, ToolCall, ToolSpec, same_calls
from toolpost.data.build import conversations, items
from toolpost.data.pocketset import rows as practice_rows

ROWS = conversations(items("practice", practice_rows(160, 0)))
LEAST = {name: low for name, (low, _) in BOUNDS.items()}
MOST = {name: high for name, (_, high) in BOUNDS.items()}
each_reward = pytest.mark.parametrize("name", list(REWARDS))

NAMES = st.sampled_from(["rain", "wind", "sun"])
VALUES = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.5, 1.0, "a", "b", ""])
ARGUMENTS = st.dictionaries(
    st.sampled_from("xyz"), VALUES | st.lists(VALUES, max_size=2), max_size=3
)
CALLS = st.lists(st.builds(ToolCall, name=NAMES, arguments=ARGUMENTS), max_size=4).map(tuple)


def row_of(gold: tuple[ToolCall, ...]) -> Conversation:
    tools = {n: ToolSpec(name=n, description="", parameters={}) for n in ("rain", "wind", "sun")}
    return Conversation(id=0, source="", query="?", tools=tools, gold_calls=gold)


def said(calls: tuple[ToolCall, ...]) -> str:
    return completion_of(calls, "None of the tools can do that.")


@given(gold=CALLS, made=CALLS, random=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_only_the_gold_calls_get_all(
    gold: tuple[ToolCall, ...], made: tuple[ToolCall, ...], random: Random
) -> None:
    """Both rewards agree on what is right, stay in their bounds, and do not mind the order."""
    row = row_of(gold)
    for name, reward in REWARDS.items():
        assert reward(row, said(gold)) == MOST[name]
        value = reward(row, said(made))
        assert LEAST[name] <= value <= MOST[name]
        assert (value == MOST[name]) == same_calls(made, gold)
        mixed = row_of(tuple(random.sample(gold, len(gold))))
        shuffled = said(tuple(random.sample(made, len(made))))
        assert reward(mixed, shuffled) == pytest.approx(value, abs=1e-9)


@given(gold=CALLS.filter(bool), more=CALLS.filter(bool))
@settings(max_examples=60, deadline=None)
def test_surplus_calls_never_pay(gold: tuple[ToolCall, ...], more: tuple[ToolCall, ...]) -> None:
    row = row_of(gold)
    assert decomposed(row, said(gold + more)) < MOST["decomposed"]
    assert binary(row, said(gold + more)) == 0
    twice = decomposed(row, said(gold * 2))
    assert decomposed(row, said(gold * 3)) < twice < MOST["decomposed"]


def test_calling_with_every_guess_does_not_beat_one_guess() -> None:
    """A policy that knows all but one of two values, each as likely, gains nothing by both."""
    for others in range(6):
        known = {f"k{n}": n for n in range(others)}
        guesses = [ToolCall(name="rain", arguments=known | {"v": v}) for v in (1, 2)]
        row = row_of((guesses[0],))
        one = sum(decomposed(row, said((g,))) for g in guesses) / 2
        assert decomposed(row, said(tuple(guesses))) < one


def perturbed(row: Conversation, random: Random) -> Iterator[tuple[Mistake, tuple[ToolCall, ...]]]:
    for kind, make in MAKERS.items():
        if bool(row.gold_calls) != (kind is Mistake.CALL_WHEN_NONE):
            yield from ((kind, calls) for calls in islice(make(row, random), 4))


def test_every_kind_of_mistake_costs() -> None:
    random, seen = Random(0), set[Mistake]()
    unit = {"type": "string", "enum": ["mm", "inch"]}
    schema = {"type": "object", "properties": {"unit": unit}, "required": ["unit"]}
    tool = ToolSpec(name="rain", description="", parameters=schema)
    call = ToolCall(name="rain", arguments={"unit": "mm"})
    choice = row_of((call,)).model_copy(update={"tools": {"rain": tool}})
    for row in [*ROWS, choice]:
        for kind, calls in perturbed(row, random):
            if same_calls(calls, row.gold_calls):
                continue
            seen.add(kind)
            for name, reward in REWARDS.items():
                assert reward(row, said(calls)) < MOST[name], (kind, calls, row.gold_calls)
    assert seen == set(MAKERS)


def test_what_the_reward_pays_for_the_metric_counts_as_right() -> None:
    random = Random(1)
    for row in ROWS:
        gold = completion_of(row.gold_calls, row.answer)
        for text in (gold, *(said(calls) for _, calls in perturbed(row, random))):
            found = grade(row, text)
            right = found.exact_call if row.gold_calls else found.abstention
            assert binary(row, text) == float(bool(right))


@each_reward
def test_a_refusal_pays_only_where_no_call_is_due(name: str) -> None:
    refusals = {bool(row.gold_calls): REWARDS[name](row, said(())) for row in ROWS}
    assert refusals[False] == MOST[name]
    assert refusals[True] <= LEAST[name] + 1  # the form of an answer, and nothing else


@each_reward
def test_a_call_where_none_is_due_earns_nothing(name: str) -> None:
    for row in ROWS:
        if not row.gold_calls:
            for _, calls in perturbed(row, Random(2)):
                assert REWARDS[name](row, said(calls)) <= LEAST[name] + 1


def hostile(gold: str) -> list[str]:
    body = gold.removesuffix(END)
    deep = "[" * 700 + "]" * 700
    twice = body.replace('{"name"', '{"name": "x", "name"')
    return [
        body,  # a run-away behind the right answer
        body + "\n" + body,
        gold + gold,
        gold + "\n",
        "Sure! " + gold,
        "None of the tools can do that.\n" + gold,
        body + "\n<tool_call>" + END,
        body.replace("</tool_call>", "") + END,
        body.replace("<tool_call>\n", "<tool_call>") + END,
        twice + END,
        f'<tool_call>\n{{"name": "f", "arguments": {{"a": {deep}}}}}\n</tool_call>' + END,
        f'<tool_call>\n{{"name": "f", "arguments": {{"a": {"9" * 5000}}}}}\n</tool_call>' + END,
        '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>' + END,
        '<tool_call>\n{"name": "rain"}\n</tool_call>' + END,
        "",
        END,
        " \n" + END,
        "x" * 9,
        "x" * 10_000_000 + END,
        gold * 100_000,
        "<tool_call>\n" * 900_000 + END,
        "<tool_call>\n" * 8_000 + END,
        "\n</tool_call>" * 3_900 + "<tool_call>\n" * 3_900 + END,
        "<tool_call>\n</tool_call>" * 3_900 + END,
        "<tool_call>\n{}\n</tool_call>\n" * 3_000 + END,
    ]


@each_reward
def test_no_text_gets_round_the_reward(name: str) -> None:
    row = next(row for row in ROWS if len(row.gold_calls) == 1)
    for text in hostile(completion_of(row.gold_calls)):
        began = time.process_time()
        assert REWARDS[name](row, text) == LEAST[name], text[:100]
        assert time.process_time() - began < 5  # seconds; a search from each tag takes minutes


@each_reward
def test_thousands_of_calls_earn_nearly_nothing(name: str) -> None:
    row = next(row for row in ROWS if len(row.gold_calls) == 1)
    flood = completion_of(row.gold_calls).removesuffix(END) + "\n"
    text = flood * (90_000 // len(flood)) + END
    assert REWARDS[name](row, text) < LEAST[name] + 1.1


PARTS = st.sampled_from(
    [
        *(END, "<tool_call>", "</tool_call>", "\n", '{"name": "rain", "arguments": {}}', "x"),
        *("<tool_call>\n", "\n</tool_call>", "{", "}", '"', "<|endoftext|>", "\x00", "\ud800"),
    ]
)


@given(st.lists(PARTS, max_size=12).map("".join) | st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_total_and_in_bounds_for_any_text(text: str) -> None:
    for row in (row_of((ToolCall(name="rain", arguments={}),)), row_of(())):
        for name, reward in REWARDS.items():
            value = reward(row, text)
            assert LEAST[name] <= value <= MOST[name]
            assert value == LEAST[name] or calls_of(text) is not None


@pytest.mark.parametrize(
    ("gold", "made", "share"),
    [  # worked out by hand: (names + parameters + values) / (1 + the larger worth)
        ([("a", {"x": 1})], [("a", {"x": 2})], (1 + 1 + 0) / 3),
        ([("a", {"x": 1})], [("b", {"x": 1})], 0),
        ([("a", {"x": 1, "y": 2})], [("a", {"x": 1})], (1 + 1 / 2 + 1) / 4),
        ([("a", {"x": 1})], [("a", {"x": 1, "y": 2})], (1 + 1 / 2 + 1) / 4),
        ([("a", {"x": 1}), ("b", {})], [("a", {"x": 1})], (1 / 2 + 1 + 1) / 4),
        ([("a", {"x": 1})], [("a", {"x": 1}), ("a", {"x": 1})], (1 / 2 + 1 + 1) / 5),
        # the greedy choice would match the first gold call with the first made one
        (
            [("a", {"x": 1}), ("a", {"x": 1, "y": 2})],
            [("a", {"x": 1, "y": 2}), ("a", {"x": 3})],
            (1 + (1 + 0) + (1 + 2)) / 6,
        ),
    ],
)
def test_the_parts_of_the_decomposed_reward(gold: Any, made: Any, share: float) -> None:
    right, tried = (
        tuple(ToolCall(name=n, arguments=a) for n, a in calls) for calls in (gold, made)
    )
    assert decomposed(row_of(right), said(tried)) == pytest.approx(1 + 6 * share - 3)


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize("source", ["xlam", "toolace"])
def test_the_gold_answers_of_real_rows_get_all(source: str) -> None:
    path = SHARED / f"{source}_rows.json"
    if not path.exists():
        pytest.skip(f"no real rows at {path.name}")
    rows = conversations(items(source, json.loads(path.read_text(encoding="utf-8"))))
    assert len(rows) > 100
    for row in rows:
        if row.gold_calls or row.answer is not None:
            text = completion_of(row.gold_calls, row.answer)
            for name, reward in REWARDS.items():
                assert reward(row, text) == MOST[name], text[:200]
