"""Shared prefixes: the same losses, log-probabilities and gradients as the stock trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer

from toolpost.train.models import POCKET, load_tokenizer, lora
from toolpost.train.prefix import block_mask, pack, sees, share_prefixes, shared_prefix, work

PAIRS = [
    (
        "The tools are these, and the question is that.\n",
        "<tool_call> get x",
        "<tool_call> put x y",
    ),
    ("Short.\n", "one two three four", "five"),
    ("The same question again, somewhat longer.\n", "yes", "yes and no"),
    ("Nothing in common behind the prompt:\n", "a b c", "d e f g h i"),
]


def model(attention: str = "sdpa") -> Qwen3ForCausalLM:
    """Make a small Qwen3 with the pocket tokenizer's vocabulary and weights that are not tiny."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(load_tokenizer(POCKET)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    config._attn_implementation = attention
    made = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:  # the norms stay one
                parameter.normal_(std=0.2)
    return made


def trainer(folder: Path, attention: str = "sdpa", **more: Any) -> DPOTrainer:
    """Make TRL's trainer over a model whose adapter has already moved."""
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    made = DPOTrainer(
        model=model(attention),
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(PAIRS),
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 0.5],
            report_to="none",
            use_cpu=True,
            bf16=False,
            **more,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(POCKET),
        peft_config=lora(4),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in cast("Any", made.model).named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return made


def step(made: DPOTrainer) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Give loss, metrics and gradients of one batch."""
    policy: Any = made.model
    batch = next(iter(made.get_train_dataloader()))
    policy.train()
    policy.zero_grad()
    made._metrics["train"].clear()
    torch.manual_seed(2)
    loss: torch.Tensor = cast("Any", made).compute_loss(policy, batch)
    loss.backward()
    metrics = {key: values[-1] for key, values in made._metrics["train"].items()}
    grads = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return float(loss.detach()), metrics, grads


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_step_is_that_of_the_stock_trainer(
    tmp_path: Path, attention: str, checkpointing: bool
) -> None:
    made = trainer(tmp_path, attention, gradient_checkpointing=checkpointing)
    loss, metrics, grads = step(made)
    shared_loss, shared_metrics, shared_grads = step(shared_prefix(made))
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    shared_metrics.pop("num_tokens"), metrics.pop("num_tokens")  # counts on from step to step
    assert shared_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert abs(metrics["rewards/margins"]) > 1e-3  # there is something to get wrong
    assert grads.keys() == shared_grads.keys()
    assert len(grads) > 20
    for name, grad in grads.items():
        error = (shared_grads[name] - grad).norm() / grad.norm()
        assert error <= 1e-5, name


def test_the_naive_packing_is_not_exact(tmp_path: Path) -> None:
    """Without the mask the second answer sees the first: the test above would notice."""
    made = trainer(tmp_path, "eager")
    loss, _, _ = step(made)
    base = cast("Any", made.model).get_base_model()
    scored = base.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = torch.full_like(kwargs["attention_mask"], torch.finfo(torch.float32).min)
        kwargs["attention_mask"] = hidden.triu(1)
        return scored(*args, **kwargs)

    base.forward = forward
    naive, _, _ = step(shared_prefix(made))
    assert naive != pytest.approx(loss, rel=1e-4)


def test_generation_is_unchanged(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    policy: Any = made.model
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = policy.generate(input_ids=ids, **options)
    shared_prefix(made)
    assert torch.equal(policy.generate(input_ids=ids, **options), before)


@settings(max_examples=60, deadline=None)
@given(group=st.integers(2, 4), count=st.integers(1, 3), data=st.data())
def test_any_group_scores_what_its_rows_score(group: int, count: int, data: st.DataObject) -> None:
    """Random rows over few tokens: equal rows, and rows that are the beginning of another."""
    size = group * count
    sizes = st.lists(st.integers(1, 4), min_size=4, max_size=9)
    rows = data.draw(st.lists(sizes, min_size=size, max_size=size))
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    prompt = data.draw(st.integers(1, 3))
    agreed = ids.view(group, count, width)[..., :prompt]
    for at in range(count):  # a prompt is common to its group
        ids.view(group, count, width)[:, at, :prompt] = agreed[0, at]
    real = (ids > 0).long()
    asked = st.lists(st.integers(1, 8), min_size=size, max_size=size)
    ends = torch.tensor(data.draw(asked))[:, None]  # a row's prompt may hold another row's answer
    labels = ids.masked_fill((real == 0) | (torch.arange(width) < ends), -100)

    made = model()
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(made)
    plain = model()
    add_fused_lm_head(plain)
    share_prefixes(made, group)
    with torch.no_grad():
        want = plain(input_ids=ids, attention_mask=real, labels=labels, fused_lm_head=True)
        found = made(input_ids=ids, attention_mask=real, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)


def test_the_block_mask_is_the_dense_mask() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 6, 0], [1, 2, 7, 0, 0], [1, 2, 8, 9, 9]])
    segments = pack(ids, (ids > 0).long(), ids, group=2).segments
    made = block_mask(segments)
    count, length = segments.shape
    dense = create_mask(made.mask_mod, count, None, length, length, device="cpu")
    assert torch.equal(dense, sees(segments))


def test_nothing_but_the_prefix_is_saved() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 0, 0]])
    packed = pack(ids, (ids > 0).long(), ids, group=2)
    assert packed.input_ids.shape == (1, 6 + 4 - 2)
    pair = [(3, 6, 4)]
    assert work(pair, shared=False) == 4 * 10
    assert work(pair, shared=True) == 4 * 8
    assert work(pair, shared=True, reference=False) == 3 * 8
