"""Pretrain the pocket base model on text that the pinned dependencies already carry.

Run it from the project's environment:

    python benchmarks/pretrain_pocket.py corpus   --out runs/pretrain
    python benchmarks/pretrain_pocket.py tokenizer --out runs/pretrain
    python benchmarks/pretrain_pocket.py train    --out runs/pretrain --minutes 60
    python benchmarks/pretrain_pocket.py ship     --out runs/pretrain

The corpus is Python source of permissively licensed packages and botocore's service descriptions.
Nothing of BFCL, of an agent framework or of a chat template is read: the base has to stay raw.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

VOCAB = 8192
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
MARKERS = ("tool_call", "tool_response", "im_start", "bfcl", "function_call")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PACKAGES = {  # package: licence; each is a pinned dependency
    "networkx": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "statsmodels": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
    "matplotlib": "Matplotlib (PSF-style)",
    "transformers": "Apache-2.0",
}
DISTRIBUTION = {"sklearn": "scikit-learn"}


def clean(text: str) -> str:
    """Turn a service description's HTML into plain text."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip()


def service_documents(root: Path) -> Iterator[str]:
    """Give one document per operation of botocore's newest service models."""
    for service in sorted(p for p in root.iterdir() if p.is_dir()):
        newest = sorted(p for p in service.iterdir() if p.is_dir())[-1]
        model = json.loads(gzip.decompress((newest / "service-2.json.gz").read_bytes()))
        shapes = model["shapes"]
        for name, operation in model["operations"].items():
            shape = shapes.get(operation.get("input", {}).get("shape"), {})
            fields = {
                key: {
                    "type": shapes[member["shape"]]["type"],
                    "description": clean(member.get("documentation", ""))[:300],
                    **(
                        {"enum": shapes[member["shape"]]["enum"][:12]}
                        if "enum" in shapes[member["shape"]]
                        else {}
                    ),
                }
                for key, member in list(shape.get("members", {}).items())[:8]
            }
            about = {
                "operation": name,
                "documentation": clean(operation.get("documentation", ""))[:900],
                "input": fields,
                "required": shape.get("required", []),
            }
            yield json.dumps(about, indent=random.Random(name).choice([None, None, 2]))
        for example in newest.glob("examples-1.json"):
            yield example.read_text(encoding="utf-8")[:20000]


def python_documents(root: Path) -> Iterator[str]:
    """Give each Python file of a package, its tests left out."""
    for path in sorted(root.rglob("*.py")):
        inside = str(path.relative_to(root))
        if "site-packages" in inside or "test" in inside or path.stat().st_size > 200_000:
            continue
        yield path.read_text(encoding="utf-8", errors="ignore")


def folder_of(package: str) -> Path:
    """Give the folder of an installed package."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: run make setup first")
    return Path(spec.origin).parent


def corpus(out: Path) -> None:
    """Write corpus.jsonl (one document a line, shuffled) and its manifest."""
    out.mkdir(parents=True, exist_ok=True)
    sources: dict[str, tuple[str, str, Iterator[str]]] = {
        "python-stdlib": (
            sys.version.split()[0],
            "PSF-2.0",
            python_documents(Path(os.__file__).parent),
        )
    }
    for name, licence in PACKAGES.items():
        sources[name] = (
            version(DISTRIBUTION.get(name, name)),
            licence,
            python_documents(folder_of(name)),
        )
    data = folder_of("botocore") / "data"
    sources["botocore"] = (version("botocore"), "Apache-2.0", service_documents(data))
    rows, manifest = [], []
    for name, (release, licence, documents) in sources.items():
        kept = [
            d[:12000]
            for d in documents
            if len(d) > 200 and not any(m in d.lower() for m in MARKERS)
        ]
        digest = hashlib.sha256("\0".join(kept).encode("utf-8", "replace")).hexdigest()
        characters = sum(map(len, kept))
        manifest.append(
            {
                "source": name,
                "version": release,
                "licence": licence,
                "documents": len(kept),
                "characters": characters,
                "sha256": digest,
            }
        )
        rows += kept
        print(f"{name:16} {release:10} {len(kept):7,} documents {characters:12,} characters")
    random.Random(0).shuffle(rows)
    with (out / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (out / "corpus.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def documents(out: Path) -> Iterator[str]:
    """Read the corpus back."""
    with (out / "corpus.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def tokenizer(out: Path) -> None:
    """Train an 8k byte-level BPE with Qwen3's splitting rule, special tokens and template."""
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
    sample = (d for i, d in enumerate(documents(out)) if i % 4 == 0)
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


def tokens(out: Path) -> None:
    """Write the corpus as one row of uint16 token ids, documents separated by <|endoftext|>."""
    import numpy as np
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(out / "model")
    texts, ids, batch = documents(out), [], []
    for text in texts:
        batch.append(text)
        if len(batch) == 512:
            ids += [np.array([*i, fast.eos_token_id], np.uint16) for i in fast(batch)["input_ids"]]
            batch = []
    row = np.concatenate(ids)
    np.save(out / "tokens.npy", row)
    print(f"{len(row):,} tokens")


def build_model() -> PreTrainedModel:
    """Build the pocket architecture: Qwen3, tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCAB - len(SPECIAL) - len(ADDED),
    )
    return Qwen3ForCausalLM(config)


def train(out: Path, minutes: float, length: int, batch: int, micro: int, rate: float) -> None:
    """Train for a number of minutes (warm-up, constant, linear decay over the last quarter)."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    row = np.load(out / "tokens.npy", mmap_mode="r")
    model = build_model()
    blocks = len(row) // (length + 1)
    held, order = blocks // 200, np.random.default_rng(0).permutation(blocks)
    test, order = order[:held][:32], order[held:]
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon: torch.optim.Optimizer = torch.optim.Muon(
        hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    adam: torch.optim.Optimizer = torch.optim.AdamW(
        rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0
    )

    def take(index: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
        ids = np.stack([row[i * (length + 1) : (i + 1) * (length + 1)] for i in index])
        return torch.from_numpy(ids.astype(np.int64))

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    start, seen, step, log = time.time(), 0, 0, []
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {blocks:,} blocks")
    saved = 0.0
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        scale = min(1.0, (step + 1) / 50, (1 - done) / 0.25)
        for optimizer in (muon, adam):
            optimizer.param_groups[0]["lr"] = rate * max(scale, 0.02)
        at = (step * batch) % (len(order) - batch)
        total = 0.0
        for k in range(0, batch, micro):
            loss = loss_of(take(order[at + k : at + k + micro])) * micro / batch
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + batch * length
        if step % 100 == 0:
            with torch.inference_mode():
                held_out = sum(loss_of(take(test[i : i + 8])).item() for i in range(0, 32, 8)) / 4
            log.append({"step": step, "tokens": seen, "loss": total, "held_out": held_out})
            rate_now = seen / (time.time() - start)
            print(f"{done:5.1%} {log[-1]} {rate_now:,.0f} tokens/s", flush=True)
            if not math.isfinite(total):
                raise SystemExit("the loss is not finite: lower --rate")
        if time.time() - saved > 600:
            saved = time.time()
            model.save_pretrained(out / "checkpoint")
    with torch.inference_mode():
        held_out = sum(loss_of(take(test[i : i + 8])).item() for i in range(0, 32, 8)) / 4
    log.append({"step": step, "tokens": seen, "loss": total, "held_out": held_out})
    model.save_pretrained(out / "final")
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": minutes,
        "length": length,
        "batch": batch,
        "rate": rate,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "curve": log,
    }
    (out / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


CARD = """# Pocket base

A Qwen3 of {parameters:,} parameters, made to be small enough for two CPU cores. It is a raw base:
it has read source code and service descriptions, and no tool call. The rows of the chat protocol's
tokens are untrained, as in larger base models.

- Text: {characters:,} characters of the packages listed in `corpus.json`, with versions, licences
  and hashes.
- Training: {tokens:,} tokens in {minutes:g} minutes on {threads} CPU threads; the loss on held-out
  blocks of the same text fell from {first:.2f} to {last:.2f} nats a token. The curve is in
  `training.json`, the script is `benchmarks/pretrain_pocket.py`.
- Limits: this first version is trained briefly. It writes neither sense nor working code.
- Licence: Apache-2.0, as the package.
"""


def card(out: Path) -> str:
    """Write the model's card from the two manifests."""
    texts = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    training = json.loads((out / "training.json").read_text(encoding="utf-8"))
    curve = training["curve"]
    return CARD.format(
        parameters=training["parameters"],
        characters=sum(source["characters"] for source in texts),
        tokens=curve[-1]["tokens"],
        minutes=training["minutes"],
        threads=training["threads"],
        first=curve[0]["held_out"],
        last=curve[-1]["held_out"],
    )


def ship(out: Path) -> None:
    """Copy tokenizer, bfloat16 weights and the two manifests into the package."""
    import torch
    from transformers import Qwen3ForCausalLM

    source = out / "final" if (out / "final").exists() else out / "checkpoint"
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    target = Path(__file__).parents[1] / "toolpost" / "models" / "pocket"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(out / "model", target)
    model.save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)
    for name in ("corpus.json", "training.json"):
        if (out / name).exists():
            shutil.copy(out / name, target / name)
    (target / "README.md").write_text(card(out), encoding="utf-8")
    print(sorted((p.name, p.stat().st_size) for p in target.iterdir()))


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["corpus", "tokenizer", "train", "ship"])
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3)
    a = parser.parse_args()
    if a.step == "corpus":
        corpus(a.out)
    elif a.step == "tokenizer":
        tokenizer(a.out)
        tokens(a.out)
    elif a.step == "train":
        train(a.out, a.minutes, a.length, a.batch, a.micro, a.rate)
    else:
        ship(a.out)


if __name__ == "__main__":
    main()
