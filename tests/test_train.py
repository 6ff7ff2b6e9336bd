"""Training on the pocket model: few steps, but the real trainers."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from practice import short_rows

from toolpost.core.pairs import ASSUMED, perturbed, texts_of
from toolpost.core.schema import Conversation
from toolpost.data.build import conversations, items, training_rows
from toolpost.data.pocketset import rows as practice_rows
from toolpost.record import sha256
from toolpost.serve.checks import ModelFolderError
from toolpost.train.doctor import PROTOCOL
from toolpost.train.dpo import (
    DisplacementError,
    DpoPlan,
    Watch,
    dpo_trainer,
    fitting_pairs,
    train_dpo,
)
from toolpost.train.loop import Announce, prepare, trainer_arguments
from toolpost.train.merge import MergePlan, merge_adapters
from toolpost.train.mine import Mined, MinePlan, dpo_rows, mine
from toolpost.train.models import POCKET, ModelSpec, load_model, load_tokenizer, lora, model_folder
from toolpost.train.sft import (
    SftPlan,
    Trained,
    families,
    fitting,
    scored_positions_only,
    train_sft,
)
from toolpost.train.stack import AdapterError, save_adapter, stack

WEIGHTS = "adapter_model.safetensors"
FEW = SftPlan(rank=16, max_steps=6, batch_size=4, threads=1)


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def rows() -> list[Conversation]:
    return conversations(items("practice", practice_rows(64, 0)))


@pytest.fixture(scope="module")
def texts(rows: list[Conversation]) -> list[dict[str, str]]:
    return [dict(text) for text in training_rows(rows)]


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return [texts_of(pair)._asdict() for pair in perturbed(short_rows(48), ASSUMED, 32, 0).pairs]


@pytest.fixture(scope="module")
def sft(
    tmp_path_factory: pytest.TempPathFactory, texts: list[dict[str, str]], rows: list[Conversation]
) -> tuple[Path, Trained]:
    out = tmp_path_factory.mktemp("sft") / "sft"
    return out, train_sft(ModelSpec(), texts, texts[:4], FEW, out, rows[:2], say=quiet)


def test_sft_learns_repairs_and_merges(
    sft: tuple[Path, Trained], texts: list[dict[str, str]], tmp_path: Path
) -> None:
    out, trained = sft
    assert trained.evals[-1]["loss"] < trained.evals[0]["loss"] - 0.5
    assert set(trained.repaired) == set(PROTOCOL)
    assert [point["step"] for point in trained.probes] == [0, 6]
    assert all(point["probe_protocol_n"] <= 2 for point in trained.probes)
    plan = MergePlan(dtype="float32", new_tokens=8)
    assert merge_adapters(ModelSpec(), [out], texts[:2], tmp_path / "merged", plan).passed
    tokenizer = load_tokenizer(tmp_path / "merged")
    assert tokenizer.eos_token == "<|im_end|>"


def test_sft_gives_the_same_adapter_for_the_same_seed(
    sft: tuple[Path, Trained], texts: list[dict[str, str]], tmp_path: Path
) -> None:
    train_sft(ModelSpec(), texts, texts[:4], FEW, tmp_path / "again", say=quiet)
    assert sha256(tmp_path / "again" / WEIGHTS) == sha256(sft[0] / WEIGHTS)


def losses(trained: Trained) -> list[float]:
    return [point["loss"] for point in trained.curve]


def test_how_many_rows_pass_at_once_changes_nothing(
    sft: tuple[Path, Trained], texts: list[dict[str, str]], tmp_path: Path
) -> None:
    plan = FEW.model_copy(update={"micro_batch": 1, "max_steps": 3, "checkpointing": True})
    slow = train_sft(ModelSpec(), texts, texts[:4], plan, tmp_path / "slow", say=quiet)
    assert losses(slow)[:2] == pytest.approx(losses(sft[1])[:2], rel=1e-5)


def test_packed_rows_do_not_see_each_other(texts: list[dict[str, str]], tmp_path: Path) -> None:
    """All rows in one step: the loss of the packed step is the loss of the padded one."""
    few, found = sorted(texts, key=lambda text: len(text["prompt"]))[:4], []
    for pack_tokens in (0, 1024):
        batch = 4 if not pack_tokens else 2
        plan = SftPlan(rank=8, max_steps=1, batch_size=batch, pack_tokens=pack_tokens, threads=1)
        out = tmp_path / str(pack_tokens)
        found.append(train_sft(ModelSpec(), few, few[:1], plan, out, say=quiet))
    assert found[1].curve[0]["tokens"] == found[0].curve[0]["tokens"]
    assert losses(found[1]) == pytest.approx(losses(found[0]), rel=1e-5)


@pytest.mark.parametrize("share", [2, 4])
def test_rows_that_share_a_pass_train_as_they_do_alone(
    texts: list[dict[str, str]], tmp_path: Path, share: int
) -> None:
    """All rows in each step, whatever the order: both losses and both steps are the same."""
    first, second = texts[:2]
    mark = "<|im_start|>user\n"
    again = [t | {"prompt": t["prompt"].replace(mark, f"{mark}So: ")} for t in (first, second)]
    few, found = [first, again[1], second, again[0]], []
    assert len({text["prompt"] for text in few}) == 4
    for rows_a_pass in (1, share):
        plan = SftPlan(rank=8, max_steps=3, batch_size=4, share=rows_a_pass, threads=1)
        out = tmp_path / str(rows_a_pass)
        found.append(train_sft(ModelSpec(), few, few[:1], plan, out, say=quiet))
    assert losses(found[1]) == pytest.approx(losses(found[0]), rel=1e-4)
    assert found[1].evals[-1]["loss"] == pytest.approx(found[0].evals[-1]["loss"], rel=1e-4)
    assert losses(found[1])[2] < losses(found[1])[0]


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=30),
    share=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
)
def test_families_hold_each_row_once_and_keep_together_what_begins_alike(
    rows: list[list[int]], share: int, order: random.Random
) -> None:
    places = list(range(len(rows)))
    order.shuffle(places)
    found = families(rows, share, 3, places)
    taken = [at for family in found for at in family]
    assert len(set(taken)) == len(taken) > len(rows) - share
    assert all(len(family) == share for family in found)

    def beginning(at: int) -> list[int]:
        return rows[at][: rows[at].index(3)] if 3 in rows[at] else []

    alike = [family for family in found if len({tuple(beginning(at)) for at in family}) == 1]
    counts = Counter(tuple(beginning(at)) for at in places)
    assert len(alike) >= sum(count // share for count in counts.values())


def test_training_stops_when_it_only_gets_worse(
    texts: list[dict[str, str]], tmp_path: Path
) -> None:
    plan = FEW.model_copy(
        update={"max_steps": 12, "save_steps": 2, "patience": 1, "learning_rate": 0.5}
    )
    trained = train_sft(ModelSpec(), texts, texts[:4], plan, tmp_path / "sft", say=quiet)
    assert trained.steps < 12
    best = min(trained.evals[1:], key=lambda point: point["loss"])
    assert trained.best_step == best["step"] < trained.steps


def test_evaluation_in_between_does_not_touch_a_4_bit_model(
    texts: list[dict[str, str]], tmp_path: Path
) -> None:
    """On a CPU with AVX512-bf16 a pass in evaluation mode repacks the weights for good."""
    spec, shas = ModelSpec(quantize="nf4"), []
    for save_steps in (0, 1):
        plan = SftPlan(rank=8, max_steps=3, batch_size=2, save_steps=save_steps, threads=1)
        out = tmp_path / str(save_steps)
        train_sft(spec, texts[:12], texts[:2], plan, out, say=quiet)
        shas.append(sha256(out / WEIGHTS))
    assert shas[0] == shas[1]


def test_adapters_below_stay_as_they_are_and_on(
    sft: tuple[Path, Trained], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        below = stack(load_model(ModelSpec()), [sft[0]])(ids).logits
        raw = load_model(ModelSpec())(ids).logits
    before = sha256(sft[0])
    plan = DpoPlan(rank=8, max_steps=3, batch_size=4, learning_rate=1e-3, threads=1)
    train_dpo(ModelSpec(), [sft[0]], pairs, plan, tmp_path / "dpo", quiet)
    assert sha256(sft[0]) == before
    whole = stack(load_model(ModelSpec()), [sft[0], tmp_path / "dpo"], lora(4))
    with torch.inference_mode(), whole.disable_adapter():
        both = whole(ids).logits
    assert not torch.allclose(raw, below, atol=1e-2)
    assert not torch.allclose(both, below, atol=1e-4)


def test_an_adapter_is_refused_upon_another_one_than_its_own(
    sft: tuple[Path, Trained], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    plan = DpoPlan(rank=8, max_steps=1, batch_size=4, threads=1)
    train_dpo(ModelSpec(), [sft[0]], pairs, plan, tmp_path / "dpo", quiet)
    other = tmp_path / "other"
    save_adapter(stack(load_model(ModelSpec()), [], lora(8), seed=9), other)
    with pytest.raises(AdapterError, match="other adapters than those given below"):
        stack(load_model(ModelSpec()), [other, tmp_path / "dpo"])
    with pytest.raises(AdapterError, match="not finished"):
        stack(load_model(ModelSpec()), [tmp_path])


def test_dpo_moves_away_from_the_rejected(
    sft: tuple[Path, Trained], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    plan = DpoPlan(max_steps=8, batch_size=4, learning_rate=1e-3, threads=1)
    aligned = train_dpo(ModelSpec(), [sft[0]], pairs[:4], plan, tmp_path / "dpo", quiet)
    assert aligned.curve[-1]["margin"] > 0
    assert (aligned.pairs, aligned.left_out, aligned.reference) == (4, 0, "pass")


def first_step(adapter: Path, rows: Sequence[dict[str, Any]], work: Path, settled: bool) -> Any:
    """Give the log of a first step with a learning rate of almost nothing."""
    plan = DpoPlan(max_steps=1, batch_size=2, learning_rate=1e-12, sft_weight=0, threads=1)
    model = stack(load_model(ModelSpec()), [adapter], lora(8))
    trainer = dpo_trainer(model, load_tokenizer(POCKET), rows, plan, work)
    if settled:
        prepare(trainer, "key", Announce(quiet, every=1))
    with scored_positions_only():
        trainer.train()
    return trainer.state.log_history[0]


def test_the_reference_of_dpo_is_the_sft_policy(
    sft: tuple[Path, Trained], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """At the start policy and reference are equal; TRL's own reference is the raw base."""
    ours = first_step(sft[0], pairs[:4], tmp_path, settled=True)
    assert ours["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert ours["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    naive = first_step(sft[0], pairs[:4], tmp_path, settled=False)
    assert abs(naive["rewards/chosen"]) > 0.1


@pytest.fixture(scope="module")
def mined(sft: tuple[Path, Trained], rows: list[Conversation]) -> list[Mined]:
    plan = MinePlan(pairs=8, prompts=4, samples=2, max_new_tokens=24)
    model = stack(load_model(ModelSpec()), [sft[0]])
    return mine(model, load_tokenizer(POCKET), rows, plan, quiet).pairs


def test_the_sampler_gives_the_same_reference_as_a_pass(
    sft: tuple[Path, Trained], mined: list[Mined], tmp_path: Path
) -> None:
    with_them = dpo_rows(mined)
    without = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in with_them]
    curves = []
    for name, texts in (("sampler", with_them), ("pass", without)):
        plan = DpoPlan(rank=8, max_steps=3, batch_size=2, learning_rate=1e-3, threads=1)
        aligned = train_dpo(ModelSpec(), [sft[0]], texts, plan, tmp_path / name, quiet)
        assert aligned.reference == name
        curves.append([point["loss"] for point in aligned.curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_displacement_stops_the_run(
    sft: tuple[Path, Trained], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    plan = DpoPlan(
        max_steps=16,
        batch_size=2,
        learning_rate=1e-2,
        sft_weight=0,
        max_displacement=1e-3,
        threads=1,
    )
    with pytest.raises(DisplacementError, match="raise sft_weight, lower learning_rate"):
        train_dpo(ModelSpec(), [sft[0]], pairs, plan, tmp_path / "dpo", quiet)
    assert not (tmp_path / "dpo").exists()


def test_displacement_is_an_average_over_the_window() -> None:
    watch = Watch(beta=0.5, limit=2.0, window=2)

    class State:
        global_step = 3

    for reward in (-5.0, 4.0, -1.0):
        watch.on_log(None, State(), None, logs={"rewards/chosen": reward})
        watch.last.extend([0.0] if reward == -5.0 else [])
    with pytest.raises(DisplacementError, match="at step 3"):
        watch.on_log(None, State(), None, logs={"rewards/chosen": -1.5})


def test_a_row_that_is_too_long_is_left_out_and_counted() -> None:
    tokenizer = load_tokenizer(POCKET)
    short, long = {"prompt": "a", "completion": " b"}, {"prompt": "a b " * 99, "completion": " b"}
    assert fitting([short, long, short], tokenizer, 16) == ([short, short], 1)
    with pytest.raises(ValueError, match="no row fits max_length=16"):
        fitting([long], tokenizer, 16)


def test_a_pair_with_one_side_too_long_is_left_out_and_counted() -> None:
    tokenizer = load_tokenizer(POCKET)
    short = {"prompt": "a", "chosen": " b", "rejected": " c"}
    long = {"prompt": "a", "chosen": " b", "rejected": " c" * 99}
    assert fitting_pairs([short, long], tokenizer, 16) == ([short], 1)
    with pytest.raises(ValueError, match="no pair fits max_length=16"):
        fitting_pairs([long], tokenizer, 16)
    with pytest.raises(ValueError, match="no pair fits"):
        fitting_pairs([], tokenizer, 16)


def test_processes_share_a_step_evenly_or_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = SftPlan(batch_size=8, micro_batch=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trainer_arguments(plan, tmp_path)["gradient_accumulation_steps"] == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size=8 is no multiple of 6"):
        trainer_arguments(plan, tmp_path)


@pytest.mark.parametrize("lacks", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_something_is_named(tmp_path: Path, lacks: str) -> None:
    for name in {"config.json", "tokenizer.json", "model.safetensors"} - {lacks}:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ModelFolderError, match=str(tmp_path)) as caught:
        model_folder(str(tmp_path))
    assert f"lacks {lacks.replace('model', '*')}" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ("{", "not readable as JSON"),
        ("[]", "no 'model_type'"),
        ('{"model_type": "qwen3"}', "no 'eos_token_id'"),
        ('{"model_type": "qwen3", "eos_token_id": 1}', "no token <|im_end|>"),
    ],
)
def test_a_folder_that_cannot_stop_or_be_read_is_named(
    tmp_path: Path, config: str, fault: str
) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFolderError) as caught:
        model_folder(str(tmp_path))
    assert fault in str(caught.value)
