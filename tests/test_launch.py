"""Two processes take the same steps as one."""

from pathlib import Path

import psutil
import pytest
from practice import short_rows

from toolpost.core.pairs import ASSUMED, perturbed, texts_of
from toolpost.data.build import training_rows
from toolpost.train.dpo import DpoPlan
from toolpost.train.launch import DpoJob, LaunchError, SftJob, launch
from toolpost.train.models import ModelSpec
from toolpost.train.sft import SftPlan
from toolpost.train.stack import check_adapter

ROWS = short_rows(32)
TEXTS = tuple(dict(text) for text in training_rows(ROWS))


def quiet(line: str) -> None:
    """Say nothing."""


def sft_job(out: Path) -> SftJob:
    plan = SftPlan(rank=8, max_steps=4, batch_size=4, micro_batch=2, threads=1)
    return SftJob(spec=ModelSpec(), train=TEXTS, dev=TEXTS[:4], plan=plan, out=out)


def test_two_processes_take_the_same_steps_as_one(tmp_path: Path) -> None:
    one = launch(sft_job(tmp_path / "one" / "sft"), 1, quiet)
    two = launch(sft_job(tmp_path / "two" / "sft"), 2, quiet)
    assert len(one.curve) == 4
    for a, b in zip(one.curve, two.curve, strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    assert two.evals[-1]["loss"] == pytest.approx(one.evals[-1]["loss"], abs=1e-4)
    assert check_adapter(tmp_path / "two" / "sft").about["stage"] == "sft"

    pairs = tuple(texts_of(pair)._asdict() for pair in perturbed(ROWS, ASSUMED, 8, 0).pairs)
    plan = DpoPlan(rank=8, max_steps=3, batch_size=4, micro_batch=2, learning_rate=1e-3, threads=1)
    adapters = (tmp_path / "one" / "sft",)
    jobs = [
        DpoJob(spec=ModelSpec(), adapters=adapters, rows=pairs, plan=plan, out=tmp_path / n / "dpo")
        for n in ("one", "two")
    ]
    one_dpo, two_dpo = launch(jobs[0], 1, quiet), launch(jobs[1], 2, quiet)
    assert one_dpo.curve[-1]["margin"] != 0
    for a, b in zip(one_dpo.curve, two_dpo.curve, strict=True):
        assert b == pytest.approx(a, abs=1e-4)


def test_processes_that_fail_say_why_and_leave_nobody(tmp_path: Path) -> None:
    job = sft_job(tmp_path / "sft")
    broken = job.model_copy(update={"plan": job.plan.model_copy(update={"max_length": 2})})
    with pytest.raises(LaunchError, match="no row fits max_length=2"):
        launch(broken, 2, quiet)
    left = psutil.Process().children(recursive=True)
    assert not [p for p in left if "toolpost.train.launch" in " ".join(p.cmdline())]
