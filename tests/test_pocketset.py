"""The practice set: the same bytes everywhere, the layout of xLAM, values that can be copied."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from toolpost.core.split import tool_identity
from toolpost.data.build import conversations, items
from toolpost.data.pocketset import MIX, describe, kind_of, read_table, rows, table, type_of

ROWS = rows(2000, 0)
TEXT = (resources.files("toolpost") / "data" / "pocket_tools.yaml").read_text(encoding="utf-8")
PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "List[str]": list,
}


def _tools(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {tool["name"]: tool for tool in json.loads(row["tools"])}


def _calls(row: dict[str, Any]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = json.loads(row["answers"])
    return calls


@pytest.mark.parametrize("hashseed", ["0", "4242"])
def test_every_process_makes_the_same_bytes(hashseed: str) -> None:
    code = (
        "import hashlib, json; from toolpost.data.pocketset import rows;"
        "print(hashlib.sha256(json.dumps(rows(300, 0), ensure_ascii=False).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": hashseed},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    here = hashlib.sha256(json.dumps(ROWS[:300], ensure_ascii=False).encode()).hexdigest()
    assert done.stdout.strip() == here


def test_a_short_list_is_the_beginning_of_a_long_one() -> None:
    assert rows(100, 0) == ROWS[:100]
    assert rows(100, 1) != ROWS[:100]


def test_rows_have_the_layout_of_xlam() -> None:
    for at, row in enumerate(ROWS):
        calls, listed = _calls(row), json.loads(row["tools"])
        assert row["id"] == at
        named = {"id", "group", "query", "answers", "tools"}
        assert set(row) == named | (set() if calls else {"answer"})
        assert 1 <= len(listed) <= 4
        assert len(_tools(row)) == len(listed), "two tools share a name"
        for tool in listed:
            assert set(tool) == {"name", "description", "parameters"}
            for entry in tool["parameters"].values():
                assert ("default" in entry) == entry["type"].endswith(", optional")
                assert entry["type"].removesuffix(", optional") in PYTHON_TYPES


def test_calls_keep_to_the_tools_on_offer() -> None:
    for row in ROWS:
        tools, calls = _tools(row), _calls(row)
        assert len({json.dumps(call) for call in calls}) == len(calls), row["query"]
        for call in calls:
            parameters = tools[call["name"]]["parameters"]
            required = {n for n, p in parameters.items() if not p["type"].endswith(", optional")}
            assert required <= set(call["arguments"]) <= set(parameters)
            for name, value in call["arguments"].items():
                wanted = parameters[name]["type"].removesuffix(", optional")
                assert isinstance(value, PYTHON_TYPES[wanted]), (row["query"], name)
                assert isinstance(value, bool) == (wanted == "bool")


def test_values_stand_in_the_request() -> None:
    for row in ROWS:
        for call in _calls(row):
            for value in call["arguments"].values():
                if not isinstance(value, bool):
                    for part in value if isinstance(value, list) else [value]:
                        assert str(part) in row["query"], (row["query"], part)


def _origin(row: dict[str, Any]) -> set[str]:
    """The tools of the table, by first name, that are on offer in a row."""
    shown = {name: tool.names[0] for tool in table().tools for name in tool.names}
    return {shown[name] for name in _tools(row)}


def test_a_tool_is_on_offer_under_one_name_only() -> None:
    assert all(len(_origin(row)) == len(_tools(row)) for row in ROWS)


def test_where_no_tool_fits_the_one_that_was_asked_for_is_missing() -> None:
    """A request whose fixed words are those of one tool's template belongs to that tool."""
    patterns: dict[str, list[re.Pattern[str]]] = {}
    for tool in table().tools:
        for template in tool.say:
            plain = re.sub(r"\[[^\]]*\]", "\0", template).replace("<", "").replace(">", "")
            plain = re.sub(r"\{\w+=\w+\}", "", plain)
            parts = re.split(r"(\0|\{\w+\})", plain)
            body = "".join(".*" if part[:1] in ("\0", "{") else re.escape(part) for part in parts)
            patterns.setdefault(tool.names[0], []).append(re.compile(body, re.IGNORECASE))
    silent = [row for row in ROWS if not _calls(row)]
    asked = 0
    for row in silent:
        query = re.sub(r"\ban\b", "a", row["query"])
        meant = {n for n, found in patterns.items() if any(p.search(query) for p in found)}
        assert not meant & _origin(row), (row["query"], meant)
        asked += bool(meant)
    assert 0.6 < asked / len(silent) < 0.9  # the others are small talk


def test_the_mix_is_what_it_says() -> None:
    kinds = describe(ROWS)["kinds"]
    assert sum(MIX.values()) == 100
    assert all(abs(kinds[kind] - share / 100) < 0.035 for kind, share in MIX.items()), kinds


def test_gold_stands_at_every_position_alike() -> None:
    places = [0] * 4
    for row in ROWS:
        if kind_of(row) in ("one call", "parallel") and len(_tools(row)) == 4:
            places[list(_tools(row)).index(_calls(row)[0]["name"])] += 1
    assert min(places) > sum(places) / 4 * 0.5, places


def test_requests_rarely_repeat() -> None:
    assert describe(ROWS)["queries"] >= 0.99 * len(ROWS)


def test_the_table_is_wide() -> None:
    names = [name for tool in table().tools for name in tool.names]
    assert len(names) >= 150
    assert len(table().domains) >= 15


def test_a_name_has_one_schema() -> None:
    found: dict[str, str] = {}
    for row in ROWS:
        for name, tool in _tools(row).items():
            assert found.setdefault(name, json.dumps(tool)) == json.dumps(tool)


def test_rows_fall_into_as_many_groups_as_there_are_shelves() -> None:
    """What a split by tool needs: groups of rows that share no tool."""
    made = conversations(items("practice", ROWS))
    assert len(made) == len(ROWS), "every row passes the checks of real rows"
    groups: list[tuple[set[bytes], int]] = []  # tools, and the number of rows
    for row in made:
        tools, count = {tool_identity(tool) for tool in row.tools.values()}, 1
        for group in [g for g in groups if g[0] & tools]:
            groups.remove(group)
            tools, count = tools | group[0], count + group[1]
        groups.append((tools, count))
    assert len(groups) == len(table().shelves)
    assert len({row["group"] for row in ROWS}) == len(groups)
    assert min(count for _, count in groups) > 0.5 * len(ROWS) / len(groups)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("there is in <{place}>", "there is in <{plaec}>", "{plaec} is no parameter"),
        ("there is in <{place}>", "there is", "it does not give 'place', which is required"),
        ("there is in <{place}>", "there is in <{place}", "a bracket has no partner"),
        ("there is in <{place}>", "in {place} there is in <{place}>", "it gives 'place' twice"),
        ("there is in <{place}>", "there is in {place}<!>", "holds nothing that two calls must"),
        ("there is in <{place}>", "there is in <{place}>.", "a sentence begins with a capital"),
        ("check how much pollen from {plant}", "check {plant=true} and", "a bool only"),
        ("plant/source: [plant,", "plant/source: [flora,", "there is no kind 'flora'"),
        ("plant/source:", "plant/place:", "two parameters share a name"),
        ("[pollen_level, weather.pollen]", "[pollen_level, menu_of]", "the name is used twice"),
    ],
)
def test_a_broken_table_is_refused_with_the_name_of_the_tool(
    good: str, bad: str, message: str
) -> None:
    assert TEXT.count(good) == 1
    with pytest.raises(ValueError, match=r"tool '(pollen_level|menu_of)'") as caught:
        read_table(TEXT.replace(good, bad))
    assert message in str(caught.value)


def test_faults_outside_the_tools_are_named_too() -> None:
    with pytest.raises(ValueError, match="kind 'town': there is no kind 'town_z' above it"):
        read_table(TEXT.replace('town: "{town_a}{town_b}"', 'town: "{town_z}{town_b}"'))
    with pytest.raises(ValueError, match="every domain stands on one shelf"):
        read_table(TEXT.replace("  - [weather, pets]\n", ""))
    with pytest.raises(ValueError, match=r"'days': 'three' is no 2\.\.10"):
        read_table(TEXT.replace("[2..10, Days ahead., 3]", "[2..10, Days ahead., three]"))


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


def test_types_are_spelt_as_in_xlam() -> None:
    kinds = ["bool", "2..10", "0.5..9.5/0.5", "1..2/0.5", "list food", "food"]
    assert [type_of(k) for k in kinds] == ["bool", "int", "float", "float", "List[str]", "str"]
