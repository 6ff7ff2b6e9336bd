"""The benchmark runs, and the README shows what it measured."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reports" / "benchmarks" / "data.json"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_data", ROOT / "benchmarks" / "data.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_table_of_the_committed_figures(data: ModuleType) -> None:
    table = data.table(json.loads(RESULTS.read_text(encoding="utf-8")))
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split("data.json -->\n")[1]
    assert shown.split("<!-- end -->")[0] == table


@pytest.mark.parametrize("what", ["floor", "toolpost", "obvious", "stage"])
def test_every_way_runs(data: ModuleType, what: str, tmp_path: Path) -> None:
    rows = [
        {
            "id": n,
            "query": f"Weather in town {n}?",
            "tools": '[{"name": "weather", "parameters": {"town": {"type": "str"}}}]',
            "answers": json.dumps([{"name": "weather", "arguments": {"town": str(n)}}]),
        }
        for n in range(20)
    ]
    file = data.write(tmp_path / "rows.json", data.repeated(rows, "xlam", 40))
    found = data.child(what, "xlam", file)
    assert found["cpu_s"] > 0
    assert found["peak_mb"] > 10
