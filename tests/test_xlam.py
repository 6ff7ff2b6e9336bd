"""The quirks of real xLAM rows, one test each, and rows that are no rows."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from toolpost.core.normalize import Normalized
from toolpost.core.schema import ToolCall, ToolSpec
from toolpost.core.verify import verify_call
from toolpost.core.xlam import default_fits, normalize_xlam, type_schema, xlam_tool

XLAM = Path(__file__).parents[1].parent / "shared" / "data" / "xlam_rows.json"
real = pytest.mark.skipif(not XLAM.exists(), reason=f"no real rows at {XLAM.name}")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def rows() -> dict[int, Any]:
    return {row["id"]: row for row in json.loads(XLAM.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def found(rows: dict[int, Any]) -> dict[int, Normalized]:
    return {number: normalize_xlam(row, 0) for number, row in rows.items()}


def listings(rows: dict[int, Any]) -> Iterator[dict[str, Any]]:
    return (tool for row in rows.values() for tool in json.loads(row["tools"]))


def parameters(rows: dict[int, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return (item for tool in listings(rows) for item in tool["parameters"].items())


def one_tool(**about: Any) -> tuple[ToolSpec, int]:
    return xlam_tool({"name": "f", "description": "", "parameters": {"x": about}})


def schema_of(row: Any, name: str) -> dict[str, Any]:
    tools = normalize_xlam(row, 0).conversations[0].tools
    schema: dict[str, Any] = tools[name].parameters
    return schema


@real
def test_no_row_is_lost_and_nearly_all_gold_calls_are_valid(found: dict[int, Normalized]) -> None:
    """Types widened only where the tool's own default is a fraction; nothing else is loosened."""
    assert all(bool(f.conversations) != bool(f.rejection) for f in found.values())
    reasons = Counter(f.rejection.reason for f in found.values() if f.rejection)
    assert set(reasons) == {"schema_violation", "duplicate_tool"}
    calls = sum(f.calls for f in found.values())
    assert calls > 1200
    assert sum(f.valid_calls for f in found.values()) / calls >= 0.98
    schemas = [
        t.parameters for f in found.values() for c in f.conversations for t in c.tools.values()
    ]
    assert not any(schema.get("additionalProperties") for schema in schemas)


@real
def test_every_type_spelling_of_the_corpus_is_understood(rows: dict[int, Any]) -> None:
    spellings = {about["type"] for _, about in parameters(rows)}
    assert len(spellings) > 15
    assert [s for s in spellings if type_schema(s)[0] == {}] == []


@pytest.mark.parametrize(
    ("spelling", "schema"),
    [
        (
            "List[Union[int, float]]",
            {"items": {"anyOf": [{"type": "integer"}, {"type": "number"}]}},
        ),
        ("list [ INT ]", {"items": {"type": "integer"}}),
        ("List", {"type": "array"}),
        ("set", {"type": "array"}),
        ("Dict[str, int]", {"type": "object", "additionalProperties": {"type": "integer"}}),
        ("Tuple[float, ...]", {"type": "array", "items": {"type": "number"}}),
        ("typing.List[str]", {"items": {"type": "string"}}),
        ("int | None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        ("Optional[str]", {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ("STR", {"type": "string"}),
        ("Literal['a', 2]", {"enum": ["a", 2]}),
        ("Literal[b'a']", {}),
        ("Tuple[()]", {"type": "array"}),
        ("Union[()]", {}),
        ("Tuple[None, int]", {"prefixItems": [{"type": "null"}, {"type": "integer"}]}),
        ("str (optional)", {"type": "string"}),
        ("Flux", {}),
        ("Flux[int]", {}),
        ("date (yyyy-mm-dd)", {}),
        ("int, float", {"type": "integer"}),
        ("", {}),
        ("List[" * 5000, {}),
        ("int|" * 5000 + "int", {}),
    ],
)
def test_the_type_grammar(spelling: str, schema: dict[str, Any]) -> None:
    read, _ = type_schema(spelling)
    assert {key: read.get(key) for key in schema} == schema
    assert (read == {}) == (schema == {})


def test_a_tuple_has_its_length() -> None:
    reader = Draft202012Validator(type_schema("List[Tuple[int, int]]")[0])
    assert reader.is_valid([[1, 2], [3, 4]])
    assert not reader.is_valid([[1, 2, 3]])
    assert not reader.is_valid([[1]])
    assert not reader.is_valid([["1", 2]])


@pytest.mark.parametrize(
    "spelling",
    [
        "int, optional",
        "INT , Optional",
        "Optional[int]",
        "typing.Optional[int]",
        "int,optional, default 3",
        "int, default 3",
        "int (optional)",
    ],
)
def test_the_optional_marker_is_seen_whatever_its_case(spelling: str) -> None:
    assert type_schema(spelling)[1]
    assert one_tool(type=spelling)[0].parameters["required"] == []


@real
def test_quirk_1_parameters_are_a_flat_map_and_may_be_called_type(rows: dict[int, Any]) -> None:
    for name, number in (("type", 49), ("name", 23), ("items", 13), ("format", 2)):
        properties = [
            tool.parameters["properties"]
            for tool in normalize_xlam(rows[number], 0).conversations[0].tools.values()
        ]
        assert any(isinstance(p.get(name), dict) for p in properties)


@real
def test_quirk_2_a_default_says_optional_and_is_dropped_where_it_contradicts_its_type(
    rows: dict[int, Any], found: dict[int, Normalized]
) -> None:
    growth = schema_of(rows[32], "project_investment_growth")
    assert "default" not in growth["properties"]["principal"]  # declared float, default true
    assert "principal" not in growth["required"]
    assert sum(f.dropped_defaults for f in found.values()) > 500
    for f in found.values():
        for row in f.conversations:
            for tool in row.tools.values():
                for schema in tool.parameters["properties"].values():
                    assert Draft202012Validator(schema).is_valid(schema.get("default", None)) or (
                        "default" not in schema
                    )


def test_quirk_2_a_fraction_as_default_shows_that_an_integer_is_none() -> None:
    tool, dropped = one_tool(type="int", default="-74.202")
    assert tool.parameters["properties"]["x"] == {"type": "number"}
    assert dropped == 1  # the text is still no number
    assert one_tool(type="int", default="250")[0].parameters["properties"]["x"] == {
        "type": "integer"
    }
    assert one_tool(type="str", default="2.5")[0].parameters["properties"]["x"]["default"] == "2.5"


def test_quirk_2_a_description_may_hold_the_shifted_default() -> None:
    needed = one_tool(type="float", description="Permittivity of the space.")
    stated = one_tool(type="float", description="Permittivity of the space, default is 8.854e-12.")
    assert needed[0].parameters["required"] == ["x"]
    assert stated[0].parameters["required"] == []


@real
def test_quirk_3_wrong_gold_calls_are_quarantined_with_the_place(
    found: dict[int, Normalized],
) -> None:
    """A sudoku of numbers for texts, a fraction for an integer, Python source for a list."""
    for number, place in (
        (53, "board"),
        (637, "intervals"),
        (364, "inflation"),
        (338, "start_date"),
    ):
        why = found[number].rejection
        assert why is not None
        assert (why.stage, why.reason) == ("verify", "schema_violation")
        assert place in why.detail
        assert found[number].valid_calls < found[number].calls


@real
def test_quirk_4_two_tools_of_one_name(rows: dict[int, Any], found: dict[int, Normalized]) -> None:
    for number in (136, 782, 1040):
        why = found[number].rejection
        assert why is not None
        assert why.reason == "duplicate_tool"
    same = [tool["name"] for tool in json.loads(rows[152]["tools"])]
    assert same.count("measure_distance") == 3  # they differ only in defaults of the wrong type
    assert list(found[152].conversations[0].tools).count("measure_distance") == 1


@real
def test_quirk_5_callables_are_texts_and_sets_are_lists(
    found: dict[int, Normalized],
) -> None:
    for number, types in ((280, "string"), (245, "array")):
        assert found[number].rejection is None
        properties = [
            schema["type"]
            for tool in found[number].conversations[0].tools.values()
            for schema in tool.parameters["properties"].values()
        ]
        assert types in properties


@real
def test_quirk_6_reading_types_by_exact_lower_case_words_refuses_far_more(
    rows: dict[int, Any], found: dict[int, Normalized]
) -> None:
    words = {
        "str": "string",
        "int": "integer",
        "float": "number",
        "bool": "boolean",
        "list": "array",
    }

    def by_words(tool: Any) -> ToolSpec:
        read = tool["parameters"].items()
        properties = {n: {"type": words.get(about["type"], "string")} for n, about in read}
        required = [n for n, about in read if "default" not in about]
        schema = {"type": "object", "properties": properties, "required": required}
        return ToolSpec(name=tool["name"], description="", parameters=schema)

    naive = 0
    for row in rows.values():
        tools = {tool["name"]: by_words(tool) for tool in json.loads(row["tools"])}
        naive += sum(verify_call(ToolCall(**c), tools).ok for c in json.loads(row["answers"]))
    assert naive < 0.9 * sum(f.valid_calls for f in found.values())


@real
def test_quirk_7_no_call_of_the_corpus_names_an_unknown_tool(found: dict[int, Normalized]) -> None:
    details = [f.rejection.detail for f in found.values() if f.rejection]
    assert not any("no tool is named" in detail for detail in details)


@real
def test_texts_beyond_ascii_survive(rows: dict[int, Any], found: dict[int, Normalized]) -> None:
    queries = [row["query"] for row in rows.values() if not row["query"].isascii()]
    kept = {c.query for f in found.values() for c in f.conversations}
    assert queries
    assert sum(query in kept for query in queries) >= len(queries) - 1


@given(JSON | st.dictionaries(st.sampled_from(["id", "query", "tools", "answers", "answer"]), JSON))
@settings(deadline=None)
def test_no_row_makes_the_reader_raise(row: Any) -> None:
    found = normalize_xlam(row, 5)
    assert found.rejection or found.conversations
    assert found.rejection is None or found.rejection.detail


@given(
    st.lists(st.sampled_from(["query", "tools", "answers"]), min_size=1),
    st.integers(0, 400),
    st.text(max_size=3),
)
@settings(deadline=None)
def test_a_damaged_row_is_refused_or_read_never_lost(keys: list[str], at: int, new: str) -> None:
    row: dict[str, Any] = {
        "id": 3,
        "query": "Weather in Lima?",
        "tools": '[{"name": "f", "description": "", "parameters": {"x": {"type": "str"}}}, '
        '{"name": "g", "description": "}, {\\"name\\": \\"h\\"", "parameters": {}}]',
        "answers": '[{"name": "f", "arguments": {"x": "Lima"}}]',
    }
    for key in keys:
        row[key] = row[key][:at] + new + row[key][at + 1 :]
    found = normalize_xlam(row, 0)
    assert (found.rejection is None) == bool(found.conversations)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["name", "description"]), st.text(), min_size=2), max_size=4
    )
)
def test_cutting_the_list_of_tools_reads_what_json_reads(tools: list[Any]) -> None:
    """The cut between tools is a guess; with texts that look like one it must not show."""
    for tool in tools:
        tool["description"] += '}, {"name": "x"}'
        tool["parameters"] = {"name": {"type": "str", "description": '}, {"name": '}}
    row = {"id": 1, "query": "q", "tools": json.dumps(tools), "answers": "[]", "answer": "No."}
    found = normalize_xlam(row, 0)
    if len({tool["name"] for tool in tools}) == len(tools):
        read = found.conversations[0].tools
        assert [(t.name, t.description) for t in read.values()] == [
            (tool["name"], tool["description"]) for tool in tools
        ]


@given(st.text())
def test_no_type_makes_the_grammar_raise(text: str) -> None:
    schema, optional = type_schema(text)
    Draft202012Validator.check_schema(schema)
    assert isinstance(optional, bool)


@given(
    st.sampled_from(["str", "int", "float", "bool", "List[int]", "set", "Union[int, str]"]), JSON
)
def test_a_default_fits_exactly_if_jsonschema_says_so(spelling: str, default: Any) -> None:
    schema, _ = type_schema(spelling)
    finite = json.dumps(default)
    if "NaN" not in finite and "Infinity" not in finite:
        assert default_fits(schema, default) == Draft202012Validator(schema).is_valid(default)
