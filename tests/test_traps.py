"""Seven ways in which the obvious code is silently wrong, each shown to fail beside ours.

Trap 5 is about what a benchmark weighs and has no code; trap 7, that TRL's trainer shares no
prefixes, is test_prefix.py's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple, cast

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from practice import in_one_table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from toolpost.core.format import END, parse_answer
from toolpost.core.schema import same_calls
from toolpost.data.build import conversations, items, training_rows
from toolpost.data.pocketset import rows as practice_rows
from toolpost.train.doctor import (
    PROTOCOL,
    UnhealthyError,
    diagnose,
    embedding,
    protocol_ids,
    repair,
    require_healthy,
)
from toolpost.train.merge import MergeError, adapted, check_merged, merge_adapters
from toolpost.train.models import POCKET, ModelSpec, load_model, load_tokenizer, lora
from toolpost.train.stack import Stack, save_adapter, stack

WORDS: Final = (
    *("add", "get", "set", "list", "name", "file", "type"),
    *("value", "time", "data", "user", "key", "code", "path"),
)
STOP: Final = "<|endoftext|>"  # of a base
PLAIN: Final = ("Q: {}\nA: ", "{}\n")  # what the base is pretrained on
CHAT: Final = (
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "<tool_call>\n{}\n</tool_call><|im_end|>",
)


TASKS: Final = Random(0).sample(  # all questions with the JSON of their calls, shuffled
    [
        (f"{verb} the {noun}", json.dumps({"name": verb, "arguments": {noun: 1}}))
        for verb, noun in product(WORDS, WORDS)
    ],
    len(WORDS) ** 2,
)


def as_rows(found: Sequence[tuple[str, str]], form: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": form[0].format(q), "completion": form[1].format(a)} for q, a in found]


HELD_OUT: Final = as_rows(TASKS[:48], CHAT)


def drawn(seed: int, form: tuple[str, str] = CHAT) -> list[dict[str, str]]:
    """Draw a batch of training rows."""
    return as_rows(Random(seed).choices(TASKS[48:], k=16), form)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer of some 370 tokens, those of the protocol among them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [text for row in as_rows(TASKS, PLAIN) for text in row.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=bpe.pre_tokenizer.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([*texts, *["user\nassistant\n"] * 99], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=STOP, pad_token=STOP)
    made.add_tokens([*PROTOCOL, "<|fim_pad|>"])
    made.chat_template = load_tokenizer(POCKET).chat_template
    return made


def batch(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    texts = [row["prompt"] + row["completion"] for row in rows]
    found = tokenizer(texts, return_tensors="pt", padding=True)
    labels = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    for at, ids in enumerate(tokenizer([row["prompt"] for row in rows])["input_ids"]):
        labels[at, : len(ids)] = -100
    mask = found["attention_mask"]
    return {"input_ids": found["input_ids"], "attention_mask": mask, "labels": labels}


def fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    form: tuple[str, str] = CHAT,
    frozen: Sequence[int] = (),  # rows of the embedding
) -> None:
    """Train what is trainable."""
    values = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=5e-3, weight_decay=0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 - at / steps)
    for at in range(steps):
        optimizer.zero_grad()
        model(**batch(drawn(at, form), tokenizer)).loss.backward()
        if frozen:
            cast("torch.Tensor", embedding(model).grad)[list(frozen)] = 0
        optimizer.step()
        decay.step()


class Base(NamedTuple):
    folder: Path
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Pretrain a tied model on questions and JSON; its protocol rows stay short and alike."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    size = len(tokenizer) + 8  # padding rows
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unseen = [*protocol_ids(tokenizer).values(), *range(len(tokenizer) - 1, size)]
    with torch.no_grad():
        table = embedding(model)
        table.normal_(std=1.16 / 8)
        rows = torch.randn(64) + 0.02 * torch.randn(len(unseen), 64)
        table[unseen] = 0.36 * rows / rows.norm(dim=1, keepdim=True)
    fit(model, tokenizer, 120, PLAIN, unseen)
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return Base(folder, tokenizer)


def wrapped(model: Any, tokenizer: PreTrainedTokenizerBase) -> float:
    """Give the fraction of unseen questions that are answered in the protocol, and with an end."""
    prompts = [row["prompt"] for row in HELD_OUT]
    tokenizer.padding_side = "left"
    found = tokenizer(prompts, return_tensors="pt", padding=True)
    tokenizer.padding_side = "right"
    model.eval()
    with torch.no_grad():
        out = model.generate(
            input_ids=found["input_ids"],
            attention_mask=found["attention_mask"],
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=tokenizer.convert_tokens_to_ids(END),
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train()
    texts = [str(tokenizer.decode(row)) for row in out[:, found["input_ids"].shape[1] :]]
    answers = [parse_answer(text) for text in texts]
    good = [
        bool(answer.calls) and not answer.errors and not answer.prose and END in text
        for answer, text in zip(answers, texts, strict=True)
    ]
    return sum(good) / len(good)


STEPS: Final = 140
PROBES: Final = as_rows(TASKS[-40:], CHAT)
FORMS = [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "nf4")]


@pytest.mark.parametrize(("dtype", "quantize"), FORMS)
def test_lora_cannot_say_what_has_no_row(
    base: Base, tmp_path: Path, dtype: Any, quantize: Any
) -> None:
    """Trap 1: untrained rows. LoRA alone emits no protocol; repaired, it does, and so merged."""
    spec = ModelSpec(name=str(base.folder), dtype=dtype, quantize=quantize)
    with pytest.raises(UnhealthyError, match="token rows"):
        require_healthy(diagnose(base.folder), repairs=False)
    naive = stack(load_model(spec), [], lora(16))
    fit(naive, base.tokenizer, STEPS)
    assert wrapped(naive, base.tokenizer) == 0

    model = load_model(spec)
    rows = repair(model, base.tokenizer)
    assert rows == protocol_ids(base.tokenizer)
    ours = stack(model, [], lora(16))
    fit(ours, base.tokenizer, STEPS)
    assert wrapped(ours, base.tokenizer) >= 0.95
    save_adapter(ours, tmp_path / "sft", rows=rows)
    proof = merge_adapters(spec, [tmp_path / "sft"], PROBES, tmp_path / "merged")
    assert proof.parity.same_text == 1
    assert proof.parity.kl_mean <= 1e-4
    assert proof.parity.calls_after >= 0.95
    check_merged(tmp_path / "merged")
    assert diagnose(tmp_path / "merged").findings == ()


def filled(model: Any, std: float = 0.2) -> Any:
    """Give an adapter something to say."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                value.normal_(std=std)
    return model


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(300, 340)[None]).logits[0]
    return found


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_an_adapter_on_tied_matrices_is_merged_twice(base: Base) -> None:
    """Trap 2: PEFT adds the deltas of embedding and head to their one matrix."""
    targets = ["q_proj", "embed_tokens", "lm_head"]
    model = load_model(ModelSpec(name=str(base.folder)))
    start = embedding(model).detach().clone()
    naive = filled(get_peft_model(model, LoraConfig(r=4, target_modules=targets)))
    tuned = [naive.base_model.model.model.embed_tokens, naive.base_model.model.lm_head]
    with pytest.raises(MergeError, match="leave both out"):
        adapted(naive)
    before, deltas = logits(naive), [one.get_delta_weight("default") for one in tuned]
    merged = naive.merge_and_unload()
    torch.testing.assert_close(embedding(merged) - start, deltas[0] + deltas[1])
    assert kl(before, logits(merged)) > 0.1  # the un-merged head had only its own delta

    ours = filled(get_peft_model(load_model(ModelSpec(name=str(base.folder))), lora(4)))
    assert not any("embed_tokens" in name or "lm_head" in name for name in adapted(ours))
    before = logits(ours)
    assert kl(before, logits(load_model(ModelSpec(name=str(base.folder))))) > 0.1
    assert kl(before, logits(ours.merge_and_unload())) < 1e-6


def sft(base: Base, folder: Path, model: Any, config: LoraConfig | None) -> SFTTrainer:
    rows = [row for seed in range(2) for row in drawn(seed)]
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=2,
            per_device_train_batch_size=4,
            completion_only_loss=True,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=config,
    )


def test_trl_cannot_train_the_rows_of_tied_matrices(base: Base, tmp_path: Path) -> None:
    """Trap 3: each obvious way to train the rows raises in TRL, or trains what merges wrong."""
    spec, ids = ModelSpec(name=str(base.folder)), list(protocol_ids(base.tokenizer).values())
    with pytest.raises(ValueError, match="lm_head"):
        sft(base, tmp_path, load_model(spec), LoraConfig(target_modules=["q_proj", "lm_head"]))
    indices = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ids})
    with pytest.raises(AttributeError, match="TrainableTokensWrapper"):
        sft(base, tmp_path, load_model(spec), indices).train()
    both = LoraConfig(target_modules=["q_proj", "embed_tokens"])
    trainer = sft(base, tmp_path, load_model(spec), both)
    trainer.train()  # without a word
    naive = filled(trainer.model)
    assert kl(logits(naive), logits(naive.merge_and_unload())) > 0.1

    model = load_model(spec)
    repair(model, base.tokenizer)
    trainer = sft(base, tmp_path, model, lora(4))
    trainer.train()
    ours = filled(trainer.model)
    assert kl(logits(ours), logits(ours.merge_and_unload())) < 1e-6


def moved(base: Base, folder: Path, model: Any, config: LoraConfig | None) -> tuple[str, float]:
    """Train with DPO at its usual rate; give the adapter's type and how much of lora_A moved."""
    rows = [row | {"chosen": row["completion"], "rejected": "No." + END} for row in drawn(0)]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder),
            max_steps=3,
            learning_rate=1e-6,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows).remove_columns("completion"),
        processing_class=base.tokenizer,
        peft_config=config,
    )
    if isinstance(trainer.model, Stack):
        trainer.model.settle()
    adapter = {
        name: value
        for name, value in cast("Any", trainer.model).named_parameters()
        if "lora_A.default" in name
    }
    before = {name: value.detach().clone() for name, value in adapter.items()}
    trainer.train()
    changed = sum(int((value != before[name]).sum()) for name, value in adapter.items())
    kinds = {str(value.dtype) for value in adapter.values()}
    return kinds.pop() if len(kinds) == 1 else str(kinds), changed / sum(
        value.numel() for value in adapter.values()
    )


def test_an_adapter_in_bfloat16_does_not_move_at_the_rates_of_dpo(
    base: Base, tmp_path: Path
) -> None:
    """Trap 4: TRL casts the adapters of a 4-bit model; a step is smaller than their rounding."""
    spec = ModelSpec(name=str(base.folder), quantize="nf4")
    kind, share = moved(base, tmp_path, load_model(spec), lora(8))
    assert kind == "torch.bfloat16"
    assert share < 0.05
    kind, share = moved(base, tmp_path, stack(load_model(spec), [], lora(8)), None)
    assert kind == "torch.float32"
    assert share > 0.9


def test_arrow_invents_arguments() -> None:
    """Trap 6: structs of different keys are unified, and the model is taught the nulls."""
    rows = conversations(items("practice", practice_rows(40, 0)))
    calls = [[call.model_dump() for call in row.gold_calls] for row in in_one_table(rows)]
    assert any(calls)
    naive = list(Dataset.from_list([{"calls": one} for one in calls]))
    assert all(None in call["arguments"].values() for row in naive for call in row["calls"])
    ours = list(Dataset.from_list([dict(row) for row in training_rows(rows)]))
    for text, row in zip(ours, rows, strict=True):
        assert same_calls(parse_answer(text["completion"]).calls, row.gold_calls)
