"""Training runs that end themselves with SIGKILL at a chosen moment, for the tests of resuming."""

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from practice import short_rows

import toolpost.train.stack as stack_module
from toolpost.core.pairs import ASSUMED, perturbed, texts_of
from toolpost.data.build import training_rows
from toolpost.train.dpo import DpoPlan, train_dpo
from toolpost.train.loop import Announce
from toolpost.train.models import ModelSpec
from toolpost.train.sft import SftPlan, train_sft
from toolpost.train.stack import Stack

AFTER_STEP = 3  # checkpoints come after each second of 5 steps, and at the end
PATCH = pytest.MonkeyPatch()  # never undone: the process ends
SFT = SftPlan(rank=8, max_steps=5, batch_size=2, save_steps=2, threads=1)
DPO = DpoPlan(rank=8, max_steps=5, batch_size=2, save_steps=2, learning_rate=1e-3, threads=1)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_a_step() -> None:
    on_log = Announce.on_log

    def killed(self: Announce, args: Any, state: Any, control: Any, **extra: Any) -> None:
        if state.global_step == AFTER_STEP:
            _die()
        on_log(self, args, state, control, **extra)

    PATCH.setattr(Announce, "on_log", killed)


def _inside_the_optimizer_file() -> None:
    """Half of optimizer.pt of the second checkpoint is written."""
    save, count = torch.save, [0]

    def killed(value: Any, path: Any, *rest: Any, **options: Any) -> None:
        if Path(str(path)).name == "optimizer.pt":
            count[0] += 1
        if count[0] < 2:
            save(value, path, *rest, **options)
            return
        whole = io.BytesIO()
        save(value, whole)
        Path(str(path)).write_bytes(whole.getvalue()[: whole.tell() // 2])
        _die()

    PATCH.setattr(torch, "save", killed)


def _inside_the_adapter_file() -> None:
    """Half of the adapter of the second checkpoint is written."""
    save, count = Stack.save_pretrained, [0]

    def killed(self: Stack, folder: str, *rest: Any, **options: Any) -> None:
        save(self, folder, *rest, **options)
        count[0] += 1
        if count[0] == 2:
            path = Path(folder) / "adapter_model.safetensors"
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            _die()

    PATCH.setattr(Stack, "save_pretrained", killed)


def _before_the_last_manifest() -> None:
    """All files of the final adapter are there, but for the manifest."""
    seal = stack_module.seal

    def killed(folder: Path, *rest: Any) -> None:
        if folder.name.endswith(".partial"):
            _die()
        seal(folder, *rest)

    PATCH.setattr(stack_module, "seal", killed)


MOMENTS: dict[str, Callable[[], None]] = {
    "never": lambda: None,
    "at a step": _at_a_step,
    "inside the optimizer's file": _inside_the_optimizer_file,
    "inside the adapter's file": _inside_the_adapter_file,
    "before the last manifest": _before_the_last_manifest,
}


def sft(out: Path, moment: str, said: Path, plan: SftPlan = SFT) -> None:
    """Train SFT on a few practice rows, and die at a moment."""
    MOMENTS[moment]()
    texts = training_rows(short_rows(24))
    with said.open("a", encoding="utf-8") as file:
        train_sft(ModelSpec(), texts, texts[:2], plan, out, say=lambda x: print(x, file=file))


def dpo(out: Path, moment: str, said: Path, below: Path) -> None:
    """Train DPO on a few perturbed pairs, and die at a moment."""
    MOMENTS[moment]()
    pairs = perturbed(short_rows(40), ASSUMED, 20, 0).pairs
    texts = [texts_of(pair)._asdict() for pair in pairs]
    with said.open("a", encoding="utf-8") as file:
        train_dpo(ModelSpec(), [below], texts, DPO, out, lambda x: print(x, file=file))
