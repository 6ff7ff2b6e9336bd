"""Pretrain the pocket base model on text that the pinned dependencies already carry.

Run it from the project's environment, step by step; `train` goes on where it stopped:

    python benchmarks/pretrain_pocket.py corpus
    python benchmarks/pretrain_pocket.py tokenizer
    python benchmarks/pretrain_pocket.py train --phase broad
    python benchmarks/pretrain_pocket.py requests
    python benchmarks/pretrain_pocket.py train --phase everyday
    python benchmarks/pretrain_pocket.py train --phase long
    python benchmarks/pretrain_pocket.py train --phase examples
    python benchmarks/pretrain_pocket.py train --phase drills
    python benchmarks/pretrain_pocket.py ship

Nothing of BFCL, of an agent framework or of a chat template is read: the base has to stay raw.
What is read, and how it is laid out, stands in `pocket_corpus.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pocket_corpus

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


VOCAB = 4096
WINDOW = 16384
# Qwen3's added tokens, in Qwen3's order.
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
ADDED = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
]
# Qwen3's rule lets a word carry the blank before it. Here the blank stands alone, so that a word is
# the same tokens after a blank, after a quotation mark and after an underscore: a small model then
# copies it instead of translating it. It costs an eighth more tokens on prompts.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Phase:
    """A part of the training."""

    length: int  # tokens of a block
    batch: int  # blocks of a step
    tokens: float  # seen in all when the phase ends
    rise: float  # tokens over which the rate rises
    decay: float  # share of the phase over which the rate falls to nothing
    mix: dict[str, float]  # kind of text: share of the blocks
    rate: float = 3e-3  # the highest


BROAD = {"services": 0.35, "docstrings": 0.3, "prose": 0.2, "code": 0.15}
EVERYDAY = {"requests": 0.35, "services": 0.3, "docstrings": 0.2, "prose": 0.1, "code": 0.05}
LESS = {"requests": 0.2, "services": 0.15, "docstrings": 0.1, "prose": 0.03, "code": 0.02}
EXAMPLES = {"examples": 0.5} | LESS
LEAST = {"requests": 0.12, "services": 0.08, "docstrings": 0.06, "prose": 0.02, "code": 0.02}
DRILLS = {"drills": 0.7} | LEAST
PHASES = {
    "broad": Phase(512, 16, 12e6, 0.8e6, 0.0, BROAD),
    "everyday": Phase(512, 16, 13.2e6, 0.0, 0.0, EVERYDAY),
    "long": Phase(1024, 8, 24e6, 0.0, 1.0, EVERYDAY),
    "examples": Phase(1024, 8, 40e6, 0.8e6, 0.4, EXAMPLES),
    "drills": Phase(1024, 4, 120e6, 0.8e6, 0.3, DRILLS, 1.5e-3),
}
LAST = "drills"


def write_kind(out: Path, kind: str, texts: Iterable[str]) -> None:
    """Write the documents of a kind, shuffled, a line each."""
    rows = list(texts)
    random.Random(0).shuffle(rows)
    with (out / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def documents(out: Path, kind: str) -> Iterator[str]:
    """Read the documents of a kind back."""
    with (out / f"{kind}.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def account(kind: str, source: pocket_corpus.Source, texts: list[str]) -> dict[str, Any]:
    """Give the manifest's line for what one source gave of a kind."""
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()
    counts = {"documents": len(texts), "characters": sum(map(len, texts)), "sha256": digest}
    print(f"{kind:10} {source.name:14} {source.version:12}", counts)
    return {"kind": kind, **asdict(source), **counts}


def corpus(out: Path) -> None:
    """Write the documents of every kind but the requests, and the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, pocket_corpus.Source], list[str]] = defaultdict(list)
    for kind, source, text in pocket_corpus.documents():
        if pocket_corpus.fit(text):
            found[kind, source].append(text[: pocket_corpus.DOCUMENT])
    lines = [account(kind, source, texts) for (kind, source), texts in found.items()]
    for kind in sorted({kind for kind, _ in found}):
        write_kind(out, kind, (t for (k, _), texts in found.items() if k == kind for t in texts))
    (out / "corpus.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


def requests(out: Path) -> None:
    """Write the requests of the practice set, their tokens, and their line of the manifest."""
    from toolpost import __version__

    source = pocket_corpus.Source("practice set", __version__, "Apache-2.0")
    texts = list(pocket_corpus.request_documents(150_000, 0))
    lines = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    lines = [line for line in lines if line["kind"] != "requests"]
    lines.append(account("requests", source, texts))
    write_kind(out, "requests", texts)
    (out / "corpus.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    tokens(out, "requests")


def tokenizer(out: Path) -> None:
    """Train a byte-level BPE with Qwen3's special tokens and template; tokenize the corpus."""
    import trl
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL) - len(ADDED),
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    kinds = EVERYDAY
    shares = {kind: 1 if kind == "requests" else 8 for kind in kinds}  # one document in so many
    sample = (
        t for kind in kinds for i, t in enumerate(documents(out, kind)) if not i % shares[kind]
    )
    bpe.train_from_iterator(sample, trainer)
    bpe.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    bpe.add_tokens([AddedToken(t, normalized=False, special=False) for t in ADDED])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3_instruct_2507.jinja"
    fast.chat_template = template.read_text(encoding="utf-8")
    fast.save_pretrained(out / "model")
    print(len(fast), "tokens;", fast.tokenize("get_weather(city='Lima', days=12)"))
    for kind in (*kinds, "examples", "drills"):
        tokens(out, kind)


def tokens(out: Path, kind: str) -> None:
    """Write a kind of text as one row of uint16 token ids, documents parted by <|endoftext|>."""
    import numpy as np
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(out / "model")
    texts, ids = list(documents(out, kind)), []
    for at in range(0, len(texts), 512):
        rows = fast(texts[at : at + 512])["input_ids"]
        ids += [np.array([*row, fast.eos_token_id], np.uint16) for row in rows]
    row = np.concatenate(ids)
    np.save(out / f"{kind}.npy", row)
    print(f"{kind}: {len(row):,} tokens, {sum(map(len, texts)) / len(row):.2f} characters a token")


def build_model() -> PreTrainedModel:
    """Build the pocket architecture: Qwen3, tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCAB - len(SPECIAL) - len(ADDED),
    )
    return Qwen3ForCausalLM(config)


class Text:
    """The blocks of every kind of text; one in two hundred is held out."""

    def __init__(self, out: Path, phase: Phase) -> None:
        """Open the token files of a phase."""
        import numpy as np

        self.phase, self.rows, self.blocks, self.held = phase, {}, {}, {}
        for kind in phase.mix:
            row = np.load(out / f"{kind}.npy", mmap_mode="r")
            count = (len(row) - 1) // phase.length
            order = np.random.default_rng(0).permutation(count)
            self.rows[kind], held = row, max(8, count // 200)
            self.held[kind], self.blocks[kind] = order[:8], order[held:]

    def take(self, kind: str, blocks: Iterable[int]) -> torch.Tensor:
        """Give blocks, each one token longer than its length."""
        import numpy as np
        import torch

        n = self.phase.length
        ids = np.stack([self.rows[kind][b * n : b * n + n + 1] for b in blocks])
        return torch.from_numpy(ids.astype(np.int64))

    def step(self, step: int) -> torch.Tensor:
        """Give the batch of a step: kinds drawn by their shares, blocks in their order."""
        import numpy as np
        import torch

        rng = np.random.default_rng([1, step])
        kinds = list(self.phase.mix)
        drawn = rng.choice(kinds, self.phase.batch, p=[self.phase.mix[k] for k in kinds])
        picked = [self.take(k, [rng.choice(self.blocks[k])]) for k in drawn]
        return torch.cat(picked)


def saved_state(out: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint, if there is one."""
    import torch

    path = out / "state.pt"
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


def train(out: Path, name: str) -> None:
    """Train a phase (constant rate, then linear decay); a checkpoint every five minutes."""
    import torch

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    phase, model = PHASES[name], build_model()
    rate = phase.rate
    cast("Any", model).to(device)  # its stub takes a model for the device
    text = Text(out, phase)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    seen, step, spent, began, log = 0, 0, 0.0, 0.0, []
    if state := saved_state(out):
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        seen, step, spent, log = state["seen"], state["step"], state["spent"], state["log"]
        began = state["began"] if state["phase"] == name else seen

    def plain_loss(ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    loss_of = torch.compile(plain_loss)

    def held_out() -> dict[str, float]:
        with torch.no_grad():
            return {k: round(plain_loss(text.take(k, b)).item(), 4) for k, b in text.held.items()}

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "seen": seen,
            "step": step,
            "spent": spent,
            "log": log,
            "phase": name,
            "began": began,
        }
        torch.save(state, out / "state.partial")
        (out / "state.partial").replace(out / "state.pt")

    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters; {seen:,} tokens seen, {name} goes to {phase.tokens:,.0f}")
    last = saved = time.time()
    while seen < phase.tokens:
        done = (seen - began) / (phase.tokens - began)
        fall = 1.0 if phase.decay == 0 else min(1.0, (1 - done) / phase.decay)
        rise = 1.0 if phase.rise == 0 else min(1.0, (seen - began) / phase.rise)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * max(0.01, min(fall, rise))
        loss = loss_of(text.step(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + phase.batch * phase.length
        now = time.time()
        spent, last = spent + now - last, now
        if not math.isfinite(loss.item()):
            raise SystemExit("the loss is not finite: lower the rate of the phase")
        if step % 50 == 0:
            log.append(
                {"phase": name, "step": step, "tokens": seen, "loss": round(loss.item(), 4)}
                | {"minutes": round(spent / 60, 2), "held_out": held_out()}
            )
            print(log[-1], f"{seen / spent:,.0f} tokens/s", flush=True)
        if now - saved > 300:
            saved = now
            save()
    save()
    shutil.copy(out / "state.pt", out / f"{name}.pt")
    model.save_pretrained(out / name)
    about = {
        "parameters": count,
        "minutes": round(spent / 60, 1),
        "tokens": seen,
        "phases": {n: asdict(p) for n, p in PHASES.items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "curve": log,
    }
    (out / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


CARD = """# Pocket base

A Qwen3 of {parameters:,} parameters ({layers} layers of width {width}, {vocabulary:,} tokens, tied
embeddings), made to be small enough for two CPU cores. It is a raw base: it has read documentation,
source code and everyday requests, and no chat, no tool call and no answer to a request. The rows of
the chat protocol's tokens are untrained, as in larger base models.

What helps it most is synthetic: pages of botocore's operations and of Python functions with
examples that a script made up. A sentence states values of some fields, and JSON repeats them. No
such page asks for anything, and none knows a tool of the practice set.

## Data

{characters:,} characters in {documents:,} documents. Anyone can rebuild them from the pinned
dependencies with `benchmarks/pretrain_pocket.py`; the hash is that of the documents of a kind and
source, in order. The requests are those of the practice set's training groups: of the groups that
the pocket profile keeps for dev and test the base has read nothing.

| kind | source | version | licence | documents | characters | sha256 |
|---|---|---|---|---:|---:|---|
{sources}

## Training

{tokens:,} tokens in {minutes:.0f} minutes on {threads} CPU threads (torch {torch}, bfloat16 matrix
products, Muon and AdamW), in phases:

| phase | up to tokens | blocks a step | rate | text |
|---|---:|---:|---|---|
{phases}

Loss on held-out blocks, nats a token; the whole curve is in `training.json`:

| tokens | {kinds} |
|---:|{rules}|
{curve}

## Limits

It writes neither sense nor working code, knows next to nothing of the world, and reads English
only. Its window is {window:,} positions, of which training saw {longest}. It serves to show
a whole post-training run on a laptop, and for nothing else.

## Licence

Apache-2.0, as the package.
"""


def sampled(curve: list[dict[str, Any]], count: int = 12) -> list[dict[str, Any]]:
    """Give the first, the last and some entries between them, evenly spaced."""
    last = len(curve) - 1
    return [curve[i] for i in sorted({round(k * last / (count - 1)) for k in range(count)})]


def phase_line(name: str, phase: Phase) -> str:
    """Give a phase's line of the card."""
    fall = f"falls over the last {phase.decay:.0%}" if phase.decay else "constant"
    rate, block = f"{phase.rate}, {fall}", f"{phase.batch} of {phase.length}"
    mix = ", ".join(f"{share:.0%} {kind}" for kind, share in phase.mix.items())
    return f"{name} | {phase.tokens:,.0f} | {block} | {rate} | {mix}"


def card(out: Path, config: Any) -> str:
    """Write the model's card from its configuration and the two manifests."""
    texts = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    about = json.loads((out / "training.json").read_text(encoding="utf-8"))
    kinds = list(PHASES[LAST].mix)
    keys = ("kind", "name", "version", "licence", "documents", "characters", "sha256")
    lines = [" | ".join(str(line[key]) for key in keys) for line in texts]
    points = [
        f"{at['tokens']:,} | " + " | ".join(str(at["held_out"].get(kind, "")) for kind in kinds)
        for at in sampled(about["curve"])
    ]
    return CARD.format(
        parameters=about["parameters"],
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        window=config.max_position_embeddings,
        characters=sum(line["characters"] for line in texts),
        documents=sum(line["documents"] for line in texts),
        sources="\n".join(f"| {line} |" for line in lines),
        tokens=about["tokens"],
        minutes=about["minutes"],
        threads=about["threads"],
        torch=about["torch"],
        longest=max(phase.length for phase in PHASES.values()),
        phases="\n".join(f"| {phase_line(name, phase)} |" for name, phase in PHASES.items()),
        kinds=" | ".join(kinds),
        rules="|".join(["---:"] * len(kinds)),
        curve="\n".join(f"| {point} |" for point in points),
    )


def ship(out: Path) -> None:
    """Copy tokenizer, bfloat16 weights, card and manifests into the package."""
    import torch
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(out / LAST, dtype=torch.bfloat16)
    target = Path(__file__).parents[1] / "toolpost" / "models" / "pocket"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(out / "model", target)
    model.save_pretrained(target)
    for name in ("corpus.json", "training.json"):
        shutil.copy(out / name, target / name)
    (target / "README.md").write_text(card(out, model.config), encoding="utf-8")
    for path in target.iterdir():
        path.chmod(0o644)
    print(sorted((p.name, p.stat().st_size) for p in target.iterdir()))


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["corpus", "tokenizer", "requests", "train", "ship"])
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--phase", choices=list(PHASES), default="broad")
    a = parser.parse_args()
    if a.step == "train":
        train(a.out, a.phase)
    else:
        {"corpus": corpus, "tokenizer": tokenizer, "requests": requests, "ship": ship}[a.step](
            a.out
        )


if __name__ == "__main__":
    main()
