"""`kill -9` at a step and inside a save: the run goes on, and ends with the same adapter."""

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_training as training
import pytest

from toolpost.record import sha256
from toolpost.train.loop import newest
from toolpost.train.stack import AdapterError, check_adapter

_SERVER = multiprocessing.get_context("forkserver")  # imports torch and TRL once, forks after that
_SERVER.set_forkserver_preload(["toolpost.train.dpo", "toolpost.data.pocketset"])


def ended(target: Callable[..., None], *arguments: Any) -> int:
    """Run a training in a process of its own; give its exit code."""
    child = _SERVER.Process(target=target, args=arguments)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of an SFT adapter from an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    assert ended(training.sft, folder / "sft", "never", folder / "said") == 0
    return folder / "sft"


@pytest.fixture(scope="module")
def calm_dpo(calm: Path) -> Path:
    assert ended(training.dpo, calm.parent / "dpo", "never", calm.parent / "said", calm) == 0
    return calm.parent / "dpo"


def weights(folder: Path) -> str:
    return sha256(folder / "adapter_model.safetensors")


def test_a_finished_run_leaves_a_whole_adapter_and_no_checkpoints(calm: Path) -> None:
    assert check_adapter(calm).about["stage"] == "sft"
    assert not calm.with_name("sft-work").exists()
    assert not calm.with_name("sft.partial").exists()


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("at a step", 2),
        ("inside the optimizer's file", 2),
        ("inside the adapter's file", 2),
        ("before the last manifest", 5),
    ],
)
def test_sft_goes_on_after_a_kill(calm: Path, tmp_path: Path, moment: str, step: int) -> None:
    out, said = tmp_path / "sft", tmp_path / "said"
    assert ended(training.sft, out, moment, said) == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(AdapterError, match="not finished"):
        check_adapter(out)
    assert ended(training.sft, out, "never", said) == 0
    assert f"going on from checkpoint-{step}" in said.read_text(encoding="utf-8")
    assert weights(out) == weights(calm)


@pytest.mark.parametrize("moment", ["at a step", "inside the optimizer's file"])
def test_dpo_goes_on_after_a_kill(calm_dpo: Path, tmp_path: Path, moment: str) -> None:
    out, said, below = tmp_path / "dpo", tmp_path / "said", calm_dpo.with_name("sft")
    assert ended(training.dpo, out, moment, said, below) == -signal.SIGKILL
    assert not out.exists()
    assert ended(training.dpo, out, "never", said, below) == 0
    assert "going on from checkpoint-2" in said.read_text(encoding="utf-8")
    assert weights(out) == weights(calm_dpo)


def test_another_plan_does_not_go_on_from_old_checkpoints(calm: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "sft", tmp_path / "said"
    assert ended(training.sft, out, "at a step", said) == -signal.SIGKILL
    work = out.with_name("sft-work")
    about = check_adapter(work / "checkpoint-2").about
    assert newest(work, about["key"]) == work / "checkpoint-2"
    assert newest(work, "another key") is None
    other = training.SFT.model_copy(update={"max_steps": 1})
    assert ended(training.sft, out, "never", said, other) == 0
    assert "going on" not in said.read_text(encoding="utf-8")
    assert weights(out) != weights(calm)
