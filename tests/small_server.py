"""A small real server in a process of its own: it answers by rote, can die, freeze or refuse."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from toolpost.serve.server import ServerError


def model_folder(folder: Path) -> str:
    """Make a model folder as BFCL needs it: no weights, a byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "qwen3", "max_position_embeddings": 262_144}
    (folder / "config.json").write_text(json.dumps(config))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return str(folder)


class SmallServer:
    """Answers the last user message of a prompt with what `answers` holds for it, or "Done.".

    Each start takes the next of `lives`; the last one stays. A life may hold `die_after` and
    `freeze_after` (a number of answers), `fail` (messages and their status), `first` (for each of
    the first answers a status, or a `finish_reason` with no text), `models` (what becomes of the
    list of models once it was given: a status, or 0 for no answer), `cut` (answers end after
    `max_tokens` characters) and `silent`.
    """

    software = "small server 1"

    def __init__(
        self,
        folder: Path,
        model: str,
        answers: Mapping[str, str],
        *lives: Mapping[str, Any],
        window: int | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.folder, self.model, self.answers = folder, model, answers
        self.lives, self.window, self.delay_s = list(lives) or [{}], window, delay_s
        self.started = 0
        self.asked_file = folder / "asked.jsonl"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def asked(self) -> list[str]:
        """All messages that were asked, in all lives."""
        text = self.asked_file.read_text() if self.asked_file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        self.__exit__()
        life = self.lives[min(self.started, len(self.lives) - 1)]
        self.started += 1
        orders = {
            "port": self.port,
            "model": self.model,
            "answers": self.answers,
            "window": self.window,
            "delay_s": self.delay_s,
            "log": str(self.asked_file),
            "life": life,
        }
        path = self.folder / "orders.json"
        path.write_text(json.dumps(orders))
        self.process = subprocess.Popen([sys.executable, "-I", __file__, str(path)])
        until = time.monotonic() + (1 if life.get("silent") else 30)
        while time.monotonic() < until:
            if self.fault() is None:
                return
            time.sleep(0.02)
        self.__exit__()
        raise ServerError("the small server was not ready in time")

    def fault(self) -> str | None:
        probe = {"prompt": "<|im_start|>user\nare you there<|im_end|>", "max_tokens": 1}
        try:
            httpx.post(f"{self.base_url}/completions", json=probe, timeout=1, trust_env=False)
        except httpx.TransportError as problem:
            return f"the small server is not well: {type(problem).__name__}"
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    orders: dict[str, Any]
    answered = 0
    listed = 0
    lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def reply(self, code: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        orders = self.server.orders
        self.server.listed += 1
        if self.server.listed > 1 and "models" in orders["life"]:
            status = orders["life"]["models"]
            time.sleep(0 if status else 3600)
            self.reply(status, {})
            return
        card = {"id": orders["model"], "object": "model", "max_model_len": orders["window"]}
        self.reply(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        orders, life = self.server.orders, self.server.orders["life"]
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        user = request["prompt"].split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        fate = None
        if user != "are you there":
            with self.server.lock:
                with open(orders["log"], "a") as log:  # noqa: PTH123
                    log.write(json.dumps(user) + "\n")
                fate = dict(enumerate(life.get("first", ()))).get(self.server.answered)
                self.server.answered += 1
            time.sleep(orders["delay_s"])
        if self.server.answered > life.get("die_after", 10**9):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.server.answered > life.get("freeze_after", 10**9):
            time.sleep(3600)
        prompt, most = len(request["prompt"].encode()), request["max_tokens"]
        size = prompt + most
        if size > (orders["window"] or size):
            self.reply(400, {"error": {"message": f"{size} tokens do not fit"}})
        elif user in life.get("fail", {}) or isinstance(fate, int):
            self.reply(fate or life["fail"][user], {"error": {"message": "not now"}})
        else:
            text = "" if fate else orders["answers"].get(user, "Done.")
            short = text[:most] if life.get("cut") else text
            why = fate or ("stop" if short == text else "length")
            choice = {"index": 0, "text": short, "finish_reason": why, "logprobs": None}
            used = len(short)
            usage = {"prompt_tokens": prompt, "completion_tokens": used}
            usage["total_tokens"] = prompt + used
            head = {"id": "c", "object": "text_completion", "created": 0, "model": orders["model"]}
            self.reply(200, head | {"choices": [choice], "usage": usage})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


def main() -> None:
    """Serve as told by the file that the command line names."""
    orders = json.loads(Path(sys.argv[1]).read_text())
    while orders["life"].get("silent"):
        time.sleep(1)
    with _Server(("127.0.0.1", orders["port"]), _Handler) as server:
        server.orders = orders
        server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
