"""Let many agents run at once for a while, and see what is lost or left behind.

python benchmarks/soak.py --model tests/models/parrot --out reports/benchmarks/soak.json

Each agent has tools in child processes of its own and takes one task after another; all write
into one trace file. Every so many runs one is cancelled in the middle. Afterwards the file must
hold every event that an agent noted, each run must play again to its end, and no process, thread or
open file may be left. The memory of this process is noted every few seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from toolpost.record import QUIET

os.environ.update(QUIET)

if TYPE_CHECKING:
    from toolpost.bench.agent import Task
    from toolpost.serve.agent import Ask, Event
    from toolpost.serve.toolbox import Workers

EVERY_S = 5.0  # between two looks at the memory
CANCELLED = 10  # one run of so many is cancelled


@dataclass
class Seen:
    """What the agents did, as this process noted it."""

    events: Counter[str] = field(default_factory=Counter)  # by run
    outcomes: Counter[str] = field(default_factory=Counter)
    memory_mb: list[float] = field(default_factory=list)


async def one_run(
    task: Task, ask: Ask, workers: Workers, file: Path, seen: Seen, patience_s: float | None
) -> None:
    """Have an agent do a task; a bounded patience cancels it."""
    from toolpost.serve.agent import Ended, Limits, run_agent
    from toolpost.serve.trace import TraceFile

    with TraceFile(file) as write:

        def record(event: Event) -> None:
            write(event)
            seen.events[write.run] += 1
            if isinstance(event, Ended):
                seen.outcomes[event.result.outcome.value] += 1

        running = asyncio.create_task(
            run_agent(task.prompt, ask, workers, Limits(steps=6, total_s=60), record=record)
        )
        done, _ = await asyncio.wait({running}, timeout=patience_s)
        if not done:
            running.cancel()
            await asyncio.wait({running})
        if not running.cancelled():
            running.result()


async def one_agent(number: int, about: tuple[str, str, Path], until: float, seen: Seen) -> None:
    """Do one task after another until time is up."""
    from toolpost.bench.agent import load_tasks
    from toolpost.serve.agent import chat
    from toolpost.serve.toolbox import Workers

    base_url, model, file = about
    rng, tasks = random.Random(number), load_tasks()
    async with (
        Workers(most=2) as workers,
        chat(base_url, model, workers.tools, max_tokens=96, timeout_s=120) as ask,
    ):
        for turn in itertools.count(1):
            if time.monotonic() > until:
                return
            patience = rng.uniform(0.1, 1) if turn % CANCELLED == 0 else None
            await one_run(rng.choice(tasks), ask, workers, file, seen, patience)


async def watch(until: float, seen: Seen) -> None:
    """Note this process's memory until time is up."""
    while time.monotonic() < until:
        seen.memory_mb.append(psutil.Process().memory_info().rss / 1e6)
        await asyncio.sleep(EVERY_S)


async def crowd(agents: int, about: tuple[str, str, Path], seconds: float, seen: Seen) -> None:
    """Have all agents run at once; raises TimeoutError if they do not come to an end."""
    until = time.monotonic() + seconds
    async with asyncio.timeout(seconds + 180), asyncio.TaskGroup() as group:
        group.create_task(watch(until, seen))
        for number in range(agents):
            group.create_task(one_agent(number, about, until, seen))


def growth(memory_mb: list[float]) -> float:
    """Give the slope of the second half of the samples, in MB a minute."""
    late = memory_mb[len(memory_mb) // 2 :]
    times = [at * EVERY_S / 60 for at in range(len(late))]
    return statistics.linear_regression(times, late).slope


def account(file: Path, seen: Seen) -> dict[str, Any]:
    """Compare what was noted with what is in the file, and play every run again.

    Raises:
        ReplayError: a run does not play again.
    """
    from toolpost.serve.trace import read_traces, replay

    traces = read_traces(file)
    for trace in traces:
        replay(trace)
    written = {trace.run: len(trace.lines) for trace in traces}
    lost = sum((seen.events - Counter(written)).values())
    return {
        "runs": len(traces),
        "events": sum(seen.events.values()),
        "lost_events": lost,
        "replayed": len(traces),
        "outcomes": dict(seen.outcomes),
    }


def soak(model: str, agents: int, seconds: float) -> dict[str, Any]:
    """Run the agents against a served model, and give the account."""
    from toolpost.serve.gateway import Gateway
    from toolpost.serve.server import Server
    from toolpost.serve.serving import find_model

    folder, served = find_model(model)
    seen, here = Seen(), psutil.Process()
    threads, files = set(threading.enumerate()), here.num_fds()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "traces.jsonl"
        with (
            Server(folder, served, log=Path(scratch) / "log") as server,
            Gateway(server.base_url, served, folder) as gateway,
        ):
            before = set(here.children(recursive=True))
            asyncio.run(crowd(agents, (gateway.base_url, served, file), seconds, seen))
            tools_left = set(here.children(recursive=True)) - before
        found: dict[str, Any] = {
            "tool_processes_left": len(tools_left),
            "processes_left": len(here.children(recursive=True)),
            "threads_left": len(set(threading.enumerate()) - threads),
            "files_left_open": here.num_fds() - files,
        }
        found |= account(file, seen)
    found |= {
        "memory_mb": [round(value, 1) for value in seen.memory_mb],
        "memory_growth_mb_per_minute": round(growth(seen.memory_mb), 2),
    }
    return found


def main() -> None:
    """Soak, and write the account."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket", help="a run, or the folder of a model")
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "model": args.model,
        "agents": args.agents,
        "seconds": args.seconds,
        **soak(args.model, args.agents, args.seconds),
    }
    print(json.dumps(found))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
