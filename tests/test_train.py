"""Training on the pocket model: few steps, but the real trainers."""

from pathlib import Path

import pytest
import torch

from toolpost.core.schema import Conversation
from toolpost.data.build import conversations, items, training_rows
from toolpost.data.pocketset import rows as practice_rows
from toolpost.record import sha256
from toolpost.serve.checks import ModelFolderError
from toolpost.train.doctor import PROTOCOL, examine, repair
from toolpost.train.dpo import DpoPlan, near_misses, train_dpo
from toolpost.train.models import POCKET, load_model, load_tokenizer, model_folder
from toolpost.train.sft import Plan, Trained, fitting, train_sft


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def rows() -> list[Conversation]:
    return conversations(items("practice", practice_rows(64, 0)))


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, rows: list[Conversation]) -> tuple[Path, Trained]:
    out = tmp_path_factory.mktemp("sft") / "sft"
    texts = training_rows(rows)
    plan = Plan(max_steps=6, batch_size=4, threads=1)
    return out, train_sft(POCKET, texts, texts[:4], plan, out, say=quiet)


def test_sft_learns_repairs_and_merges(sft: tuple[Path, Trained]) -> None:
    out, trained = sft
    assert trained.evals[1]["loss"] < trained.evals[0]["loss"] - 0.5
    assert set(trained.repaired) == set(PROTOCOL)
    assert trained.parity.same_choice == 1
    assert trained.parity.kl_max < 1e-4
    tokenizer = load_tokenizer(out)
    assert tokenizer.eos_token == "<|im_end|>"
    model = load_model(out, 1)
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not any(row.untrained for row in examine(model, tokenizer))
    assert (out.parent / "sft-adapter" / "adapter_model.safetensors").is_file()


def test_sft_gives_the_same_weights_for_the_same_seed(
    sft: tuple[Path, Trained], rows: list[Conversation], tmp_path: Path
) -> None:
    texts = training_rows(rows)
    plan = Plan(max_steps=6, batch_size=4, threads=1)
    train_sft(POCKET, texts, texts[:4], plan, tmp_path / "again", say=quiet)
    assert sha256(tmp_path / "again" / "model.safetensors") == sha256(sft[0] / "model.safetensors")


def test_dpo_starts_at_its_reference_and_moves_away_from_the_rejected(
    sft: tuple[Path, Trained], rows: list[Conversation], tmp_path: Path
) -> None:
    pairs = near_misses(rows, 32, seed=0)
    plan = DpoPlan(max_steps=8, batch_size=4, learning_rate=1e-3, threads=1)
    aligned = train_dpo(sft[0], pairs, plan, tmp_path / "dpo", say=quiet)
    assert aligned.curve[-1]["margin"] > 0
    assert sum(aligned.pairs.values()) == 32
    assert aligned.parity.same_choice == 1


def test_the_reference_of_dpo_is_the_sft_policy(
    sft: tuple[Path, Trained], rows: list[Conversation], tmp_path: Path
) -> None:
    """With a learning rate of almost nothing policy and reference stay equal: all margins are 0."""
    plan = DpoPlan(max_steps=2, batch_size=2, learning_rate=1e-12, sft_weight=0, threads=1)
    aligned = train_dpo(sft[0], near_misses(rows, 4, seed=0), plan, tmp_path / "dpo", say=quiet)
    assert aligned.curve[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert aligned.curve[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)


def test_the_doctor_finds_the_rows_that_pretraining_left_alone() -> None:
    model, tokenizer = load_model(POCKET, 1), load_tokenizer(POCKET)
    assert [row.token for row in examine(model, tokenizer) if row.untrained] == list(PROTOCOL)
    before = {
        k: v.clone()
        for k, v in model.state_dict().items()
        if "embed" not in k and "lm_head" not in k
    }
    assert repair(model, tokenizer) == list(PROTOCOL)
    assert repair(model, tokenizer) == []
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_a_row_that_is_too_long_is_left_out_and_counted() -> None:
    tokenizer = load_tokenizer(POCKET)
    short, long = {"prompt": "a", "completion": " b"}, {"prompt": "a b " * 99, "completion": " b"}
    assert fitting([short, long, short], tokenizer, 16) == ([short, short], 1)
    with pytest.raises(ValueError, match="no row fits max_length=16"):
        fitting([long], tokenizer, 16)


@pytest.mark.parametrize("lacks", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_something_is_named(tmp_path: Path, lacks: str) -> None:
    for name in {"config.json", "tokenizer.json", "model.safetensors"} - {lacks}:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ModelFolderError, match=str(tmp_path)) as caught:
        model_folder(str(tmp_path))
    assert f"lacks {lacks.replace('model', '*')}" in str(caught.value)
