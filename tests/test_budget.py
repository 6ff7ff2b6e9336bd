"""The planner's sums, beside what PyTorch really keeps at the size of the real model's layers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import add_fused_lm_head

from toolpost.train.budget import (
    DEVICES,
    GIB,
    SHAPES,
    Batch,
    BudgetError,
    Job,
    Planned,
    Setup,
    Shape,
    StageName,
    adapter_parameters,
    as_json,
    copied_bytes,
    floor_seconds,
    generation_peak,
    layer_bytes,
    measured,
    optimizer_bytes,
    plan,
    plan_training,
    read_shape,
    saved_bytes,
    static_bytes,
    table,
    training_peak,
    watch,
    weight_bytes,
)
from toolpost.train.models import POCKET as POCKET_FOLDER
from toolpost.train.models import load_tokenizer
from toolpost.train.sample import sample
from toolpost.train.sft import scored_positions_only
from toolpost.train.stack import Stack

ROOT = Path(__file__).parents[1]
BAR = 0.10  # what the planner promises
REAL = SHAPES["Qwen/Qwen3-4B-Base"].model_copy(update={"layers": 2, "vocabulary": 1000})
POCKET = read_shape("pocket")


def benchmark() -> ModuleType:
    """Load benchmarks/gpu_memory.py."""
    place = ROOT / "benchmarks" / "gpu_memory.py"
    spec = importlib.util.spec_from_file_location("gpu_memory", place)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks its annotations up
    spec.loader.exec_module(module)
    return module


BENCHMARK = benchmark()


def made(shape: Shape, setup: Setup) -> Stack:
    """Build a random model of a shape, quantised if wanted, with its adapters."""
    torch.set_num_threads(1)
    model: Stack = BENCHMARK.build(shape, setup)
    return model


@contextlib.contextmanager
def computing(setup: Setup) -> Iterator[None]:
    """Switch autocast on; PEFT's 4-bit layers ask for a GPU's, which changes no CPU tensor."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setup.mixed):
        torch.set_autocast_enabled("cuda", setup.cuda and setup.mixed)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)


def forward(model: Stack, setup: Setup, batch: Batch) -> torch.Tensor:
    """Pass a batch through the backbone."""
    if setup.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    rows = batch.tokens // batch.row
    ids = torch.randint(0, 900, (rows, batch.row))
    mask = None
    if batch.masked:  # no two rows are of the same length
        mask = (torch.arange(batch.row) < batch.row - torch.arange(rows)[:, None]).long()
        mask[-1, -1] = 0
    backbone: Any = model.get_base_model().base_model
    with computing(setup):
        states: torch.Tensor = backbone(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
    return states


def backward(model: Stack, setup: Setup, states: torch.Tensor) -> None:
    """Run the backward pass; with checkpointing it computes layers again, PEFT's too."""
    torch.set_autocast_enabled("cuda", setup.cuda and setup.mixed)
    try:
        states.sum().backward()
    finally:
        torch.set_autocast_enabled("cuda", False)
        model.zero_grad(set_to_none=True)


def nearly(found: int, counted: int) -> None:
    """Check a prediction."""
    assert found == pytest.approx(counted, rel=BAR), f"{found / counted - 1:+.1%}"


def kept(model: Stack, shape: Shape, setup: Setup, batch: Batch) -> tuple[int, int]:
    """Give the bytes that the planner says are saved, and those that autograd saves."""
    with watch(model) as found:
        forward(model, setup, batch)
    copies = 0 if setup.checkpointing else copied_bytes(shape, setup)
    return saved_bytes(shape, setup, batch).total + copies, found.saved


def peaks(model: Stack, shape: Shape, setup: Setup, batch: Batch) -> tuple[int, int]:
    """Give the predicted and the counted peak of a step of which the head is no part."""
    with watch(model) as found:
        backward(model, setup, forward(model, setup, batch))
    peak = training_peak("sft", shape, setup, batch)
    return peak.allocated - optimizer_bytes(shape, setup), found.peak


@pytest.fixture(scope="module")
def real() -> Stack:
    """Two layers of the real model in NF4, with an adapter upon a frozen one."""
    return made(REAL, Setup(quantize="nf4", dtype="bfloat16", below=(8,)))


QLORA = Setup(quantize="nf4", dtype="bfloat16", below=(8,), optimizer="adamw_8bit")


@pytest.mark.parametrize(
    ("change", "batch"),
    [
        ({}, Batch(tokens=256)),
        ({}, Batch(tokens=192, length=96, masked=True)),
        ({"cuda": False}, Batch(tokens=128)),
        ({"checkpointing": True}, Batch(tokens=192)),
    ],
    ids=["plain", "masked", "with copies", "checkpointed"],
)
def test_activations_at_real_size(real: Stack, change: dict[str, Any], batch: Batch) -> None:
    """What autograd saves, and the peak of forward and backward, each within the bar."""
    setup = QLORA.model_copy(update=change)
    nearly(*kept(real, REAL, setup, batch))
    nearly(*peaks(real, REAL, setup, batch))


def test_weights_at_real_size(real: Stack) -> None:
    with watch(real) as found:
        pass
    want = static_bytes(REAL, QLORA)
    nearly(want["weights"] + want["adapters"], found.now)
    matrices = [p for p in real.parameters() if hasattr(p, "quant_state")]
    assert len(matrices) == 14
    nearly(sum(p.numel() for p in matrices), REAL.linear_parameters // 2)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(("shape", "rank"), [(REAL, 16), (POCKET, 8), (POCKET, 64)])
def test_the_optimizer_keeps_what_is_planned(name: Any, shape: Shape, rank: int) -> None:
    """A step of the real optimiser, over matrices of the adapter's sizes."""
    setup = Setup(rank=rank, optimizer=name)
    sides = [side for pair in shape.linears for side in pair] * shape.layers
    trained = [torch.nn.Parameter(torch.ones(rank, side)) for side in sides]
    assert sum(p.numel() for p in trained) == adapter_parameters(shape, rank)
    eight: Any = bnb.optim
    kind: Any = torch.optim.AdamW if name == "adamw" else eight.AdamW8bit
    optimizer = kind(trained, lr=1e-4)
    for one in trained:
        one.grad = torch.ones_like(one)
    optimizer.step()
    state = {
        id(value): value.nbytes
        for kept in optimizer.state.values()
        for value in kept.values()
        if isinstance(value, torch.Tensor)
    }
    nearly(optimizer_bytes(shape, setup), sum(state.values()))


@pytest.mark.parametrize(
    ("quantize", "dtype", "attention", "below"),
    [
        ("none", "float32", "sdpa", ()),
        ("none", "bfloat16", "sdpa", (8,)),
        ("nf4", "float32", "sdpa", (8,)),
        ("nf4", "bfloat16", "sdpa", ()),
        ("nf4", "bfloat16", "sdpa", (8, 8)),
        ("none", "float32", "eager", ()),
        ("none", "bfloat16", "eager", ()),
        ("nf4", "bfloat16", "eager", (8,)),
    ],
)
def test_the_pocket_model_in_every_form(
    quantize: Any, dtype: Any, attention: Any, below: tuple[int, ...]
) -> None:
    setup = Setup(quantize=quantize, dtype=dtype, attention=attention, below=below)
    model = made(POCKET, setup)
    for change in ({}, {"cuda": False}, {"autocast": False, "cuda": False}):
        now = setup.model_copy(update=change)
        nearly(*kept(model, POCKET, now, Batch(tokens=256)))
    nearly(*kept(model, POCKET, setup, Batch(tokens=512, length=64, masked=True)))
    nearly(*peaks(model, POCKET, setup, Batch(tokens=512)))
    again = setup.model_copy(update={"checkpointing": True})
    nearly(*kept(model, POCKET, again, Batch(tokens=256)))
    nearly(*peaks(model, POCKET, again, Batch(tokens=512)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_a_step_with_the_head_and_the_reference(checkpointing: bool, reference: bool) -> None:
    """TRL's fused head, and DPO's second pass with the new adapter off."""
    setup = Setup(below=(8,), checkpointing=checkpointing, cuda=False)
    model = made(POCKET, setup)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    base: Any = model.get_base_model()
    add_fused_lm_head(base)
    ids = torch.randint(0, 900, (4, 128))
    labels = ids.masked_fill(torch.arange(128) < 112, -100)
    with watch(model) as found, scored_positions_only():
        loss = base(input_ids=ids, labels=labels, fused_lm_head=True).loss
        if reference:
            with torch.no_grad(), model.disable_adapter():
                base(input_ids=ids, labels=labels, fused_lm_head=True)
        loss.backward()
    batch = Batch(tokens=512, length=128, scored=64)
    peak = training_peak("dpo", POCKET, setup, batch, reference=reference)
    nearly(peak.allocated - optimizer_bytes(POCKET, setup), found.peak)


def test_without_the_fused_head_the_logits_are_counted() -> None:
    setup = Setup(cuda=False)
    whole: Any = made(POCKET, setup)
    ids = torch.randint(0, 900, (1, 256))
    with watch(whole) as found:
        whole(input_ids=ids, labels=ids).loss.backward()
    peak = training_peak("sft", POCKET, setup, Batch(tokens=256), fused=False)
    nearly(peak.allocated - optimizer_bytes(POCKET, setup), found.peak)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize(("prompts", "group", "words", "new"), [(4, 8, 200, 12), (8, 1, 200, 12)])
def test_sampling(quantize: Any, prompts: int, group: int, words: int, new: int) -> None:
    """Our sampler, which reads a prompt once for all its answers."""
    setup = Setup(quantize=quantize, below=(8,), cuda=False)
    model, tokenizer = made(POCKET, setup), load_tokenizer(POCKET_FOLDER)
    text = " the" * words
    with watch(model) as found:
        said = sample(model, tokenizer, [text] * prompts, group, 1.0, new, batch=prompts * group)
    assert max(len(one.token_ids) for row in said for one in row) == new
    length = len(tokenizer(text)["input_ids"])
    peak = generation_peak("sampling", POCKET, setup, prompts * group, length, new, group)
    nearly(peak.allocated, found.peak)


def test_the_published_figures() -> None:
    """Bytes and seconds of the 4B model that were worked out by other means."""
    shape = SHAPES["Qwen/Qwen3-4B-Base"]
    setup = Setup(quantize="nf4", dtype="bfloat16", optimizer="adamw_8bit")
    assert weight_bytes(shape, setup) == pytest.approx(2.65e9, rel=0.01)
    assert weight_bytes(shape, Setup(dtype="bfloat16")) == pytest.approx(8.04e9, rel=0.01)
    assert adapter_parameters(shape, 16) == pytest.approx(33.03e6, rel=0.001)
    for change, kib in (({}, 147), ({"quantize": "none"}, 170), ({"autocast": False}, 222)):
        one = layer_bytes(shape, setup.model_copy(update=change), Batch(tokens=1000))
        assert one / 1000 / 1024 == pytest.approx(kib, rel=0.01)
    again = setup.model_copy(update={"checkpointing": True})
    for tokens, seconds in ((1024, 0.41), (4096, 0.48)):
        batch = Batch(tokens=tokens, scored=tokens // 8)
        plain = again.model_copy(update={"quantize": "none"})  # the figures leave NF4's traffic out
        floor = floor_seconds(shape, plain, batch, DEVICES["rtx4070"]) / tokens * 1000
        assert floor == pytest.approx(seconds, rel=0.03)


JOB = Job(
    shape=SHAPES["Qwen/Qwen3-4B-Base"],
    setup=Setup(quantize="nf4", dtype="bfloat16", optimizer="adamw_8bit"),
    memory_gib=10,
    device=DEVICES["rtx4070"],
    ranks={"sft": 16, "dpo": 16, "grpo": 16},
)


def sized(job: Job, stage: StageName) -> Planned | BudgetError:
    """Plan a stage, or give the refusal."""
    try:
        return plan_training(job, stage)
    except BudgetError as problem:
        return problem


@settings(max_examples=40, deadline=None)
@given(gib=st.floats(4, 80), prompt=st.integers(50, 2000), group=st.integers(2, 16))
def test_what_is_planned_fits_and_one_more_does_not(gib: float, prompt: int, group: int) -> None:
    job = JOB.model_copy(update={"memory_gib": gib, "prompt": prompt, "group": group})
    keys: dict[StageName, str] = {
        "sft": "pack_tokens",
        "dpo": "micro_batch",
        "grpo": "micro_batch",
    }
    for stage, key in keys.items():
        one = sized(job, stage)
        if isinstance(one, BudgetError):
            assert one.part in str(one)
            assert gib < 8  # the weights are 2.5, and the longest row is 2,048 tokens
            continue
        assert one.peak.total <= gib * GIB
        more = {key: one.most + 1, "checkpointing": one.checkpointing}
        with pytest.raises(BudgetError, match=f"^{stage}: a micro-batch of {one.most + 1} "):
            plan_training(job.model_copy(update=more), stage)


def test_checkpointing_is_on_only_where_it_is_needed() -> None:
    assert plan_training(JOB, "sft").checkpointing
    large = JOB.model_copy(update={"memory_gib": 78})
    assert not plan_training(large, "sft").checkpointing
    short = JOB.model_copy(update={"longest": 512})
    assert not plan_training(short, "sft").checkpointing  # 1,000 tokens fit, and nothing is redone


def test_a_model_that_does_not_fit_is_refused_with_the_way_out() -> None:
    plain = JOB.setup.model_copy(update={"quantize": "none"})
    job = JOB.model_copy(update={"setup": plain, "memory_gib": 8})
    with pytest.raises(BudgetError, match=r"weights \(7.49 GiB\).*quantize: nf4") as found:
        plan(job)
    assert (found.value.stage, found.value.part) == ("sft", "weights")


def test_the_plan_is_one_json_object_and_a_table() -> None:
    made = plan(JOB)
    text = json.loads(json.dumps(as_json(made, JOB)))
    assert [one["stage"] for one in text["stages"]] == [one.stage for one in made]
    assert all(one["total"] <= 10 * GIB for one in text["stages"])
    assert table(made, JOB).row_count == len(made)
    shown = measured(made[0].peak)
    assert shown.error is None or abs(shown.error) < 10


def test_a_shape_is_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}', encoding="utf-8")
    with pytest.raises(BudgetError, match="it has no 'hidden_size'"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BudgetError, match="has to be the config"):
        read_shape(str(tmp_path))
    assert read_shape(str(POCKET_FOLDER)) == POCKET


@pytest.mark.parametrize(
    ("stage", "size", "checkpointing"),
    [("sft", 64, False), ("dpo shared", 2, True), ("grpo sampling", 8, False), ("merge", 2, False)],
)
def test_the_benchmark_measures_what_is_predicted(
    stage: str, size: int, checkpointing: bool
) -> None:
    """The script's own steps: training, sampling and the proof of a merge, in tiny form."""
    case = BENCHMARK.Case(
        stage=stage,
        size=size,
        checkpointing=checkpointing,
        device="cpu",
        tiny=True,
        prompt=40,
        completion=8,
        group=4,
    )
    found = BENCHMARK.run_case(case)
    assert found["outcome"] == "ok"
    nearly(BENCHMARK.prediction(case).allocated, found["allocated"])


def test_the_benchmark_runs_a_case_in_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    words = [
        "--tiny",
        "--device",
        "cpu",
        "--only",
        "generation",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["gpu_memory.py", *words])
    BENCHMARK.main()
    found = json.loads(out.read_text(encoding="utf-8"))
    (one,) = found["cases"]
    assert one["outcome"] == "ok"
    assert abs(one["error"]) < BAR
    assert one["predicted"]["allocated"] == sum(one["predicted"]["parts"].values())
    assert found["largest"][0]["largest"] == one["size"]
    assert found["not_run"] == []
