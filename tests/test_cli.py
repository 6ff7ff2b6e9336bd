"""What a person types to look at data: normalize, verify, mask."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from toolpost.core.schema import Conversation
from toolpost.data.pocketset import rows as practice_rows

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason=f"no real rows at {SHARED.name}")
TOOLS = [
    {
        "name": "clock",
        "description": "Tell the time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string"}, "hours": {"type": "integer"}},
            "required": ["zone"],
        },
    }
]


def toolpost(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("toolpost")), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@real
@pytest.mark.parametrize(("source", "validity"), [("xlam", 0.98), ("toolace", 0.999)])
def test_normalize_prints_one_object_and_writes_every_row(
    source: str, validity: float, tmp_path: Path
) -> None:
    file = SHARED / f"{source}_rows.json"
    done = toolpost("normalize", "--source", source, file, "--out", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert list(said) == ["rows", "kept", "quarantined", "calls", "valid_calls", "conversations"]
    assert said["rows"] == len(json.loads(file.read_text(encoding="utf-8")))
    assert said["rows"] == said["kept"] + sum(said["quarantined"].values())
    assert said["valid_calls"] >= validity * said["calls"]
    lines = (tmp_path / "o" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [Conversation.model_validate_json(line) for line in lines]
    assert len(rows) == said["conversations"]
    refused = (tmp_path / "o" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(refused) == sum(said["quarantined"].values())
    assert {row.id for row in rows}.isdisjoint(json.loads(line)["id"] for line in refused)


def test_a_relative_file_is_found_where_the_user_stands(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(practice_rows(30, 0)), encoding="utf-8")
    done = toolpost("normalize", "--source", "xlam", "rows.json", "--num-proc", 2, cwd=tmp_path)
    assert json.loads(done.stdout)["kept"] == 30
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (None, ["--source", "xlam"], "no such file"),
        ('[{"id": 1, "query": "a"', ["--source", "xlam"], "download"),
        ("<html></html>", ["--source", "xlam"], "HTML"),
        ('[{"system": "", "conversations": []}]', ["--source", "xlam"], "toolace"),
        ('[{"system": "", "conversations": []}]', ["--source", "glaive"], "toolace"),
    ],
)
def test_a_wrong_file_is_one_message(
    text: str | None, words: list[str], says: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    done = toolpost("normalize", *words, "rows.json", "--out", "o", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("call", "outcome", "code"),
    [
        ({"name": "clock", "arguments": {"zone": "Lima"}}, "valid", 0),
        ([{"name": "clock", "arguments": {"zone": "Lima"}}] * 2, "valid", 0),
        ({"name": "clock", "arguments": {}}, "schema_violation", 1),
        ({"name": "clock", "arguments": {"zone": "Lima", "hours": True}}, "schema_violation", 1),
        ({"name": "watch", "arguments": {}}, "unknown_tool", 1),
        ({"name": "clock"}, "unparseable", 1),
    ],
)
def test_verify_prints_the_result(call: Any, outcome: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "call.json").write_text(json.dumps(call), encoding="utf-8")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")
    done = toolpost("verify", "call.json", "tools.json", cwd=tmp_path)
    said = json.loads(done.stdout)
    assert (said["result"], done.returncode) == (outcome, code)
    assert bool(said["detail"]) == bool(code)


def test_verify_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = toolpost("verify", "call.json", "tools.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "call.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_reads_no_more_than_it_accepts(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text("[]", encoding="utf-8")
    done = toolpost("verify", "/dev/zero", "tools.json", cwd=tmp_path)
    assert json.loads(done.stdout)["result"] == "unparseable"


@pytest.mark.parametrize("words", [["7"], ["7", "--model", "nope"], ["7", "--split", "nope"]])
def test_mask_without_its_row_is_one_message(words: list[str], tmp_path: Path) -> None:
    done = toolpost("mask", *words, "--name", "never-run", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr


def running(group: int) -> list[str]:
    """Give the commands of a process group that still run."""
    found = [p for p in psutil.process_iter() if os.getpgid(p.pid) == group]
    return [" ".join(p.cmdline()) for p in found if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("after", [0.5, 0.7, 1.0, 2.0])
def test_ctrl_c_stops_all_processes_with_one_line(after: float, tmp_path: Path) -> None:
    row = json.dumps(practice_rows(1, 0)[0])
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(row + "\n" for _ in range(300_000))
    command = [str(Path(sys.executable).with_name("toolpost")), "normalize", "--source", "xlam"]
    command += ["rows.jsonl", "--num-proc", "2", "--out", "o"]
    run = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(after)
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert len(said.splitlines()) == 1, said
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())
    until = time.monotonic() + 20
    while running(run.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not running(run.pid)
