"""`toolpost serve` as a user starts it: a process of its own, found by what it prints."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil


class Served:
    """A running `toolpost serve`; leaving the `with` block kills what is left of it."""

    def __init__(self, model: str | Path, folder: Path, *options: str, key: str = "") -> None:
        toolpost = str(Path(sys.executable).with_name("toolpost"))
        fixed = ("--engine", "cpu", "--threads", "1", "--port", "0")
        self.command = [toolpost, "serve", str(model), *fixed, *options]
        self.folder, self.key = folder, key
        self.printed: list[str] = []
        self.family: list[psutil.Process] = []

    def __enter__(self) -> Self:
        environment = {**os.environ, "TOOLPOST_API_KEY": self.key}
        self.complaints = self.folder / "stderr.txt"
        with self.complaints.open("wb") as errors:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout
        for line in self.process.stdout:
            self.printed.append(line.rstrip("\n"))
            if line.startswith("Ctrl-C"):
                break
        else:
            self.process.wait(10)
            raise AssertionError(f"it ended: {self.complaints.read_text()}")
        self.note_family()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for child in self.children():
            child.kill()
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout
        self.process.stdout.close()

    def said(self, what: str) -> str:
        """Give what it printed behind a word."""
        return next(x.split(":", 1)[1].strip() for x in self.printed if x.startswith(what))

    @property
    def base_url(self) -> str:
        return self.said("base URL")

    @property
    def model(self) -> str:
        return self.said("model")

    @property
    def port(self) -> int:
        found = re.search(r":(\d+)/", self.base_url)
        assert found
        return int(found[1])

    def children(self) -> list[psutil.Process]:
        """Give the processes that it started and that run."""
        return [p for p in self.family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def note_family(self) -> None:
        """Remember the processes that it has started by now."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.family += [p for p in found if p not in self.family]

    def engine(self) -> psutil.Process:
        """Give the process that computes."""
        self.note_family()
        module = ["-m", "toolpost.serve.completions"]
        return next(p for p in self.children() if p.cmdline()[1:3] == module)

    def end(self, number: signal.Signals) -> int:
        """Send a signal, wait until nothing is left, and give the exit code."""
        self.note_family()
        self.process.send_signal(number)
        code = self.process.wait(60)
        until = time.monotonic() + 30
        while self.children() and time.monotonic() < until:
            time.sleep(0.05)
        assert self.children() == []
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0
        return code
