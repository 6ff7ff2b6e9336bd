"""Time SFT steps of the pocket model with all positions scored and with only those that count.

python benchmarks/sft_step.py --steps 15 --repeats 3

Prints, for each of the two in turn (A B A B ...), wall and CPU seconds of a whole training run of
so many steps, and the logged losses, which have to agree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from toolpost.record import QUIET

os.environ.update(QUIET)


def quiet(line: str) -> None:
    """Say nothing."""


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    from toolpost.data.build import conversations, items, training_rows
    from toolpost.data.pocketset import rows
    from toolpost.train import sft
    from toolpost.train.models import ModelSpec

    made = training_rows(conversations(items("practice", rows(300, 0))))
    train, dev = made[4:], made[:4]
    plan = sft.SftPlan(max_steps=a.steps)
    every = patch.object(sft, "scored_positions_only", contextlib.nullcontext)
    for _ in range(a.repeats):
        for name, how in (("all positions", every), ("scored only", contextlib.nullcontext())):
            with tempfile.TemporaryDirectory() as folder, how:
                wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
                done = sft.train_sft(ModelSpec(), train, dev, plan, Path(folder) / "m", say=quiet)
                end = resource.getrusage(resource.RUSAGE_SELF)
            row = {
                "what": name,
                "wall_s": round(time.perf_counter() - wall, 1),
                "cpu_s": round(end.ru_utime + end.ru_stime - cpu.ru_utime - cpu.ru_stime, 1),
                "losses": [round(point["loss"], 4) for point in done.curve],
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
