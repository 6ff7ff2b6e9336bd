"""The graph: what is refused, what is resumed after a kill, what is left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from toolpost.core.format import completion_of
from toolpost.data.build import read_split
from toolpost.pipeline import GRAPH, Run, RunError, compare, only_one, publish

ROOT = Path(__file__).parents[1]
SMALL = ["-p", "rows=150", "-p", "max_steps=40", "-p", "batch_size=2"]


@pytest.fixture
def run() -> Iterator[Run]:
    """A run of this test's own, under runs/ where every run is."""
    this = Run(f"test-{os.getpid()}")
    yield this
    shutil.rmtree(ROOT / this.folder, ignore_errors=True)


def toolpost(*words: str) -> subprocess.Popen[str]:
    code = "from toolpost.cli import main; main()"
    command = [sys.executable, "-c", code, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def say(*words: str) -> tuple[int, str]:
    process = toolpost(*words)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "--profile", "poket"], "unknown profile 'poket'; there are: datacenter, pocket"),
        (["run", "--stage", "35_sft"], "unknown stage '35_sft'; there are: 10_anchors"),
        (
            ["run", "-p", "lerning_rate=1"],
            "unknown parameter lerning_rate; there are: abstain, attention",
        ),
        (["run", "-p", "rank=many"], "stage 30_sft: parameter 'rank'"),
        (["run", "-p", "rank"], "write it as key=value"),
        (["run", "--name", "../x"], "--name '../x'"),
        (["publish", "nothing-here"], "is not finished"),
    ],
)
def test_a_mistake_is_one_message_and_a_failure(words: list[str], says: str) -> None:
    code, output = say(*words)
    assert code != 0
    assert says in output
    assert "Traceback" not in output


def test_a_missing_data_file_is_named(run: Run) -> None:
    words = ["run", "--name", run.name, "--stage", "20_data"]
    code, output = say(*words, "-p", "sources={xlam: no/rows.json}")
    assert code == 1
    assert "stage 20_data failed: SourceError: no/rows.json: no such file" in output
    assert not (ROOT / run.result("20_data")).exists()


def test_papermill_alone_refuses_a_misspelt_parameter(tmp_path: Path) -> None:
    papermill = [
        sys.executable,
        "-m",
        "papermill",
        "nbs/stages/20_data.ipynb",
        str(tmp_path / "o.ipynb"),
    ]
    done = subprocess.run(
        [*papermill, "-p", "rowz", "3", "-p", "run", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "unknown parameter 'rowz'" in done.stderr
    assert not list(tmp_path.rglob("*.json"))


def descendants(pid: int) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


def test_a_run_killed_in_the_middle_of_sft_leaves_nothing_and_goes_on(run: Run) -> None:
    words = ["run", "--name", run.name, "--stage", "30_sft", *SMALL]
    first = toolpost(*words)
    assert first.stdout
    for line in first.stdout:
        if line.strip().startswith("step "):
            break
    left = descendants(first.pid)
    assert left, "the stage runs in a process of its own"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in left), 20)
    assert (ROOT / run.result("20_data")).exists()
    assert not (ROOT / run.result("30_sft")).exists()
    made = (ROOT / run.result("20_data")).stat().st_mtime_ns

    code, output = say(*words)
    assert code == 0, output
    assert "20_data" not in output, "the finished stage was run again"
    assert (ROOT / run.result("20_data")).stat().st_mtime_ns == made
    result = json.loads((ROOT / run.result("30_sft")).read_text(encoding="utf-8"))
    assert result["result"]["steps"] == 40
    assert "data/train.jsonl" in result["inputs"]

    code, output = say(*words)
    assert (code, output.strip()) == (0, "30_sft is up to date")

    row = read_split(ROOT / run.folder / "data", "train")[0]
    code, output = say("mask", str(row.id), "--name", run.name)
    assert code == 0
    trained = "".join(re.findall("«(.*?)»", output)).replace("·", " ").replace("↵", "\n")
    assert trained == completion_of(row.gold_calls, row.answer)


def test_ctrl_c_is_one_message_and_leaves_nothing(run: Run) -> None:
    process = toolpost("run", "--name", run.name, "--stage", "30_sft", *SMALL)
    assert process.stdout
    for line in process.stdout:
        if line.strip().startswith("step "):
            break
    left = descendants(process.pid)
    assert left
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.strip() == "toolpost: stopped; the same command goes on where it was"
    assert wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in left), 10)
    assert not (ROOT / run.result("30_sft")).exists()


def test_two_runs_in_one_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with only_one(Run("x")), pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        only_one(Run("x")).__enter__()
    with only_one(Run("x")):
        assert (tmp_path / "runs" / "x").is_dir()


def results(folder: Path, hits: int, seed: int) -> Path:
    """Write results of a run with one category and one metric."""
    scores = {"categories": {"multiple": {"passed": [True] * hits + [False] * (4 - hits)}}}
    bodies = {
        "10_anchors": {"models": {"base": scores}},
        "60_eval": {
            "models": {"sft": scores},
            "probes": {"sft": {"exact_call": {"hits": hits, "n": 4}}},
        },
        "70_agent": {"models": {"sft": {"kinds": {"one": {"hits": hits, "n": 4}}}}},
    }
    folder.mkdir(parents=True)
    for stage in GRAPH:
        record = {"parameters": {"run": str(folder), "seed": seed}, "result": bodies.get(stage, {})}
        (folder / f"{stage}.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_a_run_is_compared_with_the_published_one(tmp_path: Path) -> None:
    published = results(tmp_path / "published", hits=2, seed=0)
    same = compare(results(tmp_path / "a", hits=2, seed=0), published)
    other = compare(results(tmp_path / "b", hits=3, seed=0), published)
    assert same == "Reproduced: all 4 scores equal the published ones."
    assert "4 of 4 scores" in other
    assert "sft exact_call: 3/4, published 2/4" in other
    assert "sft agent, one: 3/4, published 2/4" in other
    assert "10_anchors seed" in compare(results(tmp_path / "c", hits=2, seed=1), published)
    assert compare(published, tmp_path / "none") == "No published run to compare with."


def test_an_unfinished_run_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="80_report"):
        publish(Run("x"), tmp_path / "reports")
    assert not (tmp_path / "reports").exists()
