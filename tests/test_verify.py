"""Verify: the verdicts of `jsonschema`, and a verdict in time whatever comes in."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_calls import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from toolpost.core.normalize import Normalized
from toolpost.core.schema import (
    Conversation,
    ToolCall,
    ToolSpec,
    VerificationOutcome,
    VerificationResult,
)
from toolpost.core.toolace import normalize_toolace
from toolpost.core.verify import verify_call, verify_calls, verify_spec, verify_text
from toolpost.core.xlam import normalize_xlam

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason=f"no real rows at {SHARED.name}")
Outcome = VerificationOutcome


def judge(parameters: dict[str, Any], arguments: dict[str, Any]) -> VerificationResult:
    tool = ToolSpec(name="f", description="", parameters={"type": "object", **parameters})
    return verify_call(ToolCall(name="f", arguments=arguments), {"f": tool})


def value_verdict(schema: Any, value: Any, **root: Any) -> VerificationResult:
    return judge({"properties": {"v": schema}, **root}, {"v": value})


def reference(parameters: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Ask `jsonschema`, with undeclared arguments refused."""
    schema = {"additionalProperties": False, "type": "object", **parameters}
    return bool(Draft202012Validator(schema).is_valid(arguments))


# ---- the same verdicts as jsonschema ---------------------------------------------------------

NAMES = ["a", "b", "ab", "", "__proto__", "é", "0"]
NUMBERS: list[Any] = [0, 1, -1, 2, 3, 0.5, 0.1, 0.3, 1.0, 3.0, -0.0, 1e300, 2**53 + 1, 10**30, 7.5]
SCALARS = st.sampled_from([None, True, False, "", "a", "ab", "aab", "12", "a\n", "é", *NUMBERS])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=6,
)
PATTERNS = ["^a", "b$", r"^\d+$", "a|b", r"^\w{1,2}$", "[^a]", r"^(?=.*b)a", r"^(?!ab)", "", r"\s"]
KINDS = ["null", "boolean", "integer", "number", "string", "array", "object"]
SIZES = st.integers(0, 3) | st.sampled_from([1.0, 2.0])


def keywords(inner: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    """Give every keyword that is executed, with what may stand behind it."""
    names = st.lists(st.sampled_from(NAMES), max_size=2, unique=True)
    schemas = st.lists(inner, min_size=1, max_size=3)
    found: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from(KINDS)
        | st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True),
        "enum": st.lists(VALUES, min_size=1, max_size=4),
        "const": VALUES,
        "multipleOf": st.sampled_from([1, 2, 3, 0.1, 0.5, 1.0, 2.5, 1e-300]),
        "pattern": st.sampled_from(PATTERNS),
        "uniqueItems": st.booleans(),
        "required": names,
        "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
        "patternProperties": st.dictionaries(
            st.sampled_from(["^a", "b$", r"\d", "^.?$"]), inner, max_size=2
        ),
        "dependentRequired": st.dictionaries(st.sampled_from(NAMES), names, max_size=2),
        "dependentSchemas": st.dictionaries(st.sampled_from(NAMES), inner, max_size=2),
        "$ref": st.sampled_from(["#/$defs/one", "#/$defs/two", "#/properties/w"]),
        "format": st.sampled_from(["date", "email", "regex"]),
    }
    found |= dict.fromkeys(("minimum", "maximum"), st.sampled_from(NUMBERS))
    found |= dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), st.sampled_from(NUMBERS))
    sizes = "minLength maxLength minItems maxItems minProperties maxProperties minContains"
    found |= dict.fromkeys((*sizes.split(), "maxContains"), SIZES)
    one = "items contains additionalProperties propertyNames not if then else"
    found |= dict.fromkeys(one.split(), inner)
    return found | dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), schemas)


def some(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    by_word = keywords(inner)
    words = st.lists(st.sampled_from(sorted(by_word)), min_size=1, max_size=4, unique=True)
    return words.flatmap(lambda chosen: st.fixed_dictionaries({w: by_word[w] for w in chosen}))


SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | some(st.booleans()), some, max_leaves=5
)


def values_for(schema: Any) -> st.SearchStrategy[Any]:
    """Draw values that the schema itself names, more often than chance would."""
    near: list[Any] = []
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            near += [*node.get("enum", ()), *([node["const"]] if "const" in node else ())]
            near += [v for k, v in node.items() if k.startswith(("min", "max", "excl", "mult"))]
            stack += [v for k, v in node.items() if k not in ("enum", "const")]
        elif isinstance(node, list):
            stack += node
    leaves = st.sampled_from(near) | VALUES if near else VALUES
    boxes = st.dictionaries(st.sampled_from(NAMES), leaves, max_size=3)
    return leaves | st.lists(leaves, max_size=4) | boxes


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), SCHEMAS, SCHEMAS, SCHEMAS)
def test_verdicts_are_those_of_jsonschema(data: st.DataObject, v: Any, one: Any, two: Any) -> None:
    parameters = {"properties": {"v": v, "w": True}, "$defs": {"one": one, "two": two}}
    arguments = {"v": data.draw(values_for([v, one, two]))}
    ours = judge(parameters, arguments)
    if ours.result is Outcome.MALFORMED_SPEC:  # the only ones in this pool that are no schemas
        assert "refers to itself" in ours.detail
        return
    Draft202012Validator.check_schema({"type": "object", **parameters})
    assert ours.ok == reference(parameters, arguments)
    assert bool(ours.detail) != ours.ok


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "type",
                "items",
                "enum",
                "required",
                "pattern",
                "minLength",
                "properties",
                "allOf",
                "$ref",
                "multipleOf",
                "additionalProperties",
                "$defs",
            ]
        ),
        VALUES,
    )
)
def test_what_jsonschema_calls_malformed_is_malformed(schema: dict[str, Any]) -> None:
    parameters = {"type": "object", "properties": {"v": schema}}
    spec = verify_spec(ToolSpec(name="f", description="", parameters=parameters))
    try:
        Draft202012Validator.check_schema(parameters)
    except SchemaError:
        assert spec.result is Outcome.MALFORMED_SPEC
    else:
        assert spec.ok or "$ref" in schema


# ---- patterns --------------------------------------------------------------------------------

ATOMS = ["a", "b", "0", "_", " ", "-", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "^", r"\A", r"\Z"]
ATOMS += [".", "é", "[a-c]", "[^a]", r"[\w.-]", r"[^\d]", r"[\W_]", r"[\s\S]", r"\n", r"\.", r"\/"]
ATOMS += ["\U0001f600", r"\x41", "#", "[a&&b]", "[]a]", r"[\]^-]", "\x1c"]
TEXTS = st.text("abA0_ -é٣\n\U0001f600]^.\x1c\u2028\r/&%\u0301", max_size=6)
REGEXES = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map("({0[0]}|{0[1]})".format)
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "{,2}"])).map(
            lambda t: f"(?:{t[0]}){t[1]}"
        )
        | inner.map("^{}$".format)
        | st.tuples(st.sampled_from("=!"), inner, inner).map("^(?{0[0]}{0[1]}){0[2]}".format)
    ),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=400, deadline=None)
@given(REGEXES, st.lists(TEXTS, min_size=1, max_size=6))
def test_patterns_mean_what_they_mean_in_python(pattern: str, texts: list[str]) -> None:
    for text in texts:
        verdict = value_verdict({"pattern": pattern}, text)
        if verdict.result is Outcome.MALFORMED_SPEC:
            assert "AT_END" in verdict.detail or "ASSERT" in verdict.detail
        else:
            assert verdict.ok == bool(re.search(pattern, text)), (pattern, text)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "missing )"),
        (r"(a)\1", "GROUPREF"),
        ("(?<=a)b", "ASSERT"),
        ("^(?<=a)b", "look-behind"),
        ("a(?=b)", "ASSERT"),
        ("(?i)a", "inline flags"),
        ("(?i:a)", "SUBPATTERN"),
        ("(?>a)", "ATOMIC_GROUP"),
        ("a$b", "AT_END"),
        (r"\B", "AT_NON_BOUNDARY"),
        (r"[^\W_]", "negated class"),
        ("\ud800", "surrogate"),
        (r"\w{2000}", "too large"),
        ("(?:a{1000}){1000}", "too large"),
        ("a" * 2001, "2,000 characters"),
        ("(" * 900 + ")" * 900, "recursion"),
        ("a{99999999999999999999}", "repetition number"),
    ],
)
def test_a_pattern_that_is_not_executed_says_so(pattern: str, says: str) -> None:
    verdict = value_verdict({"pattern": pattern}, "a")
    assert verdict.result is Outcome.MALFORMED_SPEC
    assert says in verdict.detail


def test_a_word_boundary_beside_a_combining_mark_is_the_known_difference() -> None:
    schema, text = {"pattern": r"a\b"}, "a\u0301"
    assert Draft202012Validator(schema).is_valid(text)
    assert not value_verdict(schema, text).ok


def test_true_and_1_inside_objects_and_lists_are_the_other_known_difference() -> None:
    """`jsonschema` sorts before it compares, so that neighbours hide a repetition."""
    schema, value = {"uniqueItems": True}, [[True], [1], [True]]
    assert Draft202012Validator(schema).is_valid(value)
    assert not value_verdict(schema, value).ok


# ---- policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "result"),
    [
        ("#/$defs/a~1b", Outcome.VALID),
        ("#/$defs/c~0d/anyOf/0", Outcome.VALID),
        ("#/$defs/c~d/anyOf/0", Outcome.MALFORMED_SPEC),
        ("#/$defs/c~0d/anyOf/00", Outcome.MALFORMED_SPEC),
        ("#/$defs/c~0d/anyOf/-1", Outcome.MALFORMED_SPEC),
        ("#/$defs/c~0d/anyOf/1", Outcome.MALFORMED_SPEC),
        ("#/type/0", Outcome.MALFORMED_SPEC),
        ("#a", Outcome.MALFORMED_SPEC),
    ],
)
def test_a_reference_has_one_spelling(ref: str, result: Outcome) -> None:
    definitions = {"a/b": {"type": "integer"}, "c~d": {"anyOf": [{"type": "integer"}]}}
    root = {"$defs": definitions}
    assert value_verdict({"$ref": ref}, 1, **root).result is result
    assert not value_verdict({"$ref": ref}, "1", **root).ok


@pytest.mark.parametrize(
    ("kind", "value", "ok"),
    [
        ("integer", 1, True),
        ("integer", 1.0, True),
        ("integer", 1.5, False),
        ("integer", True, False),
        ("number", False, False),
        ("boolean", 1, False),
        ("string", None, False),
    ],
)
def test_true_is_no_integer_and_1_0_is_one(kind: str, value: Any, ok: bool) -> None:
    assert value_verdict({"type": kind}, value).ok is ok


def test_undeclared_arguments_are_refused_unless_the_schema_lets_them() -> None:
    assert judge({}, {"x": 1}).result is Outcome.SCHEMA_VIOLATION
    assert judge({"additionalProperties": True}, {"x": 1}).ok
    assert judge({"additionalProperties": {"type": "string"}}, {"x": 1}).detail.startswith(
        "at $.x:"
    )


def test_a_detail_says_what_is_wrong_and_where() -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    assert value_verdict(schema, [1, "2"]).detail == 'at $.v[1]: "2" is not of type "integer"'
    assert "'w\\xe4tter'" in verify_call(ToolCall(name="wätter", arguments={}), {}).detail


def test_the_first_call_that_falls_decides() -> None:
    tool = ToolSpec(name="f", description="", parameters={"type": "object"})
    good, bad = ToolCall(name="f", arguments={}), ToolCall(name="g", arguments={})
    assert verify_calls([good, good], {"f": tool}).ok
    assert verify_calls([good, bad], {"f": tool}).result is Outcome.UNKNOWN_TOOL
    assert verify_calls([], {}).ok


NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
}


def test_tools_that_pydantic_wrote_work() -> None:
    from pydantic import BaseModel

    class Leg(BaseModel):
        city: str
        stops: "list[Leg]" = []
        price: float | None = None

    class Trip(BaseModel):
        legs: list[Leg]

    schema = Trip.model_json_schema()
    leg = {"city": "Lima", "stops": [{"city": "Oslo", "price": None}]}
    for legs in ([leg], [leg, {}], [{"city": 3}], leg):
        assert judge(schema, {"legs": legs}).ok == reference(schema, {"legs": legs})


def test_a_linked_list_may_be_as_deep_as_any_value() -> None:
    value: Any = None
    for _ in range(60):
        value = {"next": value}
    schema = {"properties": {"v": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": NODE}}
    assert judge(schema, {"v": value}).ok
    value = {"next": {"next": 3}}
    assert judge(schema, {"v": value}).result is Outcome.SCHEMA_VIOLATION


# ---- real rows -------------------------------------------------------------------------------


def mutants(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Drop each argument, change its type, wrap it, add one that nobody declared."""
    yield {**arguments, "undeclared_argument": 1}
    for name, value in arguments.items():
        yield {n: v for n, v in arguments.items() if n != name}
        wrong: list[Any] = [str(value), [value], None, True, 1.0, -1.5, {}]
        for other in wrong:
            yield {**arguments, name: other}


def agreement(rows: list[Conversation]) -> Counter[bool]:
    found: Counter[bool] = Counter()
    engines: dict[str, Any] = {}
    for row in rows:
        for call in row.gold_calls:
            schema = {"additionalProperties": False, **row.tools[call.name].parameters}
            text = json.dumps(schema)
            if text not in engines:
                Draft202012Validator.check_schema(schema)
                engines[text] = Draft202012Validator(schema)
            for arguments in (call.arguments, *mutants(call.arguments)):
                other = ToolCall(name=call.name, arguments=arguments)
                ours = verify_call(other, row.tools).ok
                assert ours == engines[text].is_valid(arguments), (schema, arguments)
                found[ours] += 1
    return found


@real
@pytest.mark.parametrize(
    ("corpus", "read"), [("xlam", normalize_xlam), ("toolace", normalize_toolace)]
)
def test_gold_calls_and_their_mutants_get_the_same_verdict_from_both_engines(
    corpus: str, read: Callable[[Any, int], Normalized]
) -> None:
    rows = json.loads((SHARED / f"{corpus}_rows.json").read_text(encoding="utf-8"))
    found = agreement([c for at, row in enumerate(rows) for c in read(row, at).conversations])
    assert found[True] > 1_000 < found[False]


@real
def test_every_pattern_of_toolace_is_executed_and_means_the_same() -> None:
    rows = json.loads((SHARED / "toolace_rows.json").read_text(encoding="utf-8"))
    quoted = (found for row in rows for found in PATTERN.findall(row["system"]))
    patterns = {json.loads(found) for found in quoted}
    assert len(patterns) > 40
    texts = ["", "2024-01-31", "2024-01-31 10:00", "12:30", "a@b.co", "AB-1234", "#ff00aa", "x\n"]
    for pattern in patterns:
        for value in texts:
            verdict = value_verdict({"pattern": pattern}, value)
            assert verdict.result is not Outcome.MALFORMED_SPEC
            assert verdict.ok == bool(re.search(pattern, value))


PATTERN = re.compile(r'"pattern": ("(?:[^"\\]|\\.)*")')


# ---- hostile input ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged() -> dict[str, Any]:
    """Judge the hostile set, each case in a process of its own under 512 MB of address space."""
    script = Path(__file__).with_name("hostile_calls.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, timeout=120
    )
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", sorted(CASES))
def test_hostile_input_ends_in_a_verdict_within_a_second(name: str, judged: dict[str, Any]) -> None:
    found = judged[name]
    assert "died" not in found, f"killed or raised: status {found}"
    assert found["seconds"] < 1
    assert found["result"] == CASES[name].result
    assert bool(found["detail"]) == (found["result"] != Outcome.VALID)


ANYTHING = st.recursive(
    SCALARS
    | st.sampled_from([b"x", float("nan"), float("inf"), "\ud800", 10**400, object(), {1}, 1j])
    | st.text(st.characters(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from([*KINDS, "$ref", "pattern", "items", 1, None]), inner)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.text(max_size=2), ANYTHING), st.dictionaries(st.text(max_size=2), ANYTHING)
)
def test_no_python_object_makes_verify_raise(arguments: Any, properties: Any) -> None:
    for parameters in ({"properties": properties}, {"additionalProperties": True}):
        assert isinstance(judge(parameters, arguments), VerificationResult)


@given(st.text() | VALUES.map(json.dumps), st.text() | VALUES.map(json.dumps))
def test_no_text_makes_verify_raise(call: str, tools: str) -> None:
    assert verify_text(call, tools).ok == (call == tools == "[]")


# ---- texts -----------------------------------------------------------------------------------

TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
CALL = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("call", "tools", "result"),
    [
        (CALL, [TOOL], Outcome.VALID),
        ([CALL, CALL], [TOOL], Outcome.VALID),
        ([], [TOOL], Outcome.VALID),
        (CALL, [{"type": "function", "function": TOOL}], Outcome.VALID),
        (CALL, [{**TOOL, "description": "d", "strict": True}], Outcome.VALID),
        (CALL, [], Outcome.UNKNOWN_TOOL),
        ([CALL, {**CALL, "arguments": {"x": "1"}}], [TOOL], Outcome.SCHEMA_VIOLATION),
        ({**CALL, "id": "1"}, [TOOL], Outcome.UNPARSEABLE),
        ({**CALL, "arguments": "{}"}, [TOOL], Outcome.UNPARSEABLE),
        ({**CALL, "name": 1}, [TOOL], Outcome.UNPARSEABLE),
        ([[CALL]], [TOOL], Outcome.UNPARSEABLE),
        (CALL, TOOL, Outcome.MALFORMED_SPEC),
        (CALL, [{**TOOL, "description": 1}], Outcome.MALFORMED_SPEC),
        (CALL, [TOOL, TOOL], Outcome.MALFORMED_SPEC),
    ],
)
def test_texts_are_read_strictly(call: Any, tools: Any, result: Outcome) -> None:
    assert verify_text(json.dumps(call), json.dumps(tools)).result is result
