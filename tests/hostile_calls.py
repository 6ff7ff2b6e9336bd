"""Hostile tools and calls, each judged in a process of its own under a limit of memory.

As a script it judges them all and prints a line for each: name, result, detail, CPU seconds.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from toolpost.core.schema import ToolCall, ToolSpec, VerificationResult
from toolpost.core.schema import VerificationOutcome as Outcome
from toolpost.core.verify import verify_call, verify_text

MEMORY = 512 * 2**20  # bytes of address space, imports included
Judge = Callable[[], VerificationResult]
MALFORMED, VIOLATION = Outcome.MALFORMED_SPEC, Outcome.SCHEMA_VIOLATION


class Case(NamedTuple):
    """What is judged and what has to come out."""

    prepare: Callable[[], Judge]
    result: Outcome


CASES: dict[str, Case] = {}


def calls(result: Outcome, name: str, arguments: Any = None, **parameters: Any) -> None:
    """Add a case; what is given as a function is made in the child."""

    def prepare() -> Judge:
        schema = {k: v() if callable(v) else v for k, v in parameters.items()}
        values = arguments() if callable(arguments) else arguments
        tool = ToolSpec(name="f", description="", parameters={"type": "object", **schema})
        call = ToolCall(name="f", arguments=values or {})
        return lambda: verify_call(call, {"f": tool})

    CASES[name] = Case(prepare, result)


def of_v(result: Outcome, name: str, schema: Any, value: Any, **more: Any) -> None:
    """Add a case about one argument, `v`."""
    calls(
        result,
        name,
        lambda: {"v": value() if callable(value) else value},
        properties=lambda: {"v": schema() if callable(schema) else schema},
        **more,
    )


def text(
    result: Outcome, name: str, call: Any = '{"name": "f", "arguments": {}}', tools: Any = "[]"
) -> None:
    """Add a case of two texts."""

    def prepare() -> Judge:
        read = [part() if callable(part) else part for part in (call, tools)]
        return lambda: verify_text(read[0], read[1])

    CASES["text: " + name] = Case(prepare, result)


def nested(depth: int, key: str = "a", leaf: Any = 1) -> Any:
    value = leaf
    for _ in range(depth):
        value = {key: value}
    return value


def lists(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def circle() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def chain(length: int, link: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Give definitions each of which refers to the next."""
    found = {str(n): link({"$ref": f"#/$defs/{n + 1}"}) for n in range(length)}
    return {**found, str(length): {"type": "integer"}}


TWICE = {"n": {"allOf": [{"properties": {"c": {"$ref": "#/$defs/n"}}}] * 2}}
FIRST = {"$ref": "#/$defs/0"}
AB = "ab" * 40_000

# patterns
of_v(VIOLATION, "catastrophic pattern", {"pattern": "^(a+)+$"}, "a" * 50_000 + "!")
of_v(VIOLATION, "catastrophic look-ahead", {"pattern": "^(?=(a+)+$)a"}, "a" * 50_000 + "!")
of_v(MALFORMED, "back reference", {"pattern": r"^(a+)+\1$"}, "a" * 50_000 + "!")
of_v(MALFORMED, "pattern of a billion states", {"pattern": "((a{1000}){1000}){1000}"}, "a")
of_v(MALFORMED, "pattern with many states", {"pattern": "a[ab]{2400}[c-e]"}, AB)
of_v(
    MALFORMED,
    "many patterns",
    lambda: {"allOf": [{"pattern": f"a[ab]{{{n}}}c"} for n in range(95)]},
    AB,
)
of_v(MALFORMED, "wide classes", {"pattern": r"[\w\W]{70}\w{50}\d{20}q"}, "é" * 50_000)
of_v(
    MALFORMED,
    "a class of all characters, without case",
    {"pattern": "(?i)" + "[\0-\U0010ffff]" * 20},
    "a",
)
of_v(MALFORMED, "deep pattern", {"pattern": "(" * 100_000}, "a")
of_v(VIOLATION, "python-only pattern", {"pattern": r"(?P<x>a)\Z"}, "a\n")
calls(
    VIOLATION,
    "many patternProperties",
    lambda: {f"k{n}": n for n in range(5_000)},
    patternProperties=lambda: {f"^k{n}[0-9]*x": {} for n in range(400)},
)
# just inside the limits, so that the engine runs
of_v(VIOLATION, "inside: many states", {"pattern": "a[ab]{1500}[c-e]"}, AB[:9_000])
of_v(
    VIOLATION,
    "inside: many patterns",
    lambda: {"anyOf": [{"pattern": f"a[ab]{{{n}}}[c-e]"} for n in range(50)]},
    AB[:9_000],
)
of_v(MALFORMED, "outside: wide classes", {"pattern": r"\w{150}-"}, "é" * 10_000)
of_v(VIOLATION, "inside: wide classes", {"pattern": r"\w{60}-"}, "é" * 10_000)
of_v(
    VIOLATION, "inside: wide classes, wide letters", {"pattern": r"\w{60}-"}, "\U00020000" * 10_000
)
of_v(
    MALFORMED,
    "many patterns that are allowed one by one",
    lambda: {"allOf": [{"pattern": rf"\w{{60}}{n}"} for n in range(700)]},
    "a",
)
calls(Outcome.VALID, "no arguments for a schema without end", {}, properties={"l": {"$ref": "#"}})
of_v(MALFORMED, "pattern 400 deep", {"pattern": "(" * 400 + ")" * 400}, "a")
of_v(
    VIOLATION,
    "many schemas for many values",
    lambda: {"$ref": "#/$defs/n"},
    lambda: [0] * 90_000,
    **{"$defs": lambda: {"n": {"prefixItems": [True, {"$ref": "#/$defs/n"}] * 1_500}}},
)
of_v(
    MALFORMED,
    "one place, many spellings",
    {"allOf": [{"$ref": f"#/$defs/big/allOf/{'0' * n}1"} for n in range(200)]},
    1,
    **{"$defs": lambda: {"big": {"allOf": [{}, {"required": [f"k{n}" for n in range(3_000)]}]}}},
)
of_v(
    VIOLATION,
    "inside: enum",
    lambda: {"items": {"not": {"enum": [f"é{n}" for n in range(900)]}}},
    lambda: [*["é-"] * 2_000, "é7"],
)
of_v(
    VIOLATION,
    "inside: anyOf",
    lambda: {"items": {"anyOf": [{"const": n, "type": "integer"} for n in range(1, 300)]}},
    lambda: [0] * 4_000,
)
of_v(
    VIOLATION,
    "inside: contains",
    lambda: {"anyOf": [{"contains": {"const": -n}, "minContains": 2} for n in range(1, 300)]},
    lambda: [0] * 1_500,
)
of_v(
    Outcome.VALID,
    "inside: fractions",
    lambda: {"items": {"allOf": [{"multipleOf": 0.5}] * 48}},
    lambda: [1e300] * 900,
)
of_v(
    VIOLATION,
    "inside: explained",
    lambda: {"anyOf": [{"anyOf": [{"const": n}] * 12} for n in range(30)]},
    lambda: nested(60, leaf=[0] * 50),
)
# references
calls(MALFORMED, "reference to itself", {}, **{"$ref": "#"})
calls(MALFORMED, "allOf itself", {}, allOf=[{"$ref": "#"}])
of_v(
    MALFORMED, "mutual references", FIRST, 1, **{"$defs": {"0": {"$ref": "#/$defs/1"}, "1": FIRST}}
)
of_v(MALFORMED, "not itself", FIRST, 1, **{"$defs": {"0": {"not": FIRST}}})
of_v(MALFORMED, "http reference", {"$ref": "http://127.0.0.1:9/schema"}, 1)
of_v(MALFORMED, "file reference", {"$ref": "file:///etc/passwd"}, 1)
of_v(MALFORMED, "reference by name of a file", {"$ref": "etc/passwd#/x"}, 1)
of_v(MALFORMED, "urn reference", {"$ref": "urn:uuid:deadbeef-1234-1234-1234-4321feebdaed"}, 1)
of_v(MALFORMED, "id that moves references", {"$id": "http://127.0.0.1:9/", "$ref": "x"}, 1)
of_v(MALFORMED, "dynamic reference", {"$dynamicRef": "#x", "$dynamicAnchor": "x"}, 1)
of_v(MALFORMED, "reference to data", {"$ref": "#/properties/v/const", "const": {"type": 5}}, 1)
of_v(MALFORMED, "reference to nothing", {"$ref": "#/$defs/none"}, 1)
DOUBLED = {"$defs": lambda: chain(40, lambda s: {"allOf": [s, s]})}
of_v(MALFORMED, "allOf doubled 40 times", FIRST, 1, **DOUBLED)
INSIDE = {"$defs": lambda: chain(40, lambda s: {"properties": {"a": s, "b": s}})}
of_v(VIOLATION, "properties doubled 40 times", FIRST, lambda: nested(41), **INSIDE)
ROW = {"$defs": lambda: chain(120, lambda s: {"anyOf": [s]})}
of_v(Outcome.VALID, "inside: 120 references in a row", FIRST, 1, **ROW)
LONG = {"$defs": lambda: chain(2_000, lambda s: {"anyOf": [s]})}
of_v(MALFORMED, "2,000 references in a row", FIRST, 1, **LONG)
of_v(
    VIOLATION,
    "recursion that doubles",
    {"$ref": "#/$defs/n"},
    lambda: nested(60, "c"),
    **{"$defs": TWICE},
)
# depth and size
of_v(MALFORMED, "schema 100,000 deep", lambda: nested(100_000, "not", {}), 1)
calls(VIOLATION, "arguments 100,000 deep", lambda: {"x": nested(100_000)}, properties={"x": {}})
calls(VIOLATION, "list 100,000 deep", lambda: {"x": lists(100_000)}, properties={"x": {}})
calls(VIOLATION, "list that holds itself", lambda: {"x": circle()}, properties={"x": {}})
calls(MALFORMED, "schema that holds itself", {}, examples=circle)
of_v(VIOLATION, "ten million numbers", {"items": {"type": "integer"}}, lambda: [0] * 10_000_000)
of_v(VIOLATION, "a long string", {"minLength": 1}, lambda: "é" * 20_000_000)
of_v(
    VIOLATION,
    "big enum, big list",
    lambda: {"items": {"enum": list(range(9_000))}},
    lambda: [-1] * 90_000,
)
of_v(
    VIOLATION,
    "many contains",
    lambda: {"allOf": [{"contains": {"const": -n}, "minContains": 2} for n in range(1, 900)]},
    lambda: [0] * 40_000,
)
of_v(
    Outcome.VALID,
    "unique objects",
    {"uniqueItems": True},
    lambda: [{"a": [n]} for n in range(20_000)],
)
of_v(
    VIOLATION,
    "many fractions",
    {"items": {"allOf": [{"multipleOf": 0.1}] * 400}},
    lambda: [0.3] * 40_000,
)
of_v(Outcome.VALID, "fraction that overflows", {"multipleOf": 5e-324}, 10**300)
of_v(
    VIOLATION,
    "anyOf in anyOf",
    lambda: {"anyOf": [{"anyOf": [{"anyOf": [{"const": n}] * 12}] * 12} for n in range(9)]},
    lambda: {"k": "x" * 90_000},
)
DATED: Any = {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {"minProperties": 1}}
of_v(Outcome.VALID, "if in if", lambda: nested(20, "else", DATED), lambda: {"c": 1})
of_v(MALFORMED, "unevaluatedProperties", {"unevaluatedProperties": False}, lambda: {"c": 1})
# what JSON does not have
of_v(VIOLATION, "integer of 100,000 digits", {"type": "integer"}, lambda: 10**100_000)
of_v(MALFORMED, "integer of 100,000 digits in the schema", lambda: {"maximum": 10**100_000}, 1)
of_v(VIOLATION, "NaN", {"type": "number"}, float("nan"))
of_v(MALFORMED, "infinity in the schema", {"maximum": float("inf")}, 1)
of_v(VIOLATION, "lone surrogate", {"type": "string"}, "\ud800")
calls(VIOLATION, "lone surrogate as a key", {"\ud800": 1}, additionalProperties=True)
of_v(MALFORMED, "lone surrogate in an enum", {"enum": ["\udfff"]}, "a")
of_v(VIOLATION, "bytes", {}, b"x")
of_v(VIOLATION, "a set", {}, lambda: {1, 2})
of_v(VIOLATION, "keys that are no strings", {}, {1: 2, None: 3})
# malformed tools
calls(MALFORMED, "a type of Python", {}, type="dict")
of_v(MALFORMED, "unknown type", {"type": "flux"}, 1)
of_v(MALFORMED, "draft 4", {"minimum": 3, "exclusiveMinimum": True}, 4)
calls(
    Outcome.VALID,
    "names of the language",
    {"__proto__": 1, "": 2},
    properties={"__proto__": {}, "": {}},
)
calls(
    Outcome.VALID,
    "an unknown dialect",
    {},
    **{"$schema": "http://127.0.0.1:9/", "$vocabulary": {"x:y": True}},
)
# texts
F = '[{"name": "f", "parameters": {"type": "object", "properties": {"v": {}}}}]'
text(Outcome.UNPARSEABLE, "key twice", '{"name": "f", "name": "g", "arguments": {}}', F)
text(Outcome.UNPARSEABLE, "argument twice", '{"name": "f", "arguments": {"v": 1, "v": 2}}', F)
text(Outcome.UNPARSEABLE, "NaN", '{"name": "f", "arguments": {"v": NaN}}', F)
text(
    Outcome.UNPARSEABLE,
    "infinity by a large exponent",
    '{"name": "f", "arguments": {"v": 1e999}}',
    F,
)
text(VIOLATION, "lone surrogate", '{"name": "f", "arguments": {"v": "\\ud800"}}', F)
text(
    Outcome.UNKNOWN_TOOL,
    "lone surrogate as the name",
    '{"name": "\\ud800", "arguments": {"v": 1}}',
    F,
)
text(
    Outcome.UNPARSEABLE,
    "integer of 10,000 digits",
    lambda: f'{{"name":"f","arguments":{{"v":{"9" * 10_000}}}}}',
    F,
)
text(
    Outcome.UNPARSEABLE,
    "integer of 100,000 digits",
    lambda: f'{{"name":"f","arguments":{{"v":{"9" * 100_000}}}}}',
    F,
)
text(Outcome.UNPARSEABLE, "100,000 brackets", "[" * 100_000, F)
text(Outcome.UNPARSEABLE, "50,000 pairs of brackets", "[" * 49_999 + "]" * 49_999, F)
text(Outcome.UNPARSEABLE, "truncated", '{"name": "f", "arguments": {"v": ', F)
text(Outcome.UNPARSEABLE, "too long", lambda: " " * 10_000_000, F)
text(Outcome.UNPARSEABLE, "no call", "3", F)
text(Outcome.UNPARSEABLE, "empty", "", F)
text(MALFORMED, "tools truncated", tools="[{")
text(MALFORMED, "tools 100,000 deep", tools=lambda: '{"a":' * 20_000)
text(MALFORMED, "a tool without parameters", tools='[{"name": "f"}]')
text(MALFORMED, "two tools of one name", tools=lambda: f"[{F[1:-1]}, {F[1:-1]}]")
text(
    Outcome.UNKNOWN_TOOL,
    "a tool that is never called",
    tools='[{"name": "g", "parameters": {"type": "dict"}}]',
)


def _patterned(count: int) -> str:
    """Give tools whose patterns are dear, each another one."""
    schemas = [
        {"type": "object", "properties": {"v": {"pattern": rf"\w{{60}}{n}"}}} for n in range(count)
    ]
    return json.dumps([{"name": f"f{n}", "parameters": s} for n, s in enumerate(schemas)])


text(
    VIOLATION, "700 tools with patterns", '{"name": "f0", "arguments": {"v": ""}}', _patterned(700)
)
text(
    VIOLATION,
    "every one of 32 calls needs another pattern",
    lambda: json.dumps(
        [{"name": f"f{n}", "arguments": {"v": "a" * 60 + str(n)}} for n in range(31)]
        + [{"name": "f31", "arguments": {"v": ""}}]
    ),
    _patterned(32),
)
text(Outcome.UNPARSEABLE, "33 calls", lambda: json.dumps([{"name": "f", "arguments": {}}] * 33), F)


def _judged(name: str) -> dict[str, Any]:
    judge = CASES[name].prepare()
    start = time.process_time()
    verdict = judge()
    seconds = time.process_time() - start
    found = {"name": name, "result": str(verdict.result), "detail": verdict.detail}
    return {**found, "seconds": seconds}


def main() -> None:
    """Judge each case in a fork of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for name in CASES:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(json.dumps(_judged(name)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"name": name, "died": status}), flush=True)


if __name__ == "__main__":
    main()
