"""The practice set: the same bytes everywhere, two layouts, values that follow from requests."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from dateutil import parser as dates

from toolpost.bench.bfcl import benchmark_texts
from toolpost.core.augment import Recipe
from toolpost.core.decontaminate import benchmark, contamination
from toolpost.core.schema import Conversation, ToolSpec
from toolpost.core.split import tool_identity
from toolpost.core.toolace import normalize_toolace
from toolpost.core.verify import verify_call
from toolpost.core.xlam import normalize_xlam
from toolpost.data.build import build, conversations, items, normalize_rows
from toolpost.data.pocketset import (
    MIX,
    SERVED,
    Draft,
    Pen,
    draft,
    lot,
    offer,
    request,
    requests,
    rows,
    toolace_row,
    xlam_row,
)
from toolpost.data.survey import asked, describe
from toolpost.data.table import (
    OPTIONAL,
    REPEATED,
    SLOT,
    Tool,
    practice_files,
    read_table,
    slots,
    table,
)
from toolpost.data.values import (
    Value,
    draw,
    in_words,
    is_converted,
    kind_fault,
    options_of,
    parts_of,
    type_of,
)

ROOT = Path(__file__).parents[1]
ROWS = rows(3000, 0)
KINDS = table().kinds


def drafts(count: int, seed: int = 0) -> list[Draft]:
    """Rows without a layout; dialogues are left out."""
    kinds = [lot(index // SERVED, seed).kinds[index % SERVED] for index in range(count)]
    pens = [Pen(table(), random.Random(f"test:{seed}:{index}")) for index in range(count)]
    return [draft(kind, pen) for kind, pen in zip(kinds, pens, strict=True) if kind != "steps"]


def in_xlam(row: dict[str, Any]) -> bool:
    return "query" in row


# The same everywhere


CODE = """
import hashlib, json
from toolpost.data.pocketset import requests, rows
made = [rows(300, 0), list(requests(300, 0))]
print(hashlib.sha256(json.dumps(made, ensure_ascii=False).encode()).hexdigest())
"""
# Of the first rows and requests. Where the words were changed on purpose, take what the test says.
PINNED = "95b0ea26ed5874d4d3ba637cdc16e1e57332bfb9b4c16aa45db722e52ec4e09b"


def sha256_by(python: str, **variables: str) -> str:
    done = subprocess.run(
        [python, "-c", CODE],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("hashseed", ["0", "4242"])
def test_every_process_makes_the_bytes_that_were_committed(hashseed: str) -> None:
    assert sha256_by(sys.executable, PYTHONHASHSEED=hashseed) == PINNED


SHIM = """
import json
class BaseModel:
    def __init__(self, **fields): self.__dict__.update(fields)
    def model_dump_json(self):
        return json.dumps(vars(self), default=vars, separators=(",", ":"), ensure_ascii=False)
def ConfigDict(**_): return {}
def to_json(*_, **__): raise NotImplementedError
"""


@pytest.mark.parametrize("name", ["python3.11", "python3.12", "python3.13", "python3.14"])
def test_other_pythons_make_the_same_bytes(name: str, tmp_path: Path) -> None:
    """With the pure part of PyYAML, and a stand-in for pydantic: nothing compiled is needed."""
    python = shutil.which(name)
    if (
        not python
        or subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"there is no {name}")
    origin = yaml.__file__
    shutil.copytree(Path(origin).parent, tmp_path / "yaml", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "pydantic.py").write_text(SHIM, encoding="utf-8")
    (tmp_path / "pydantic_core.py").write_text(SHIM, encoding="utf-8")
    assert sha256_by(python, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}") == PINNED


def test_a_short_list_is_the_beginning_of_a_long_one() -> None:
    assert rows(100, 0) == ROWS[:100]
    assert rows(100, 1) != ROWS[:100]
    assert list(requests(50, 0)) == list(requests(80, 0))[:50]


# What is said and what is meant, by another reading than the one that wrote it


NUMBERS = {in_words(n): n for n in range(20)} | {in_words(n): n for n in range(20, 100, 10)}


def numeral(text: str) -> int:
    """Read a number in words or digits."""
    if text.isdigit():
        return int(text)
    total, part = 0, 0
    for word in text.replace("-", " ").replace(" and ", " ").split():
        if word == "thousand":
            total, part = total + 1000 * part, 0
        else:
            part = part * 100 if word == "hundred" else part + NUMBERS[word]
    return total + part


def clock(text: str) -> str:
    if text == "noon":
        return "12:00"
    half = "am" if "morning" in text else "pm"
    text = re.sub(r" (in the \w+|at night)$", f" {half}", text)
    if found := re.fullmatch(r"(?:(\S+) (past|to) )?(\S+)(?: o'clock)? (am|pm)", text):
        minutes = {"half": 30, "quarter": 15}.get(found[1]) or numeral(found[1] or "zero")
        if found[3] in NUMBERS:
            hour = NUMBERS[found[3]] % 12 * 60 + (minutes if found[2] != "to" else -minutes)
            whole = hour % 720 + (720 if found[4] == "pm" else 0)
            return f"{whole // 60:02}:{whole % 60:02}"
    return str(dates.parse(text).time())[:5]


def span(text: str) -> int:
    for words, meant in {
        "three quarters of an hour": 45,
        "a quarter of an hour": 15,
        "half an hour": 30,
        "an hour and a half": 90,
    }.items():
        if text == words:
            return meant
    text = text.replace("an hour", "1 hour").replace(" and a half hours", " hours and 30 minutes")
    parts = re.findall(r"(?:^| and )(.+?) (hour|minute)s?(?=$| and )", text)
    assert parts, text
    return sum(numeral(number) * (60 if unit == "hour" else 1) for number, unit in parts)


def price(text: str) -> float:
    found = re.fullmatch(r"\$?([\d.]+)(?: dollars)?(?: and (\d+) cents)?", text)
    assert found, text
    return float(found[1]) + int(found[2] or 0) / 100


def alike(one: Any, other: Any) -> bool:
    """Tell whether two arguments are equal, numbers but for the last digit."""
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)


READINGS: dict[str, Callable[[str], Any]] = {
    "word 1..999999": numeral,
    "day": lambda text: dates.parse(text, fuzzy=True).date().isoformat(),
    "clock": clock,
    "span": span,
    "share 5..40/5": lambda text: float(re.sub(r"%| percent| per cent", "", text)) / 100,
    "share 0.5..9.5/0.5": lambda text: float(re.sub(r"%| percent| per cent", "", text)) / 100,
    "price 2..80": price,
    "count first": lambda text: len(re.split(", | and ", text)),
    "list first": lambda text: re.split(", | and ", text),
    "list 0.5..9.5/0.5": lambda text: [float(part) for part in re.split(", | and ", text)],
    "x1000 0.5..9.5/0.5": lambda text: float(text) * 1000,
    "x7 1..20": lambda text: int(text) * 7,
    "2..10": int,
    "0.5..9.5/0.5": float,
    "first": str,
    "one of low|very_high": lambda text: text.replace(" ", "_"),
}


@pytest.mark.parametrize("kind", READINGS)
def test_what_is_meant_follows_from_what_is_said(kind: str) -> None:
    drawn = [draw(kind, KINDS, Random(seed)) for seed in range(1500)]
    for value in drawn:
        assert alike(READINGS[kind](value.said), value.meant), value
    meant_by: dict[str, Any] = {}
    for value in drawn:
        assert meant_by.setdefault(value.said, value.meant) == value.meant, "said twice, meant once"


def test_numbers_in_words() -> None:
    assert [in_words(n) for n in (0, 21, 100, 105, 340, 1999, 12_000, 400_017)] == [
        "zero",
        "twenty-one",
        "one hundred",
        "one hundred and five",
        "three hundred and forty",
        "one thousand nine hundred and ninety-nine",
        "twelve thousand",
        "four hundred thousand and seventeen",
    ]


TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}


@pytest.mark.parametrize("kind", [*READINGS, "list 1..9", "price 1..5/0.5", "x12 1..2/0.25"])
def test_a_value_has_the_type_of_its_kind(kind: str) -> None:
    for seed in range(200):
        meant, wanted = draw(kind, KINDS, Random(seed)).meant, type_of(kind)
        if kind.startswith("list "):
            assert isinstance(meant, list)
            assert 2 <= len(meant) <= 4
            assert len({str(entry) for entry in meant}) == len(meant)
            wanted, meant = wanted.removeprefix("List[").removesuffix("]"), meant[0]
        assert isinstance(meant, TYPES[wanted])
    assert kind_fault(kind, KINDS) is None


# Requests


def said_by(tool: Tool, template: str, times: int, seed: int) -> tuple[str, list[Any], set[str]]:
    pen = Pen(table(), Random(seed))
    text, own = request(template, tool, times, pen)
    return text, own, pen.used


def test_every_template_says_every_value_it_gives() -> None:
    for tool in table().tools:
        for at, template in enumerate(tool.say):
            times = 2 if "<" in template else 1
            text, own, _ = said_by(tool, template, times, at)
            assert not set(text) & set("{}")
            assert len(own) == times
            for given in own:
                required = {name for name, p in tool.leaves.items() if not p.optional}
                assert required <= set(given) <= set(tool.leaves)
                for name, value in given.items():
                    assert_stands(value, tool.leaves[name].kind, text)


def assert_stands(value: Any, kind: str, text: str) -> None:
    """A value that is not converted stands there as it is, but for a capital and underscores."""
    if kind == "bool" or is_converted(kind):
        return
    for part in value if isinstance(value, list) else [value]:
        inner = kind.removeprefix("list ")
        said = part.replace("_", " ") if options_of(inner) else str(part)
        assert said in text or text.startswith(said[:1].upper() + said[1:]), (said, text)


_ANY = "|".join(sorted(NUMBERS, key=len, reverse=True))
NUMERAL = rf"\b(?:{_ANY})(?:[ -](?:and )?(?:{_ANY}|hundred|thousand)\b)*"
DAY = (
    r"\d{4}-\d\d-\d\d|\d+(?:st|nd|rd|th) of \w+ \d{4}"
    r"|\d+ [A-Z]\w+ \d{4}|[A-Z]\w+ \d+\w*, \d{4}"
)
_PART = r"(?:in the (?:morning|afternoon|evening)|at night)"
CLOCK = (
    rf"\bnoon\b|\d+(?::\d\d)? (?:am|pm|{_PART})|[\w-]+ (?:past|to) \w+ {_PART}"
    rf"|\w+ o'clock {_PART}|\b\d\d:\d\d\b"
)
READ_BACK: dict[str, Callable[[str], list[Any]]] = {
    "word": lambda text: [numeral(n) for n in re.findall(NUMERAL, text)],
    "day": lambda text: [
        dates.parse(d, fuzzy=True).date().isoformat() for d in re.findall(DAY, text)
    ],
    "share": lambda text: [
        float(n) / 100 for n in re.findall(r"(\d+(?:\.\d+)?)(?:%| percent| per cent)", text)
    ],
    "clock": lambda text: [clock(t) for t in re.findall(CLOCK, text)],
}


def test_converted_values_can_be_read_out_of_whole_requests() -> None:
    """A reader who sees only the text finds the argument there."""
    seen = Counter[str]()
    for tool in table().tools:
        for at, template in enumerate(tool.say):
            text, (given,), _ = said_by(tool, template, 1, at)
            for name, value in given.items():
                head = tool.leaves[name].kind.partition(" ")[0]
                if head in READ_BACK and is_converted(tool.leaves[name].kind):
                    found = READ_BACK[head](text[:1].lower() + text[1:])
                    assert any(alike(f, value) for f in found), (text, name, value, found)
                    seen[head] += 1
    assert min(seen[head] for head in READ_BACK) >= 20, seen


def test_no_value_is_said_twice_in_a_request() -> None:
    for tool in table().tools:
        for template in tool.say:
            piece = REPEATED.search(OPTIONAL.sub("", template))
            names = [n for n, _ in slots(piece[1])] if piece else []
            wide = [n for n in names if len(tool.kinds.get(tool.leaves[n].kind, "")) > 9]
            if wide:
                _, own, _ = said_by(tool, template, 3, 1)
                assert len({given[wide[0]] for given in own}) == 3, template


def test_requests_alone_say_the_same_in_other_words() -> None:
    """No tool is named, and the numbers of one wording are those of the other."""
    groups = list(table().groups)[:3]
    of_tools = [
        name for tool in table().tools for name in tool.names if re.search(r"[_.A-Z]", name)
    ]
    named = re.compile("|".join(map(re.escape, of_tools)))
    fixed = {
        number
        for tool in table().tools
        for template in tool.say
        for number in re.findall(r"\d+", SLOT.sub("", template))
    }
    alone = 0
    for entry in requests(2000, 3):
        alone += len(entry) == 1
        assert len(set(entry)) == len(entry) <= 3
        assert not any(named.search(text) or "{" in text for text in entry)
        numbers = [set(re.findall(r"\d+", text)) - fixed for text in entry]
        assert all(found == numbers[0] for found in numbers), entry
    assert 0.05 < alone / 2000 < 0.15
    own = [pattern_of(text) for group in groups for t in table().groups[group] for text in t.say]
    for entry in requests(300, 0, groups):
        if len(entry) > 1:
            texts = [re.sub(r"\b(a)n\b", r"\1", text, flags=re.IGNORECASE) for text in entry]
            assert all(any(p.search(text) for p in own) for text in texts), entry
    with pytest.raises(ValueError, match="there is no group"):
        next(requests(1, 0, ["cooking"]))


# Rows


def test_rows_have_the_keys_of_their_layout() -> None:
    for at, row in enumerate(ROWS):
        own = {"query", "answers", "tools"} if in_xlam(row) else {"system", "conversations"}
        silent = {"answer"} if in_xlam(row) and row["kind"] in ("no tool", "ask") else set()
        assert set(row) == {"id", "group", "kind"} | own | silent
        assert row["id"] == at
        assert row["kind"] in MIX
    layouts = Counter(in_xlam(row) for row in ROWS if row["kind"] != "steps")
    assert abs(layouts[True] / layouts.total() - 0.5) < 0.08
    assert not [row for row in ROWS if in_xlam(row) and row["kind"] == "steps"]


def test_rows_of_a_lot_have_the_same_tools_on_offer() -> None:
    def listed(row: dict[str, Any]) -> str:
        return str(row["tools"] if in_xlam(row) else row["system"])

    lots = [ROWS[at : at + SERVED] for at in range(0, len(ROWS), SERVED)]
    assert all(len(set(map(listed, one))) == 1 for one in lots if one[0]["kind"] != "steps")
    assert {len({row["kind"] == "steps" for row in one}) for one in lots} == {1}
    assert len(set(map(listed, ROWS))) > 0.9 * len(lots)


def test_every_row_is_read_and_verified() -> None:
    account = normalize_rows(items("practice", ROWS))
    assert (account.kept, account.dropped_defaults) == (len(ROWS), 0), account.examples
    split = build(items("practice", ROWS), Recipe(), None, (0.1, 0.1))
    assert set(split.quarantined) <= {"repeated_query", "split_conflict"}, split.examples
    assert split.quarantined.total() < 0.01 * len(ROWS)


def test_both_layouts_hold_the_same() -> None:
    for at, made in enumerate(drafts(600)):
        if not made.calls:
            continue
        (flat,) = normalize_xlam(xlam_row(at, made), at).conversations
        (nested,) = normalize_toolace(toolace_row(at, made), at).conversations
        assert without_tools(flat) == without_tools(nested)
        assert list(flat.tools) == list(nested.tools)
        for name, tool in flat.tools.items():
            other = nested.tools[name]
            assert tool.description == other.description
            assert tool_identity(tool) == tool_identity(other)
            assert set(tool.parameters["required"]) == set(other.parameters["required"])
            for key, schema in tool.parameters["properties"].items():
                assert_same_parameter(schema, other.parameters["properties"][key])


def without_tools(row: Conversation) -> Conversation:
    return row.model_copy(update={"tools": {}, "source": ""})


def assert_same_parameter(flat: dict[str, Any], nested: dict[str, Any]) -> None:
    """What the flat layout has no place for is told in its description."""
    assert flat.get("default") == nested.get("default")
    told = flat["description"]
    assert told.startswith(nested["description"].rstrip("."))
    for option in nested.get("enum", nested.get("items", {}).get("enum", [])):
        assert option in told
    for name, field in nested.get("properties", {}).items():
        assert f"{name} (" in told
        assert all(option in told for option in field.get("enum", []))


def test_calls_differ_and_keep_to_what_is_on_offer() -> None:
    for row in conversations(items("practice", ROWS)):
        assert len({json.dumps(c.model_dump()) for c in row.gold_calls}) == len(row.gold_calls)
        for call in row.gold_calls:
            assert verify_call(call, row.tools).ok
            assert set(call.arguments) <= set(row.tools[call.name].parameters["properties"])


def openings() -> list[tuple[dict[str, Any], Conversation]]:
    """Rows, and the first conversation of each."""
    first: dict[int, Conversation] = {}
    for row in conversations(items("practice", ROWS)):
        first.setdefault(row.id, row)
    return [(row, first[row["id"]]) for row in ROWS]


def test_kinds_are_what_they_are_called() -> None:
    for row, found in openings():
        names = [call.name for call in found.gold_calls]
        kind = row["kind"]
        if kind in ("no tool", "ask"):
            assert not names
            assert found.answer
        elif kind == "one call":
            assert len(names) == 1
        elif kind == "parallel":
            assert len(names) in (2, 3)
            assert len(set(names)) == 1
        elif kind == "several tools":
            assert 2 <= len(set(names)) <= 3
        else:
            assert len(row["conversations"]) > 2


def first_name(tool: str) -> str:
    return next((t.names[0] for t in table().tools if tool in t.names), tool)


def test_a_tool_is_on_offer_under_one_name_only() -> None:
    for row, found in openings():
        if row["kind"] != "steps":
            assert len({first_name(name) for name in found.tools}) == len(found.tools)
            assert 1 <= len(found.tools) <= 6


def test_where_no_tool_fits_the_one_that_was_asked_for_is_missing() -> None:
    """A request whose fixed words are those of one tool's template belongs to that tool."""
    patterns = {
        tool.names[0]: [pattern_of(text) for text in tool.say if is_telling(text)]
        for tool in table().tools
    }
    silent = [(row, found) for row, found in openings() if row["kind"] == "no tool"]
    asked_for = 0
    for _, found in silent:
        query = re.sub(r"\b(a)n\b", r"\1", found.query, flags=re.IGNORECASE)
        offered = {first_name(name) for name in found.tools}
        meant = {n for n, all_ in patterns.items() if any(p.search(query) for p in all_)}
        assert not meant & offered, (found.query, meant & offered)
        asked_for += bool(meant)
    assert 0.7 < asked_for / len(silent) < 0.9  # the others are small talk


def is_telling(template: str) -> bool:
    """Tell whether the fixed words of a template are more than a few that go with anything."""
    return len(re.sub(r"\{[^}]*\}|\[[^]]*\]|\W", "", template)) >= 12


def pattern_of(template: str) -> re.Pattern[str]:
    plain = OPTIONAL.sub("\0", template).replace("<", "").replace(">", "")
    plain = re.sub(r"\{[\w.]+=\w+\}", "", plain)
    parts = re.split(r"(\0|\{[\w.]+\})", plain)
    body = "".join(".*" if part[:1] in ("\0", "{") else re.escape(part) for part in parts)
    return re.compile(re.sub(r"\b(a)n\b", r"\1", body, flags=re.IGNORECASE), re.IGNORECASE)


def test_where_a_value_is_lacking_the_answer_asks_for_it() -> None:
    """It says what the tool list says about one required parameter of a tool on offer."""
    for row, found in openings():
        if row["kind"] == "ask":
            about = [text for tool in found.tools.values() for text in descriptions(tool)]
            assert found.answer
            parts = [part for text in about for part in re.split(r"Fields: |; |\): ", text)]
            assert any(beginning(part) in found.answer.lower() for part in parts if part), (
                found.answer
            )


def descriptions(tool: ToolSpec) -> list[str]:
    properties = tool.parameters["properties"]
    required = [properties[name] for name in tool.parameters["required"]]
    inner = [field for schema in required for field in schema.get("properties", {}).values()]
    return [schema["description"] for schema in [*required, *inner]]


def beginning(text: str) -> str:
    return re.split(r"[.?!]( |$)", text)[0].lower()


def test_answers_vary() -> None:
    answers = Counter(found.answer for row, found in openings() if row["kind"] == "no tool")
    assert len(answers) >= 40
    assert max(answers.values()) < 0.06 * answers.total()
    words = table().texts
    assert len(words["answers"]) + len(words["missing"]) + len(words["chat"]) >= 40
    assert len(words["asking"]) >= 12


def test_the_mix_is_what_it_says() -> None:
    found = describe(ROWS)
    assert sum(MIX.values()) == 100
    for kind, share in MIX.items():
        assert abs(found["kinds"][kind] - share / 100) < 0.03, found["kinds"]
    assert 2 < found["on offer"] < 4


def test_gold_stands_at_every_position_alike() -> None:
    places = Counter[int]()
    for row, found in openings():
        if row["kind"] in ("one call", "parallel") and len(found.tools) == 3:
            places[list(found.tools).index(found.gold_calls[0].name)] += 1
    assert min(places[at] for at in range(3)) > places.total() / 3 * 0.7, places


def test_requests_rarely_repeat() -> None:
    texts = [asked(row)[0] for row in rows(20_000, 5)]
    assert len(set(texts)) >= 0.99 * len(texts), Counter(texts).most_common(5)


def test_the_table_is_wide() -> None:
    tools = table().tools
    assert len(table().domains) >= 25
    assert len(tools) >= 400
    assert len({name for tool in tools for name in tool.names}) == 2 * len(tools)
    assert all(len(shelf) >= 8 for shelf in table().groups.values())
    heads = {p.kind.partition(" ")[0] for tool in tools for p in tool.leaves.values()}
    assert {"one", "list", "word", "day", "clock", "span", "share", "price", "count"} <= heads
    assert any(p.fields for tool in tools for p in tool.takes.values())
    found = describe(ROWS)
    assert {"option", "array", "object", "bool", "larger unit"} <= set(found["arguments"])
    assert found["repeated"] <= 0.01
    assert found["variety"][4] > found["variety"][2] > 100


def test_every_kind_is_used() -> None:
    used = {kind for text in table().texts["small_talk"] for kind, _ in slots(text)}
    for tool in table().tools:
        for p in tool.leaves.values():
            used |= {p.kind, p.kind.partition(" ")[2]}
        used |= {part for texts in tool.kinds.values() for text in texts for part in parts_of(text)}
    known = {kind for tool in table().tools for kind in tool.kinds}
    assert known - used == set()


def test_a_name_has_one_schema_in_each_layout() -> None:
    found: dict[tuple[bool, str], str] = {}
    for row, opening in openings():
        if row["kind"] != "steps":
            for name, tool in opening.tools.items():
                text = tool.model_dump_json()
                assert found.setdefault((in_xlam(row), name), text) == text


def test_rows_fall_into_groups_that_share_no_tool() -> None:
    tools: dict[bytes, str] = {}
    for row in conversations(items("practice", ROWS)):
        group = ROWS[row.id]["group"]
        for tool in row.tools.values():
            assert tools.setdefault(tool_identity(tool), group) == group, tool.name
    found, shelves = {row["group"] for row in ROWS}, table().groups
    assert shelves.keys() <= found
    assert all(name.startswith("service ") for name in found - shelves.keys())
    stands = [stand for at in range(2000) if (stand := lot(at, 0).stand)]
    counts = Counter(table().group_of[stand.tools[0].domain] for stand in stands)
    assert min(counts[name] for name in shelves) > 0.3 * len(stands) / len(shelves)


def test_hardly_anything_is_known_from_the_exam() -> None:
    index = benchmark(*benchmark_texts())
    found = conversations(items("practice", ROWS))
    why = [(row.query, known) for row in found if (known := contamination(row, index))]
    assert len(why) <= 0.001 * len(ROWS), why


def test_names_are_not_those_of_bfcl() -> None:
    """The practice set must not teach the test."""
    package = importlib.util.find_spec("bfcl_eval")
    if package is None or package.origin is None:
        pytest.skip("bfcl-eval is not installed")
    files = sorted((Path(package.origin).parent / "data").glob("**/*.json"))
    assert files
    theirs = " ".join(file.read_text(encoding="utf-8") for file in files)
    ours = [name for tool in table().tools for name in tool.names]
    assert not [name for name in ours if f'"name": "{name}"' in theirs]


# A table that cannot work


SMALL = """
kinds:
  berry: "currants|plums|{colour} grapes"
shelves: [[jam]]
domains:
  jam:
    contexts: [The pot is hot.]
    tools:
      - names: [cook_jam, jam.cook]
        does: Cook jam.
        takes:
          fruit/berries: [berry, What goes into the pot.]
          sugar: [share 30..60/5, Sugar as a fraction.]
          day: [day, "Day, as YYYY-MM-DD."]
          glass: {about: The glasses., fields: {size: [one of small|very_big, How big.]}}
          lid: [bool, Close them., true]
          stir: [2..9, Times an hour., 3]
        say:
          - cook {fruit} with {sugar} sugar on <{day}> in {glass.size} glasses[, {stir} stirs]
          - Please cook {fruit} on {day} with {sugar} sugar{lid=false} in open {glass.size} glasses.
        lacks:
          sugar: ["cook {fruit} on {day} in {glass.size} glasses"]
      - names: [stir_jam, jam.stir]
        does: Stir jam.
        takes: {pot: [list colour, Colours of the pots.], at: [clock, "When, as HH:MM."]}
        say: ["stir <the jam in {pot}> at {at}"]
"""
SHARED = practice_files()["words.yaml"]


def read(small: str) -> None:
    read_table({"words.yaml": SHARED, "jam.yaml": small})


def test_a_small_table_is_read() -> None:
    found = read_table({"words.yaml": SHARED, "jam.yaml": SMALL})
    cook, _ = found.tools
    assert cook.leaves["glass.size"].kind == "one of small|very_big"
    assert found.groups == {"jam": found.tools}
    assert "One of: small, very_big" in offer(cook, 0).xlam
    assert '"enum": ["small", "very_big"]' in offer(cook, 0).toolace
    assert found.texts["frames"]
    text, (given,) = request(cook.say[1], cook, 1, Pen(found, Random(0)))
    assert given["lid"] is False
    assert text.endswith("open very big glasses.") == (given["glass.size"] == "very_big")


IN_COOK, IN_STIR = "jam.yaml: tool 'cook_jam': ", "jam.yaml: tool 'stir_jam': "
REQUEST = f"{IN_COOK}request 'cook "


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("cook {fruit} with", "cook {friut} with", f"{REQUEST}{{friut}}"),
        ("cook {fruit} with", "cook {friut} with", "{friut} is no parameter"),
        ("cook {fruit} with", "cook with", "it does not give 'fruit', which is required"),
        ("cook {fruit} with", "cook <{fruit} with", "a bracket has no partner"),
        ("cook {fruit} with", "cook {fruit} {sugar} with", "it gives 'sugar' twice"),
        ("<{day}>", "{day}<!>", "holds nothing that two calls must"),
        (
            "open {glass.size} glasses.",
            "open {glass.size} jars",
            "a sentence begins with a capital",
        ),
        ("{lid=false}", "{lid}", "a bool only, is written {lid=true}"),
        ("on {day} with", "on {day=true} with", "a bool only, is written {day=true}"),
        ("in {glass.size} glasses[", "in {glass} glasses[", "{glass} is no parameter"),
        ("[berry,", "[flora,", f"{IN_COOK}parameter 'fruit': there is no kind 'flora'"),
        ("[share 30..60/5", "[share 30-60", "'30-60' is no range"),
        ("[2..9,", "[9..2,", "'9..2' holds no number"),
        ("[2..9,", "[word 2..9/0.5,", "cannot be said in words"),
        ("small|very_big", "small", "is no 'one of a|b|c'"),
        ("small|very_big", "small|small", "is no 'one of a|b|c'"),
        (
            "list colour",
            "list list colour",
            f"{IN_STIR}parameter 'pot': there is no 'list' of 'list",
        ),
        ("an hour., 3]", "an hour., three]", "'stir': the default 'three' is no 2..9"),
        ("Close them., true]", "Close them., 1]", "'lid': the default 1 is no bool"),
        ("as YYYY-MM-DD", "please", "parameter 'day': it is a day, so its description must say"),
        ("as HH:MM", "at last", "parameter 'at': it is a clock, so its description must say"),
        ("Cook jam.", "Cook jam.\n        goes: x", f"{IN_COOK}a tool has no 'goes'"),
        ("        does: Stir jam.\n", "", f"{IN_STIR}a tool has names, does, takes and say"),
        ("[bool, Close them., true]", "[bool, Close, them., true]", "lack its quotes?"),
        ("fields: {size", "feilds: {size", "it is not written {about: ..., fields: ...}"),
        ("          stir: [2", "          sugar/stir: [2", "two parameters share the name 'sugar'"),
        ("[cook_jam, jam.cook]", "[cook_jam]", "are not two names"),
        ("[cook_jam, jam.cook]", "[cook_jam, jam-cook]", "are not two names"),
        ("[cook_jam, jam.cook]", "[cook_jam, jam.stir]", "tool 'jam.stir': the name is used twice"),
        ('          sugar: ["cook', '          sweet: ["cook', "lacks: 'sweet' is no required"),
        ('          sugar: ["cook', '          stir: ["cook', "lacks: 'stir' is no required"),
        ('on {day} in {glass.size} glasses"', '{sugar}"', "'sugar', which it must leave out"),
        ('on {day} in {glass.size} glasses"', 'on {day}"', "it does not give 'glass.size'"),
        ("What goes into the pot.", "The default is plums.", "its description speaks of a default"),
        ("{colour} grapes", "{shade} grapes", "jam.yaml: kind 'berry': there is no kind 'shade'"),
        ("  berry:", "  colour:", "jam.yaml: kind 'colour': words.yaml has it already"),
        ("  berry:", "  clock:", "kind 'clock': the name is taken"),
        ("currants|", "currants||", "kind 'berry': an alternative is empty"),
        ("[[jam]]", "[[jelly]]", "shelves: there is no domain 'jelly'"),
        ("[[jam]]", "[[]]", "shelves: domain 'jam' stands on 0 shelves, not on one"),
        ("[[jam]]", "[[jam], [jam]]", "domain 'jam' stands on 2 shelves, not on one"),
        ("domains:", "domain:", "jam.yaml: it must hold domains, shelves"),
        ("[bool, Close", "[bool, [Close", "jam.yaml: while parsing"),
    ],
)
def test_a_broken_table_is_refused_by_name(good: str, bad: str, message: str) -> None:
    assert SMALL.count(good) >= 1
    with pytest.raises(ValueError, match="jam") as caught:
        read(SMALL.replace(good, bad, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (
            "{town_a}{town_b}",
            "{town_z}{town_b}",
            "words.yaml: kind 'town': there is no kind 'town_z'",
        ),
        ("small_talk:\n", "small_talk:\n  - Hello {nobody}.\n", "small_talk 'Hello {nobody}.'"),
        ("asking:\n", "asked:\n", "words.yaml: it must hold kinds, frames"),
    ],
)
def test_faults_of_the_shared_words_are_named_too(good: str, bad: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_table({"words.yaml": SHARED.replace(good, bad), "jam.yaml": SMALL})


def test_a_domain_stands_in_one_file() -> None:
    with pytest.raises(ValueError, match="domain 'jam': another file has it already"):
        read_table({"words.yaml": SHARED, "jam.yaml": SMALL, "more.yaml": SMALL})


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="cannot be used") as caught:
        read(SMALL.replace("[berry,", "[flora,").replace("small|very_big", "small"))
    assert str(caught.value).count("\n") == 2


def test_types_are_spelt_as_in_xlam() -> None:
    kinds = ["bool", "2..10", "0.5..9.5/0.5", "list food", "food", "day", "span", "x1000 1..2/0.5"]
    assert [type_of(kind) for kind in kinds] == [
        "bool",
        "int",
        "float",
        "List[str]",
        "str",
        "str",
        "int",
        "int",
    ]
    assert draw("x1000 1..2/0.5", KINDS, Random(1)) in [
        Value(said, meant) for said, meant in (("1", 1000), ("1.5", 1500), ("2", 2000))
    ]
