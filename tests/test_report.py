"""The report: honest sentences, numbers that can be recomputed, a page that stands alone."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from toolpost.bench.bfcl import (
    CATEGORIES,
    LIVE,
    SINGLE_TURN,
    CategoryScore,
    ModelScores,
    cluster,
    questions,
)
from toolpost.core.metrics import METRICS, Count, Grade, row_cluster, tally
from toolpost.core.schema import Conversation, ToolCall, ToolSpec
from toolpost.core.stats import Difference, Group, Interval, difference, interval, wilson
from toolpost.record import PACKAGE, ROOT
from toolpost.report import charts, page, serving, tables

STAGE = ROOT / "nbs" / "stages" / "80_report.ipynb"
HOSTILE = "<script>alert('x')</script> & <img src=http://evil.test/x.png onerror=run()>"


def category(name: str, bits: list[bool]) -> CategoryScore:
    # As in BFCL: a live question's middle number names its tools. Here two share theirs.
    ids = [
        f"{name}_{i}-{i // 2}-{i % 2}" if name in LIVE else f"{name}_{i}" for i in range(len(bits))
    ]
    return CategoryScore(
        category=name,
        ids=tuple(ids),
        passed=tuple(bits),
        errors={i: "value_error:string" for i, ok in zip(ids, bits, strict=True) if not ok},
    )


def model(name: str, **bits: list[bool]) -> ModelScores:
    scores = {c: category(c, b) for c, b in bits.items()}
    return ModelScores(model=name, categories=scores, max_tokens=96)


def bits(hits: int, n: int) -> list[bool]:
    return [i < hits for i in range(n)]


def a_run(folder: Path) -> dict[str, ModelScores]:
    """Write the results of a small run: no DPO, and `live_parallel` was never asked."""
    rng = random.Random(7)
    asked = [c for c in SINGLE_TURN if c != "live_parallel"]
    models = {
        name: model(name, **{c: [rng.random() < share for _ in range(12)] for c in asked})
        for name, share in (("base", 0.1), ("sft", 0.6))
    }
    plain = {name: scores.model_dump(mode="json") for name, scores in models.items()}
    oracle = model("oracle", **{c: bits(12, 12) for c in SINGLE_TURN}).model_dump(mode="json")
    published = {
        "model": "ceiling-4b",
        "source": f"somewhere else {HOSTILE}",
        "groups": {"Live": 76.31},
        "categories": dict.fromkeys(SINGLE_TURN, 80.0),
    }
    sample = {"query": HOSTILE, "tools": [HOSTILE], "completion": f"<tool_call>\n{HOSTILE}"}
    results: dict[str, dict[str, Any]] = {
        "10_anchors": {
            "models": {"base": plain["base"]},
            "harness": {"oracle": oracle},
            "published": [published],
        },
        "20_data": {"counts": {"rows_in": 9}, "reasons": {HOSTILE: 2}, "examples": [sample] * 3},
        "30_sft": {
            "curve": [{"step": i, "loss": 3 / i} for i in range(1, 70)],
            "evals": [{"step": 69, "loss": 0.5}],
            "rows": 483,
        },
        "60_eval": {
            "models": {"sft": plain["sft"]},
            "probes": {
                "sft": {"exact_call": {"hits": 30, "n": 60}, "protocol": {"hits": 0, "n": 0}}
            },
        },
    }
    folder.mkdir(parents=True)
    for stage, result in results.items():
        record = {"stage": stage, "result": result, "wall_seconds": 1.5, "machine": HOSTILE}
        (folder / f"{stage}.json").write_text(json.dumps(record), encoding="utf-8")
    return models


# Pictures


def rows() -> list[charts.Row]:
    some = {"base": wilson(0, 49), "sft": wilson(20, 50), "dpo": wilson(30, 60)}
    return [
        charts.Row("simple_python", some, 0.9525, "Non-Live"),
        charts.Row("live_parallel", {}, 0.625, "Live"),
    ]


def marks(svg: str, model_name: str) -> list[str]:
    """Give the marks of a model, without the key's."""
    found: list[str] = re.findall(r"<use [^>]*>", svg)
    return [m for m in found if f"stroke: var(--{model_name}," in m and "fill-opacity: 0" not in m]


def test_pictures_have_the_same_bytes_in_every_process() -> None:
    code = (
        "import hashlib;"
        "from toolpost.core.stats import wilson; from toolpost.report import charts;"
        "r = [charts.Row('a', {'base': wilson(1, 20), 'dpo': wilson(9, 80)}, 0.5, 'g')];"
        "c = [{'step': i, 'loss': 1 / (i + 1), 'accuracy': 0.5, 'margin': 0.1} for i in range(9)];"
        "p = [charts.dumbbell(r), charts.metric_dots(r), charts.training_curves(c, c, c[-1:])];"
        "print(hashlib.sha256(repr([(x.wide, x.narrow) for x in p]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_few_questions_make_a_hollow_mark() -> None:
    drawn = charts.dumbbell(rows())
    for svg in (drawn.wide, drawn.narrow):
        hollow, solid = marks(svg, "base"), marks(svg, "sft")
        assert len(hollow) == len(solid) == 1
        assert "fill: var(--paper," in hollow[0]
        assert "fill: var(--sft," in solid[0]


def test_a_published_number_never_looks_measured() -> None:
    svg = charts.dumbbell(rows()).wide
    paths = dict(re.findall(r'<path id="(categories-wide-m\w+)" d="([^"]*)"', svg))
    tall: dict[str, set[float]] = {}
    for use in re.findall(r"<use [^>]*>", svg):
        name = re.search(r"stroke: var\(--(\w+),", use)
        target = re.search(r'href="#([^"]*)"', use)
        assert name is not None
        assert target is not None
        numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", paths[target[1]])]
        tall.setdefault(name[1], set()).add(max(numbers[1::2]) - min(numbers[1::2]))
        assert name[1] != "published" or "fill-opacity: 0" in use
    measured = set().union(*(tall[m] for m in ("base", "sft", "dpo")))
    assert min(tall["published"]) > 1.8 * max(measured)
    assert "published, all questions" in svg


def test_what_was_not_run_is_called_so() -> None:
    drawn = charts.dumbbell(rows())
    assert "not run" in drawn.wide
    assert "not run" in drawn.narrow
    one = charts.dumbbell([charts.Row("multiple", {"base": wilson(3, 20)})])
    assert "SFT (not run)" in one.wide
    assert "base (not run)" not in one.wide
    assert charts.training_curves([], []).wide.count("not run") == 4


def test_clusters_stand_in_brackets_where_they_are_fewer() -> None:
    some = {m: Interval(mean=0.5, low=0.4, high=0.6, n=1053, clusters=280) for m in ("base", "sft")}
    assert charts.sizes(charts.Row("live_multiple", some)) == "n=1053 (280)"
    assert charts.sizes(charts.Row("multiple", {"base": wilson(3, 20)})) == "n=20"
    mixed = some | {"dpo": Interval(mean=0.5, low=0.3, high=0.7, n=20, clusters=19)}
    assert plain(charts.sizes(charts.Row("live_multiple", mixed))) == "n=20–1053 (19–280)"  # noqa: RUF001


def test_names_are_text_and_not_markup() -> None:
    svg = charts.dumbbell([charts.Row("$x$ <b>&", {"base": wilson(3, 20)})]).wide
    assert "$x$ &lt;b&gt;&amp;" in svg


def test_two_pictures_share_no_id() -> None:
    both = [charts.dumbbell(rows()), charts.metric_dots(rows()), charts.training_curves([], [])]
    ids = [i for p in both for svg in (p.wide, p.narrow) for i in re.findall(r' id="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))


def test_page_and_pictures_have_one_palette() -> None:
    css = (PACKAGE / "templates" / "report" / "style.css").read_text(encoding="utf-8")
    light = css[: css.index("@media")]
    assert charts.COLOUR.items() <= dict(re.findall(r"--(\w+): (#\w{6})", light)).items()
    dark = css[css.index("@media") :]
    assert set(charts.COLOUR) <= set(re.findall(r"--(\w+): #\w{6}", dark))


# Numbers


def test_the_sizes_of_the_categories_are_bfcls() -> None:
    assert {c: len(questions(c)) for c in CATEGORIES} == dict(tables.SIZES)


def test_groups_follow_the_official_formulas() -> None:
    hits = {c: i for i, c in enumerate(CATEGORIES, 1)}
    found = tables.group_scores(model("m", **{c: bits(h, 20) for c, h in hits.items()}))
    at = {c: Fraction(h, 20) for c, h in hits.items()}
    simple = (at["simple_python"] + at["simple_java"] + at["simple_javascript"]) / 3
    non_live = (simple + at["multiple"] + at["parallel"] + at["parallel_multiple"]) / 4
    live = 258 * at["live_simple"] + 1053 * at["live_multiple"]
    live += 16 * at["live_parallel"] + 24 * at["live_parallel_multiple"]
    expected = {
        "Non-Live": non_live,
        "Live": live / 1351,
        "Irrelevance": (at["irrelevance"] + at["live_irrelevance"]) / 2,
        "Must call": at["live_relevance"],
        "Multi-Turn": sum(at[c] for c in CATEGORIES if c.startswith("multi_turn")) / 4,
    }
    assert {g: s.mean for g, s in found.items()} == pytest.approx(
        {g: float(v) for g, v in expected.items()}
    )
    assert [s.n for s in found.values()] == [120, 80, 40, 20, 80]
    # Two live questions share their tools; a scenario occurs in all four kinds of dialogue.
    assert [s.clusters for s in found.values()] == [120, 40, 30, 10, 20]


def test_a_group_with_a_category_missing_is_not_run() -> None:
    partial = model("m", **{c: bits(1, 4) for c in SINGLE_TURN if c != "multiple"})
    assert set(tables.group_scores(partial)) == {"Live", "Irrelevance", "Must call"}
    cells = tables.headline({"base": partial}).rows[0]
    assert (cells[1].text, cells[1].small) == ("not run", "5 of 6 categories")


def recomputed(asked: list[bool], ids: tuple[str, ...] = ()) -> tuple[str, str]:
    """Compute a score cell: where no two belong together, from Wilson's closed form."""
    names = [cluster(i) for i in ids]
    if len(set(names)) < len(names):
        found = interval(Group({"c": 1.0}, {"c": names}), {"c": asked})
        share, few = 100 * found.mean, len(set(names))
        at = f"{100 * found.low:.0f}–{100 * found.high:.0f}"  # noqa: RUF001
        return f"{share:.1f} %", f"{sum(asked)}/{len(asked)} ({few}) · {at}"
    n, z = len(asked), 1.959963984540054
    p = sum(asked) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{100 * p:.1f} %", f"{sum(asked)}/{n} · {100 * low:.0f}–{100 * high:.0f}"  # noqa: RUF001


def fair_coin(won: int, lost: int) -> float:
    """Compute the two-sided exact p value of a fair coin."""
    n, k = won + lost, min(won, lost)
    return min(1.0, float(2 * sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1))))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


def a_difference(models: dict[str, ModelScores], name: str) -> Difference:
    """Compare base and SFT in one category, without the tables."""
    base, sft = (models[m].categories[name] for m in ("base", "sft"))
    assert base.ids == sft.ids
    group = Group({name: 1.0}, {name: [cluster(i) for i in base.ids]})
    return difference(group, {name: base.passed}, {name: sft.passed})


def holm_by_hand(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    found, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        found[i] = highest
    return found


def test_the_category_table_can_be_recomputed(tmp_path: Path) -> None:
    models = a_run(tmp_path / "results")
    records = tables.read_records(tmp_path / "results")
    assert tables.measured(records) == models
    table = tables.categories(tables.measured(records), tables.published(records))
    assert {row[0].text for row in table.rows} == set(CATEGORIES)
    run = [c for c in SINGLE_TURN if c != "live_parallel"]
    single = [a_difference(models, c) for c in run]
    adjusted = dict(zip(run, holm_by_hand([d.p for d in single]), strict=True))
    for name, base, sft, dpo, above, gain, later in table.rows:
        assert plain(above.text) == ("80.00 %" if name.text in SINGLE_TURN else charts.DASH)
        assert (dpo.text, later.text) == ("not run", charts.DASH)
        if name.text not in run:
            assert (base.text, sft.text, gain.text) == ("not run", "not run", charts.DASH)
            continue
        was = list(models["base"].categories[name.text].passed)
        now = list(models["sft"].categories[name.text].passed)
        ids = models["base"].categories[name.text].ids
        assert (plain(base.text), plain(base.small)) == recomputed(was, ids)
        assert (plain(sft.text), plain(sft.small)) == recomputed(now, ids)
        won = sum(b and not a for a, b in zip(was, now, strict=True))
        lost = sum(a and not b for a, b in zip(was, now, strict=True))
        assert float(plain(gain.text)) == pytest.approx(100 * (won - lost) / 12, abs=0.05)
        seen = tables.change(models["base"], models["sft"], [name.text])
        assert seen is not None
        assert seen == a_difference(models, name.text)
        assert (seen.won, seen.lost, seen.n) == (won, lost, 12)
        if name.text not in LIVE:
            assert seen.p == pytest.approx(fair_coin(won, lost))
        span = f"{100 * seen.low:+.1f} to {100 * seen.high:+.1f}"
        told = plain(tables.p_value(adjusted[name.text]))
        assert plain(gain.small) == f"+{won} -{lost} · {span} · {told}"
        assert gain.tone == ("strong" if adjusted[name.text] < 0.05 else "")


def test_models_are_paired_by_id_and_not_by_place() -> None:
    old = model("base", multiple=[True, False, False])
    new = CategoryScore(
        category="multiple",
        ids=("multiple_2", "multiple_0", "multiple_9"),
        passed=(True, True, False),
        errors={"multiple_9": "x"},
    )
    later = ModelScores(model="sft", categories={"multiple": new}, max_tokens=96)
    seen = tables.change(old, later, ["multiple"])
    assert seen is not None
    assert (seen.before, seen.after, seen.won, seen.lost, seen.n, seen.p) == (1, 2, 1, 0, 2, 1.0)


def live_simple(asked: list[bool], tools: list[int]) -> ModelScores:
    """Make a model that was asked live questions with these tools."""
    ids = [f"live_simple_{i}-{tool}-0" for i, tool in enumerate(tools)]
    score = CategoryScore(
        category="live_simple",
        ids=tuple(ids),
        passed=tuple(asked),
        errors={i: "x" for i, ok in zip(ids, asked, strict=True) if not ok},
    )
    return ModelScores(model="m", categories={"live_simple": score}, max_tokens=96)


def test_live_questions_with_the_same_tools_are_one_witness() -> None:
    apart, crowd = list(range(12)), [0] * 6 + list(range(6, 12))
    narrow, wide = (
        tables.category_scores(live_simple(bits(6, 12), tools))["live_simple"]
        for tools in (apart, crowd)
    )
    assert narrow.model_dump() == pytest.approx(wilson(6, 12).model_dump())
    assert (wide.n, wide.clusters) == (12, 7)
    assert wide.high - wide.low > narrow.high - narrow.low
    alone, together = (
        tables.change(
            live_simple(bits(0, 12), tools), live_simple(bits(6, 12), tools), ["live_simple"]
        )
        for tools in (apart, crowd)
    )
    assert alone is not None
    assert together is not None
    assert alone.p == pytest.approx(2 / 2**6)
    assert together.p == 1


# The ceiling


def test_recovery_needs_a_ceiling_of_this_run(tmp_path: Path) -> None:
    a_run(tmp_path / "results")
    records = tables.read_records(tmp_path / "results")
    assert tables.measured_ceiling(records) is None
    above = tables.published(records)
    table = tables.recovery_table(tables.measured(records), None, above)
    assert {cell.text for row in table.rows for cell in row[2:]} == {"not run"}
    told = " ".join(table.notes)
    assert "measured no ceiling model" in told
    assert "published scores of ceiling-4b were measured elsewhere" in told


def test_recovery_is_a_share_of_the_gap_or_says_why_not(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    a_run(folder)
    shares = {"base": 2, "sft": 7, "ceiling": 12}
    three = {
        name: model(
            name,
            multiple=bits(n, 14),
            parallel=bits(5, 14),
            live_simple=bits(14 - n, 14),
            irrelevance=bits(n, 14),
        )
        for name, n in shares.items()
    }
    path = folder / "10_anchors.json"
    record = json.loads(path.read_text())
    record["result"]["models"] = {m: three[m].model_dump(mode="json") for m in ("base", "ceiling")}
    path.write_text(json.dumps(record))
    records = tables.read_records(folder)
    top = tables.measured_ceiling(records)
    assert top == three["ceiling"]
    assert "ceiling" not in tables.measured(records)
    rows = {
        row[0].text: row[1:]
        for row in tables.recovery_table({"base": three["base"], "sft": three["sft"]}, top).rows
    }
    assert rows.keys() == {*tables.GROUPS, *CATEGORIES}
    assert [plain(c.text) for c in rows["multiple"]] == ["14.3 %", "85.7 %", "50 %", "not run"]
    low, high = map(int, plain(rows["multiple"][2].small).split(" to "))
    assert low < 50 < high
    assert rows["parallel"][2].text == charts.DASH
    assert rows["parallel"][2].small == "floor and ceiling cannot be told apart"
    assert rows["live_simple"][2].small == "the ceiling is lower than the floor"
    assert [c.text for c in rows["Non-Live"]] == ["not run"] * 4


# The published run and what it lacks


def test_an_older_record_without_dialogues_is_shown() -> None:
    records = tables.read_records(ROOT / "reports" / "pocket" / "results")
    ruler, models = tables.harness(records), tables.measured(records)
    old = {
        name: scores.model_copy(
            update={"categories": {c: scores.categories[c] for c in SINGLE_TURN}}
        )
        for name, scores in ruler.items()
    }
    dialogues = {c: category(c, bits(200, 200)) for c in CATEGORIES if c.startswith("multi_turn")}
    new = {
        name: scores.model_copy(update={"categories": scores.categories | dialogues})
        for name, scores in old.items()
    }
    column = tables.harness_table(old).head.index("Multi-Turn")
    assert [row[column].text for row in tables.harness_table(old).rows] == ["not run"] * 3
    cells = [row[column] for row in tables.harness_table(new).rows]
    assert [(plain(c.text), c.small) for c in cells] == [("100.0 %", "n=800")] * 3
    table = tables.headline(models, tables.published(records))
    at = table.head.index("Multi-Turn")
    assert [row[at].text for row in table.rows[:3]] == ["not run"] * 3
    assert any("of 30" in note for note in table.notes)
    assert any("multi_turn_base" in line for line in tables.limits(records))
    assert not any("independent" in line for line in tables.limits(records))


def test_overall_is_given_with_its_coverage() -> None:
    asked = {c: bits(4, 8) for c in CATEGORIES}
    everything = tables.overall({"base": model("b", **asked)})
    assert plain(everything).endswith(" of 60.")
    assert "base 30.0 (" in everything
    silent = model("b", irrelevance=bits(8, 8), live_irrelevance=bits(8, 8))
    assert "base 10.0 (" in tables.overall({"base": silent})
    assert tables.overall({"base": silent}).endswith(" of 10.")
    assert tables.overall({"base": model("b", multiple=bits(1, 2))}).endswith("allow: not run.")


def test_the_metrics_table_tells_no_answers_from_not_run() -> None:
    counts = {
        "base": {"json_validity": Count(hits=0, n=0), "exact_call": Count(hits=0, n=68)},
        "sft": {"exact_call": Count(hits=38, n=68)},
    }
    cells = {row[0].text: row[1:] for row in tables.metrics(counts).rows}
    assert [c.text for c in cells["json validity"]] == [charts.DASH, "not run", "not run"]
    exact = cells["exact call"][1]
    assert (plain(exact.text), exact.small) == recomputed(bits(38, 68))
    drawn = {row.name: row for row in tables.metric_rows(counts)}
    assert drawn["json validity"].empty == "nothing to judge"
    assert drawn["protocol"].empty == "not run"
    assert "too narrow" in tables.metrics(counts).notes[0]  # no clusters were kept


ANSWERS = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from([None, False, True])))


@given(ANSWERS)
def test_a_count_keeps_how_its_clusters_came_out(answers: list[tuple[str, bool | None]]) -> None:
    grades = [Grade(exact_call=value) for _, value in answers]
    found = tally(grades, [name for name, _ in answers])
    assert found.keys() == set(METRICS)
    assert {m: c.model_copy(update={"clusters": ()}) for m, c in found.items()} == tally(grades)
    count = Count.model_validate(json.loads(found["exact_call"].model_dump_json()))
    assert count == found["exact_call"]
    asked = [(name, value) for name, value in answers if value is not None]
    assert (count.hits, count.n) == (sum(value for _, value in asked), len(asked))
    if not asked:
        assert count.clusters == ()
        return
    group = Group({"c": 1.0}, {"c": [name for name, _ in asked]})
    expected = interval(group, {"c": [value for _, value in asked]})
    assert tables.judged(count).model_dump() == pytest.approx(expected.model_dump())


def test_answers_about_one_tool_are_one_witness_of_a_metric() -> None:
    grades = [Grade(exact_call=i < 40) for i in range(60)]
    tools = [f"tool_{i // 20}" for i in range(60)]
    with_tools = {"sft": tally(grades, tools)}
    naive = tables.judged(tally(grades)["exact_call"])
    by_tool = tables.judged(with_tools["sft"]["exact_call"])
    assert naive == wilson(40, 60)
    assert by_tool.high - by_tool.low > 2 * (naive.high - naive.low)
    table = tables.metrics(with_tools)
    cell = {row[0].text: row[2] for row in table.rows}["exact call"]
    assert plain(cell.small).startswith("40/60 (3) ·")
    assert "too narrow" not in table.notes[0]
    drawn = {row.name: row for row in tables.metric_rows(with_tools)}
    assert drawn["exact call"].points["sft"] == by_tool
    with pytest.raises(ValueError, match="shorter"):
        tally(grades, tools[:-1])


def test_a_row_belongs_to_its_tool() -> None:
    tools = {
        name: ToolSpec(name=name, description="", parameters={"type": "object"}) for name in "ba"
    }
    row = Conversation(
        id=0, source="t", query="q", tools=tools, gold_calls=(ToolCall(name="b", arguments={}),)
    )
    assert row_cluster(row) == "b"
    silent = Conversation(id=0, source="t", query="q", tools=tools, gold_calls=(), answer="No.")
    assert row_cluster(silent) == "a"


def test_what_a_source_did_not_publish_is_not_called_published() -> None:
    one = tables.Published(
        model="m",
        source="s",
        groups={"Live": 50, "Overall": 35.68, "Web": 3},
        categories={"irrelevance": 90, "live_irrelevance": 80, "live_relevance": 70},
    )
    table = tables.headline({}, [one])
    cells = dict(zip(table.head, table.rows[-1], strict=True))
    assert cells["Live"].small == cells["Must call"].small == "all questions"
    assert (plain(cells["Irrelevance"].text), cells["Irrelevance"].small) == (
        "85.00 %",
        "from its categories",
    )
    assert table.notes[-1].endswith("in percent: m 35.68, Web 3.00 (s).")
    bare = one.model_copy(update={"groups": {}})
    assert not any("Published Overall" in note for note in tables.headline({}, [bare]).notes)


# Sentences


def a_claim(before: int, after: int, n: int) -> list[str]:
    base, sft = model("b", multiple=bits(before, n)), model("s", multiple=bits(after, n))
    models = {"base": base, "sft": sft}
    return [plain(line) for line in tables.claim(models)]


def test_a_gain_is_called_a_gain() -> None:
    said = a_claim(2, 14, 20)
    assert said[0] == (
        "SFT gains 60.0 points over base on the 20 questions that need a call: "
        "14 right, 2 before (12 won, 0 lost, +33.3 to +78.1 points, p < 0.001)."
    )
    assert "DPO: not run." in said


def test_a_loss_is_called_a_loss() -> None:
    assert a_claim(14, 2, 20)[0].startswith("SFT loses 60.0 points against base")


@pytest.mark.parametrize(("before", "after"), [(5, 5), (5, 8), (8, 5), (0, 0), (0, 5)])
def test_a_small_difference_is_called_none(before: int, after: int) -> None:
    said = a_claim(before, after, 20)[0]
    assert said.startswith("SFT and base cannot be told apart")
    assert f"{after} right, {before} before" in said


def test_a_significant_result_that_holm_takes_back_is_no_gain() -> None:
    # 6 won, 0 lost: p = 0.031 alone, 0.094 as the smallest of three statements.
    base = model("b", multiple=bits(0, 20), irrelevance=bits(10, 20))
    sft = model("s", multiple=bits(6, 20), irrelevance=bits(10, 20))
    dpo = model("d", multiple=bits(6, 20))
    assert tables.statements({"base": base, "sft": sft})[0].p == pytest.approx(0.0625)
    said = tables.statements({"base": base, "sft": sft, "dpo": dpo})
    assert [s.verdict for s in said] == ["no difference"] * 3
    assert said[0].p == pytest.approx(3 * 0.03125)


def test_silence_is_not_praised() -> None:
    mute = model("b", multiple=bits(0, 20), irrelevance=bits(20, 20))
    assert any("No call of base counts" in line for line in tables.claim({"base": mute}))
    other = model("b", multiple=bits(1, 20), irrelevance=bits(20, 20))
    assert not any("No call" in line for line in tables.claim({"base": other}))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_a_verdict_never_contradicts_the_counts(pairs: list[tuple[bool, bool]]) -> None:
    was, now = [a for a, _ in pairs], [b for _, b in pairs]
    (said,) = tables.statements({"base": model("b", multiple=was), "sft": model("s", multiple=now)})
    won, lost = sum(b > a for a, b in pairs), sum(a > b for a, b in pairs)
    sure = fair_coin(won, lost) < 0.05
    expected = ("gain" if won > lost else "loss") if sure else "no difference"
    assert said.verdict == expected
    assert said.change.mean == pytest.approx((won - lost) / len(pairs))


def test_a_sample_is_called_a_sample() -> None:
    few = {"base": model("b", multiple=bits(1, 20), parallel=bits(1, 7))}
    assert tables.sample(few).startswith("A sample: 27 of the 3,641")
    other = few | {"sft": model("s", multiple=bits(1, 20))}
    assert "not all asked the same" in tables.sample(other)
    everything = {"base": model("b", **{c: bits(1, n) for c, n in tables.SIZES.items()})}
    told = "All 3,641 single-turn questions and 800 multi-turn dialogues of BFCL-V4"
    assert tables.sample(everything).startswith(told)
    single = {"base": model("b", **{c: bits(1, tables.SIZES[c]) for c in SINGLE_TURN})}
    assert tables.sample(single).startswith("All 3,641 single-turn questions of BFCL-V4")
    mixed = few | {"base": model("b", multiple=bits(1, 20), multi_turn_base=bits(1, 7))}
    assert "20 of the 3,641 single-turn questions and 7 of the 800" in tables.sample(mixed)


# Reading


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"stage": "30_sft", "resu', "30_sft.json: Invalid JSON"),
        (b"\xff\xfe\x00", "30_sft.json: Invalid JSON"),
        ("[]", "30_sft.json"),
        ('{"stage": "30_sft"}', "result: Field required"),
        ('{"stage": "40_dpo", "result": {}}', "holds a result of '40_dpo'"),
    ],
)
def test_a_broken_result_is_named(tmp_path: Path, content: str | bytes, told: str) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "30_sft.json").write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(told)):
        tables.read_records(tmp_path)


def test_a_wrong_part_is_named_and_a_missing_one_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the earlier stages"):
        tables.read_records(tmp_path / "nowhere")
    result = {"models": {"sft": {"model": "x", "categories": {}, "max_tokens": "many"}}}
    (tmp_path / "60_eval.json").write_text(json.dumps({"stage": "60_eval", "result": result}))
    records = tables.read_records(tmp_path)
    with pytest.raises(ValueError, match=r"60_eval.json: models.sft.max_tokens"):
        tables.measured(records)
    assert tables.probes(records) == {}
    assert "not run" in tables.samples({}).html


# Both outputs


def test_one_table_two_outputs() -> None:
    table = tables.headline({"base": model("b", **{c: bits(5, 20) for c in SINGLE_TURN})})
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(tables.to_rich(table))
    terminal, html = console.export_text(), table._repr_html_()
    for text in ("25.0", "n=120", "n=80 (40)", "not run", "Overall counts what was not run as 0"):
        assert text in plain(terminal)
        assert text in plain(html)


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    a_run(tmp_path / "results")
    records = tables.read_records(tmp_path / "results")
    ceiling = tables.published(records)
    pieces = [
        tables.samples(records).html,
        tables.data_table(records)._repr_html_(),
        tables.provenance(records)._repr_html_(),
        tables.headline({}, ceiling)._repr_html_(),
        tables.bullets(tables.limits(records)).html,
        tables.sentences([HOSTILE]).html,
    ]
    for html in pieces:
        assert "&lt;script&gt;" in html
        assert "<script" not in html
        assert "<img" not in html


# The page


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the report stage on a small run that lacks a stage, a model and a category."""
    run = tmp_path_factory.mktemp("run")
    a_run(run / "report" / "results")
    out = run / "report" / "80_report.ipynb"
    papermill.execute_notebook(
        STAGE,
        out,
        parameters={"run": str(run)},
        kernel_name="python3",
        progress_bar=False,
        cwd=ROOT,
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    return out


@pytest.fixture(scope="module")
def html(executed: Path) -> str:
    page.render(executed, executed.with_name("index.html"))
    return executed.with_name("index.html").read_text(encoding="utf-8")


def test_the_stage_writes_nothing_to_stderr(executed: Path) -> None:
    cells = page.read_executed(executed).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert len(outputs) > 10
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []


def test_the_page_shows_the_run(html: str) -> None:
    assert html.count("<figure>") == 3
    assert html.count("<svg ") == 6
    for words in (
        "SFT gains",
        "DPO: not run.",
        "Overall counts what was not run as 0",
        "make report",
        "ceiling-4b",
    ):
        assert words in html
    assert len(re.findall(r"<(script|iframe|link|object|embed)\b", html)) == 0


def test_the_page_needs_nothing_else(html: str) -> None:
    assert page.external(html) == []
    # A second, cruder look: no tag of the page holds an address of another host.
    tags = re.findall(r"<[^!/][^>]*>", re.sub(r' xmlns(:xlink)?="[^"]*"', "", html))
    assert [tag for tag in tags if "//" in tag] == []
    assert "default-src 'none'" in html


class Ids(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [str(found["id"])] if "id" in found else []
        self.links += [str(found["href"])] if tag == "a" and "href" in found else []


def test_every_link_of_the_contents_leads_somewhere(html: str) -> None:
    parser = Ids()
    parser.feed(html)
    assert len(parser.ids) == len(set(parser.ids))
    assert len(parser.links) > 8
    assert {link.removeprefix("#") for link in parser.links} <= set(parser.ids)


def test_the_same_run_gives_the_same_page(executed: Path, html: str, tmp_path: Path) -> None:
    page.render(executed, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_the_stage_leaves_its_own_result(executed: Path) -> None:
    written = json.loads((executed.parent / "results" / "80_report.json").read_text())
    stages = ("10_anchors", "20_data", "30_sft", "60_eval")
    results = {f"report/results/{stage}.json" for stage in stages}
    measured = [p for p in (*serving.FILES.values(), serving.SOAK) if p.is_file()]
    benchmarks = {str(path.relative_to(ROOT)) for path in measured}
    assert set(written["inputs"]) == results | benchmarks
    assert written["result"]["groups"]["base"].keys() == {"Non-Live", "Irrelevance", "Must call"}


def notebook(*cells: dict[str, Any]) -> str:
    full = [{"metadata": {}, "id": f"cell-{i}", **cell} for i, cell in enumerate(cells)]
    return json.dumps({"cells": full, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def code(source: str, count: int | None, *outputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "source": source,
        "execution_count": count,
        "outputs": list(outputs),
    }


def markdown(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "source": source}


def broken_notebooks() -> Iterator[tuple[str, str]]:
    yield '{"cells": [', "is not a notebook"
    yield "[1, 2]", "is not a notebook"
    yield '{"cells": [{"cell_type": "code"}], "nbformat": 4, "nbformat_minor": 5}', "not a notebook"
    failed = {"output_type": "error", "ename": "ValueError", "evalue": "no run", "traceback": []}
    yield notebook(code("1 / 0", 3, failed)), "cell 1 failed with ValueError: no run"
    yield notebook(markdown("# T"), code("1 + 1", None)), "cell 2 was not executed"
    yield notebook(markdown("![far](https://example.test/a.png)")), "https://example.test/a.png"


@pytest.mark.parametrize(("text", "told"), broken_notebooks())
def test_a_broken_notebook_leaves_the_old_page_alone(tmp_path: Path, text: str, told: str) -> None:
    source, target = tmp_path / "80_report.ipynb", tmp_path / "index.html"
    source.write_text(text, encoding="utf-8")
    target.write_text("the old page", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(told)):
        page.render(source, target)
    assert target.read_text(encoding="utf-8") == "the old page"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["80_report.ipynb", "index.html"]


def test_a_missing_notebook_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"80_report.ipynb is missing: run the stage"):
        page.render(tmp_path / "80_report.ipynb", tmp_path / "index.html")


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "n.ipynb").write_text(notebook(markdown("# T")), encoding="utf-8")
    (tmp_path / "index.html").mkdir()
    with pytest.raises(IsADirectoryError):
        page.render(tmp_path / "n.ipynb", tmp_path / "index.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "n.ipynb"]


def test_stderr_is_not_shown(tmp_path: Path) -> None:
    noise = {"output_type": "stream", "name": "stderr", "text": "a warning nobody needs"}
    (tmp_path / "n.ipynb").write_text(notebook(code("1", 1, noise)), encoding="utf-8")
    page.render(tmp_path / "n.ipynb", tmp_path / "n.html")
    assert "nobody needs" not in (tmp_path / "n.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "html",
    [
        '<img src="https://a.test/x.png">',
        "<a href='//a.test/x'>x</a>",
        "<a href=local.html>x</a>",
        '<svg><use xlink:href="http://a.test/x.svg#y"></use></svg>',
        '<p style="background: url( http://a.test )">x</p>',
        "<style>@import url('x.css');</style>",
        "<style>p { background: URL(https://a.test) }</style>",
        '<form action="https://a.test"></form>',
    ],
)
def test_every_way_out_is_found(html: str) -> None:
    assert len(page.external(f"<p>http://plain.test/text is fine</p>{html}")) == 1
