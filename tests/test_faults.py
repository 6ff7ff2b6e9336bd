"""What goes wrong while a model is asked: nothing is lost, nothing is invented, nobody stays."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_server import SmallServer, model_folder

from toolpost.bench.ask import ask, persist
from toolpost.bench.bfcl import (
    TOO_LONG,
    BenchError,
    Plan,
    UnfinishedError,
    _run,
    check_server,
    generate,
    questions,
    result_file,
    sample_ids,
    score,
    truths,
)
from toolpost.bench.errors import bfcl_metrics
from toolpost.bench.harness import ANSWERS
from toolpost.bench.probes import complete
from toolpost.bench.worker import ScoreJob
from toolpost.core.format import render_calls
from toolpost.core.schema import ToolCall
from toolpost.serve.server import Server, Vllm

CODE = Path(str(files("toolpost"))).parent
IDS = sample_ids(2, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))  # of Python's own, from other tests
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
    return True


MESSAGES = {
    question["id"]: question["question"][0][-1]["content"]
    for category, ids in IDS.items()
    for question in questions(category)
    if question["id"] in ids
}
EXPECTED = {
    question["id"]: str(ANSWERS["oracle"](category, question, truths(category).get(question["id"])))
    for category, ids in IDS.items()
    for question in questions(category)
    if question["id"] in ids
}
ORACLE = {MESSAGES[i]: text for i, text in EXPECTED.items()}


def answers(root: Path, stage: str = "base") -> dict[str, str]:
    """Read what was answered; each question may have one row only."""
    rows = [
        json.loads(line)
        for category in IDS
        if (path := result_file(root, stage, category)).exists()
        for line in path.read_text().splitlines()
    ]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["result"] for row in rows}


# ------------------------------------------------------------------------------------ the server


def test_a_server_that_dies_freezes_and_refuses(tmp_path: Path, model: str) -> None:
    """Refusals, killed at one half, then frozen: the answers are those of a calm run."""
    first, second, *_ = (MESSAGES[i] for i in IDS["irrelevance"])
    lives: list[dict[str, Any]] = [
        {"die_after": 13, "fail": {first: 400, second: 500}},
        {"freeze_after": 4},
        {},
    ]
    lines: list[str] = []
    with SmallServer(tmp_path, model, ORACLE, *lives) as server:
        plan = ask(
            server,
            tmp_path / "run",
            "base",
            IDS,
            model,
            max_tokens=48,
            threads=3,
            request_timeout_s=2,
            say=lines.append,
        )
        assert server.started == 3
        asked = server.asked
    assert answers(tmp_path / "run") == EXPECTED
    assert plan.total == len(EXPECTED) == 26
    assert plan.engine == server.software
    assert is_free(server.port)

    told = [line for line in lines if line.startswith("attempt")]
    assert len(told) == 2
    assert "bfcl gave up: the server is gone" in told[0]
    assert "bfcl gave up: no answer came for 2 s" in told[1]
    assert lines[-1].startswith("bfcl base: 26/26 questions, ")
    assert lines[-1].endswith("/s, 0 s left")
    # No good answer was asked for again: 3 were in flight at each end, a 500 is sent thrice.
    assert asked.count(first) == 2
    assert 2 <= asked.count(second) <= 3 + 1
    assert len(asked) <= 26 + 1 + 3 + 2 * 3


def test_a_server_that_does_not_come_back_is_given_up(tmp_path: Path, model: str) -> None:
    with SmallServer(tmp_path, model, {}, {}, {"silent": True}) as server:
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        with pytest.raises(BenchError, match="nobody can be asked: the small server is not well"):
            ask(server, tmp_path / "run", "base", IDS, model)

        server.started = 0
        server.restart()
        killed = server.process

        def work(base_url: str) -> None:
            killed.kill()
            killed.wait()
            check_server(base_url, model)

        killed = server.process
        with pytest.raises(BenchError, match="gave up; good answers are kept") as failure:
            persist(server, work, say=lambda _: None)
        assert "attempt 1 of 3: no usable answer from" in str(failure.value)
        assert "could not be started again: the small server was not ready" in str(failure.value)
    assert is_free(server.port)


def test_what_another_attempt_cannot_heal_is_said_at_once(tmp_path: Path, model: str) -> None:
    with SmallServer(tmp_path, "somebody-else", {}) as server:
        with pytest.raises(BenchError, match=r"serves \['somebody-else'\], not"):
            ask(server, tmp_path / "run", "base", IDS, model)
        with pytest.raises(BenchError, match=r"has no config\.json"):
            ask(server, tmp_path / "run", "base", IDS, tmp_path)
        assert server.started == 1
        assert server.asked == []


def test_an_answer_that_the_server_broke_off_is_asked_for_again(tmp_path: Path, model: str) -> None:
    """VLLM ends what is open with status 200, no text and "abort" when it shuts down."""
    ids = {"irrelevance": IDS["irrelevance"]}
    lines: list[str] = []
    life = {"first": ["abort"]}
    with SmallServer(tmp_path, model, ORACLE, life) as server:
        ask(server, tmp_path / "run", "base", ids, model, threads=1, say=lines.append)
        assert server.started == 1
        assert len(server.asked) == 2 + 1
    assert answers(tmp_path / "run") == {i: EXPECTED[i] for i in IDS["irrelevance"]}
    (told,) = (line for line in lines if line.startswith("attempt"))
    assert "1 of 2 questions have no good answer" in told
    assert "its finish_reason is 'abort'" in told


@pytest.mark.parametrize(("status", "says"), [(503, "with status 503"), (0, "ReadTimeout")])
def test_a_server_that_stops_between_two_looks_is_not_waited_for(
    tmp_path: Path, model: str, status: int, says: str
) -> None:
    """BFCL itself looks for the server in a loop without end."""
    with (
        SmallServer(tmp_path, model, ORACLE, {"models": status}) as server,
        pytest.raises(UnfinishedError, match=f"gave up: the server is not ready .*{says}"),
    ):
        generate(
            tmp_path / "run", "base", IDS, model, server.base_url, request_timeout_s=2, timeout_s=60
        )
    assert answers(tmp_path / "run") == {}


def test_own_rows_are_asked_again_too(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    texts = [f"<|im_start|>user\n{text}<|im_end|>" for text in ORACLE]
    life = {"first": [500, "abort"]}
    with SmallServer(tmp_path, model, ORACLE, life) as server:
        work = partial(complete, model=model, prompts=texts, max_tokens=1000, clients=1)
        with pytest.raises(UnfinishedError, match="its finish_reason is 'abort'"):
            work(server.base_url)
        server.restart()
        found = persist(server, work, say=lambda _: None)
        assert server.started == 2
    assert [said.text for said in found] == list(ORACLE.values())
    assert not any(said.capped for said in found)


def test_what_computes_the_answers_has_a_version(tmp_path: Path) -> None:
    about = tmp_path / "lib" / "python3.12" / "site-packages" / "vllm-0.21.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.21.0\n")
    options = Vllm(executable=tmp_path / "bin" / "vllm", enforce_eager=False)
    log = tmp_path / "log"
    served = Server(tmp_path, log=log, engine="vllm", vllm=options)
    assert served.software == "vllm 0.21.0"
    assert served.options["enforce_eager"] is False
    assert str(tmp_path) not in json.dumps(served.options)
    cpu = Server(tmp_path, log=log, threads=3)
    assert cpu.options == {"threads": 3}
    assert {"toolpost", "torch"} <= set(cpu.software.split())


def test_a_model_is_asked_like_those_it_is_compared_with(tmp_path: Path, model: str) -> None:
    """Another engine or cap is refused before anything is asked; a larger window is not used."""
    ids = {"irrelevance": IDS["irrelevance"]}
    base = Plan(ids={}, max_tokens=64, window=5000, engine=SmallServer.software)
    with SmallServer(tmp_path, model, ORACLE, window=8000) as server:
        once = partial(ask, server, tmp_path / "run", "sft", ids, model)
        for change, says in (
            ({"engine": "small server 0"}, "engine 'small server 0' and 'small server 1'"),
            ({"max_tokens": 48}, "max_tokens 48 and 64"),
            ({"window": 9000}, "window 9000 and 8000"),
        ):
            like = {"base": base.model_copy(update=change)}
            with pytest.raises(BenchError, match=f"'base' and 'sft' were not asked alike.*{says}"):
                once(max_tokens=64, like=like)
        assert server.asked == []
        plan = once(max_tokens=64, like={"base": base})
    assert plan == base.model_copy(update={"ids": ids})


# ------------------------------------------------------------------------------------ the runner


def test_an_answer_that_the_window_cut_off_is_no_refusal(tmp_path: Path, model: str) -> None:
    """A piece of a call is none to BFCL: what the cap cut is the model's, what the window not."""
    by_size = sorted(questions("irrelevance"), key=lambda q: len(json.dumps(q)))
    short, long = by_size[0]["id"], by_size[-1]["id"]
    ids = {"irrelevance": (short, long)}
    asked = {q["id"]: q["question"][0][-1]["content"] for q in by_size}
    call = render_calls([ToolCall(name="some_function", arguments={"some": "argument"})])
    texts = {asked[i]: call for i in ids["irrelevance"]}
    life, cap = {"cut": True}, 40

    def run(name: str, window: int) -> dict[str, dict[str, Any]]:
        with SmallServer(tmp_path, model, texts, life, window=window) as server:
            generate(tmp_path / name, "base", ids, model, server.base_url, max_tokens=cap)
        lines = result_file(tmp_path / name, "base", "irrelevance").read_text().splitlines()
        return {row["id"]: row for row in map(json.loads, lines)}

    wide = run("wide", 100_000)
    assert {i: row["result"] for i, row in wide.items()} == dict.fromkeys(wide, call[:cap])
    assert [row["finish_reason"] for row in wide.values()] == [["length"]] * 2
    size = int(wide[long]["input_token_count"])
    assert size > wide[short]["input_token_count"] + cap

    tight = run("tight", size + 2 + cap - 10)
    assert {i: row["result"] for i, row in tight.items()} == {short: call[:cap], long: call[:30]}
    scores = score(tmp_path / "tight", ["base"])["base"]
    found = scores.categories["irrelevance"]
    assert (found.hits, found.capped, found.too_long) == (1, 1, 1)
    assert found.errors == {long: TOO_LONG}
    counts = bfcl_metrics(tmp_path / "tight", scores)
    assert (counts["run_away"].hits, counts["run_away"].n, counts["abstention"].n) == (1, 1, 1)


def limited(size: int, call: str) -> str:
    """Write a program that makes a call while no file may grow beyond a size."""
    return (
        "import resource; from pathlib import Path; from toolpost.bench.bfcl import generate\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n{call}"
    )


def test_a_killed_runner_goes_on_where_it_stopped(tmp_path: Path, model: str) -> None:
    """Killed with -9; a cut line; a full disk; a question that does not fit into the window."""
    asked = sorted(questions("live_irrelevance"), key=lambda q: len(json.dumps(q["function"])))
    chosen = [asked[-1], *(q for q in asked if len(q["question"][0]) == 1)][:6]
    ids = {"live_irrelevance": tuple(q["id"] for q in chosen)}
    texts = {q["id"]: q["question"][0][-1]["content"] for q in chosen}
    refusals = {text: f"No. {'x' * 6000}{n}" for n, text in enumerate(texts.values())}
    root, too_long = tmp_path / "run", chosen[0]["id"]
    rows = result_file(root, "base", "live_irrelevance")

    with SmallServer(tmp_path, model, refusals, window=8000, delay_s=0.4) as server:
        call = f"generate(Path({str(root)!r}), 'base', {ids!r}, {model!r}, {server.base_url!r}"
        code = limited(10**9, f"{call}, threads=1)")
        runner = subprocess.Popen([sys.executable, "-c", code], cwd=CODE)
        while not rows.exists() or not rows.read_text().count("No. "):
            time.sleep(0.05)
            assert runner.poll() is None
        workers = psutil.Process(runner.pid).children(recursive=True)
        runner.kill()
        runner.wait()
        assert workers
        assert not psutil.wait_procs(workers, timeout=30)[1]
        kept = rows.read_text()
        rows.write_text(kept + kept.splitlines()[-1][:300])

        code = limited(20_000, f"{call})")
        full = subprocess.run(
            [sys.executable, "-c", code], cwd=CODE, capture_output=True, text=True, check=False
        )
        assert full.returncode == 1
        assert "UnfinishedError" in full.stderr
        assert f"cannot be written: [Errno 27] File too large: '{rows}'" in full.stderr

        plan = generate(root, "base", ids, model, server.base_url, threads=1)
        asked_texts = server.asked

    assert plan.window == 8000
    want = {i: refusals[text] for i, text in texts.items()} | {too_long: ""}
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["id"]: row["result"] for row in found} == want
    assert len(found) == len(want)
    ends = {row["id"]: row["finish_reason"] for row in found}
    assert ends == {i: ["window" if i == too_long else "stop"] for i in want}
    assert texts[too_long] not in asked_texts
    assert len(asked_texts) < 2 * len(want)  # not everything was asked again

    # An answer for which there was no room is no refusal to call: it is wrong, and counted.
    scores = score(root, ["base"])["base"].categories["live_irrelevance"]
    assert (scores.n, scores.hits, scores.too_long) == (6, 5, 1)
    assert scores.errors == {too_long: TOO_LONG}
    assert is_free(server.port)


def test_a_full_disk_is_named_before_anything_starts(tmp_path: Path, model: str) -> None:
    with SmallServer(tmp_path, model, {}) as server:
        call = f"generate(Path({str(tmp_path)!r}), 'base', {IDS!r}, {model!r}, {server.base_url!r})"
        full = subprocess.run(
            [sys.executable, "-c", limited(100, call)],
            cwd=CODE,
            capture_output=True,
            text=True,
            check=False,
        )
        plan = tmp_path / "plan" / "toolpost-base-FC.json"
        told = f"UnfinishedError: bfcl base: [Errno 27] File too large: '{plan}'"
        assert told in full.stderr
        assert server.asked == []


def test_a_process_that_meets_a_limit_names_it(tmp_path: Path) -> None:
    with pytest.raises(UnfinishedError, match="score process ended by SIGXCPU: it used up its CPU"):
        _run(ScoreJob(names=(), cpu_s=1), tmp_path, 60)
