"""Measure the memory of each training stage under a cap, beside what the planner predicts.

python benchmarks/gpu_memory.py --out reports/hardware/gpu_memory.json            # a CUDA machine
python benchmarks/gpu_memory.py --tiny --device cpu --only sft --repeats 1        # anywhere

The model is Qwen3-4B by its published shape, with random weights that are quantised on the card,
one matrix after the other: memory and speed do not depend on what the weights say. Each case runs
in a process of its own, so that one that runs out of memory spoils no other. The steps are the
passes that the trainers make (toolpost's adapters, prefix sharing, sampler and folding; TRL's
fused head; bitsandbytes' optimiser), without their data loading and logging. On a CPU the peak is
counted tensor by tensor, which is slow, so that its times say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from toolpost.core.schema import Frozen
from toolpost.record import QUIET
from toolpost.train.budget import (
    GIB,
    SHAPES,
    Attention,
    Batch,
    Peak,
    Setup,
    Shape,
    generation_peak,
    merge_peak,
    read_shape,
    training_peak,
    watch,
)

os.environ.update(QUIET)
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

STAGES = ("sft", "dpo", "dpo shared", "grpo", "grpo sampling", "generation", "merge")


class Case(Frozen):
    """One measurement."""

    stage: str
    size: int  # tokens (SFT), pairs (DPO), prompts (GRPO), answers (sampling)
    checkpointing: bool = False
    device: str = "cuda"
    tiny: bool = False
    quantize: bool = True
    attention: Attention = "sdpa"
    prompt: int = 800
    completion: int = 96
    group: int = 8
    repeats: int = 3
    cap_gib: float = 10.0
    seed: int = 0

    @property
    def shape(self) -> Shape:
        """The model's shape."""
        return read_shape("pocket") if self.tiny else SHAPES["Qwen/Qwen3-4B-Base"]

    @property
    def setup(self) -> Setup:
        """How it is held."""
        above = {"sft": 0, "dpo": 1, "dpo shared": 1}.get(self.stage, 2)
        return Setup(
            quantize="nf4" if self.quantize else "none",
            dtype="bfloat16",
            attention=self.attention,
            below=(16,) * above,
            optimizer="adamw_8bit",
            checkpointing=self.checkpointing,
            cuda=self.device == "cuda",
        )

    @property
    def together(self) -> int:
        """Answers that share a row."""
        return {"dpo shared": 2, "grpo": self.group}.get(self.stage, 1)

    @property
    def batch(self) -> Batch:
        """What passes at once."""
        if self.stage == "sft":
            scored = self.size * self.completion // (self.prompt + self.completion)
            return Batch(tokens=self.size, scored=scored)
        rows = self.size * (2 if self.stage == "dpo" else 1)
        # Answers share all but the prompt's last token, of which each has a copy.
        row = self.prompt + self.together * self.completion + self.together - 1
        scored = rows * self.together * self.completion
        masked = self.together > 1
        return Batch(tokens=rows * row, length=row, scored=scored, masked=masked)


def linear(shape: tuple[int, int], setup: Setup, device: str) -> Any:
    """Make a random linear layer, quantised where it is if wanted."""
    import bitsandbytes as bnb
    import torch

    outputs, inputs = shape
    dtype = getattr(torch, setup.dtype)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device) * 0.02
    if setup.quantize == "none":
        plain = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        return plain
    nn: Any = bnb.nn
    layer = nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    layer.weight = nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(device)


def build(shape: Shape, setup: Setup, device: str = "cpu", seed: int = 0) -> Any:
    """Build a random model of a shape with its adapters, one matrix after the other."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from toolpost.train.models import lora
    from toolpost.train.stack import Stack

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    config._attn_implementation = setup.attention
    dtype = getattr(torch, setup.dtype)
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(config)
    for name, module in list(model.named_modules()):
        place = model.get_submodule(name.rpartition(".")[0])
        own = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear) and own != "lm_head":
            setattr(place, own, linear((module.out_features, module.in_features), setup, device))
        elif own == "rotary_emb":
            setattr(place, own, type(module)(config).to(device))
        elif "Norm" in type(module).__name__:
            weight = torch.ones(module.weight.shape, dtype=dtype, device=device)
            module.weight = torch.nn.Parameter(weight)
    table = torch.randn(shape.vocabulary, shape.hidden, dtype=dtype, device=device) * 0.02
    model.model.embed_tokens.weight = torch.nn.Parameter(table)
    model.tie_weights()
    model.is_loaded_in_4bit = setup.quantize == "nf4"
    model.requires_grad_(False)
    whole = Stack(model, lora(setup.rank), adapter_name="default")
    for n, rank in enumerate(setup.below):
        whole.add_adapter(f"below{n}", lora(rank))
    whole.settle()
    return whole.train()


def rows_of(case: Case) -> dict[str, Any]:
    """Make random rows: those of one prompt stand `count` apart, as the packing wants them."""
    import torch

    generator = torch.Generator().manual_seed(case.seed)
    most = min(case.shape.vocabulary, 8000)
    if case.stage == "sft":
        ids = torch.randint(1, most, (1, case.size), generator=generator)
        labels = ids.clone()
        labels[:, : case.size - case.batch.scored] = -100
    else:
        answers = 2 if case.stage.startswith("dpo") else case.group
        prompts = torch.randint(1, most, (case.size, case.prompt), generator=generator)
        said = torch.randint(1, most, (answers * case.size, case.completion), generator=generator)
        if answers > 1:  # no two begin alike
            said[:, 0] = torch.arange(len(said)) // case.size + 1
        ids = torch.cat([prompts.repeat(answers, 1), said], dim=1)
        labels = ids.clone()
        labels[:, : case.prompt] = -100
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(case.device) for name, value in rows.items()}


@contextlib.contextmanager
def scoring(case: Case) -> Iterator[None]:
    """Compute as the trainers do: autocast, and on a CPU too only what counts is scored."""
    import torch

    from toolpost.train.sft import scored_positions_only

    with torch.autocast(case.device, dtype=torch.bfloat16), scored_positions_only():
        yield


def training(case: Case, model: Any) -> Callable[[], None]:
    """Give one optimiser step of a stage."""
    import bitsandbytes as bnb
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from toolpost.train.prefix import share_prefixes

    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    base = model.get_base_model()
    add_fused_lm_head(base)
    if case.together > 1:
        share_prefixes(base, case.together)
    optim: Any = bnb.optim
    optimizer = optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = rows_of(case)

    def score() -> torch.Tensor:
        found: torch.Tensor = base(**rows, fused_lm_head=True).log_probs.sum(dim=1)
        return found

    def step() -> None:
        with scoring(case):
            scores = score()
            if case.stage.startswith("dpo"):
                with torch.no_grad(), model.disable_adapter():
                    reference = score()
                better, worse = (scores - reference).chunk(2)
                loss = -torch.nn.functional.logsigmoid(0.1 * (better - worse)).mean()
            else:  # in GRPO an advantage that is one for half of the answers
                signs = torch.arange(len(scores), device=scores.device) % 2 * 2 - 1
                loss = -(scores * signs if case.stage == "grpo" else scores).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def writing(case: Case, model: Any) -> Callable[[], None]:
    """Give one round of sampling with our sampler."""
    from toolpost.train.models import POCKET, load_tokenizer
    from toolpost.train.sample import sample

    tokenizer = load_tokenizer(POCKET)  # its ids are a part of the real vocabulary
    group = case.group if case.stage == "grpo sampling" else 1
    prompts = ["0" * case.prompt] * max(1, case.size // group)  # a token a digit

    def step() -> None:
        sample(model, tokenizer, prompts, group, 1.0, case.completion, case.seed, batch=case.size)

    return step


def merging(case: Case, model: Any) -> Callable[[], None]:
    """Give the folding of all matrices (nothing is written) and the un-merged side of the proof."""
    from toolpost.train.merge import base_of, look, pieces
    from toolpost.train.models import POCKET, load_tokenizer

    tokenizer = load_tokenizer(POCKET)
    probe = {"prompt": "0" * case.prompt, "completion": "0" * case.completion}

    def step() -> None:
        for piece in pieces(model).values():
            piece.make()
        look(base_of(model), tokenizer, [probe] * case.size, new_tokens=case.completion)
        model.train()

    return step


def action(case: Case, model: Any) -> Callable[[], None]:
    """Give what is to be measured."""
    if case.stage == "merge":
        return merging(case, model)
    if case.stage in ("grpo sampling", "generation"):
        return writing(case, model)
    return training(case, model)


def prediction(case: Case) -> Peak:
    """Predict a case; nothing is built for it."""
    shape, setup = case.shape, case.setup
    if case.stage == "merge":
        return merge_peak(shape, setup, case.size, case.prompt, case.completion)
    if case.stage in ("grpo sampling", "generation"):
        group = case.group if case.stage == "grpo sampling" else 1
        return generation_peak(
            case.stage, shape, setup, case.size, case.prompt, case.completion, group=group
        )
    reference = case.stage.startswith("dpo")
    return training_peak(case.stage, shape, setup, case.batch, reference=reference)


def run_case(case: Case) -> dict[str, Any]:
    """Measure a case in this process."""
    import torch

    cuda = case.device == "cuda"
    found: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap_gib * GIB / total))
        found["device"] = torch.cuda.get_device_name()
    else:
        torch.set_num_threads(1)
    try:
        found |= measured(case)
    except torch.OutOfMemoryError as problem:
        found |= {"outcome": "out of memory", "why": str(problem).partition(". ")[0]}
    if cuda:
        found["allocated"] = torch.cuda.max_memory_allocated()
        found["reserved"] = torch.cuda.max_memory_reserved()
    return found


def measured(case: Case) -> dict[str, Any]:
    """Run the steps; give their times, and on a CPU the peak of counted tensors."""
    import torch

    model = build(case.shape, case.setup, case.device, case.seed)
    step = action(case, model)
    if case.device == "cpu":
        with watch(model) as counted:
            for _ in range(2):  # the optimiser's state is there from the second step on
                step()
        return {"outcome": "ok", "allocated": counted.peak, "how": "counted tensor by tensor"}
    seconds = []
    torch.cuda.reset_peak_memory_stats()  # building is no part of a step
    for _ in range(case.repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"outcome": "ok", "how": "torch.cuda.max_memory_allocated", "seconds": seconds[1:]}


def child(case: Case) -> dict[str, Any]:
    """Measure a case in a process of its own, and put the prediction beside it."""
    command = [sys.executable, str(Path(__file__)), "--case", case.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        found = {"outcome": "failed", "why": done.stderr[-1000:]}
    peak = prediction(case)
    want = {"allocated": peak.allocated, "reserved": peak.reserved, "total": peak.total}
    row = {
        "stage": case.stage,
        "size": case.size,
        "checkpointing": case.checkpointing,
        "predicted": want | {"moment": peak.moment, "parts": peak.parts},
        "fits_predicted": peak.reserved <= case.cap_gib * GIB,
        **found,
    }
    if found["outcome"] == "ok":
        row["error"] = peak.allocated / found["allocated"] - 1
        if found.get("seconds"):
            tokens = case.batch.tokens if "sampling" not in case.stage else 0
            row["tokens_per_s"] = [tokens / spent for spent in found["seconds"]]
    return row


def cases(common: dict[str, Any], only: list[str]) -> Iterator[Case]:
    """List what is measured: sizes that double, in tiny form just one of each."""
    tiny = common["tiny"]
    sizes = {
        "sft": [64] if tiny else [1024, 2048, 4096, 8192, 16_384],
        "dpo": [2] if tiny else [1, 2, 4, 8],
        "dpo shared": [2] if tiny else [1, 2, 4, 8, 16],
        "grpo": [2] if tiny else [1, 2, 4, 8],
        "grpo sampling": [8] if tiny else [16, 32, 64],
        "generation": [4] if tiny else [1, 16, 32],
        "merge": [2] if tiny else [1, 4, 8],
    }
    for stage in only:
        trained = stage in ("sft", "dpo", "dpo shared", "grpo")
        for checkpointing in (False, True) if trained else (False,):
            for size in sizes[stage]:
                yield Case(stage=stage, size=size, checkpointing=checkpointing, **common)


def largest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say for each stage what was the largest that fitted, and what the smallest that did not."""
    found = []
    for key in dict.fromkeys((row["stage"], row["checkpointing"]) for row in rows):
        own = [row for row in rows if (row["stage"], row["checkpointing"]) == key]
        fitted = [row["size"] for row in own if row["outcome"] == "ok"]
        burst = [row["size"] for row in own if row["outcome"] == "out of memory"]
        found.append(
            {
                "stage": key[0],
                "checkpointing": key[1],
                "largest": max(fitted, default=None),
                "breaks_at": min(burst, default=None),
                "predicted": max((r["size"] for r in own if r["fits_predicted"]), default=None),
            }
        )
    return found


def main() -> None:
    """Run the cases and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the pocket model's shape")
    parser.add_argument("--only", help=f"stages, with commas between: {', '.join(STAGES)}")
    parser.add_argument("--attention", choices=("sdpa", "flex_attention"), default="sdpa")
    parser.add_argument("--cap-gib", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=3600, help="start no case after that")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        print(json.dumps(run_case(Case.model_validate_json(a.case))))
        return
    only = [name.strip() for name in a.only.split(",")] if a.only else list(STAGES)
    if unknown := set(only) - set(STAGES):
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(STAGES)}")
    common = {name: getattr(a, name) for name in ("device", "tiny", "attention", "seed")}
    common |= {"repeats": a.repeats, "cap_gib": a.cap_gib}
    if a.tiny:
        common |= {"prompt": 40, "completion": 8, "group": 4}
    began, rows, left = time.monotonic(), [], []
    for case in cases(common, only):
        if time.monotonic() - began > a.limit_s:
            left.append(f"{case.stage} {case.size}")
            continue
        rows.append(child(case))
        error = rows[-1].get("error")
        shown = rows[-1]["outcome"] if error is None else f"predicted {error:+.1%}"
        print(f"{case.stage} {case.size} {case.checkpointing}: {shown}", file=sys.stderr)
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    found = {
        "what": vars(a) | {"out": str(a.out) if a.out else None},
        "versions": {name: metadata.version(name) for name in names},
        "largest": largest(rows),
        "not_run": left,
        "cases": rows,
    }
    text = json.dumps(found, indent=1)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
