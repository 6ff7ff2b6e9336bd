"""The ToolACE reader: each measured quirk, calls with hostile names, and rows broken at will."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from toolpost.core.format import completion_of, parse_answer, prompt_of
from toolpost.core.normalize import Normalized, RefusedError
from toolpost.core.schema import Conversation, Message, ToolCall, ToolSpec
from toolpost.core.toolace import normalize_toolace, scan_calls, toolace_tool
from toolpost.core.verify import verify_call, verify_spec

ROWS = Path(__file__).parents[1].parent / "shared" / "data" / "toolace_rows.json"
MARKER = "Here is a list of functions in JSON format that you can invoke:\n"
CHINESE = "\u4f60\u662f\u5de5\u5177\u8c03\u7528\u65b9\u9762\u7684\u4e13\u5bb6\u3002"
TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}


@cache
def real_rows() -> list[dict[str, Any]]:
    if not ROWS.exists():
        pytest.skip("the shared ToolACE rows are not here")
    rows: list[dict[str, Any]] = json.loads(ROWS.read_text(encoding="utf-8"))
    return rows


@cache
def read_rows() -> list[Normalized]:
    return [normalize_toolace(row, at) for at, row in enumerate(real_rows())]


def listed(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the tools of a real row as they stand there."""
    tools, _ = json.JSONDecoder().raw_decode(row["system"].partition(MARKER)[2])
    return list(tools)


def found(what: str, where: str = "system") -> tuple[dict[str, Any], Normalized]:
    """Give the first real row in normal format that holds a text in its prompt or its answers."""
    for at, row in enumerate(real_rows()):
        said = [turn["value"] for turn in row["conversations"] if turn["from"] == where]
        texts = [row["system"]] if where == "system" else said
        if MARKER in row["system"] and any(what in text for text in texts):
            return row, normalize_toolace(row, at)
    pytest.skip(f"no shared row holds {what!r}")


def made(tools: Any, *turns: tuple[str, str], before: str = "", after: str = "") -> dict[str, Any]:
    """Make a row in the style of ToolACE."""
    role = "You are an expert in composing functions. If not, also point it out.\n"
    text = tools if isinstance(tools, str) else json.dumps(tools)
    end = ". \nShould you decide to return the function call(s). \nNO other text MUST be included."
    return {
        "system": f"{role}{before}{MARKER}{text}{end}{after}",
        "conversations": [{"from": role, "value": value} for role, value in turns],
    }


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "dict", "properties": properties, "required": []}
    return {"name": name, "description": "", "parameters": parameters, "required": None}


def spec(name: str, *parameters: str) -> ToolSpec:
    schema = {"type": "object", "properties": {p: {} for p in parameters}}
    return ToolSpec(name=name, description="", parameters=schema)


def steps(row: Any) -> tuple[Conversation, ...]:
    result = normalize_toolace(row, 0)
    assert result.rejection is None, result.rejection
    return result.conversations


def reason(row: Any) -> str:
    result = normalize_toolace(row, 3)
    assert result.rejection
    assert result.rejection.id == 3
    assert result.rejection.detail
    assert not result.conversations
    return result.rejection.reason


def schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Walk the places where a schema stands, by the rules of JSON Schema."""
    if isinstance(node, dict):
        yield node
        for key in ("properties", "patternProperties", "$defs", "definitions"):
            for inner in node.get(key, {}).values():
                yield from schemas(inner)
        for key in ("items", "additionalProperties", "not", "if", "then", "else", "contains"):
            yield from schemas(node.get(key))
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            for inner in node.get(key, ()):
                yield from schemas(inner)


# The quirks of the facts, section 2, by their numbers.


def test_quirk_1_the_list_of_tools_ends_in_prose() -> None:
    row, result = found("record_audio")
    assert not row["system"].rstrip().endswith("]")
    assert [list(c.tools) for c in result.conversations] == [["record_audio"]]
    nasty = tool("a", b={"type": "string", "description": 'ends in "]. \nShould you decide'})
    assert list(steps(made([nasty], ("user", "Hi"), ("assistant", "Hi")))[0].tools) == ["a"]


def test_quirk_2_a_useless_required_beside_the_parameters() -> None:
    for row, result in zip(real_rows(), read_rows(), strict=True):
        if MARKER not in row["system"]:
            continue
        for raw in listed(row):
            assert raw["required"] is None
            parameters = result.conversations[0].tools[raw["name"]].parameters
            assert parameters.get("required") == raw["parameters"].get("required")


def test_quirk_2_tools_without_required_need_nothing() -> None:
    bare = tool("clock")
    del bare["parameters"]["required"]
    (step,) = steps(made([bare], ("user", "Time?"), ("assistant", "[clock()]")))
    assert step.gold_calls == (ToolCall(name="clock", arguments={}),)


@pytest.mark.parametrize(
    "name", ["(Detailed)", "'s ", "/api/v1/", ", Past Hour", "{id}", "Query for Postal Code"]
)
def test_quirk_3_names_that_are_no_identifiers(name: str) -> None:
    row, result = found(name)
    names = {raw["name"] for raw in listed(row)}
    assert all(set(step.tools) == names for step in result.conversations)


def test_quirk_3_every_real_name_can_be_called() -> None:
    for result in read_rows():
        for step in result.conversations[:1]:
            calls = tuple(ToolCall(name=name, arguments={}) for name in step.tools)
            text = f"[{', '.join(f'{name}()' for name in step.tools)}]"
            assert not calls or scan_calls(text, step.tools) == calls


@pytest.mark.parametrize("key", ["postal-unit", "api-key", "x-user-lang", "$top"])
def test_quirk_3_keys_that_are_no_identifiers(key: str) -> None:
    (step,) = steps(
        made(
            [tool("Get, Sorted {x} (by 'key')", **{key: {"type": "string"}})],
            ("user", "Go"),
            ("assistant", f"[Get, Sorted {{x}} (by 'key')({key}=\"a=b, c)\")]"),
        )
    )
    assert step.gold_calls[0].arguments == {key: "a=b, c)"}


def test_quirk_3_json_and_python_literals_mix() -> None:
    names = "abcdefgh"
    text = (
        "[f(a=true, b=True, c=null, d=None, e='x', f=\"\\u00e9\", "
        "g=[1e3, -.5, (1,)], h={'k': false})]"
    )
    (call,) = scan_calls(text, {"f": spec("f", *names)})
    values = [True, True, None, None, "x", "\u00e9", [1000.0, -0.5, [1]], {"k": False}]
    assert call.arguments == dict(zip(names, values, strict=True))


@pytest.mark.parametrize(
    "value", ["=True", "=False", ": true", ": false", "='", "=-", "\\u", "\\n"]
)
def test_quirk_3_literals_of_real_rows(value: str) -> None:
    _, result = found(value, "assistant")
    assert any(step.gold_calls for step in result.conversations)


def test_quirk_4_odd_formats_are_refused_by_what_they_are() -> None:
    for row, result in zip(real_rows(), read_rows(), strict=True):
        assert (result.rejection is None) == (MARKER in row["system"])
    reasons = Counter(r.rejection.reason for r in read_rows() if r.rejection)
    assert reasons == {"odd_format": 44, "other_language": 4, "no_tool_list": 2}


def test_quirk_4_odd_formats_made() -> None:
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hi"}]
    for system, why in (
        ("Here are the tools you can use:\n<table border='1'>", "odd_format"),
        (CHINESE + "[]", "other_language"),
        ("Ensure the output only contains the tool names.", "no_tool_list"),
        (MARKER + "[{", "bad_tool_list"),
        (MARKER + "{}", "bad_tool_list"),
        (MARKER, "bad_tool_list"),
    ):
        assert reason({"system": system, "conversations": turns}) == why


def test_quirk_5_no_tools_means_no_call() -> None:
    _, result = found(MARKER + "[]")
    (step,) = result.conversations
    assert (step.tools, step.gold_calls) == ({}, ())
    assert step.answer


def test_quirk_5_prose_is_an_answer() -> None:
    answers = [s for r in read_rows() for s in r.conversations if not s.gold_calls]
    assert len(answers) == 267
    assert all(step.answer and step.answer.strip() for step in answers)


def test_quirk_6_type_words_at_every_depth() -> None:
    for result in read_rows():
        for step in result.conversations[:1]:
            for offered in step.tools.values():
                for schema in schemas(offered.parameters):
                    kinds = schema.get("type", [])
                    assert {kinds} <= TYPES if isinstance(kinds, str) else set(kinds) <= TYPES


def test_quirk_6_type_words_inside_any_of() -> None:
    inner = {"anyOf": [{"type": "float"}, {"type": "array", "items": {"type": "dict"}}]}
    read, _ = toolace_tool(tool("f", a=inner, b={"type": ["int", "null"]}))
    kinds = {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "object"}}]}
    assert read.parameters["properties"] == {"a": kinds, "b": {"type": ["integer", "null"]}}


def test_quirk_6_words_that_are_data_or_names_stay() -> None:
    data = {"type": "int", "items": "float"}
    properties: dict[str, dict[str, Any]] = {
        "type": {"type": "dict", "enum": [data], "default": data, "example": data},
        "items": {"type": "string", "enum": ["int", "float"], "default": "int"},
        "required": {"type": "string"},
    }
    read, dropped = toolace_tool(tool("f", **properties))
    kept = read.parameters["properties"]
    assert kept == {**properties, "type": {**properties["type"], "type": "object"}}
    assert dropped == 0


@pytest.mark.parametrize(
    ("kind", "default", "kept"),
    [
        ("float", "0.5", False),
        ("int", "10", False),
        ("boolean", "true", False),
        ("string", None, False),
        ("int", True, False),
        ("int", 1.0, True),
        ("float", 1, True),
        ("string", "", True),
        (["string", "null"], None, True),
        ("any", None, True),
    ],
)
def test_quirk_6_defaults_against_their_type(kind: Any, default: Any, kept: bool) -> None:
    read, dropped = toolace_tool(tool("f", a={"type": kind, "default": default}))
    assert ("default" in read.parameters["properties"]["a"], dropped) == (kept, not kept)


def test_quirk_6_the_real_defaults_that_are_dropped() -> None:
    assert sum(result.dropped_defaults for result in read_rows()) == 55


def test_quirk_7_spoilt_names_stay_as_they_are() -> None:
    row, result = found("upstring", "assistant")
    names = {raw["name"] for raw in listed(row)}
    called = {call.name for step in result.conversations for call in step.gold_calls}
    assert called <= names
    assert "upstring" in json.dumps([step.model_dump() for step in result.conversations])


def test_quirk_8_every_real_call_is_valid() -> None:
    normal = [r for r, row in zip(read_rows(), real_rows(), strict=True) if MARKER in row["system"]]
    assert len(normal) == 911
    assert sum(result.calls for result in normal) == 1618
    assert sum(result.valid_calls for result in normal) == 1618


def test_quirk_8_every_real_call_turn_is_parsed() -> None:
    for row, result in zip(real_rows(), read_rows(), strict=True):
        if result.rejection is None:
            said = [t["value"] for t in row["conversations"] if t["from"] == "assistant"]
            called = [bool(step.gold_calls) for step in result.conversations]
            assert called == [text.startswith("[") for text in said if text.strip()]


def test_quirk_8_a_float_inside_any_of_is_valid() -> None:
    inner = {"anyOf": [{"type": "float"}, {"type": "string"}]}
    row = made([tool("f", a=inner)], ("user", "Go"), ("assistant", "[f(a=0.5)]"))
    assert normalize_toolace(row, 691).valid_calls == 1


# Schemas that are odd in other ways.


def test_required_is_repaired() -> None:
    inner = {"type": "string", "required": True}
    odd = tool("f", a=inner, b={"type": "dict", "properties": {}, "required": None})
    odd["parameters"]["required"] = ["c", "b", "b", 7]
    read, _ = toolace_tool(odd)
    assert read.parameters["required"] == ["b", "a"]
    assert read.parameters["properties"] == {
        "a": {"type": "string"},
        "b": {"type": "object", "properties": {}},
    }


def test_keywords_that_cannot_be_right_are_left_out() -> None:
    odd: dict[str, Any] = {
        "type": "array",
        "items": [],
        "minItems": "2",
        "enum": [],
        "description": None,
    }
    read, _ = toolace_tool(tool("f", a=odd, b="string", c={}))
    assert read.parameters["properties"] == {
        "a": {"type": "array"},
        "b": {"type": "string"},
        "c": {},
    }


@pytest.mark.parametrize(
    "odd",
    [
        None,
        {"name": 1},
        {"name": " "},
        {"name": "f" * 300},
        tool("f", a=None),
        tool("f", a=[1]),
        {"name": "f", "parameters": []},
        {"name": "f", "parameters": {"type": "string"}},
        tool("f", a={"pattern": "("}),
        tool("f", a={"$ref": "https://example.com/schema.json"}),
    ],
)
def test_tools_that_cannot_be_used(odd: Any) -> None:
    with pytest.raises(RefusedError) as why:
        toolace_tool(odd)
    assert why.value.reason in ("bad_tool", "malformed_spec")
    assert reason(made([odd], ("user", "Hi"), ("assistant", "Hi"))) == why.value.reason


def test_two_schemas_of_one_name_are_refused() -> None:
    two = [tool("f", a={"type": "int"}), tool("f", a={"type": "string"})]
    assert reason(made(two, ("user", "Hi"), ("assistant", "Hi"))) == "duplicate_tool"
    assert len(steps(made([two[0], two[0]], ("user", "Hi"), ("assistant", "Hi")))[0].tools) == 1


# Dialogues.

WEATHER = tool("weather", city={"type": "string"})
CALL = ToolCall(name="weather", arguments={"city": "Lima"})
ASK, CALLS = ("user", "Weather in Lima?"), ("assistant", '[weather(city="Lima")]')
RESULT = ("tool", '[{"name": "weather", "results": {"sky": "\\u2600"}}]')


def test_a_dialogue_becomes_steps() -> None:
    talk = (ASK, CALLS, RESULT, ("assistant", "Sunny."), ("user", "Thanks!"), ("assistant", "Bye."))
    first, second, third = steps(made([WEATHER], *talk))
    assert [s.step for s in (first, second, third)] == [0, 1, 2]
    assert (first.query, first.gold_calls, first.answer, first.history) == (
        ASK[1],
        (CALL,),
        None,
        (),
    )
    assert second.history == (
        Message(role="user", content=ASK[1]),
        Message(role="assistant", content="", tool_calls=(CALL,)),
        Message(role="tool", content='{"sky": "\\u2600"}'),
    )
    assert (second.query, second.gold_calls, second.answer) == (ASK[1], (), "Sunny.")
    assert third.query == "Thanks!"
    assert third.history == (*second.history, Message(role="assistant", content="Sunny."))


def test_the_time_is_kept_and_the_instructions_are_not() -> None:
    time = "The current time is 2024-03-01 09:00:00."
    (step,) = steps(made([WEATHER], ASK, CALLS, before=time))
    assert step.history == (Message(role="system", content=time),)
    (plain,) = steps(made([WEATHER], ASK, CALLS, after="\n\n Note: Java 8 SDK syntax."))
    assert plain.history == ()


def test_real_system_messages_are_times_and_dates() -> None:
    said = [s.history[:1] for r in read_rows() for s in r.conversations[:1] if s.history]
    texts = [messages[0].content for messages in said if messages[0].role == "system"]
    assert len(texts) == 530
    when = re.compile(r"The current time is [\d\- :]+\.|Today is [\d-]+, \w+day\.\.")
    assert all(when.fullmatch(text) for text in texts)


def test_several_results_are_several_messages() -> None:
    twice = ("assistant", '[weather(city="Lima"), weather(city="Lima")]')
    results = [{"name": "weather", "results": n} for n in (1, "two")]
    *_, last = steps(
        made([WEATHER], ASK, twice, ("tool", json.dumps(results)), ("assistant", "So."))
    )
    assert [m.content for m in last.history if m.role == "tool"] == ["1", '"two"']


def test_results_that_do_not_match_keep_their_names() -> None:
    results = [{"name": "wether", "results": 1}]
    *_, last = steps(
        made([WEATHER], ASK, CALLS, ("tool", json.dumps(results)), ("assistant", "So."))
    )
    assert json.loads(last.history[-1].content) == results[0]


def test_a_silent_assistant_leaves_no_trace() -> None:
    (step,) = steps(made([WEATHER], ("user", "Hello"), ("assistant", " "), ASK, CALLS))
    assert (step.step, step.query) == (0, ASK[1])
    assert step.history == (Message(role="user", content="Hello"),)


def test_a_last_turn_without_an_answer_is_not_used() -> None:
    assert len(steps(made([WEATHER], ASK, CALLS, RESULT))) == 1
    assert len(steps(made([WEATHER], ASK, CALLS, RESULT, ("user", "And?")))) == 1


@pytest.mark.parametrize(
    ("talk", "why"),
    [
        ([], "bad_turns"),
        ([CALLS], "bad_turns"),
        ([RESULT], "bad_turns"),
        ([("system", "Hi"), ASK, CALLS], "bad_turns"),
        ([ASK, CALLS, CALLS], "bad_turns"),
        ([ASK, ("assistant", "Hm."), RESULT], "bad_turns"),
        ([("user", " "), CALLS], "bad_turns"),
        ([ASK], "no_answer"),
        ([ASK, ("assistant", "")], "no_answer"),
        ([ASK, CALLS, ("tool", "Sunny"), ("assistant", "So.")], "bad_tool_turn"),
        ([ASK, CALLS, ("tool", "[]"), ("assistant", "So.")], "bad_tool_turn"),
        ([ASK, CALLS, ("tool", "[" * 100_000), ("assistant", "So.")], "bad_tool_turn"),
        ([ASK, ("assistant", "Sure: [weather(city='Lima')]")], "bad_call"),
        ([ASK, ("assistant", "weather(city='Lima')")], "bad_call"),
        ([ASK, ("assistant", "[wether(city='Lima')]")], "bad_call"),
        ([ASK, ("assistant", "[weather(city='\\ud800')]")], "bad_call"),
        ([ASK, ("assistant", '[weather(city="\\ud800")]')], "bad_unicode"),
        ([("user", "\ud800"), CALLS], "bad_unicode"),
        ([ASK, ("assistant", "[weather(city=7)]")], "schema_violation"),
        ([ASK] * 1000, "bad_turns"),
        ([ASK, ("assistant", "([weather]=>['city'=Lima])")], "bad_call"),
        ([ASK, ("assistant", '<weather:{"city"-Lima}>')], "bad_call"),
        ([ASK, ("assistant", "{weather|['city'|Lima]}")], "bad_call"),
        ([ASK, ("assistant", '{"name": "weather", "arguments": {"city": "Lima"}}')], "bad_call"),
        ([ASK, ("assistant", "Action: weather (city='Lima')")], "bad_call"),
        ([ASK, ("assistant", "print(functions.weather(city='Lima'))")], "bad_call"),
        ([ASK, ("assistant", "[weather]")], "bad_call"),
    ],
)
def test_dialogues_that_cannot_be_used(talk: list[tuple[str, str]], why: str) -> None:
    assert reason(made([WEATHER], *talk)) == why


@pytest.mark.parametrize(
    "text",
    [
        "[1] According to the report, yes.",
        "[Docs](https://a.b) say so.",
        "The weather (city) is new.",
    ],
)
def test_prose_with_brackets_is_no_call(text: str) -> None:
    (step,) = steps(made([WEATHER], ASK, ("assistant", text)))
    assert (step.gold_calls, step.answer) == ((), text)


@pytest.mark.parametrize("row", [None, 7, "row", [], {}, {"system": ""}, {"conversations": []}])
def test_rows_that_are_no_rows(row: Any) -> None:
    assert reason(row) in ("bad_row", "missing_key", "bad_turns")


def test_real_steps_are_rendered_and_read_back() -> None:
    for result in read_rows():
        for step in result.conversations:
            assert prompt_of(step).endswith("<|im_start|>assistant\n")
            answer = parse_answer(completion_of(step.gold_calls, step.answer))
            assert answer.calls == step.gold_calls
            assert not answer.errors


# The scanner.


@pytest.mark.parametrize(
    "text",
    [
        "[f(a=" + "[" * 100_000,
        "[f(a=" + "[" * 90_000 + "]" * 9_000 + ")]",
        "[f(a=" + "{'k':" * 15_000,
        "[f(a=" + "(" * 70 + ")" * 70 + ")]",
        "[f(a='" + "\\x" * 40_000,
        "[f(a='" + "a" * 90_000,
        '[f(a="' + '\\"' * 40_000,
        "[" * 100_000,
        "[" + "f(a=1), " * 12_000,
        "[f(" + "a=1, " * 15_000 + ")]",
        "[f(a=" + "9" * 90_000 + ")]",
        "[f(a=1" + "0" * 5_000 + ".x)]",
        "[f(a=1e999)]",
        "[f(a=NaN)]",
        "[f(a=-Infinity)]",
        "[f(a=007)]",
        "[f(a='\\U99999999')]",
        "[f(a={'k': 1, 'k': 2})]",
        '[f(a={"k": 1, "k": 2})]',
        "[f(a=1, a=2)]",
        "[f(a=__import__('os').system('true'))]",
        "[f(a=1 + 1)]",
        "[f(a='x' 'y')]",
        "[f(b=1)]",
        "[f(1)]",
        "[f(a=)]",
        "[f(a=1]",
        "[f(a=1) f(a=1)]",
        "[f(a=1)] and more",
        "[f(a=1)",
        "[f]",
        "[]",
        "[",
        "",
    ],
)
def test_hostile_call_texts_are_refused(text: str) -> None:
    with pytest.raises(RefusedError) as why:
        scan_calls(text, {"f": spec("f", "a")})
    assert why.value.reason == "bad_call"
    assert re.match(r"at \d+: ", why.value.detail)
    assert len(why.value.detail) < 400


def test_many_calls_beside_nasty_names_are_read() -> None:
    nasty = "f" + "(" * 200
    tools = {name: spec(name, "a", "=" * 200) for name in ("f", nasty)}
    calls = scan_calls("[" + "f(a=1)," * 9_000 + "]", tools)
    assert len(calls) == 9_000


def test_the_longest_name_wins() -> None:
    tools = {name: spec(name, "a", "a=b") for name in ("f", "f (x)", "f (x), g", "g")}
    text = "[f(a=1), f (x)(a=1), f (x), g(a=b=2), g (a = 1 , )]"
    read = [(call.name, call.arguments) for call in scan_calls(text, tools)]
    one = {"a": 1}
    assert read == [("f", one), ("f (x)", one), ("f (x), g", {"a=b": 2}), ("g", one)]


NASTY = st.text(alphabet="ab ,.()[]{}=/'\"$-\\:\u00e9\U0001f600", min_size=1, max_size=8)
TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=8) | NASTY
NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def python_text(text: str, random: Random) -> str:
    """Write a string as Python would, escaping what has to be and now and then what has not."""
    quote = random.choice("'\"")
    return quote + "".join(escaped(c, quote, random) for c in text) + quote


def escaped(character: str, quote: str, random: Random) -> str:
    code, wild = ord(character), random.random() < 0.1
    if character in (quote, "\\"):
        return f"\\{character}"
    if character in "\n\t\r":
        return repr(character)[1:-1]
    if not wild:
        return character
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def rendered(value: Any, random: Random) -> str:
    """Write a value in a random mix of JSON's and Python's ways."""
    gap = random.choice(["", " "])
    if isinstance(value, list):
        items = f"{gap},{gap}".join(rendered(item, random) for item in value)
        return f"[{items}]" if len(value) == 1 or random.random() < 0.7 else f"({items})"
    if isinstance(value, dict):
        pairs = [f"{rendered(k, random)}{gap}:{gap}{rendered(v, random)}" for k, v in value.items()]
        return "{" + f",{gap}".join(pairs) + "}"
    if isinstance(value, str) and random.random() < 0.5:
        return python_text(value, random)
    return (
        random.choice([json.dumps, repr])(value)
        if not isinstance(value, str)
        else json.dumps(value)
    )


def apart(words: list[str], mark: str) -> bool:
    """Tell whether no word begins like another one with a mark behind it."""
    return not any(
        longer != word
        and re.match(re.escape(word.strip()) + r"\s*" + re.escape(mark), longer.strip())
        for word in words
        for longer in words
    )


@st.composite
def called(draw: st.DrawFn) -> tuple[dict[str, ToolSpec], list[ToolCall]]:
    names = draw(st.lists(NASTY.filter(str.strip), min_size=1, max_size=4, unique_by=str.strip))
    assume(apart(names, "("))
    tools, calls = {}, []
    for name in names:
        keys = draw(st.lists(NASTY.filter(str.strip), max_size=4, unique_by=str.strip))
        assume(apart(keys, "=") and not any(key.lstrip().startswith(")") for key in keys))
        assume(not name.lstrip().startswith("]"))
        tools[name] = spec(name, *keys)
        chosen = draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
        calls.append(ToolCall(name=name, arguments={key: draw(VALUES) for key in chosen}))
    return tools, draw(st.permutations(calls))


@given(called(), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_calls_are_scanned_back_exactly(
    example: tuple[dict[str, ToolSpec], list[ToolCall]], random: Random
) -> None:
    tools, calls = example
    gap = random.choice(["", " ", "\n"])
    texts = [
        f"{call.name}{gap}({gap}"
        + f"{gap},{gap}".join(f"{k}={gap}{rendered(v, random)}" for k, v in call.arguments.items())
        + f"{gap})"
        for call in calls
    ]
    read = scan_calls(f"{gap}[{gap}{f',{gap}'.join(texts)}{gap}]{gap}", tools)
    assert repr(read) == repr(tuple(calls))


@given(st.text(alphabet="[]f(a=1'\"\\x, {}:)Tn.e", max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        calls = scan_calls(f"[f(a={text}", {"f": spec("f", "a")})
    except RefusedError as refused:
        calls, why = (), refused.reason
    else:
        why = ""
    assert bool(calls) == (why == "")
    assert why in ("", "bad_call")


# Everything is total.

WORDS = st.sampled_from(
    ["type", "properties", "items", "required", "enum", "default", "anyOf", "description"]
) | st.sampled_from(
    ["example", "minimum", "optional", "pattern", "minLength", "additionalProperties", "$ref"]
)
KINDS = st.sampled_from(
    ["dict", "float", "int", "list", "string", "boolean", "any", "null", "object", "array", ""]
)
WILD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | KINDS | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
PARAMETER = st.fixed_dictionaries(
    {"type": KINDS | WILD},
    optional={"default": WILD, "enum": WILD, "items": WILD, "minimum": WILD, "description": WILD},
)
PARAMETERS = st.fixed_dictionaries(
    {"type": st.just("dict"), "properties": st.dictionaries(WORDS, PARAMETER | WILD, max_size=4)},
    optional={"required": WILD | st.lists(WORDS), "additionalProperties": WILD},
)


@given(
    st.fixed_dictionaries({"name": st.just("f"), "parameters": PARAMETERS | WILD}), st.booleans()
)
@settings(max_examples=500, deadline=None)
def test_a_tool_passes_verify_spec_or_is_refused(raw: dict[str, Any], small: bool) -> None:
    before = deepcopy(raw)
    try:
        read, dropped = toolace_tool(raw, small=small)
    except RefusedError as refused:
        event(refused.reason)
        return
    assert repr(raw) == repr(before)
    assert dropped >= 0
    assert verify_spec(read).ok, verify_spec(read)
    for schema in read.parameters.get("properties", {}).values():
        if isinstance(schema, dict) and "default" in schema:
            probe = {"type": "object", "properties": {"v": schema}}
            call = ToolCall(name="x", arguments={"v": schema["default"]})
            assert verify_call(call, {"x": ToolSpec(name="x", description="", parameters=probe)}).ok


TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["user", "assistant", "tool"]) | WILD, "value": st.text() | WILD}
)


@given(
    WILD
    | st.fixed_dictionaries({"system": st.text() | WILD, "conversations": st.lists(TURN) | WILD})
)
@settings(max_examples=300, deadline=None)
def test_any_row_becomes_steps_or_a_reason(row: Any) -> None:
    result = normalize_toolace(row, 0)
    assert (result.rejection is None) == bool(result.conversations)


def spoilt(row: Mapping[str, Any], random: Random) -> dict[str, Any]:
    """Break a row in one of the ways that files break."""
    system, turns = row["system"], deepcopy(row["conversations"])
    kind = random.randrange(6)
    if kind == 0:
        system = system[: random.randrange(len(system))]
    elif kind == 1:
        random.shuffle(turns)
    elif kind == 2:
        turn = random.choice(turns)
        turn["value"] = turn["value"][: random.randrange(len(turn["value"]) + 1)]
    elif kind == 3:
        del turns[random.randrange(len(turns))]
    elif kind == 4:
        at = random.randrange(len(system))
        system = system[:at] + random.choice('"[]{},\\\x00\ud800') + system[at + 1 :]
    else:
        turn = random.choice(turns)
        at = random.randrange(len(turn["value"]) + 1)
        turn["value"] = (
            turn["value"][:at] + random.choice("\"'[]{}(),=\\\ud800") + turn["value"][at:]
        )
    return {"system": system, "conversations": turns}


def test_spoilt_real_rows_become_steps_or_a_reason() -> None:
    random = Random(7)
    fates: Counter[str] = Counter()
    for row in real_rows():
        for _ in range(4):
            result = normalize_toolace(spoilt(row, random), 0)
            assert (result.rejection is None) == bool(result.conversations)
            fates[result.rejection.reason if result.rejection else "kept"] += 1
    assert {"kept", "bad_call", "bad_tool_list", "bad_turns", "odd_format"} <= set(fates)
