"""Normalize, verify, split and build, on real rows and on hostile ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from toolpost.core.normalize import Rejection, normalize_xlam, type_schema
from toolpost.core.pairs import perturbed_pair
from toolpost.core.schema import (
    Conversation,
    ToolCall,
    ToolSpec,
    VerificationOutcome,
    canonical,
    same_calls,
)
from toolpost.core.split import identities, query_identity, split
from toolpost.core.verify import verify_call
from toolpost.data.build import build, training_rows
from toolpost.data.pocketset import rows as practice_rows
from toolpost.data.sources import SourceError, load_rows

XLAM = Path(__file__).parents[1].parent / "shared" / "data" / "xlam_rows.json"
real = pytest.mark.skipif(not XLAM.exists(), reason=f"no real rows at {XLAM.name}")
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def xlam() -> list[Any]:
    found: list[Any] = json.loads(XLAM.read_text(encoding="utf-8"))
    return found


@real
def test_real_rows_pass_as_often_as_policy_a_lets_them(xlam: list[Any]) -> None:
    """On the full 1,200 rows this policy was measured to keep 97 % of the rows."""
    found = [normalize_xlam(row) for row in xlam]
    reasons = Counter(r.reason for r in found if isinstance(r, Rejection))
    kept = [r for r in found if isinstance(r, Conversation)]
    assert len(kept) / len(found) > 0.96
    assert set(reasons) <= {"schema_violation", "duplicate_tool"}
    assert all(verify_call(c, r.tools).ok for r in kept for c in r.gold_calls)


@real
def test_every_type_of_the_real_rows_is_understood(xlam: list[Any]) -> None:
    spellings = {
        about["type"]
        for row in xlam
        for tool in json.loads(row["tools"])
        for about in tool["parameters"].values()
    }
    assert len(spellings) > 15
    assert [s for s in spellings if type_schema(s)[0] == {}] == []


@real
def test_a_split_of_real_rows_shares_nothing(xlam: list[Any]) -> None:
    built = build(xlam, "xlam", seed=3, shares=(0.1, 0.1))
    keys = {n: {k for r in rows for k in identities(r)} for n, rows in built.splits.items()}
    assert all(built.splits.values())
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["dev"]
    assert not keys["dev"] & keys["test"]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["id", "query", "tools", "answers", "answer"]), JSON) | JSON)
def test_no_row_makes_normalize_raise(row: Any) -> None:
    assert isinstance(normalize_xlam(row), Conversation | Rejection)


@given(st.text())
def test_no_type_makes_the_grammar_raise(text: str) -> None:
    schema, optional = type_schema(text)
    Draft202012Validator.check_schema(schema)
    assert isinstance(optional, bool)


@given(st.dictionaries(st.text(), JSON, min_size=2))
def test_the_canonical_text_is_json_and_ignores_the_order_of_keys(value: dict[str, Any]) -> None:
    text = canonical(value)
    assert canonical(json.loads(text)) == text
    assert canonical(dict(reversed(value.items()))) == text


TYPES = {
    "string": st.text(),
    "integer": st.integers(),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
}


@given(
    st.data(),
    st.dictionaries(st.text(min_size=1), st.sampled_from(sorted(TYPES)), min_size=1, max_size=4),
)
def test_verify_agrees_with_jsonschema(data: st.DataObject, types: dict[str, str]) -> None:
    properties = {name: {"type": kind} for name, kind in types.items()}
    schema = {"type": "object", "properties": properties, "required": sorted(types)[:1]}
    arguments = {
        name: data.draw(TYPES[data.draw(st.sampled_from([kind, "string"]))])
        for name, kind in types.items()
        if data.draw(st.booleans())
    }
    tool = ToolSpec(name="f", description="", parameters=schema)
    ours = verify_call(ToolCall(name="f", arguments=arguments), {"f": tool}).ok
    huge = any(isinstance(v, int) and abs(v) >= 10**400 for v in arguments.values())
    assert huge or ours == Draft202012Validator(schema).is_valid(arguments)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        ({"properties": {"s": {"pattern": "^(a+)+$"}}}, {"s": "a" * 40 + "!"}),
        ({"$ref": "#"}, {}),
        ({"$ref": "http://127.0.0.1:9/schema"}, {}),
        ({"$ref": "file:///etc/passwd"}, {}),
        ({"properties": {"x": nested(100_000)}}, {"x": 1}),
        ({}, {"x": nested(100_000)}),
        ({}, {"x": 10**100_000}),
        ({"properties": {"x": {"type": "number"}}}, {"x": float("nan")}),
        ({"type": "dict"}, {}),
        ({"properties": {"x": {"type": "flux"}}}, {"x": 1}),
        ({"properties": {"x": {"type": "string"}}}, {"x": 1, "\ud800": 2}),
    ],
    ids=[
        "redos",
        "self-ref",
        "http",
        "file",
        "deep-schema",
        "deep",
        "huge",
        "nan",
        "dict",
        "type",
        "surrogate",
    ],
)
def test_hostile_tools_and_calls_end_in_a_verdict(parameters: Any, arguments: Any) -> None:
    tool = ToolSpec(name="f", description="", parameters={"type": "object", **parameters})
    verdict = verify_call(ToolCall(name="f", arguments=arguments), {"f": tool})
    wrong = (VerificationOutcome.MALFORMED_SPEC, VerificationOutcome.SCHEMA_VIOLATION)
    assert verdict.result in wrong
    assert verdict.detail


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 5))
def test_a_split_is_stable_when_rows_are_added(seed: int, extra: int) -> None:
    made = [normalize_xlam(row) for row in practice_rows(60, 1)]
    rows = [row for row in made if isinstance(row, Conversation)]
    fresh = [
        Conversation(id=1000 + n, source="x", query=f"zzz {n}", tools={}, gold_calls=(), answer="-")
        for n in range(extra)
    ]
    before, after = split(rows, seed), split(rows + fresh, seed)
    for name, part in before.items():
        assert [r for r in after[name] if r.id < 1000] == part


def test_a_near_miss_differs_from_gold_and_covers_both_directions() -> None:
    from random import Random

    rows = build(practice_rows(400, 0), "practice", seed=0, shares=(0.1, 0.1)).splits["train"]
    pairs = [p for n, r in enumerate(rows) if (p := perturbed_pair(r, Random(n)))]
    assert len(pairs) > 0.9 * sum(bool(r.tools) for r in rows)
    assert not any(same_calls(p.chosen, p.rejected) for p in pairs)
    reasons = Counter(p.rejection_reason for p in pairs)
    assert {"over_call", "under_call", "wrong_value", "wrong_tool"} <= set(reasons)
    assert all((p.chosen == ()) == (p.rejection_reason == "over_call") for p in pairs)


def test_every_practice_row_is_accounted_for() -> None:
    made = [*practice_rows(500, 0), "junk", {"id": 1, "query": "x"}]
    built = build(made, "practice", seed=0, shares=(0.1, 0.1))
    counts = built.counts
    assert counts["rows_in"] == 502 == counts["kept"] + counts["quarantined"]
    assert {"bad_row", "missing_key"} <= set(built.reasons)
    queries = [query_identity(r.query) for part in built.splits.values() for r in part]
    assert len(queries) == len(set(queries))
    assert all(
        row["completion"].endswith("<|im_end|>") for row in training_rows(built.splits["train"])
    )


@pytest.mark.parametrize(
    ("text", "says"), [(None, "no such file"), ("[{", "complete"), ("{}", "expected a list")]
)
def test_a_broken_file_says_what_to_do(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=says) as caught:
        load_rows(str(path), 10, 0)
    assert str(path) in str(caught.value)
