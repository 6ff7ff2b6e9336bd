"""GRPO on the pocket model: the stock trainer's loss at less work, on weights that do not move."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from killed_training import MOMENTS
from safetensors.torch import load_file
from transformers import TrainerState
from trl import GRPOTrainer

from toolpost.core.format import END, completion_of, prompt_of
from toolpost.core.schema import Conversation
from toolpost.data.build import conversations, items, training_rows
from toolpost.data.pocketset import rows as practice_rows
from toolpost.record import sha256
from toolpost.train.grpo import (
    CollapseError,
    GroupTrainer,
    GrpoPlan,
    Reinforced,
    Watch,
    frozen,
    grpo_trainer,
    passed,
    reachable,
    regroup,
    schedule,
    train_grpo,
)
from toolpost.train.loop import Announce, prepare
from toolpost.train.models import POCKET, ModelSpec, load_model, load_tokenizer, lora
from toolpost.train.sft import SftPlan, scored_positions_only, train_sft
from toolpost.train.stack import check_adapter, stack

TINY = GrpoPlan(
    rank=4,
    batch_size=2,
    group=3,
    max_steps=2,
    max_new_tokens=48,
    learning_rate=1e-3,
    reward="decomposed",
    threads=1,
)
_SERVER = multiprocessing.get_context("forkserver")  # imports torch and TRL once, forks after that
_SERVER.set_forkserver_preload(["toolpost.train.grpo"])


def quiet(line: str) -> None:
    """Say nothing."""


def easy_rows() -> list[Conversation]:
    """Give the practice rows with the shortest prompts that TINY's cap allows to answer."""
    rows = conversations(items("practice", practice_rows(80, 0)))
    kept = reachable(rows, load_tokenizer(POCKET), TINY)
    return sorted(kept, key=lambda row: len(prompt_of(row)))[:12]


@pytest.fixture(scope="module")
def rows() -> list[Conversation]:
    return easy_rows()


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, rows: list[Conversation]) -> Path:
    """Give an SFT adapter that has just begun to know the protocol, so that rewards vary."""
    out = tmp_path_factory.mktemp("sft") / "sft"
    texts = training_rows(rows)
    train_sft(ModelSpec(), texts, texts[:1], SftPlan(max_steps=14, threads=1), out, say=quiet)
    return out


# ----------------------------------------------------------------------------- the stock trainer's


def moved(plan: GrpoPlan, folder: Path, rows: list[Conversation], attention: Any) -> GroupTrainer:
    """Make a trainer whose adapter is not at its start."""
    spec = ModelSpec(attention=attention)
    model = stack(load_model(spec), [], lora(plan.rank))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trainer = grpo_trainer(model, load_tokenizer(POCKET), rows, plan, folder)
    prepare(trainer, "key", Announce(quiet, every=1))
    return trainer


def batch(rows: list[Conversation], group: int) -> dict[str, torch.Tensor]:
    """Make answers of different lengths, some with a common beginning, some the same."""
    tokenizer = load_tokenizer(POCKET)
    torch.manual_seed(3)
    prompts, answers = [], []
    for row in rows:
        gold = tokenizer(completion_of(row.gold_calls, row.answer))["input_ids"]
        for n in range(group):
            prompts.append(tokenizer(prompt_of(row))["input_ids"])
            kept = gold if n == 0 else gold[: 4 * (n // 2)]  # the second and third begin alike
            answers.append(kept + torch.randint(5, 4000, (3 * n,)).tolist() * (n != 2))
    wide, long = max(map(len, prompts)), max(map(len, answers))
    found = {
        "prompt_ids": [[0] * (wide - len(p)) + p for p in prompts],
        "prompt_mask": [[0] * (wide - len(p)) + [1] * len(p) for p in prompts],
        "completion_ids": [a + [0] * (long - len(a)) for a in answers],
        "completion_mask": [[1] * len(a) + [0] * (long - len(a)) for a in answers],
    }
    made = {name: torch.tensor(value) for name, value in found.items()}
    advantages = torch.randn(len(prompts))
    return made | {"advantages": advantages, "num_items_in_batch": made["completion_mask"].sum()}


def step(trainer: GroupTrainer, inputs: dict[str, torch.Tensor], stock: bool) -> tuple[Any, ...]:
    """Give loss, per-token log-probabilities, entropies and gradients."""
    model: Any = trainer.model
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    kind: Any = GRPOTrainer if stock else GroupTrainer
    with scored_positions_only():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            logps, entropies, _ = kind._get_per_token_logps_and_entropies(
                trainer, model, ids, mask, width, compute_entropy=True
            )
        loss = kind._compute_loss(trainer, model, inputs)
        loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), logps, entropies, grads


@pytest.mark.parametrize(("attention", "group"), [("sdpa", 4), ("eager", 2)])
def test_the_packed_step_is_that_of_the_stock_trainer(
    tmp_path: Path, rows: list[Conversation], attention: str, group: int
) -> None:
    plan = TINY.model_copy(update={"group": group, "batch_size": 3})
    inputs = batch([rows[0], rows[5], rows[11]], group)
    unshared = moved(plan.model_copy(update={"share_prefix": False}), tmp_path, rows, attention)
    want_loss, want_logps, want_entropies, want = step(unshared, inputs, stock=True)
    shared = moved(plan, tmp_path, rows, attention)
    loss, logps, entropies, grads = step(shared, inputs, stock=False)
    assert want.keys() == grads.keys()
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(logps, want_logps, rtol=1e-5, atol=1e-5)
    # A sum of as many small terms as the vocabulary has tokens: it rounds more than one term does.
    torch.testing.assert_close(entropies, want_entropies, rtol=1e-4, atol=1e-4)
    for name, grad in want.items():  # sums over hundreds of tokens, in another order
        assert (grads[name] - grad).norm() <= 5e-5 * grad.norm(), name
    assert abs(float(want_loss)) > 1e-3  # there is something to get wrong
    plain, through = (sum(shared._metrics["train"][name]) for name in ("plain", "passed"))
    assert through < plain * (1 / group + 0.35)


def test_groups_that_are_torn_apart_are_not_exact(tmp_path: Path, rows: list[Conversation]) -> None:
    """TRL shuffles a batch before it is split: packed like that, the test above would notice."""
    inputs = batch([rows[0], rows[5]], 3)
    trainer = moved(TINY, tmp_path, rows, "sdpa")
    want, *_ = step(trainer, inputs, stock=False)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    torn = {name: value[order] if value.ndim else value for name, value in inputs.items()}
    ids = torch.cat([torn["prompt_ids"], torn["completion_ids"]], dim=1)
    mask = torch.cat([torn["prompt_mask"], torn["completion_mask"]], dim=1)
    whole = regroup(ids[order.argsort()], mask[order.argsort()], 1, 3)
    assert passed(regroup(ids, mask, 1, 3), 3, shared=True) > passed(whole, 3, shared=True)
    loss, *_ = step(trainer, torn, stock=False)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)  # slower, but never wrong


# ----------------------------------------------------------------------------------- zero variance


def sampled(trainer: GroupTrainer) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Sample a step's batch; give what is kept of it, and the metrics."""
    model: Any = trainer.model
    model.train()
    whole = next(iter(cast("Any", trainer).get_train_dataloader()))
    kept = trainer._generate_and_score_completions(whole)
    return kept, {name: list(v) for name, v in trainer._metrics["train"].items()}


def test_groups_without_variance_are_dropped_and_counted(
    tmp_path: Path, sft: Path, rows: list[Conversation]
) -> None:
    """The loss over the kept groups is that of the stock trainer if it had sampled only these."""
    plan = TINY.model_copy(update={"batch_size": 8, "group": 2, "temperature": 0.7})
    model = stack(load_model(ModelSpec()), [sft], lora(4))
    trainer = grpo_trainer(model, load_tokenizer(POCKET), rows, plan, tmp_path)
    kept, metrics = sampled(trainer)
    groups, constant = metrics["groups"][0], metrics["constant"][0]
    assert groups == 8
    assert 0 < constant < 8
    assert len(kept["advantages"]) == 2 * (groups - constant)
    assert kept["num_items_in_batch"] == kept["completion_mask"].sum()
    pairs = kept["advantages"].view(-1, 2)
    assert (pairs.abs() > 0.5).all()
    assert pairs.sum(dim=1).abs().max() < 1e-3
    ends = kept["completion_mask"].sum(dim=1)
    texts = load_tokenizer(POCKET).batch_decode(kept["completion_ids"])
    assert all(END in text for text, n in zip(texts, ends, strict=True) if n < plan.max_new_tokens)


def test_a_step_without_any_variance_changes_nothing(
    tmp_path: Path, rows: list[Conversation]
) -> None:
    """The bare pocket model answers nothing right: all groups are constant."""
    found = train_grpo(ModelSpec(), [], rows, TINY, tmp_path / "grpo", say=quiet)
    assert (found.steps, found.skipped_steps) == (2, 2)
    assert (found.groups, found.constant_groups) == (4, 4)
    assert found.tokens_passed == 0
    start = stack(load_model(ModelSpec()), [], lora(TINY.rank), TINY.seed).state_dict()
    end = stack(load_model(ModelSpec()), [tmp_path / "grpo"]).state_dict()
    new = {name: value for name, value in start.items() if ".default." in name}
    assert new
    for name, value in new.items():
        assert torch.equal(end[name.replace(".default.", ".below0.")], value)


# ---------------------------------------------------------------------------------------- training


def test_a_step_makes_the_better_answers_likelier(
    tmp_path: Path, sft: Path, rows: list[Conversation]
) -> None:
    plan = TINY.model_copy(update={"batch_size": 4, "max_steps": 1, "learning_rate": 3e-4})
    model = stack(load_model(ModelSpec()), [sft], lora(4))
    trainer = grpo_trainer(model, load_tokenizer(POCKET), rows, plan, tmp_path)
    prepare(trainer, "key", Announce(quiet, every=1))
    with scored_positions_only():
        trainer.train()
        (inputs,) = trainer._parts
        weights = inputs["advantages"][:, None] * inputs["completion_mask"]

        def gained() -> float:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            width = inputs["completion_ids"].shape[1]
            with torch.no_grad():
                logps, *_ = trainer._get_per_token_logps_and_entropies(model, ids, mask, width)
            return float((logps * weights).sum())

        after = gained()
        with model.disable_adapter():
            before = gained()
    assert after > before


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, sft: Path, rows: list[Conversation]
) -> tuple[Path, Reinforced]:
    out = tmp_path_factory.mktemp("grpo") / "grpo"
    return out, train_grpo(ModelSpec(), [sft], rows, TINY, out, rows[:2], say=quiet)


def test_training_moves_the_new_adapter_alone(trained: tuple[Path, Reinforced], sft: Path) -> None:
    out, found = trained
    assert found.skipped_steps < found.steps == 2
    assert 0 < found.tokens_passed < found.tokens_plain
    assert [probe["step"] for probe in found.probes] == [0, 2]
    assert len(found.curve) == 2
    assert check_adapter(out).about["stage"] == "grpo"
    model = stack(load_model(ModelSpec()), [sft, out])
    grown = [p for n, p in model.named_parameters() if "below1" in n and "lora_B" in n]
    assert any(p.abs().max() > 0 for p in grown)
    untouched = stack(load_model(ModelSpec()), [sft], lora(TINY.rank))
    assert frozen(untouched) == found.frozen


def test_the_same_seed_gives_the_same_adapter(
    trained: tuple[Path, Reinforced], sft: Path, rows: list[Conversation], tmp_path: Path
) -> None:
    train_grpo(ModelSpec(), [sft], rows, TINY, tmp_path / "again", say=quiet)
    one, other = (f / "adapter_model.safetensors" for f in (trained[0], tmp_path / "again"))
    assert sha256(one) == sha256(other)


def test_small_passes_give_the_same_steps(
    trained: tuple[Path, Reinforced], sft: Path, rows: list[Conversation], tmp_path: Path
) -> None:
    """One prompt at a time, activations computed twice: the same but for rounding."""
    plan = TINY.model_copy(update={"micro_batch": 1, "checkpointing": True})
    found = train_grpo(ModelSpec(), [sft], rows, plan, tmp_path / "small", say=quiet)
    for one, other in zip(found.curve, trained[1].curve, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_the_reference_is_the_policy_below(
    sft: Path, rows: list[Conversation], tmp_path: Path
) -> None:
    """At the start policy and reference are equal, so the pull towards it has no force."""
    plan = TINY.model_copy(update={"beta": 0.5, "batch_size": 4, "max_steps": 1})
    model = stack(load_model(ModelSpec()), [sft], lora(4))
    trainer = grpo_trainer(model, load_tokenizer(POCKET), rows, plan, tmp_path)
    prepare(trainer, "key", Announce(quiet, every=1))
    assert "ref" not in model.peft_config
    with scored_positions_only():
        trainer.train()
    (kl,) = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------- drift


def test_four_bit_weights_stay_as_they_are(
    sft: Path, rows: list[Conversation], tmp_path: Path
) -> None:
    spec = ModelSpec(quantize="nf4")
    fresh = frozen(stack(load_model(spec), [sft], lora(4)))
    found = train_grpo(spec, [sft], rows, TINY, tmp_path / "grpo", rows[:1], say=quiet)
    assert found.skipped_steps < found.steps
    assert found.frozen == fresh


def test_merging_and_un_merging_would_be_noticed(sft: Path) -> None:
    """What a copy in another engine takes with each step, in 4 bits and in 32."""
    for quantize in ("nf4", "none"):
        model = stack(load_model(ModelSpec(quantize=cast("Any", quantize))), [sft], lora(4))
        before = frozen(model)
        assert frozen(model) == before
        model.merge_adapter()
        model.unmerge_adapter()
        assert frozen(model) != before


# ------------------------------------------------------------------------------------------ killed


def reinforce(out: Path, moment: str, said: Path, below: Path) -> None:
    """Train, and die at a moment."""
    MOMENTS[moment]()
    plan = TINY.model_copy(update={"max_steps": 5, "save_steps": 2, "batch_size": 1})
    with said.open("a", buffering=1, encoding="utf-8") as file:
        train_grpo(ModelSpec(), [below], easy_rows(), plan, out, (), lambda x: print(x, file=file))


def ended(*arguments: Any) -> int | None:
    child = _SERVER.Process(target=reinforce, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def test_a_run_killed_twice_goes_on_and_ends_the_same(sft: Path, tmp_path: Path) -> None:
    calm, out, said = tmp_path / "calm", tmp_path / "grpo", tmp_path / "said"
    assert ended(calm, "never", said, sft) == 0
    for moment in ("at a step", "inside the optimizer's file"):  # the file of the last checkpoint
        assert ended(out, moment, said, sft) == -signal.SIGKILL
        assert not out.exists()
    assert ended(out, "never", said, sft) == 0
    starts = [line for line in said.read_text(encoding="utf-8").splitlines() if "going on" in line]
    assert starts == ["going on from checkpoint-2", "going on from checkpoint-4"]
    one, other = (sha256(folder / "adapter_model.safetensors") for folder in (calm, out))
    assert one == other
    weights = load_file(calm / "adapter_model.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)  # it learned


# ----------------------------------------------------------------------------------------- prompts


def test_rows_out_of_reach_are_left_out(rows: list[Conversation]) -> None:
    tokenizer = load_tokenizer(POCKET)
    assert reachable(rows, tokenizer, TINY) == rows
    assert reachable(rows, tokenizer, TINY.model_copy(update={"max_new_tokens": 5})) == []
    assert reachable(rows, tokenizer, TINY.model_copy(update={"max_length": 60})) == []
    mute = rows[0].model_copy(update={"gold_calls": (), "answer": None})
    assert reachable([mute], tokenizer, TINY) == []


def test_each_pass_asks_every_prompt_once() -> None:
    plan = GrpoPlan(batch_size=5, max_steps=4, seed=1)
    order = schedule(10, plan)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert schedule(10, plan) == order
    assert schedule(0, plan) == []


def test_a_policy_that_refuses_everything_is_stopped() -> None:
    watch = Watch(limit=0.5)
    state = TrainerState(global_step=7)
    for refused in (0.0, 1.0, 1.0, 0.0, 0.0, 0.9, 0.8):  # four in a row: half at most
        watch.on_log(None, state, None, logs={"refused": refused})
    watch.on_log(None, state, None, logs={"train_runtime": 1.0})  # the last entry has no answers
    with pytest.raises(CollapseError, match="refuse though a call is due") as caught:
        watch.on_log(None, state, None, logs={"refused": 0.8})
    assert "at step 7 62%" in str(caught.value)


def test_too_few_rows_are_refused(tmp_path: Path, rows: list[Conversation]) -> None:
    plan = TINY.model_copy(update={"max_new_tokens": 5})
    with pytest.raises(ValueError, match="0 rows can be answered within max_new_tokens=5"):
        train_grpo(ModelSpec(), [], rows, plan, tmp_path / "grpo", say=quiet)


def test_several_processes_are_refused(
    tmp_path: Path, rows: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="GRPO runs in one process"):
        train_grpo(ModelSpec(), [], rows, TINY, tmp_path / "grpo", say=quiet)
