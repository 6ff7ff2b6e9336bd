"""Measure the chat endpoint: requests and tokens a second, and how long a client waits.

python benchmarks/serve.py --model pocket --engine cpu --out reports/benchmarks/serve_cpu.json

Each client sends its next request when it has the last answer. The requests are those of the
practice set, each with the six tools of the agent, as an agent's requests are. Each engine is
measured twice: with the common beginning of prompts read once (prefix caching in vLLM, the common
beginning of a batch in the CPU engine), and without.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolpost.record import QUIET

os.environ.update(QUIET)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from toolpost.serve.server import Server

CLIENTS = (1, 4, 16)


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Give chat requests without their model."""
    from toolpost.core.format import wrap
    from toolpost.data.pocketset import rows
    from toolpost.serve.agent import SYSTEM
    from toolpost.serve.tools import desk_tools, spec_of

    tools = [wrap(spec_of(function)) for function in desk_tools().values()]
    system = {"role": "system", "content": SYSTEM}
    return [
        {"messages": [system, {"role": "user", "content": row["query"]}], "tools": tools}
        for row in rows(count, seed)
    ]


async def one_client(
    client: AsyncOpenAI, todo: itertools.chain[dict[str, Any]], model: str, limit: int
) -> list[tuple[float, int]]:
    """Send requests until none is left; give the seconds and the new tokens of each."""
    found = []
    for request in todo:
        start = time.perf_counter()
        answer = await client.chat.completions.create(model=model, max_tokens=limit, **request)
        assert answer.usage is not None
        found.append((time.perf_counter() - start, answer.usage.completion_tokens))
    return found


async def load(
    base_url: str, model: str, asked: list[dict[str, Any]], clients: int, limit: int
) -> dict[str, Any]:
    """Have so many clients send all requests once."""
    from openai import AsyncOpenAI

    todo = itertools.chain(asked)
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600) as client:
        start = time.perf_counter()
        work = (one_client(client, todo, model, limit) for _ in range(clients))
        found = [one for part in await asyncio.gather(*work) for one in part]
        wall = time.perf_counter() - start
    waits = sorted(seconds for seconds, _ in found)
    tokens = sum(written for _, written in found)
    cuts = statistics.quantiles(waits, n=20, method="inclusive")
    return {
        "requests_per_s": len(found) / wall,
        "new_tokens_per_s": tokens / wall,
        "p50_s": cuts[9],
        "p95_s": cuts[18],
    }


def cpu_seconds(server: Server) -> float:
    """Give the processor time that the engine has used so far, all its processes together."""
    import psutil

    from toolpost.serve.server import session_members

    times = [psutil.Process(pid).cpu_times() for pid in session_members(server.session or 0)]
    return float(sum(one.user + one.system for one in times))


def measure(server: Server, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a running engine behind a gateway, at each number of clients."""
    from toolpost.serve.gateway import Gateway

    asked = requests(args.requests, seed=0)
    found = []
    with Gateway(server.base_url, server.served_name, folder) as gateway:
        about = (gateway.base_url, gateway.model)
        asyncio.run(load(*about, requests(16, seed=1), 16, args.max_tokens))  # a warm-up
        for clients in CLIENTS:
            runs = []
            for _ in range(args.repeats):
                before = cpu_seconds(server)
                run = asyncio.run(load(*about, asked, clients, args.max_tokens))
                runs.append(
                    run | {"cpu_s_per_request": (cpu_seconds(server) - before) / len(asked)}
                )
            found.append({"clients": clients, "runs": runs})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Measure, and write the figures."""
    from toolpost.serve.server import Server, Vllm
    from toolpost.serve.serving import find_engine, find_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket", help="a run, or the folder of a model")
    parser.add_argument("--engine", choices=["auto", "cpu", "vllm"], default="cpu")
    parser.add_argument("--vllm", type=Path, default=Vllm().executable, help="vLLM's executable")
    parser.add_argument("--requests", type=int, default=64, help="at each number of clients")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    engine = find_engine(args.engine, Vllm(executable=args.vllm))
    folder, served = find_model(args.model)
    levels = []
    for caching in (True, False):
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "engine.log"
            options = Vllm(executable=args.vllm, prefix_caching=caching)
            about: dict[str, Any] = {"engine": engine, "threads": args.threads, "vllm": options}
            about["share_prefix"] = caching
            with Server(folder, served, log=log, **about) as server:
                software = server.software
                levels.append({"prefix_caching": caching, "levels": measure(server, folder, args)})
    found = {
        "software": software,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "model": served,
        "requests": args.requests,
        "max_tokens": args.max_tokens,
        "measured": levels,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
