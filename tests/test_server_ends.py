"""However a server, its supervisor or its user ends: no process is left, and no port is held."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import Any, NamedTuple

import psutil
import pytest

from toolpost.record import ROOT
from toolpost.serve.server import Server, ServerError, Vllm

# It takes vLLM's place: a process that answers, and an engine below it that computes, with a worker
# below that. What an answer needs comes from the engine, /health does not. As in vLLM, the engine
# changes its name, ends after SIGTERM (unless it is told to be stubborn) and survives its parent's
# SIGKILL, and the server ends with code 0 when its engine is gone.
FAMILY = """#!{python} -IS
import ctypes, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder, mode = Path(os.environ["FAMILY"]), os.environ.get("MODE", "")
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
print("loading", options["--served-model-name"], flush=True)
if mode.startswith("exit"):
    sys.exit(int(mode[4:]))

def note(role):
    (folder / f"{{role}}.{{os.getpid()}}").touch()

def engine(questions, answers):
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "daemon":
        os.setsid()
    ctypes.CDLL(None).prctl(15, b"VLLM::EngineCore")
    if os.fork() == 0:
        note("worker")
        signal.pause()
    note("engine")
    while os.read(questions, 1):
        os.write(answers, b"!")
    signal.pause()

asks, told = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    os.close(asks[1])
    engine(asks[0], told[1])
    os._exit(0)
note("api")

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200)

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        os.write(asks[1], b"?")
        self.reply(200 if os.read(told[0], 1) and mode != "broken" else 500)

    def reply(self, status):
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

def end(*_):
    os.kill(child, signal.SIGTERM)
    os._exit(0)

signal.signal(signal.SIGTERM, end)
while len(list(folder.glob("*.*"))) < 3:
    time.sleep(0.01)
while mode == "silent" or mode == "slow" and not (folder / "go").exists():
    time.sleep(0.01)
server = ThreadingHTTPServer((options["--host"], int(options["--port"])), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.waitpid(child, 0)
"""

USER = """
import sys
from pathlib import Path
from toolpost.serve.server import Server, Vllm
folder = Path(sys.argv[1])
with Server(
    folder / "model", "it", engine="vllm", log=folder / "log", patience_s=0.5,
    vllm=Vllm(executable=folder / "bin" / "vllm"),
) as server:
    print(server.port, flush=True)
    sys.stdin.read()
"""


def wait_for(check: Callable[[], bool], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def is_free(port: int) -> bool:
    try:
        socket.create_server((HERE[0], port)).close()
    except OSError:
        return False
    return True


def is_held(port: int) -> bool:
    """Tell whether a port that nobody listened on or talked to is somebody's all the same."""
    with socket.socket() as probe:
        try:
            probe.bind((HERE[0], port))
        except OSError:
            return True
    return False


class Family(NamedTuple):
    """A server made of several processes, and what it left on disk about them."""

    folder: Path

    def server(self, **change: Any) -> Server:
        options = Vllm(executable=self.folder / "bin" / "vllm")
        log = self.folder / "log"
        plain = Server(self.folder / "model", "it", log=log, engine="vllm", vllm=options)
        return replace(plain, **{"ready_timeout_s": 60, "patience_s": 0.5, **change})

    @property
    def members(self) -> dict[str, int]:
        """The processes that ever ran, the last of each role."""
        paths = sorted(self.folder.glob("pids/*.*"), key=lambda path: path.stat().st_mtime_ns)
        return {path.stem: int(path.suffix[1:]) for path in paths}

    @property
    def living(self) -> list[str]:
        pids = {path.name: int(path.suffix[1:]) for path in self.folder.glob("pids/*.*")}
        return [name for name, pid in pids.items() if runs(pid)]

    def forget(self) -> None:
        for path in self.folder.glob("pids/*.*"):
            path.unlink()


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """A family of which nobody may be left, whatever the test did."""
    for name in ("model/config.json", "model/tokenizer.json", "model/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("bin", "pids"):
        (tmp_path / name).mkdir()
    executable = tmp_path / "bin" / "vllm"
    executable.write_text(FAMILY.format(python=sys.executable))
    executable.chmod(0o755)
    monkeypatch.setenv("FAMILY", str(tmp_path / "pids"))
    found = Family(tmp_path)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield found
    left = [] if wait_for(lambda: not found.living) else found.living
    for name in left:
        os.kill(int(name.rpartition(".")[2]), signal.SIGKILL)
    assert left == []
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


HERE = ("127.0.0.1", 0)
MODES = ["cooperative", "stubborn", "daemon"]


# The end of the block


@pytest.mark.parametrize("mode", MODES)
def test_the_end_of_the_block_ends_everybody(
    family: Family, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", mode)
    with family.server() as server:
        assert set(family.members) == {"api", "engine", "worker"}
        assert len(family.living) == 3
        assert server.fault(timeout_s=20) is None
    assert family.living == []
    assert server.session is None
    assert is_free(server.port or 0)
    assert server.fault() == "the server of 'it' is not started"


def test_an_exception_ends_everybody_and_goes_on(family: Family) -> None:
    with pytest.raises(ZeroDivisionError), family.server():
        raise ZeroDivisionError
    assert family.living == []


# The end of the user


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_everybody_goes_when_the_user_does(
    family: Family, mode: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", mode)
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(family.folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as user:
        assert user.stdout is not None
        port = int(user.stdout.readline())
        assert len(family.living) == 3
        user.send_signal(number)
        assert user.wait(20) != 0
        assert wait_for(lambda: not family.living), family.living
    assert wait_for(lambda: is_free(port))


def test_a_server_outlives_the_thread_that_started_it(family: Family) -> None:
    server = family.server()
    starter = threading.Thread(target=server.restart)
    starter.start()
    starter.join()
    try:
        assert server.fault(timeout_s=20) is None
    finally:
        server.close()


# The end of the server


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_server_is_seen_and_its_engine_does_not_outlive_it(
    family: Family, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", mode)
    with family.server() as server:
        os.kill(family.members["api"], signal.SIGKILL)
        assert wait_for(lambda: not family.living), family.living
        assert "ended with exit code 137 (SIGKILL)" in (server.fault() or "")


def test_a_killed_engine_is_a_fault_though_the_exit_code_is_0(family: Family) -> None:
    with family.server() as server:
        os.kill(family.members["engine"], signal.SIGKILL)
        assert wait_for(lambda: not family.living), family.living
        fault = server.fault() or ""
    assert "'it' ended with exit code 0; the last lines of" in fault
    assert "supervisor: the server ended with exit code 0" in fault


def test_a_frozen_engine_is_a_fault_though_it_is_healthy(family: Family) -> None:
    with family.server() as server:
        os.kill(family.members["engine"], signal.SIGSTOP)
        assert "does not complete" in (server.fault(timeout_s=0.3) or "")
    assert family.living == []


@pytest.mark.parametrize("mode", ["cooperative", "stubborn"])
def test_a_killed_supervisor_leaves_nobody(
    family: Family, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", mode)
    with family.server() as server:
        os.kill(server.session or 0, signal.SIGKILL)
        assert wait_for(lambda: not runs(family.members["api"]))
    assert family.living == []


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_server_is_started_again_where_it_was(
    family: Family, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", mode)
    with family.server() as server:
        address, dead = server.base_url, family.members["api"]
        os.kill(dead, signal.SIGKILL)
        assert wait_for(lambda: not runs(dead))
        family.forget()
        server.restart()
        assert server.base_url == address
        assert server.fault(timeout_s=20) is None
        assert len(family.living) == 3
    log = (family.folder / "log").read_text()
    assert log.count("loading it") == 2
    assert "the server ended with exit code 137 (SIGKILL)" in log


def test_a_server_can_be_used_again(family: Family) -> None:
    server = family.server()
    for _ in range(2):
        with server:
            assert server.fault(timeout_s=20) is None
        assert family.living == []
        family.forget()


# The start


@pytest.mark.parametrize("code", [0, 1, 70])
def test_a_server_that_ends_at_once_has_failed_whatever_its_code(
    family: Family, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", f"exit{code}")
    server = family.server()
    with pytest.raises(ServerError, match=f"ended with exit code {code} before") as found:
        server.restart()
    assert "loading it" in str(found.value)
    assert str(family.folder / "log") in str(found.value)
    assert not is_held(server.port or 0)


def test_a_server_that_is_never_ready_is_ended_and_holds_its_port_until_then(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", "silent")
    server = family.server(ready_timeout_s=5)
    with ThreadPoolExecutor() as pool:
        started = pool.submit(server.restart)
        assert wait_for(lambda: len(family.living) == 3)
        assert is_held(server.port or 0)
        with pytest.raises(ServerError, match=r"not ready after 5 s; raise ready_timeout_s") as e:
            started.result()
    assert "loading it" in str(e.value)
    assert family.living == []
    assert not is_held(server.port or 0)


def test_a_server_that_is_healthy_and_does_not_complete_is_ended(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", "broken")
    with pytest.raises(ServerError, match="is healthy but does not complete") as found:
        family.server().restart()
    assert "loading it" in str(found.value)
    assert family.living == []


def test_two_servers_at_once_have_two_ports(family: Family) -> None:
    other = family.server(log=family.folder / "other")
    with family.server() as first:
        family.forget()
        with other:
            assert first.port != other.port
            assert first.fault(timeout_s=20) is None
            assert other.fault(timeout_s=20) is None
        assert first.fault(timeout_s=20) is None


def test_a_port_in_use_is_named_with_its_process(family: Family) -> None:
    with socket.create_server(HERE) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} .* stop process {os.getpid()} \("):
            family.server(port=port).restart()
        assert not (family.folder / "log").exists()


def test_a_port_that_is_lost_while_the_server_loads_is_an_error(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", "slow")
    monkeypatch.setattr(TCPServer, "allow_reuse_address", True)
    with TCPServer(HERE, BaseRequestHandler, False) as thief, ThreadPoolExecutor() as pool:
        thief.server_bind()
        server = family.server(port=thief.server_address[1])
        started = pool.submit(server.restart)
        assert wait_for(lambda: len(family.living) == 3)
        thief.server_activate()  # it takes every call and hangs up
        pool.submit(thief.serve_forever, 0.05)
        (family.folder / "pids" / "go").touch()
        with pytest.raises(ServerError, match=r"exit code 1 before it was ready") as found:
            started.result()
        thief.shutdown()
    assert "Address already in use" in str(found.value)


# Where vLLM lives

PYTHON = """#!/bin/sh
case "$*" in
*version_info*) exit {old} ;;
--version) echo Python 3.9.1 ;;
"-m venv .venv-serve") mkdir -p .venv-serve/bin && cp "$0" .venv-serve/bin/python ;;
*pip*) echo "$*" >> asked; echo "no space left" >&2; exit {full} ;;
esac
"""


def make(folder: Path, old: int = 0, full: int = 0) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(PYTHON.format(old=old, full=full))
    python.chmod(0o755)
    return subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "serve-env", f"PYTHON={python}"],  # noqa: S607
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "requirements-serve.txt").write_text("vllm==0.21.0\n")
    return tmp_path


def test_the_environment_is_built_once(checkout: Path) -> None:
    assert [make(checkout).returncode for _ in range(2)] == [0, 0]
    (asked,) = (checkout / "asked").read_text().splitlines()
    assert "requirements-serve.txt" in asked


def test_an_environment_that_fails_says_why_and_is_tried_again(checkout: Path) -> None:
    failed = make(checkout, full=1)
    assert failed.returncode != 0
    assert "no space left" in failed.stdout + failed.stderr
    assert make(checkout).returncode == 0


def test_a_python_that_is_too_old_is_named(checkout: Path) -> None:
    failed = make(checkout, old=1)
    assert failed.returncode != 0
    assert "Python 3.9.1" in failed.stdout
    assert not (checkout / ".venv-serve").exists()
