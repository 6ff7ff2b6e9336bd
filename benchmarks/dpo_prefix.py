"""Compare DPO steps of the stock trainer with those that share the prefixes of a pair.

python benchmarks/dpo_prefix.py --xlam ROWS.json --out reports/benchmarks/dpo_prefix.json

Near misses of real rows, the pocket model, fp32, the same batches for all, in turn (A B C A ...):

stock      the trainer of TRL: four sequences a pair, two for the policy and two for the reference
shared     one packed sequence a pair for each of the two
sampler    the same, with the reference's log-probabilities at hand
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolpost.record import QUIET

os.environ.update(QUIET)

if TYPE_CHECKING:
    from trl import DPOTrainer

WAYS = ("stock", "shared", "sampler")


def pairs_of(path: Path, count: int) -> list[dict[str, str]]:
    """Give near misses of a file's rows, rendered."""
    from toolpost.core.pairs import ASSUMED, perturbed, texts_of
    from toolpost.data.build import conversations, items
    from toolpost.data.sources import load_rows

    rows = conversations(items("xlam", load_rows("xlam", None, 0, path)))
    return [texts_of(pair)._asdict() for pair in perturbed(rows, ASSUMED, count, seed=0).pairs]


def trainer(way: str, rows: list[dict[str, str]], batch: int, folder: Path) -> DPOTrainer:
    """Make one of the trainers, all with the same adapter."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from toolpost.core.format import END
    from toolpost.train.models import POCKET, ModelSpec, load_model, load_tokenizer, lora
    from toolpost.train.prefix import shared_prefix

    torch.manual_seed(0)
    tokenizer = load_tokenizer(POCKET)
    tokenizer.eos_token = END
    made = DPOTrainer(
        model=load_model(ModelSpec(), torch.get_num_threads()),
        args=DPOConfig(
            output_dir=str(folder / way),
            per_device_train_batch_size=batch,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 1.0],
            precompute_ref_log_probs=way == "sampler",
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(16),
    )
    torch.manual_seed(0)
    policy: Any = made.model
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return made if way == "stock" else shared_prefix(made)


def step(made: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Take one step's forward and backward pass; give the loss and the seconds."""
    made.model.train()
    made.model.zero_grad()
    start = time.perf_counter()
    loss = made.compute_loss(made.model, dict(batch))
    loss.backward()
    return float(loss.detach()), time.perf_counter() - start


def measure(rows: list[dict[str, str]], batch: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Time all ways on the same batches, and count what they process."""
    from trl.trainer.utils import add_fused_lm_head  # noqa: F401  # imported before any clock runs

    from toolpost.train.prefix import pack, work
    from toolpost.train.sft import scored_positions_only

    made = {way: trainer(way, rows, batch, folder) for way in WAYS}
    batches = {way: list(one.get_eval_dataloader(one.train_dataset)) for way, one in made.items()}
    lengths: list[tuple[int, int, int]] = []
    tokens = {"stock": 0, "shared": 0}
    for inputs in batches["stock"]:
        ids, real = inputs["input_ids"], inputs["attention_mask"]
        packed = pack(ids, real, ids)
        both = real.sum(dim=1).view(2, -1)
        tokens["stock"] += int(both.sum())
        tokens["shared"] += int((packed.segments < 3).sum())
        common = (packed.segments == 0).sum(dim=1) + 1
        lengths += list(zip(common.tolist(), both[0].tolist(), both[1].tolist(), strict=True))
    stock = work(lengths, shared=False)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {}
    with scored_positions_only():
        for _ in range(repeats):
            for way in WAYS:
                found = [step(made[way], inputs) for inputs in batches[way]]
                losses[way] = [loss for loss, _ in found]
                seconds[way].append(sum(spent for _, spent in found))
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    worst = max(
        abs(a - b) / abs(a)
        for way in WAYS[1:]
        for a, b in zip(losses["stock"], losses[way], strict=True)
    )
    return {
        "pairs": len(lengths),
        "mean_tokens": {
            "common": statistics.mean(common for common, _, _ in lengths),
            "chosen": statistics.mean(chosen for _, chosen, _ in lengths),
            "rejected": statistics.mean(rejected for _, _, rejected in lengths),
        },
        "tokens": tokens,
        "tokens_ratio": tokens["shared"] / tokens["stock"],
        "work_ratio": work(lengths, shared=True) / stock,
        "work_ratio_sampler": work(lengths, shared=True, reference=False) / stock,
        "seconds": seconds,
        "wall_ratio": middle["shared"] / middle["stock"],
        "wall_ratio_sampler": middle["sampler"] / middle["stock"],
        "largest_relative_difference_of_losses": worst,
    }


def main() -> None:
    """Run the comparison."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--xlam", type=Path, required=True, help="real xLAM rows, a JSON array")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows = pairs_of(a.xlam, a.pairs)
    random.Random(0).shuffle(rows)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(rows, a.batch, a.repeats, Path(folder))
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    device = {"machine": platform.machine(), "device": "cpu", "threads": a.threads}
    text = json.dumps({**versions, **device, "batch": a.batch, **found}, indent=1)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
