"""Time the normalizer on real rows, against a floor and against the obvious way.

python benchmarks/data.py --xlam ROWS.json --toolace ROWS.json --out reports/benchmarks/data.json
python benchmarks/data.py --table reports/benchmarks/data.json

The rows are repeated to `--rows`, each with its number behind the question. Every figure is taken
in a process of its own, in turn, `--repeats` times; the median counts; CPU seconds, no start-up.

floor      parse the JSON, that of the tools and of the calls inside the rows too, and nothing else
toolpost   `toolpost normalize --out`: read, normalize, verify every gold call, write every row
first      the same on the rows before they are repeated: every tool is new
obvious    the same with `jsonschema.validate` for each call and each default, nothing kept from
           row to row; on the rows before they are repeated, because it is slow
stage      the whole data stage: decontaminate, deduplicate, augment and split as well
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

MARKER = "Here is a list of functions in JSON format that you can invoke:\n"


def repeated(rows: list[dict[str, Any]], source: str, count: int) -> Iterator[dict[str, Any]]:
    """Give so many rows, none with the question of another."""
    for at in range(count):
        row = rows[at % len(rows)]
        if source == "xlam":
            yield {**row, "id": at, "query": f"{row['query']} ({at})"}
        else:
            first, *others = row["conversations"]
            yield {
                **row,
                "conversations": [{**first, "value": f"{first['value']} ({at})"}, *others],
            }


def write(path: Path, rows: Iterable[Any]) -> Path:
    """Write a JSON array, row by row."""
    with path.open("w", encoding="utf-8") as file:
        for at, row in enumerate(rows):
            file.write(("[" if at == 0 else ",\n") + json.dumps(row))
        file.write("]\n")
    return path


def floor(file: Path, source: str, out: Path) -> None:  # noqa: ARG001
    """Parse the JSON of every row, and that inside it."""
    with file.open(encoding="utf-8") as opened:
        rows = json.load(opened)
    decoder = json.JSONDecoder()
    for row in rows:
        if source == "xlam":
            json.loads(row["tools"]), json.loads(row["answers"])
        elif (at := row["system"].find(MARKER)) >= 0:
            decoder.raw_decode(row["system"], at + len(MARKER))
            [json.loads(t["value"]) for t in row["conversations"] if t["from"] == "tool"]


def toolpost(file: Path, source: Any, out: Path, num_proc: int = 1) -> None:
    """Normalize a file as the command does."""
    from toolpost.data.build import items, normalize_rows, summary
    from toolpost.data.sources import load_rows

    rows = items(source, load_rows(source, None, 0, file))
    found = summary(normalize_rows(rows, out, num_proc))
    if found["valid_calls"] < 0.97 * found["calls"]:
        raise SystemExit(f"{file}: not what is to be measured: {found}")


def obvious(file: Path, source: str, out: Path) -> None:
    """Do the same with `jsonschema.validate` and with nothing kept from one row to the next."""
    import jsonschema

    from toolpost.core.schema import ToolCall, VerificationOutcome, VerificationResult

    def judge(call: ToolCall, tools: Any) -> VerificationResult:
        try:
            schema = {"additionalProperties": False, **tools[call.name].parameters}
            jsonschema.validate(call.arguments, schema, jsonschema.Draft202012Validator)
        except (KeyError, jsonschema.ValidationError) as problem:
            bad = VerificationOutcome.SCHEMA_VIOLATION
            return VerificationResult(result=bad, detail=str(problem)[:200])
        return VerificationResult(result=VerificationOutcome.VALID)

    for name in ("verify", "normalize", "xlam", "toolace", "split"):
        module = import_module(f"toolpost.core.{name}")
        if hasattr(module, "verify_call"):
            setattr(module, "verify_call", judge)  # noqa: B010  # the type checker knows no patches
        for key, value in list(vars(module).items()):
            if hasattr(value, "cache_info"):
                setattr(module, key, value.__wrapped__)
    toolpost(file, source, out)


def stage(file: Path, source: Any, out: Path) -> None:
    """Do all that the data stage does."""
    from toolpost.bench.bfcl import benchmark_texts
    from toolpost.core.augment import Recipe
    from toolpost.core.decontaminate import benchmark
    from toolpost.data.build import build, items
    from toolpost.data.sources import load_rows

    exam = benchmark(*benchmark_texts())
    recipe = Recipe(abstain=0.1, masked=0.33, wrapped=0.5)
    build(items(source, load_rows(source, None, 0, file)), recipe, out, (0.1, 0.1), exam)


WAYS: dict[str, Callable[..., None]] = {
    "floor": floor,
    "toolpost": toolpost,
    "toolpost, 2 processes": lambda file, source, out: toolpost(file, source, out, 2),
    "first": toolpost,
    "obvious": obvious,
    "stage": stage,
}
ON_FEW = ("first", "obvious")


def measure(what: str, source: str, file: Path) -> dict[str, float]:
    """Measure one way in this process."""
    import toolpost.data.build  # noqa: F401  # start-up is not measured

    with tempfile.TemporaryDirectory() as out:
        wall, cpu = time.perf_counter(), time.process_time()
        WAYS[what](file, source, Path(out))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_s": cpu, "wall_s": wall, "peak_mb": peak}


def child(what: str, source: str, file: Path) -> dict[str, float]:
    """Measure one way in a process of its own."""
    words = [sys.executable, __file__, "--measure", what, "--source", source, "--file", str(file)]
    found: dict[str, float] = json.loads(
        subprocess.run(words, capture_output=True, check=True).stdout
    )
    return found


def median(runs: list[dict[str, float]], key: str) -> float:
    """Give the median of a figure."""
    return statistics.median(run[key] for run in runs)


def compare(source: str, rows: list[dict[str, Any]], count: int, repeats: int, to: Path) -> Any:
    """Measure all ways on one corpus."""
    few = write(to / f"{source}-few.json", repeated(rows, source, len(rows)))
    many = write(to / f"{source}-many.json", repeated(rows, source, count))
    part = {
        n: write(to / f"{source}-{n}.json", repeated(rows, source, n))
        for n in (count // 4, count // 2)
    }
    runs: dict[str, list[dict[str, float]]] = {what: [] for what in WAYS}
    for _ in range(repeats):
        for what, found in runs.items():
            found.append(child(what, source, few if what in ON_FEW else many))
            print(source, what, {k: round(v, 3) for k, v in found[-1].items()}, file=sys.stderr)
    size = {what: len(rows) if what in ON_FEW else count for what in WAYS}
    microseconds = {what: 1e6 * median(found, "cpu_s") / size[what] for what, found in runs.items()}
    walls = {what: 1e6 * median(found, "wall_s") / size[what] for what, found in runs.items()}
    memory = {n: child("toolpost", source, file)["peak_mb"] for n, file in part.items()}
    stages = {n: child("stage", source, file)["peak_mb"] for n, file in part.items()}
    return {
        "real_rows": len(rows),
        "rows": size,
        "cpu_us_per_row": microseconds,
        "wall_us_per_row": walls,
        "peak_mb": {what: median(found, "peak_mb") for what, found in runs.items()},
        "peak_mb_by_rows": {**memory, count: median(runs["toolpost"], "peak_mb")},
        "stage_peak_mb_by_rows": {**stages, count: median(runs["stage"], "peak_mb")},
        "runs": runs,
    }


FULL = {"xlam": 60_000, "toolace": 11_300}  # rows of the published corpora


def both(corpora: dict[str, Any]) -> dict[str, float]:
    """Give the microseconds a row of both corpora together, in the proportion of their sizes."""
    ways = corpora["xlam"]["cpu_us_per_row"]
    spent = {
        way: sum(corpora[c]["cpu_us_per_row"][way] * n for c, n in FULL.items()) for way in ways
    }
    return {way: total / sum(FULL.values()) for way, total in spent.items()}


def table(results: dict[str, Any]) -> str:
    """Write the README's table."""
    corpora = results["corpora"]
    times = [corpora["xlam"]["cpu_us_per_row"], corpora["toolace"]["cpu_us_per_row"], both(corpora)]
    lines = ["| | xLAM | ToolACE | both, as 60,000 to 11,300 |", "|---|---|---|---|"]

    def add(label: str, cells: Iterable[str]) -> None:
        lines.append(f"| {label} | {' | '.join(cells)} |")

    def counts(of: Callable[[Any], str]) -> list[str]:
        return [*(of(corpora[name]) for name in FULL), ""]

    def rate(way: str) -> list[str]:
        return [f"{1e6 / time[way]:,.0f}" for time in times]

    def ratio(one: str, other: str) -> list[str]:
        return [f"{time[one] / time[other]:.1f}" for time in times]

    def memory(key: str) -> list[str]:
        return counts(lambda c: ", ".join(f"{mb:.0f}" for mb in c[key].values()))

    add("real rows → repeated to", counts(lambda c: f"{c['real_rows']:,} → {c['rows']['stage']:,}"))
    add("`toolpost normalize`, rows/s on one core", rate("toolpost"))
    add("… rows/s with every tool new", rate("first"))
    add("whole data stage, rows/s on one core", rate("stage"))
    add("only parsing the JSON, rows/s", rate("floor"))
    add("`jsonschema.validate` for each call, nothing kept, rows/s", rate("obvious"))
    add("toolpost / only parsing, time", ratio("toolpost", "floor"))
    add("`jsonschema.validate` / toolpost, time", ratio("obvious", "toolpost"))
    add("… with every tool new", ratio("obvious", "first"))
    add("peak memory at a quarter, a half, all of the rows, MB", memory("peak_mb_by_rows"))
    add("… of the whole data stage", memory("stage_peak_mb_by_rows"))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--xlam", type=Path, help="real xLAM rows, a JSON array")
    parser.add_argument("--toolace", type=Path, help="real ToolACE rows, a JSON array")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the README's table of this result")
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure(a.measure, a.source, a.file)))
        return
    if a.table:
        print(table(json.loads(a.table.read_text(encoding="utf-8"))), end="")
        return
    if not (a.xlam and a.toolace):
        parser.error("name the real rows with --xlam and --toolace")
    results: dict[str, Any] = {
        "python": platform.python_version(),
        "jsonschema": metadata.version("jsonschema"),
        "jsonschema_rs": metadata.version("jsonschema-rs"),
        "machine": platform.machine(),
        "repeats": a.repeats,
        "corpora": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for source, path in (("xlam", a.xlam), ("toolace", a.toolace)):
            rows = json.loads(path.read_text(encoding="utf-8"))
            found = compare(source, rows, a.rows, a.repeats, Path(folder))
            results["corpora"][source] = found
    text = json.dumps(results, indent=1)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(text + "\n", encoding="utf-8")
    print(table(json.loads(text)), end="")


if __name__ == "__main__":
    main()
