"""What a person types to look at data: normalize, verify, mask."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from practice import xlam_rows
from typer.testing import CliRunner

from toolpost.bench import harness
from toolpost.cli import app
from toolpost.core.schema import Conversation

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
    (tmp_path / "rows.json").write_text(json.dumps(xlam_rows(30)), encoding="utf-8")
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


def test_bfcl_check_prints_one_object_and_says_that_the_ruler_is_straight(tmp_path: Path) -> None:
    done = toolpost("bfcl", "check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["oracle", "null", "always", "deviations"]
    assert found["deviations"] == []
    groups = {"non_live": 99.75, "live": 99.7, "irrelevance": 100, "multi_turn": 100}
    assert found["oracle"]["groups"] == groups
    assert found["oracle"]["simple_java"] == 97
    assert found["null"]["groups"] == dict.fromkeys(groups, 0) | {"irrelevance": 100}
    assert found["always"]["live_relevance"] == 100
    assert list(tmp_path.iterdir()) == []


def test_bfcl_check_fails_where_the_ruler_is_bent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small sample the known numbers of failures are wrong: these are real deviations."""
    monkeypatch.setattr(harness, "prove", partial(harness.prove, per_category=1))
    done = CliRunner().invoke(app, ["bfcl", "check"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert "oracle, simple_java: 1 of 1 passed, expected 97" in found["deviations"]
    assert found["oracle"]["multiple"] == 100


def test_bfcl_check_names_the_file_that_cannot_be_written(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("toolpost")
    done = subprocess.run(
        ["/bin/sh", "-c", f"ulimit -f 400; exec {program} bfcl check"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"File too large: {tmp_path}" in done.stderr


def running(group: int) -> list[str]:
    """Give the commands of a process group that still run."""
    found = [p for p in psutil.process_iter() if os.getpgid(p.pid) == group]
    return [" ".join(p.cmdline()) for p in found if p.status() != psutil.STATUS_ZOMBIE]


def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(xlam_rows(1)[0]), encoding="utf-8")
    tool = str(Path(sys.executable).with_name("toolpost"))
    command = [sys.executable, "-X", "importtime", tool, "normalize", "--source", "xlam"]
    with subprocess.Popen(
        [*command, "rows.jsonl", "--out", "o"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:  # a line for every module, when it has been imported
            if line.endswith(" toolpost.data\n"):
                run.send_signal(signal.SIGINT)
                break
        said = [line for line in run.stderr if not line.startswith("import time:")]
    assert (run.returncode, said) == (130, ["toolpost: stopped\n"])
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("after", [0.0, 0.2, 1.0])
def test_ctrl_c_stops_all_processes_with_one_line(after: float, tmp_path: Path) -> None:
    row = json.dumps(xlam_rows(1)[0])
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(row + "\n" for _ in range(300_000))
    command = [str(Path(sys.executable).with_name("toolpost")), "normalize", "--source", "xlam"]
    command += ["rows.jsonl", "--num-proc", "2", "--out", "o"]
    run = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 60
    while not psutil.Process(run.pid).children() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(after)
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said == "toolpost: stopped; the same command starts again\n"
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())
    until = time.monotonic() + 20
    while running(run.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not running(run.pid)


def plain(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output


def test_the_doctor_says_what_sft_will_repair_and_what_cannot_be_used(tmp_path: Path) -> None:
    code, said = plain("doctor", "pocket")
    assert code == 1
    assert "untrained: <|im_start|>" in said
    assert "repair: sft replaces these rows before training" in said
    assert plain("doctor", str(tmp_path / "none"))[0] == 2
    code, said = plain("doctor", "Qwen/Qwen3-4B-Base")
    assert code == 2
    assert "name its commit" in said


@pytest.mark.parametrize("profile", ["pocket", "rtx4070", "datacenter"])
def test_each_profile_is_planned_to_fit_its_own_budget(profile: str) -> None:
    code, said = plain("plan", "--profile", profile, "--json")
    assert code == 0
    found = json.loads(said)
    assert {one["stage"] for one in found["stages"]} >= {"sft", "dpo shared", "merge"}
    for one in found["stages"]:
        assert sum(one["peak"]["parts"].values()) == one["allocated"] > 0
        assert one["total"] <= found["job"]["memory_gib"] * 2**30


def test_a_plan_that_does_not_fit_says_what_is_in_the_way() -> None:
    code, said = plain("plan", "--profile", "rtx4070", "-p", "memory_gib=4")
    assert code == 1
    assert "sft: a micro-batch of 4096 tokens takes" in said
    assert "most of it is weights" in said
    assert plain("plan", "--profile", "rtx4070", "-p", "checkpointing=never")[0] == 1
    code, said = plain("plan", "-p", "memory_gib=0")
    assert code == 1
    assert "no memory_gib in the settings of Sft, Dpo, Grpo" in said
