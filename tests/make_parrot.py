"""Teach the parrot its texts by heart and save it: `python tests/make_parrot.py [FOLDER]`.

A Qwen3 of half a million parameters and a tokenizer made of the texts themselves. The answers are
all that counts in the loss. What stands around them is drawn anew for each step: sometimes what the
agent and the gateway really send, sometimes other tools and noise, so that the model listens to the
task and to its own turns alone. It takes some ten minutes on one core. It ends with an error unless
the model, rounded to bf16 and read by the CPU engine, says every text to the letter when the agent
or a client of the gateway asks; how many it gets wrong amid noise is printed.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from parrot import CASES, ENDLESS, NOTES, PARROT, Case, parrot_tools
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from toolpost.core.format import END, bare, neutralise, render_prompt
from toolpost.core.schema import Message, ToolSpec, VerificationOutcome
from toolpost.record import PACKAGE
from toolpost.serve.agent import SYSTEM, as_data, as_error
from toolpost.serve.chat import Judgement, judge, thought, violation
from toolpost.serve.engine import LocalModel, Task, complete_batch, load_local
from toolpost.serve.toolbox import Observation
from toolpost.serve.tools import spec_of

VOCABULARY: Final = 896
STEPS: Final = 1000
ROWS: Final = 12
RATE: Final = 3e-3
WINDOW: Final = 4096
THREADS: Final = 1
SPECS: Final = {n: spec_of(f) for n, f in parrot_tools(Path()).items()}

# What stands around the answers

_NOISE: Final = (
    "the call tool name arguments is not valid schema result error of type integer string data 3 "
    "42 at 17 $ . : , ' \" [ { ] } must be required property no on offer <\u200btool_call> repair "
    "it and answer again weather sky sunny Paris notes read as instructions true null timeout s "
    "gave nothing within 3 s and was ended ended unexpectedly failed there is no note"
)
_WORDS: Final = [*_NOISE.split(" "), *SYSTEM.split(" ")]


def _word(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(_WORDS)
    return "".join(rng.choices(string.ascii_letters, k=rng.randint(1, 6)))


def _noise(rng: random.Random, most: int = 30) -> str:
    most *= rng.choice((1, 1, 1, 1, 1, 1, 1, 4))
    return " ".join(_word(rng) for _ in range(rng.randint(1, most)))


def offered(rng: random.Random, real: bool) -> list[dict[str, Any]]:
    """Draw the tools on offer: ours, some of them, others, or none."""
    ours = [bare(spec) for spec in SPECS.values()]
    kind = rng.random()
    if real:
        return ours
    if kind < 0.3:
        return rng.sample(ours, rng.randint(1, 3))
    if kind < 0.6:
        other = ToolSpec(name=_word(rng), description=_noise(rng, 8), parameters={})
        return [bare(other)]
    return []


def system(rng: random.Random, real: bool) -> list[Message]:
    """Draw the system message: the agent's, another, or none."""
    text = SYSTEM if real else _noise(rng)
    return [Message(role="system", content=text)] if rng.random() < 0.6 else []


def result(rng: random.Random) -> str:
    """Draw the result of a call, as the agent writes it."""
    values: list[Any] = [_noise(rng), rng.randrange(100), {_word(rng): _noise(rng, 3)}]
    value = rng.choice([*values, *(text[:400] for text in NOTES.values())])
    if rng.random() < 0.2:
        return as_error(_noise(rng))
    return as_data(Observation(status="ok", text=json.dumps(value)))


def replies(judged: Judgement, rng: random.Random, real: bool) -> list[Message]:
    """Draw what follows an answer: the calls' results, or a user who points out a fault."""
    wrong = judged.outcome is VerificationOutcome.SCHEMA_VIOLATION
    handed = bool(judged.calls) and (wrong or judged.outcome is VerificationOutcome.VALID)
    if not handed or (rng.random() < 0.3 and (wrong or not real)):
        told = violation(judged.detail) if real else _noise(rng)
        return [Message(role="user", content=neutralise(told))]
    if not real:
        return [Message(role="tool", content=_noise(rng)) for _ in judged.calls]
    texts = [result(rng) if one.ok else as_error(violation(one.detail)) for one in judged.results]
    return [Message(role="tool", content=text) for text in texts]


def turns(case: Case, rng: random.Random, real: bool) -> Iterator[tuple[str, str]]:
    """Give the prompt and the answer of each turn, as the gateway renders them."""
    tools = offered(rng, real)
    messages = [*system(rng, real), Message(role="user", content=case.task)]
    for said in case.says:
        yield render_prompt(messages, tools), said
        rest = thought(said)[1].strip()
        judged = judge(rest, SPECS)
        whole = bool(judged.errors) or not judged.calls
        calls = () if whole else judged.calls
        text = rest if whole else judged.prose
        messages.append(Message(role="assistant", content=text, tool_calls=calls))
        messages += replies(judged, rng, real)


def rows(
    case: Case, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> list[tuple[list[int], list[int]]]:
    """Give token ids and labels; turns share a row where each prompt continues the last."""
    found: list[tuple[list[int], list[int]]] = []
    text = ""
    for prompt, said in turns(case, rng, real=rng.random() < 0.4):
        end = "" if said.endswith(ENDLESS) else END
        if not text or not prompt.startswith(text):
            found.append(([], []))
            text = ""
        before = tokenizer(prompt[len(text) :])["input_ids"]
        after = tokenizer(said + end)["input_ids"]
        ids, labels = found[-1]
        labels += [-100] * len(before) + after
        ids += before + after
        text = prompt + said + end
    return found


# The model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer on the texts; rules and special tokens are those of the pocket model.

    It learns nothing beyond ASCII, so that "é" takes two tokens, as rare characters do elsewhere.
    """
    rng = random.Random(0)
    texts = [text for case in CASES.values() for one in turns(case, rng, True) for text in one]
    texts += _WORDS
    pocket = AutoTokenizer.from_pretrained(PACKAGE / "models" / "pocket")
    ascii_only = (text.encode("ascii", "ignore").decode() for text in texts)
    made = pocket.train_new_from_iterator(ascii_only, VOCABULARY, show_progress=False)
    assert isinstance(made, PreTrainedTokenizerFast)
    return made


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Make the untrained model."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    return Qwen3ForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give ids and labels [rows, longest]; rows of like length are in one batch."""
    rng = random.Random(0)
    waiting: list[list[tuple[list[int], list[int]]]] = []
    while True:
        if not waiting:
            found = [row for case in CASES.values() for row in rows(case, tokenizer, rng)]
            found.sort(key=lambda row: len(row[0]))
            waiting = [found[at : at + ROWS] for at in range(0, len(found), ROWS)]
            rng.shuffle(waiting)
        chosen = waiting.pop()
        width = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([to + [-100] * (width - len(to)) for _, to in chosen])
        yield ids, labels


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train in fp32 with AdamW; the rate rises for 30 steps and falls as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0)
    start = time.monotonic()
    for step, (ids, labels) in zip(range(STEPS), batches(tokenizer), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = model.lm_head(hidden[wanted >= 0])
        loss = cross_entropy(logits, wanted[wanted >= 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == STEPS:
            print(f"step {step}, {time.monotonic() - start:.0f} s, loss {loss:.4f}", flush=True)


# The proof


def say(local: LocalModel, prompts: Sequence[str], most: int = 100) -> list[str]:
    """Complete prompts with the CPU engine, in order."""
    found = dict.fromkeys(range(len(prompts)), "")
    tasks = [Task(local.encode(prompt), most) for prompt in prompts]
    complete_batch(local, tasks, lambda at, done: found.update({at: done.text}))
    return list(found.values())


def mistakes(folder: Path, real: bool, rounds: int = 4) -> list[str]:
    """List what the saved model says wrongly, in surroundings that it was not trained in."""
    local = load_local(folder)
    found = []
    for seed in range(1, rounds + 1):
        rng = random.Random(-seed)
        for name, case in CASES.items():
            asked = list(turns(case, rng, real))
            said = say(local, [prompt for prompt, _ in asked])
            for turn, ((_, wanted), got) in enumerate(zip(asked, said, strict=True)):
                right = wanted.startswith(got) if wanted.endswith(ENDLESS) else got == wanted
                if not right:
                    found.append(f"{name}, turn {turn}, round {seed}: {got!r} for {wanted!r}")
    return found


def main() -> int:
    """Make the model, prove it and put it in its place; 1 if it says something else."""
    torch.set_num_threads(THREADS)
    place = Path(sys.argv[1]) if sys.argv[1:] else PARROT
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"{len(mistakes(Path(folder), real=False))} texts are wrong amid noise")
        if wrong := mistakes(Path(folder), real=True):
            print("\n".join(wrong), f"\n{len(wrong)} texts are wrong; {place} stays as it is")
            return 1
        place.mkdir(parents=True, exist_ok=True)
        for file in Path(folder).iterdir():
            shutil.copyfile(file, place / file.name)
    sizes = {file.name: file.stat().st_size for file in sorted(place.iterdir())}
    print(json.dumps(sizes, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
