"""The desk's tools: right where an oracle can tell, and harmless whatever a model writes."""

import calendar
import hashlib
import math
import re
import sqlite3
from collections.abc import Iterator
from datetime import date, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from toolpost.core.schema import ToolCall
from toolpost.core.verify import verify_call, verify_spec
from toolpost.serve.tools import (
    DESK,
    DeskError,
    ToolError,
    ask_database,
    calculate,
    call_function,
    convert_units,
    days_between,
    desk_tools,
    open_database,
    shift_date,
    spec_of,
)

Sum = tuple[str, Fraction]  # an expression and its exact value


def joined(parts: tuple[Sum, str, Sum]) -> Sum:
    (left, a), sign, (right, b) = parts
    if sign == "/" and not b:
        sign = "-"
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a - b}[sign]
    return f"({left} {sign} {right})", value


NUMBERS: st.SearchStrategy[Sum] = st.one_of(
    st.integers(0, 10**6).map(lambda n: (str(n), Fraction(n))),
    st.integers(0, 10**6).map(lambda n: (f"{n / 100:.2f}", Fraction(n, 100))),
)
SUMS = st.recursive(
    NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(joined),
    max_leaves=8,
)


@given(SUMS)
def test_a_sum_has_its_exact_value_to_a_few_digits(one: Sum) -> None:
    text, exact = one
    assume(abs(exact) < 10**15 and (not exact or abs(exact) > Fraction(1, 10**6)))
    scale = max([Fraction(part) for part in re.findall(r"[0-9.]+", text)])
    assert calculate(text) == pytest.approx(
        float(exact), rel=1e-9, abs=1e-9 * float(scale + 1) ** 4
    )


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("-2 ** 2", -4),
        ("2 ** -1", 0.5),
        ("7 // -2 * 1.0", -4),
        ("7 % -3", -2),
        ("0.1 + 0.2", 0.3),
        ("sqrt(16)", 4),
        ("abs(-3) + min(4, 2, 8) + max(1, 2)", 7),
        ("round(1234.567, 1)", 1234.6),
        ("round(1234.567, -2)", 1200),
        ("round(2.6)", 3),
        ("ceil(1.2) * floor(1.8)", 2),
        ("log(e ** 3) + log(8, 2) + log10(1000)", 9),
        ("sin(pi / 2) + cos(0)", 2),
        ("2 ** 100", 2**100),
        ("1e3", 1000),
    ],
)
def test_the_calculator_knows_its_functions(expression: str, value: float) -> None:
    assert calculate(expression) == pytest.approx(value, rel=1e-14)


HOSTILE = [
    "__import__('os').system('true')",
    "().__class__.__mro__[1].__subclasses__()",
    "open('/etc/passwd').read()",
    "[x for x in (1, 2)]",
    "(lambda: 1)()",
    "f'{1}'",
    "'a' * 10**9",
    "(1, 2) * 10**9",
    "9 ** 9 ** 9 ** 9",
    "2 ** 10 ** 10",
    "(2 ** 2000) ** 2000",
    "10 ** 600 * 10 ** 600",
    "1 << 10 ** 10",
    "round(1, -10 ** 10)",
    "round(1.5, 10 ** 10)",
    "floor(1e308) ** 9",
    "max()",
    "max(*range(9))",
    "sqrt(x=4)",
    "sqrt",
    "True + True",
    "1j ** 2",
    "(-8) ** (1 / 3)",
    "1e999",
    "1e308 * 10",
    "-1e308 * 10",
    "log(0)",
    "exp(1000)",
    "1 / 0",
    "1 % 0",
    "0 ** -1",
    "1; 2",
    "x = 1",
    "1\n2",
    "1 if 1 else 2",
    "1 < 2",
    "1 and 2",
    "not 1",
    "~1",
    "1 @ 2",
    "\0",
    "\ud800",
    "",
    " ",
    "(" * 250 + "1" + ")" * 249,
    "-" * 501 + "1",
    "1" * 501,
    "(1," * 90,
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_a_hostile_expression_gets_one_line(expression: str) -> None:
    with pytest.raises(ToolError) as told:
        calculate(expression)
    assert 0 < len(str(told.value)) < 400
    assert "\n" not in str(told.value)


@given(st.text("0123456789.e+-*/%()<>, absqrtmxinflogpc_'[]", max_size=60))
def test_whatever_is_calculated_is_a_finite_number_or_a_tool_error(expression: str) -> None:
    try:
        value = calculate(expression)
    except ToolError:
        return
    assert type(value) in (int, float)
    assert isinstance(value, int) or math.isfinite(value)


@pytest.mark.parametrize(
    ("value", "unit", "to", "expected"),
    [
        (1, "mile", "m", 1609.344),
        (0, "celsius", "fahrenheit", 32),
        (-40, "°F", "°C", -40),
        (36, "km/h", "m/s", 10),
        (2, "m²", "cm^2", 20000),
        (1, "kWh", "joule", 3.6e6),
        (1, "Kilometers", "METERS", 1000),
        (90, "min", "hours", 1.5),
        (1, "kg * m / s**2", "newton", 1),
    ],
)
def test_units_are_converted(value: float, unit: str, to: str, expected: float) -> None:
    assert convert_units(value, unit, to)["value"] == pytest.approx(expected, rel=1e-11)


SIZES = ("inch", "light_year", "µm", "nautical_mile", "furlong")


@given(st.floats(1e-6, 1e6), st.sampled_from(SIZES), st.sampled_from(SIZES))
def test_there_and_back_is_the_same(value: float, unit: str, to: str) -> None:
    there = convert_units(value, unit, to)
    back = convert_units(there["value"], there["unit"], unit)
    assert back["value"] == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(
    ("unit", "to"),
    [
        ("m", "s"),
        ("USD", "EUR"),
        ("m", "2 ** 99 ** 99"),
        ("m ** 99", "cm ** 99"),
        ("minute ** 9 ** 9", "s"),
        ("(minute ** 9) ** 9", "s"),
        ("minute²²²²²", "s²²²²²"),
        ("m ** s", "m"),
        ("m ** m", "m"),
        ("9", "m"),
        ("", ""),
        (" ", "m"),
        ("a" * 59 + "!", "m"),
        ("a" * 100_000, "m"),
        ("__import__('os')", "m"),
        ("m.__class__", "m"),
        ("(" * 60, "m"),
        ("\0", "m"),
        ("\ud800", "m"),
        ("[length]", "m"),
        ("* / *", "m"),
    ],
)
def test_a_hostile_unit_gets_one_line(unit: str, to: str) -> None:
    with pytest.raises(ToolError) as told:
        convert_units(1.0, unit, to)
    assert 0 < len(str(told.value)) < 400
    assert "\n" not in str(told.value)


@given(st.floats(-1e300, 1e300), st.text("ms°%²*^/() kdegC1239µ", max_size=30))
def test_any_unit_gives_a_finite_value_or_a_tool_error(value: float, unit: str) -> None:
    try:
        given_back = convert_units(value, unit, "m**2")
    except ToolError:
        return
    assert math.isfinite(given_back["value"])


@given(st.dates(date(1000, 1, 1), date(3000, 1, 1)), st.integers(-99999, 99999))
def test_days_forth_and_days_between_agree(start: date, days: int) -> None:
    found = shift_date(start, days=days)
    end = date.fromisoformat(found["date"])
    assert end == start + timedelta(days)
    assert found["weekday"] == calendar.day_name[end.weekday()]
    assert days_between(start, end) == {"days": days}


@given(st.dates(date(1000, 1, 1), date(3000, 1, 1)), st.integers(-999, 999), st.integers(-99, 99))
def test_months_keep_the_day_or_end_the_month(start: date, months: int, years: int) -> None:
    found = date.fromisoformat(shift_date(start, months=months, years=years)["date"])
    year, month = divmod(12 * start.year + start.month - 1 + months + 12 * years, 12)
    last = calendar.monthrange(year, month + 1)[1]
    assert found == date(year, month + 1, min(start.day, last))


@pytest.mark.parametrize("arguments", [{"years": 10**400}, {"days": 10**9}, {"weeks": -(10**6)}])
def test_a_date_outside_the_calendar_gets_one_line(arguments: dict[str, int]) -> None:
    with pytest.raises(ToolError, match=r"^that date lies outside the years 1 to 9999$"):
        shift_date(date(2024, 1, 1), **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("days_between", {"start": "2023-02-30", "end": "2024-01-01"}),
        ("days_between", {"start": "2024-01-01"}),
        ("days_between", {"start": "2024-01-01", "end": "soon"}),
        ("shift_date", {"start": "2024-01-01", "hours": 1}),
        ("search_documents", {"words": "tent", "limit": 11}),
        ("calculate", {"expression": 5}),
    ],
)
def test_arguments_that_do_not_fit_get_one_line(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ToolError) as told:
        call_function(desk_tools()[name], arguments)
    assert "\n" not in str(told.value)
    assert "Traceback" not in str(told.value)


# The database

SCRIPT = """
CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT, size REAL, picture BLOB);
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 120)
INSERT INTO things SELECT i, 'thing ' || i, i / 4.0, x'00ff' FROM n;
CREATE VIEW small AS SELECT * FROM things WHERE size < 2;
"""


@pytest.fixture(params=["script", "file"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "desk"
    folder.mkdir()
    if request.param == "script":
        (folder / "database.sql").write_text(SCRIPT)
    else:
        made = sqlite3.connect(folder / "database.sqlite")
        made.executescript(SCRIPT)
        made.close()
    return folder


def everything(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.sqlite"
    made = sqlite3.connect(path)
    made.executescript("CREATE TABLE secrets (word TEXT); INSERT INTO secrets VALUES ('mellon');")
    made.close()
    return path


def test_rows_come_with_their_columns_and_a_limit(desk: Path) -> None:
    opened = open_database(desk)
    assert ask_database(opened, "SELECT id, name AS n, size FROM things WHERE id = 7") == {
        "columns": ["id", "n", "size"],
        "rows": [[7, "thing 7", 1.75]],
        "more": False,
    }
    many = ask_database(opened, "SELECT id FROM things ORDER BY id")
    assert [row[0] for row in many["rows"]] == list(range(1, 51))
    assert many["more"]
    assert not ask_database(opened, "SELECT id FROM things LIMIT 50")["more"]
    assert ask_database(opened, "SELECT name FROM small WHERE 0")["rows"] == []
    assert ask_database(opened, "SELECT picture, 1e999 FROM small LIMIT 1")["rows"] == [
        ["2 bytes", "inf"]
    ]
    counted = "SELECT count(*), max(upper(name)) FROM things WHERE name LIKE '%9' AND id GLOB '1*'"
    assert ask_database(opened, counted)["rows"] == [[3, "THING 19"]]
    assert ask_database(opened, "SELECT date('2024-01-31', '+1 month')")["rows"] == [["2024-03-02"]]
    shown = ask_database(opened, "SELECT name FROM sqlite_master ORDER BY name")
    assert shown["rows"] == [["small"], ["things"]]


WRITES = [
    "DELETE FROM things",
    "UPDATE things SET size = 0",
    "INSERT INTO things (id) VALUES (999)",
    "REPLACE INTO things (id) VALUES (1)",
    "DROP TABLE things",
    "CREATE TABLE other (a)",
    "CREATE TEMP TABLE other (a)",
    "CREATE TEMP VIEW other AS SELECT 1",
    "CREATE VIRTUAL TABLE other USING fts5 (a)",
    "ALTER TABLE things RENAME TO other",
    "WITH a AS (SELECT 1) DELETE FROM things",
    "DELETE FROM things RETURNING id",
    "VACUUM",
    "VACUUM INTO '{outside}.copy'",
    "ATTACH '{outside}' AS o",
    "ATTACH 'file:{outside}?mode=rw' AS o",
    "ATTACH ':memory:' AS o",
    "DETACH main",
    "SELECT * FROM '{outside}'.secrets",
    "PRAGMA query_only = OFF",
    "PRAGMA writable_schema = ON",
    "PRAGMA temp_store_directory = '/tmp'",
    "PRAGMA database_list",
    "SELECT * FROM pragma_database_list",
    "PRAGMA journal_mode = DELETE",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT a",
    "REINDEX",
    "ANALYZE",
    "SELECT load_extension('{outside}')",
    "SELECT readfile('{outside}')",
    "SELECT writefile('{outside}', 'x')",
    "SELECT fts3_tokenizer('simple', x'4141414141414141')",
    "SELECT 1; DELETE FROM things",
    "SELECT 1; SELECT 2",
    "",
    ";",
    "-- nothing",
    "/* open",
    "SELECT",
    "SELECT ?",
    "SELECT :a",
    "SELECT * FROM nothing",
    "SELECT '\0'",
    "SELECT '\ud800'",
    "SELECT CAST(x'ff' AS TEXT)",
    "SELECT zeroblob(1000000000)",
    "SELECT FTS3_TOKENIZER('simple')",
    "SELECT randomblob(9)",
    "SELECT " + "1, " * 200 + "1",
    "SELECT " + "(" * 2000 + "1" + ")" * 2000,
    "SELECT " + "1 + " * 2400 + "1",
    "SELECT '" + "a" * 20_000 + "'",
    "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0",
    "SELECT count(*) FROM things a, things b, things c, things d, things e",
]


@pytest.mark.parametrize("sql", WRITES)
def test_a_hostile_statement_gets_one_line_and_changes_nothing(
    sql: str, desk: Path, outside: Path
) -> None:
    before = everything(desk.parent)
    opened = open_database(desk)
    with pytest.raises(ToolError) as told:
        ask_database(opened, sql.replace("{outside}", str(outside)))
    assert 0 < len(str(told.value)) < 400
    assert "\n" not in str(told.value)
    assert ask_database(opened, "SELECT count(*), sum(size) FROM things")["rows"] == [[120, 1815.0]]
    opened.close()
    assert everything(desk.parent) == before


WORDS = """
SELECT DELETE FROM things WHERE id name = 1 ( ) , ; * UNION ALL WITH RECURSIVE n AS ATTACH 'x' LIKE
PRAGMA query_only OFF UPDATE SET size INSERT INTO VALUES EXPLAIN ORDER BY LIMIT NULL -- /* products
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[sqlite3.Connection]:
    opened = open_database(DESK)
    yield opened
    opened.close()


@given(st.lists(st.sampled_from(WORDS.split()), max_size=12).map(" ".join))
def test_any_statement_gives_a_table_or_a_tool_error(shared: sqlite3.Connection, sql: str) -> None:
    changes = shared.total_changes
    try:
        found = ask_database(shared, sql)
    except ToolError:
        found = None
    assert shared.total_changes == changes
    assert found is None or all(len(row) == len(found["columns"]) for row in found["rows"])


@pytest.mark.parametrize(
    "script",
    [
        "ATTACH '{outside}' AS o; CREATE TABLE a AS SELECT * FROM o.secrets;",
        "CREATE TABLE a (b); VACUUM INTO '{outside}.copy';",
        "SELECT load_extension('{outside}');",
        "SELECT fts3_tokenizer('simple', x'4141414141414141');",
        "CREATE TABLE a (",
        "\udcff",
    ],
)
def test_a_script_that_reaches_out_is_refused(script: str, tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "desk"
    folder.mkdir()
    text = script.replace("{outside}", str(outside))
    (folder / "database.sql").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DeskError, match=r"database\.sql"):
        open_database(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"desk", outside.name}


@pytest.mark.parametrize("name", ["database.sql", "database.sqlite", "database.sqlite-wal"])
def test_a_database_that_leads_out_of_the_desk_is_refused(
    name: str, tmp_path: Path, outside: Path
) -> None:
    folder = tmp_path / "desk"
    folder.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(DeskError, match="leads out of the desk"):
        open_database(folder)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "database.sqlite").write_text("no database, but long enough to be taken for one")
    with pytest.raises(DeskError, match=r"database\.sqlite: cannot be read"):
        open_database(tmp_path)
    (tmp_path / "database.sqlite").unlink()
    with pytest.raises(DeskError, match="neither"):
        open_database(tmp_path)


# The documents


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../outside.md", "nowhere.md", "/proc/self/environ"]
)
def test_a_document_that_leads_out_of_the_desk_is_refused(target: str, tmp_path: Path) -> None:
    (tmp_path / "outside.md").write_text("mellon")
    folder = tmp_path / "desk"
    folder.mkdir()
    (folder / "page.md").symlink_to(target)
    with pytest.raises(DeskError, match=r"page\.md: leads out of the desk"):
        desk_tools(folder)


def test_links_inside_the_desk_and_to_it_are_fine(tmp_path: Path) -> None:
    folder = tmp_path / "desk"
    folder.mkdir()
    (folder / "page.md").write_text("mellon")
    (folder / "same.txt").symlink_to("page.md")
    (tmp_path / "link").symlink_to(folder)
    found = desk_tools(tmp_path / "link")["search_documents"]("mellon")
    assert {one["text"] for one in found} == {"mellon"}


def test_every_paragraph_of_the_desk_is_found_by_its_own_words() -> None:
    search = desk_tools()["search_documents"]
    for path in sorted([*DESK.glob("*.md"), *DESK.glob("*.txt")]):
        for part in path.read_text(encoding="utf-8").split("\n\n"):
            if part.strip() and not part.startswith("#"):
                best = search(part, limit=1)[0]
                assert best["document"] == path.name
                assert best["text"].endswith(part.strip())


@given(st.text(max_size=60), st.integers(1, 10))
def test_any_words_give_paragraphs_or_a_tool_error(words: str, limit: int) -> None:
    try:
        found = SEARCH(words, limit)
    except ToolError:
        assert not re.search(r"\w", words)
        return
    assert len(found) <= limit
    assert all((DESK / one["document"]).is_file() for one in found)


SEARCH = desk_tools()["search_documents"]


def test_operators_of_the_index_are_plain_words() -> None:
    assert SEARCH("document : returns NOT gas", 3) == SEARCH('"document" "returns" "not" "gas"', 3)


# What the model is told


def test_every_tool_can_be_verified_and_described() -> None:
    tools = {name: spec_of(function) for name, function in desk_tools().items()}
    assert list(tools) == [
        "calculate",
        "convert_units",
        "shift_date",
        "days_between",
        "query_database",
        "search_documents",
    ]
    for name, spec in tools.items():
        assert verify_spec(spec).ok
        assert spec.name == name
        assert "Raises" not in spec.description
        assert spec.description.endswith(".")
        assert "title" not in spec.schema_text
        assert spec.parameters["additionalProperties"] is False


@pytest.mark.parametrize(
    ("name", "arguments", "right"),
    [
        ("calculate", {"expression": "1"}, True),
        ("calculate", {}, False),
        ("calculate", {"expression": 1}, False),
        ("convert_units", {"value": 1, "unit": "m", "to": "cm"}, True),
        ("convert_units", {"value": "1", "unit": "m", "to": "cm"}, False),
        ("shift_date", {"start": "2024-01-01"}, True),
        ("shift_date", {"start": "2024-01-01", "days": 1.5}, False),
        ("days_between", {"start": "2024-01-01"}, False),
        ("search_documents", {"words": "tent", "limit": 10}, True),
        ("search_documents", {"words": "tent", "limit": 0}, False),
    ],
)
def test_the_schema_tells_right_from_wrong(
    name: str, arguments: dict[str, Any], right: bool
) -> None:
    tools = {one: spec_of(function) for one, function in desk_tools().items()}
    assert verify_call(ToolCall(name=name, arguments=arguments), tools).ok is right
