"""Every pair's chosen answer stands and its rejected one falls, by a judge of the test's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from toolpost.bench.errors import ErrorClass
from toolpost.core.format import END, completion_of, parse_answer, prompt_of, render_calls
from toolpost.core.metrics import grade
from toolpost.core.pairs import (
    ASSUMED,
    MAKERS,
    OF_BENCH,
    OPPOSITES,
    Mistake,
    Refusal,
    allocate,
    mistake_in,
    mistake_of,
    perturbed,
    perturbed_pair,
    refusal_of,
    same_meaning,
    texts_of,
)
from toolpost.core.schema import Conversation, Message, PreferencePair, ToolCall, ToolSpec
from toolpost.core.toolace import normalize_toolace
from toolpost.core.xlam import normalize_xlam
from toolpost.data.build import conversations, items
from toolpost.data.pocketset import rows as practice_rows

DATA: Final = Path(__file__).parents[1].parent / "shared" / "data"
M: Final = Mistake
Calls = Sequence[ToolCall]
Tools = Mapping[str, ToolSpec]


def rows_of(source: str) -> list[Conversation]:
    if source == "practice":
        return conversations(items("practice", practice_rows(300, 0)))
    path = DATA / f"{source}_rows.json"
    if not path.exists():
        pytest.skip(f"no real rows at {path.name}")
    read = {"xlam": normalize_xlam, "toolace": normalize_toolace}[source]
    raw = json.loads(path.read_text(encoding="utf-8"))
    found = [read(row, at, source) for at, row in enumerate(raw)]
    return [row for one in found for row in one.conversations][::2]


# ------------------------------------------------------------------ a second judge, with jsonschema


def valid(call: ToolCall, tools: Tools) -> bool:
    if call.name not in tools:
        return False
    schema = {"additionalProperties": False, **tools[call.name].parameters}
    return bool(Draft202012Validator(schema).is_valid(call.arguments))


def text(calls: Calls) -> list[str]:
    return sorted(json.dumps([c.name, c.arguments], sort_keys=True) for c in calls)


def loose(value: Any) -> str:
    return "".join(c for c in json.dumps(value).lower() if c not in " ,./-_*^'\"")


def json_type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return type(value).__name__


def changed(pair: PreferencePair) -> tuple[ToolCall, ToolCall, ToolSpec]:
    """Give the one call that differs, what it should be, and its tool."""
    both = [
        (a, b) for a, b in zip(pair.rejected, pair.chosen, strict=True) if text([a]) != text([b])
    ]
    assert len(both) == 1
    (wrong, right) = both[0]
    return wrong, right, pair.tools[right.name]


def one_argument(pair: PreferencePair, tools_say: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Give the only value that differs, what it should be, and its schema."""
    wrong, right, tool = changed(pair)
    assert valid(wrong, pair.tools) == tools_say
    assert wrong.arguments.keys() == right.arguments.keys()
    (name,) = [k for k, v in wrong.arguments.items() if v != right.arguments[k]]
    about = tool.parameters.get("properties", {}).get(name, {})
    return wrong.arguments[name], right.arguments[name], about


def is_call_when_none(pair: PreferencePair) -> bool:
    return not pair.chosen and len(pair.rejected) == 1 and valid(pair.rejected[0], pair.tools)


def is_refused(pair: PreferencePair) -> bool:
    return bool(pair.chosen) and not pair.rejected and bool(pair.answer)


def is_missing_call(pair: PreferencePair) -> bool:
    left = Counter(text(pair.chosen))
    left.subtract(text(pair.rejected))
    return 0 < len(pair.rejected) < len(pair.chosen) and min(left.values()) >= 0


def is_doubled_call(pair: PreferencePair) -> bool:
    more = Counter(text(pair.rejected)) - Counter(text(pair.chosen))
    return more.total() == 1 and set(more) <= set(text(pair.chosen))


def is_extra_call(pair: PreferencePair) -> bool:
    more = Counter(text(pair.rejected)) - Counter(text(pair.chosen))
    (new,) = more
    return len(pair.rejected) == len(pair.chosen) + 1 and new not in text(pair.chosen)


def is_unknown_tool(pair: PreferencePair) -> bool:
    wrong, _, _ = changed(pair)
    return wrong.name not in pair.tools


def is_wrong_tool(pair: PreferencePair) -> bool:
    wrong, right, _ = changed(pair)
    return wrong.name in pair.tools and wrong.name != right.name


def is_missing_required(pair: PreferencePair) -> bool:
    wrong, right, tool = changed(pair)
    (gone,) = right.arguments.keys() - wrong.arguments.keys()
    return gone in tool.parameters["required"] and not valid(wrong, pair.tools)


def is_missing_optional(pair: PreferencePair) -> bool:
    wrong, right, tool = changed(pair)
    (gone,) = right.arguments.keys() - wrong.arguments.keys()
    default = tool.parameters["properties"].get(gone, {}).get("default", None)
    needed = gone in tool.parameters.get("required", [])
    return not needed and valid(wrong, pair.tools) and right.arguments[gone] != default


def is_invented_optional(pair: PreferencePair) -> bool:
    wrong, right, tool = changed(pair)
    (new,) = wrong.arguments.keys() - right.arguments.keys()
    about = tool.parameters.get("properties", {}).get(new)
    if about is None:
        return not valid(wrong, pair.tools) or bool(tool.parameters.get("additionalProperties"))
    return valid(wrong, pair.tools) and wrong.arguments[new] != about.get("default")


def is_wrong_type(pair: PreferencePair) -> bool:
    wrong, right, _ = one_argument(pair, tools_say=False)
    if json_type(wrong) == "list" == json_type(right):
        return not {json_type(item) for item in wrong} <= {json_type(item) for item in right}
    return json_type(wrong) != json_type(right)


def is_enum_violation(pair: PreferencePair) -> bool:
    wrong, right, _ = one_argument(pair, tools_say=False)
    return json_type(wrong) == json_type(right) and loose(wrong) != loose(right)


def is_wrong_value(pair: PreferencePair) -> bool:
    wrong, right, _ = one_argument(pair, tools_say=True)
    return loose(wrong) != loose(right)


JUDGES: Final[Mapping[Mistake, Callable[[PreferencePair], bool]]] = {
    M.CALL_WHEN_NONE: is_call_when_none,
    M.REFUSE_WHEN_CALLABLE: is_refused,
    M.MISSING_CALL: is_missing_call,
    M.DOUBLED_CALL: is_doubled_call,
    M.EXTRA_CALL: is_extra_call,
    M.UNKNOWN_TOOL: is_unknown_tool,
    M.WRONG_TOOL: is_wrong_tool,
    M.MISSING_REQUIRED: is_missing_required,
    M.MISSING_OPTIONAL: is_missing_optional,
    M.INVENTED_OPTIONAL: is_invented_optional,
    M.WRONG_TYPE: is_wrong_type,
    M.ENUM_VIOLATION: is_enum_violation,
    M.WRONG_VALUE: is_wrong_value,
}


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ("practice", set()),
        ("xlam", {M.CALL_WHEN_NONE, M.ENUM_VIOLATION}),  # all its rows have calls
        ("toolace", set()),
    ],
)
def test_every_pair_is_what_it_says(source: str, lacks: set[Mistake]) -> None:
    rows = rows_of(source)
    gold = {json.dumps([r.query, text(r.gold_calls)]) for r in rows}
    seen = Counter[str]()
    for row in rows:
        for kind in MAKERS:
            pair = perturbed_pair(row, kind, Random(row.id)).pair
            if pair is None:
                continue
            assert pair.rejection_reason == kind
            assert json.dumps([pair.query, text(pair.chosen)]) in gold
            assert all(valid(call, pair.tools) for call in pair.chosen)
            assert JUDGES[kind](pair), (kind, pair.chosen, pair.rejected)
            seen[kind] += 1
    assert set(MAKERS) - {kind for kind in MAKERS if seen[kind] > 5} == lacks
    assert seen[M.WRONG_VALUE] > 0.9 * sum(any(c.arguments for c in r.gold_calls) for r in rows)


# ------------------------------------------------------------------------ what is no mistake at all

TOOL: Final = ToolSpec(
    name="book",
    description="Book a table.",
    parameters={
        "type": "object",
        "properties": {
            "place": {"type": "string"},
            "people": {"type": "integer"},
            "when": {"enum": ["lunch", "dinner"], "default": "dinner"},
            "note": {"type": "string"},
            "outside": {"type": "boolean"},
            "dishes": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["place", "people"],
    },
)
OTHER: Final = TOOL.model_copy(update={"name": "cancel"})
OFFER: Final = {"book": TOOL, "cancel": OTHER}
ASKED: Final[dict[str, Any]] = {"place": "La Plata", "people": 5, "dishes": ["soup", "fish"]}


def call(name: str = "book", **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def pair_of(rejected: Calls, chosen: Calls, why: str = "wrong_value") -> PreferencePair:
    return PreferencePair(
        query="A table, please.",
        tools=OFFER,
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        rejection_reason=why,
        origin="perturbed",
    )


@pytest.mark.parametrize(
    "form",
    [
        {"people": 5.0},
        {"place": "la plata"},
        {"place": " La Plata "},
        {"place": "La-Plata."},
        {"when": "dinner"},
        {"when": "Dinner"},
        {"note": ""},
        {"note": None},
        {"outside": False},
        {"dishes": ["Soup", "fish "]},
    ],
)
def test_form_alone_makes_no_pair(form: dict[str, Any]) -> None:
    gold, wrong = [call(**ASKED)], [call(**ASKED | form)]
    assert mistake_in(wrong, gold, OFFER) is None
    assert same_meaning(wrong, gold, OFFER)
    for why in MAKERS:
        assert refusal_of(pair_of(wrong, gold, why)) is Refusal.ALIKE


def test_neither_order_makes_a_pair() -> None:
    gold = [call(**ASKED), call("cancel", place="Roma", people=2)]
    turned = [call("cancel", people=2, place="Roma"), call(**dict(reversed(ASKED.items())))]
    assert refusal_of(pair_of(turned, gold)) is Refusal.ALIKE


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"people": "5"}, M.WRONG_TYPE),
        ({"people": 5.5}, M.WRONG_TYPE),
        ({"people": True}, M.WRONG_TYPE),
        ({"dishes": ["soup", 1]}, M.WRONG_TYPE),
        ({"dishes": "soup"}, M.WRONG_TYPE),
        ({"people": 6}, M.WRONG_VALUE),
        ({"dishes": ["soup"]}, M.WRONG_VALUE),
        ({"place": ""}, M.WRONG_VALUE),
        ({"when": "lunch"}, M.INVENTED_OPTIONAL),
        ({"outside": True}, M.INVENTED_OPTIONAL),
        ({"tip": 3}, M.INVENTED_OPTIONAL),
        ({"people": 6, "tip": 3}, M.INVENTED_OPTIONAL),  # the earlier one names it
    ],
)
def test_a_changed_argument_is_named(change: dict[str, Any], kind: Mistake) -> None:
    assert mistake_in([call(**ASKED | change)], [call(**ASKED)], OFFER) is kind


def test_a_value_that_an_enum_forbids_is_named() -> None:
    gold = [call(**ASKED, when="lunch")]
    assert mistake_in([call(**ASKED, when="tea")], gold, OFFER) is M.ENUM_VIOLATION
    assert mistake_in([call(**ASKED)], gold, OFFER) is M.MISSING_OPTIONAL
    assert mistake_in([call(**ASKED, when="dinner")], gold, OFFER) is M.MISSING_OPTIONAL
    assert mistake_in([call(place="La Plata")], gold, OFFER) is M.MISSING_REQUIRED


def test_the_number_of_calls_is_named() -> None:
    one, two = call(**ASKED), call("cancel", place="Roma", people=2)
    assert mistake_in([one], [one, two], OFFER) is M.MISSING_CALL
    assert mistake_in([one, two, one], [one, two], OFFER) is M.DOUBLED_CALL
    assert mistake_in([one, one], [one], OFFER) is M.DOUBLED_CALL
    assert mistake_in([one, two], [one], OFFER) is M.EXTRA_CALL
    assert mistake_in([one, one, two], [one, one], OFFER) is M.EXTRA_CALL
    assert mistake_in([two], [one], OFFER) is M.WRONG_TOOL
    assert mistake_in([call("cook", **ASKED)], [one], OFFER) is M.UNKNOWN_TOOL
    assert mistake_in([], [one], OFFER) is M.REFUSE_WHEN_CALLABLE
    assert mistake_in([one], [], OFFER) is M.CALL_WHEN_NONE
    assert mistake_in([], [], OFFER) is None


def test_a_pair_that_states_another_reason_is_refused() -> None:
    gold, wrong = [call(**ASKED)], [call(**ASKED | {"people": 6})]
    assert refusal_of(pair_of(wrong, gold)) is None
    assert refusal_of(pair_of(wrong, gold, "wrong_type")) is Refusal.OTHERWISE_WRONG
    assert refusal_of(pair_of(gold, [call(place="La Plata")])) is Refusal.CHOSEN_INVALID
    both = [call(**ASKED | {"people": "6"}), call("cancel", place="Roma", people=2)]
    stated = pair_of(both, [call(**ASKED)], "extra_call")
    assert refusal_of(stated) is Refusal.OTHER_VERDICT  # more than one thing is wrong
    with pytest.raises(ValueError, match="under_call"):
        refusal_of(pair_of(wrong, gold, "under_call"))


# ------------------------------------------------------------------------------------------ answers

ANSWERS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["<tool_call>\n{}\n</tool_call>", "<tool_call>", "</tool_call>" + END, ""]),
    st.builds(
        lambda n, a: render_calls([ToolCall(name=n, arguments=a)]),
        st.sampled_from(["book", "cancel", "cook"]),
        st.dictionaries(
            st.sampled_from([*ASKED, "when", "tip"]),
            st.sampled_from(["La Plata", 5, "5", None, True, [], ["soup", "fish"], {"a": 1}]),
        ),
    ),
)


@settings(max_examples=300, deadline=None)
@given(said=ANSWERS, due=st.booleans(), finished=st.booleans())
def test_every_answer_has_a_name_that_agrees_with_the_metrics(
    said: str, due: bool, finished: bool
) -> None:
    gold = (call(**ASKED),) if due else ()
    row = Conversation(
        id=0, source="t", query="", tools=OFFER, gold_calls=gold, answer=None if due else "No."
    )
    found, graded = mistake_of(parse_answer(said), row, finished), grade(row, said)
    if not finished:
        assert found is M.RAN_AWAY
    elif due and graded.exact_call:
        assert found is None
    elif due and found is None:  # only the lenient judge lets it pass
        assert same_meaning(parse_answer(said).calls, gold, OFFER)
    elif not due:
        assert (found is None) == graded.abstention
    if finished and graded.json_validity is False and not parse_answer(said).calls:
        assert found is M.UNPARSEABLE


def test_an_answer_nested_beyond_all_sense_is_unparseable() -> None:
    deep = "[" * 700 + "]" * 700
    said = f'<tool_call>\n{{"name": "book", "arguments": {{"place": {deep}}}}}\n</tool_call>'
    row = Conversation(id=0, source="t", query="", tools=OFFER, gold_calls=(call(**ASKED),))
    assert mistake_of(parse_answer(said), row) in (M.UNPARSEABLE, M.MISSING_REQUIRED)


def test_every_class_of_the_benchmark_has_kinds() -> None:
    dialogues = {"forced end", "empty turn", "wrong state", "wrong result"}
    assert {*OF_BENCH} | dialogues | {"prompt too long", "other"} == {str(e) for e in ErrorClass}
    assert Counter(kind for kinds in OF_BENCH.values() for kind in kinds) == Counter(Mistake)


# -------------------------------------------------------------------------------- how many of which

HISTOGRAMS = st.dictionaries(st.sampled_from(list(Mistake)), st.integers(0, 100), max_size=15)
ROOMS = st.dictionaries(st.sampled_from(list(MAKERS)), st.integers(0, 12))


@given(histogram=HISTOGRAMS, count=st.integers(0, 200), most=ROOMS, have=ROOMS)
def test_the_allocation_fits(
    histogram: dict[Mistake, int],
    count: int,
    most: dict[Mistake, int],
    have: dict[Mistake, int],
) -> None:
    found = allocate(histogram, count, most, have)
    assert set(found) == set(MAKERS)
    assert 0 <= sum(found.values()) <= count
    assert all(0 <= n <= most.get(kind, count) for kind, n in found.items())
    made = [kind for kind in MAKERS if histogram.get(kind, 0) > 0]
    free = [kind for kind in made if kind not in most and kind not in OPPOSITES]
    assert sum(found.values()) == count or not free
    one, two = (found[kind] + have.get(kind, 0) for kind in OPPOSITES)
    if found[OPPOSITES[0]] and found[OPPOSITES[1]]:
        assert abs(one - two) <= 1  # however unequal they were before


@given(histogram=HISTOGRAMS, count=st.integers(1, 300))
def test_the_shares_are_those_of_the_histogram(histogram: dict[Mistake, int], count: int) -> None:
    found = allocate(histogram, count)
    total = sum(n for kind, n in histogram.items() if kind in MAKERS)
    both = sum(histogram.get(kind, 0) for kind in OPPOSITES) / 2
    assert sum(found.values()) == (count if total else 0)
    for kind, n in found.items() if total else ():
        share = both if kind in OPPOSITES else histogram.get(kind, 0)
        assert abs(n - count * share / total) <= 2
    assert abs(found[OPPOSITES[0]] - found[OPPOSITES[1]]) <= 1


def test_many_pairs_match_the_histogram_and_are_balanced() -> None:
    rows = rows_of("practice")
    measured = {M.WRONG_VALUE: 30, M.MISSING_REQUIRED: 20, M.CALL_WHEN_NONE: 25, M.UNPARSEABLE: 9}
    pairs = perturbed(rows, measured, 60, seed=0).pairs
    seen = Counter(pair.rejection_reason for pair in pairs)
    assert seen == {
        "wrong_value": 24,
        "missing_required": 16,
        "call_when_none": 10,
        "refuse_when_callable": 10,
    }


def test_pairs_that_are_there_already_are_made_up_for() -> None:
    measured = {M.WRONG_VALUE: 30, M.CALL_WHEN_NONE: 30}
    have = {M.CALL_WHEN_NONE: 12, M.WRONG_VALUE: 20}
    pairs = perturbed(rows_of("practice"), measured, 28, seed=0, have=have).pairs
    total = Counter(pair.rejection_reason for pair in pairs) + Counter(have)
    assert total == {"wrong_value": 30, "call_when_none": 15, "refuse_when_callable": 15}


def test_a_kind_that_cannot_be_made_leaves_its_share_to_the_others() -> None:
    rows = [
        row
        for row in rows_of("practice")
        if row.gold_calls and not any('"enum"' in tool.schema_text for tool in row.tools.values())
    ]
    found = perturbed(rows, ASSUMED, 100, seed=0)
    seen = Counter(pair.rejection_reason for pair in found.pairs)
    assert len(found.pairs) == 100
    assert not seen[M.ENUM_VIOLATION]
    assert not seen[M.CALL_WHEN_NONE] + seen[M.REFUSE_WHEN_CALLABLE]  # one has no opposite
    why = found.refused[M.CALL_WHEN_NONE]
    assert why == {Refusal.NOTHING: len(rows)}


def test_pairs_follow_from_the_seed_alone() -> None:
    rows = rows_of("practice")
    one, two, other = (perturbed(rows, ASSUMED, 50, seed) for seed in (1, 1, 2))
    assert one == two
    assert one.pairs != other.pairs
    assert perturbed([], ASSUMED, 50, 0).pairs == ()
    assert perturbed(rows, {}, 50, 0).pairs == ()


@pytest.mark.parametrize("source", ["practice", "toolace"])
def test_a_pair_is_asked_as_its_row_is(source: str) -> None:
    for row in rows_of(source)[:80]:
        for wrapped in (False, True):
            own = row.model_copy(update={"wrapped": wrapped})
            for kind in OPPOSITES:
                if pair := perturbed_pair(own, kind, Random(0)).pair:
                    texts = texts_of(pair)
                    assert texts.prompt == prompt_of(own)
                    assert texts.chosen == completion_of(own.gold_calls, own.answer)
                    assert texts.rejected.endswith(END)
                    assert texts.rejected != texts.chosen


# ---------------------------------------------------------------------------------- hostile schemas

NAMES = st.sampled_from(["a", "b", "", "ü"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
ABOUT = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["integer", "string", "array", "object", "boolean", [], 7]),
            "enum": st.lists(VALUES, max_size=2) | VALUES,
            "minimum": VALUES,
            "maximum": VALUES,
            "items": VALUES,
            "default": VALUES,
            "properties": VALUES,
            "required": VALUES,
        },
    ),
)
SCHEMAS = st.fixed_dictionaries(
    {"type": st.sampled_from(["object", "array"])},
    optional={
        "properties": VALUES | st.dictionaries(NAMES, ABOUT, max_size=3),
        "required": VALUES | st.lists(NAMES, max_size=2),
        "additionalProperties": st.booleans(),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    schemas=st.lists(SCHEMAS, max_size=3),
    called=st.lists(st.tuples(st.integers(0, 3), st.dictionaries(NAMES, VALUES)), max_size=3),
    query=st.text(max_size=20),
)
def test_no_schema_is_too_hostile(
    schemas: list[dict[str, Any]], called: list[tuple[int, dict[str, Any]]], query: str
) -> None:
    tools = {
        f"t{n}": ToolSpec(name=f"t{n}", description="", parameters=schema)
        for n, schema in enumerate(schemas)
    }
    gold = tuple(ToolCall(name=f"t{n}", arguments=arguments) for n, arguments in called)
    row = Conversation(
        id=0,
        source="t",
        query=query,
        tools=tools,
        gold_calls=gold,
        history=(Message(role="user", content="x 1.5 y"),),
    )
    for kind in MAKERS:
        tried = perturbed_pair(row, kind, Random(0))
        assert (tried.pair is None) <= bool(tried.refused)
        if tried.pair:
            assert refusal_of(tried.pair) is None
            assert not same_meaning(tried.pair.rejected, gold, tools)


def test_an_enum_of_one_value_has_no_other_value() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x"]}},
        "required": ["a"],
    }
    tool = ToolSpec(name="t", description="", parameters=schema)
    gold = (ToolCall(name="t", arguments={"a": "x"}),)
    row = Conversation(id=0, source="t", query="Do it.", tools={"t": tool}, gold_calls=gold)
    assert perturbed_pair(row, M.WRONG_VALUE, Random(0)).pair is None
    assert perturbed_pair(row, M.ENUM_VIOLATION, Random(0)).pair
    bare = row.model_copy(update={"tools": {}, "gold_calls": ()})
    assert all(perturbed_pair(bare, kind, Random(0)).pair is None for kind in MAKERS)
