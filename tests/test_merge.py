"""The merge: equal to the un-merged model in every form, and caught where it is not."""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from practice import short_rows
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from toolpost.core.format import END
from toolpost.data.build import training_rows
from toolpost.record import sha256
from toolpost.serve.checks import check_folder
from toolpost.train import merge as room
from toolpost.train.budget import read_shape
from toolpost.train.doctor import PROTOCOL, protocol_ids, repair
from toolpost.train.merge import (
    LIMITS,
    Limits,
    MergeError,
    MergePlan,
    Origin,
    ProofError,
    Seen,
    adapted,
    base_of,
    check_merged,
    delta,
    exact,
    failures,
    flip_cost,
    look,
    merge,
    merge_adapters,
    parity,
    pieces,
    plain,
    push,
)
from toolpost.train.models import POCKET, ModelSpec, load_model, load_tokenizer, lora
from toolpost.train.stack import save_adapter, stack

Probes = Sequence[Mapping[str, str]]
PLAN = MergePlan(positions=48, new_tokens=12)
FORMS = [
    ModelSpec(),
    ModelSpec(dtype="bfloat16"),
    ModelSpec(quantize="nf4"),
    ModelSpec(quantize="nf4", dtype="bfloat16"),
]
NF4 = FORMS[3]
REARRANGES = cast("Callable[[], int]", has_avx512bf16)()


def move(model: PeftModel, ratio: float, seed: int) -> None:
    """Give the adapter "default" deltas of a size, relative to each weight."""
    random = torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = dict(adapted(model))
    for layer in layers.values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            a.copy_(torch.randn(a.shape, generator=random))
            b.copy_(torch.randn(b.shape, generator=random))
            size = layer.scaling["default"] * (b @ a).norm()
            b.mul_(ratio * plain(layer.get_base_layer().weight).float().norm() / size)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(POCKET)


@pytest.fixture(scope="module")
def probes() -> Probes:
    return training_rows(short_rows(3))


@pytest.fixture(scope="module")
def adapters(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, Path]:
    """Save an adapter with repaired token rows, and a second one on top of it."""
    folder = tmp_path_factory.mktemp("adapters")
    base = load_model(ModelSpec())
    ids = protocol_ids(tokenizer)
    rows = {token: ids[token] for token in repair(base, tokenizer)}
    assert set(rows) == set(PROTOCOL)
    first = stack(base, [], lora(8))
    move(first, 0.2, seed=1)
    save_adapter(first, folder / "sft", rows=rows)
    second = stack(load_model(ModelSpec()), [folder / "sft"], lora(4))
    move(second, 0.05, seed=2)
    save_adapter(second, folder / "dpo", [folder / "sft"])
    return folder / "sft", folder / "dpo"


def fingerprint(model: torch.nn.Module) -> dict[str, bytes]:
    found = {}
    for name, value in model.named_parameters():
        raw = value.detach().contiguous().view(torch.uint8).numpy().tobytes()
        state = getattr(value, "quant_state", None)
        found[name] = raw if state is None else raw + state.absmax.numpy().tobytes()
    return found


def no_traces(folder: Path) -> bool:
    return not [path for path in folder.parent.iterdir() if path.name.startswith(folder.name)]


@pytest.mark.parametrize(
    ("spec", "count"),
    [*((spec, 2) for spec in FORMS), (NF4, 1)],
    ids=lambda it: f"{it.quantize}-{it.dtype}" if isinstance(it, ModelSpec) else str(it),
)
def test_the_merged_model_is_the_unmerged_one(
    spec: ModelSpec,
    count: int,
    adapters: tuple[Path, Path],
    probes: Probes,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    model = stack(load_model(spec), adapters[:count])
    before, modes = fingerprint(model), [module.training for module in model.modules()]
    origin = Origin(spec, adapters[:count])
    proof = merge(model, tokenizer, probes, tmp_path / "m", origin, PLAN)
    assert proof.parity.kl_mean <= 1e-4
    assert proof.parity.same_decided == proof.parity.same_to_tie == 1
    wide = PLAN.model_copy(update={"dtype": "float32"})
    sharp = merge(model, tokenizer, probes, tmp_path / "m32", origin, wide)
    assert sharp.parity.kl_max < 1e-9
    assert sharp.parity.same_choice == sharp.parity.same_text == 1
    assert fingerprint(model) == before
    assert [module.training for module in model.modules()] == modes


def test_the_folder_is_whole(
    adapters: tuple[Path, Path],
    probes: Probes,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    plan = PLAN.model_copy(update={"max_shard_size": "3MB"})
    folder = tmp_path / "merged"
    proof = merge_adapters(NF4, adapters, probes, folder, plan)
    check_folder(folder)
    assert check_merged(folder) == proof
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    end = tokenizer.convert_tokens_to_ids(END)
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"]
    for one in (config, generation):
        assert one["eos_token_id"] == end
        assert one["pad_token_id"] == tokenizer.pad_token_id
    again = load_tokenizer(folder)
    assert again.eos_token == END
    assert again.chat_template == tokenizer.chat_template
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
        assert path.stat().st_mode & 0o777 == 0o644
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert "lm_head.weight" not in weights
    rows = load_file(adapters[0] / "token_rows.safetensors")
    table = weights["model.embed_tokens.weight"]
    assert len(rows) == len(PROTOCOL)
    assert all(torch.equal(table[int(at)], row.to(table.dtype)) for at, row in rows.items())
    card = (folder / "README.md").read_text()
    for path in adapters:
        assert sha256(path / "adapter_model.safetensors") in card
    assert f"{proof.parity.kl_mean:.2g}" in card


def test_both_bases_are_measured_and_either_is_published(
    adapters: tuple[Path, Path],
    probes: Probes,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    model = stack(load_model(NF4), adapters)
    plan = PLAN.model_copy(update={"publish": "original", "dtype": "float32"})
    proof = merge(model, tokenizer, probes, tmp_path / "m", Origin(NF4, adapters), plan)
    assert proof.original is not None
    assert proof.original.kl_mean > 100 * proof.parity.kl_mean
    saved = load_file(tmp_path / "m" / "model.safetensors")
    raw = load_file(POCKET / "model.safetensors")
    for name, layer in adapted(model).items():
        expected = raw[f"{name}.weight"].float() + delta(layer)
        assert torch.equal(saved[f"{name}.weight"], expected)
    other = pieces(model, tmp_path / "m")  # a folder of the same names that is another model
    with pytest.raises(MergeError, match="not the base of the adapters"):
        [piece.make() for piece in other.values()]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31), ratio=st.floats(0.05, 0.2), spec=st.sampled_from(FORMS[2:]))
def test_random_adapters_of_real_sizes(seed: int, ratio: float, spec: ModelSpec) -> None:
    """Each written weight is W + s B A to fp32 precision, W being what the layer computes with."""
    model = stack(load_model(spec), [], lora(4))
    move(model, ratio, seed)
    parts = pieces(model)
    layers: dict[str, Any] = dict(adapted(model))
    with exact(model):
        for name in [*layers][:: len(layers) // 4]:
            layer = layers[name]
            computed = layer(torch.eye(layer.in_features)).T
            made = parts[f"{name}.weight"].make()
            assert torch.allclose(made, computed, atol=1e-6 * float(made.abs().max()), rtol=1e-5)


# Faults: what goes wrong in real merges.


def _one_forgotten(layer: Any) -> torch.Tensor:
    whole = layer.active_adapters
    layer.set_adapter([name for name in whole if name != "below1"])
    try:
        return delta(layer)
    finally:
        layer.set_adapter(whole, inference_mode=True)


def _one_layer_forgotten(layer: Any) -> torch.Tensor:
    forgotten = layer.in_features == read_shape("pocket").intermediate  # the down projections
    return torch.zeros_like(delta(layer)) if forgotten else delta(layer)


def _scale_forgotten(layer: Any) -> torch.Tensor:
    return delta(layer) / 2


def _twice(layer: Any) -> torch.Tensor:
    return delta(layer) * 2


@pytest.mark.parametrize("fault", [_one_forgotten, _one_layer_forgotten, _scale_forgotten, _twice])
def test_a_faulty_merge_is_caught_and_the_old_folder_stays(
    fault: Callable[[Any], torch.Tensor],
    adapters: tuple[Path, Path],
    probes: Probes,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "older").write_text("good")
    model = stack(load_model(NF4), adapters)
    with monkeypatch.context() as broken:
        broken.setattr(room, "delta", fault)
        with pytest.raises(ProofError, match="mean KL") as caught:
            merge(model, tokenizer, probes, folder, Origin(NF4, adapters), PLAN)
    assert not caught.value.proof.passed
    assert caught.value.proof.parity.kl_mean > LIMITS["bfloat16"].kl_mean
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert [path.name for path in folder.iterdir()] == ["older"]


def test_forgotten_token_rows_are_caught(
    adapters: tuple[Path, Path],
    probes: Probes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = load_file(POCKET / "model.safetensors")["model.embed_tokens.weight"]

    def unrepaired(model: PeftModel, original: Path | None = None) -> dict[str, room.Piece]:
        found = pieces(model, original)
        name = "model.embed_tokens.weight"
        return found | {name: room.Piece(found[name].shape, lambda: raw)}

    monkeypatch.setattr(room, "pieces", unrepaired)
    with pytest.raises(ProofError):
        merge_adapters(ModelSpec(), adapters, probes, tmp_path / "m", PLAN)
    assert no_traces(tmp_path / "m")


def test_peft_merge_on_four_bits_fails_the_same_proof(
    adapters: tuple[Path, Path], probes: Probes, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = stack(load_model(NF4), adapters)
    before = look(base_of(model), tokenizer, probes, 48, 12)
    naive: Any = copy.deepcopy(model).merge_and_unload(adapter_names=["below0", "below1"])
    limits = LIMITS["bfloat16"]
    found = parity(before, look(naive, tokenizer, probes, 48, 12), limits.kl_max)
    assert found.kl_mean > 10 * limits.kl_mean
    assert any("mean KL" in line for line in failures(found, limits))


def test_peft_merge_of_a_tied_head_fails_the_same_proof(
    probes: Probes, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])
    model = get_peft_model(load_model(ModelSpec()), config)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    with pytest.raises(MergeError, match="target_modules"):
        adapted(model)
    before = look(base_of(model), tokenizer, probes, 48, 2)
    naive: Any = model.merge_and_unload()
    after = look(naive, tokenizer, probes, 48, 2)
    assert parity(before, after, 1e-2).kl_mean > 1e-2


@pytest.mark.skipif(not REARRANGES, reason="this CPU does not rearrange 4-bit weights")
def test_the_naive_order_reads_noise_and_ours_does_not() -> None:
    """An evaluation before the merge rearranges 4-bit weights; exact() keeps them."""
    model = get_peft_model(load_model(NF4), lora(4))
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as bitsandbytes has it by default
    weight: Any = adapted(model)["model.layers.0.mlp.up_proj"].get_base_layer().weight
    good = plain(weight)
    ids = torch.arange(8)[None]
    with exact(model):
        model(input_ids=ids)
    assert torch.equal(plain(weight), good)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    naive = dequantize_4bit(weight.data, weight.quant_state).float()
    assert (naive - good).norm() > 0.5 * good.norm()
    with pytest.raises(MergeError, match="load the base again"):
        plain(weight)


# Refusals


def _variant(**options: Any) -> PeftModel:
    return get_peft_model(load_model(ModelSpec()), LoraConfig(r=2, **options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens: .*target_modules"),
        ({"target_modules": ["lm_head"]}, "lm_head: .*target_modules"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "q_proj: DoRA"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "variants"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "ModulesToSaveWrapper"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5]}, "TrainableTokens"),
    ],
)
def test_what_has_no_exact_merge_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(MergeError, match=says):
        adapted(_variant(**options))


def test_a_model_in_the_wrong_state_is_refused(
    adapters: tuple[Path, Path],
    probes: Probes,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    model = stack(load_model(ModelSpec()), adapters)
    folder = tmp_path / "m"
    with pytest.raises(MergeError, match="are on, 1 are named"):
        merge(model, tokenizer, probes, folder, Origin(ModelSpec(), adapters[:1]), PLAN)
    with pytest.raises(MergeError, match="probes"):
        merge(model, tokenizer, [], folder, Origin(ModelSpec(), adapters), PLAN)
    both = PLAN.model_copy(update={"compare_original": True})
    with pytest.raises(MergeError, match="not in 4 bits"):
        merge(model, tokenizer, probes, folder, Origin(ModelSpec(), adapters), both)
    with PeftModel.disable_adapter(model), pytest.raises(MergeError, match="switched off"):
        adapted(model)
    model.merge_adapter(["below0"])
    with pytest.raises(MergeError, match="merged into the weights already"):
        adapted(model)
    assert no_traces(folder)


# Publication


SMALL = MergePlan(positions=4, new_tokens=1)


@pytest.fixture(scope="module")
def published(
    adapters: tuple[Path, Path],
    probes: Probes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("published") / "m"
    merge_adapters(ModelSpec(), adapters, probes, folder, SMALL)
    return folder


@pytest.mark.parametrize("step", ["write_settings", "look", "card", "write_json", "rename"])
def test_a_kill_never_leaves_a_folder_that_looks_good(
    step: str,
    adapters: tuple[Path, Path],
    published: Path,
    probes: Probes,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """Killed at a step, the folder is the old one or aside; the next merge clears up."""
    folder = tmp_path / "m"
    shutil.copytree(published, folder)
    old = check_merged(folder)
    model, origin = stack(load_model(ModelSpec()), adapters), Origin(ModelSpec(), adapters)
    child = os.fork()
    if child == 0:
        try:
            _kill_at(step)
            merge(model, tokenizer, probes, folder, origin, SMALL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()}
    assert "m.trained.partial" in left
    if step == "rename":
        assert left == {"m.old", "m.trained.partial"}
    else:
        assert check_merged(folder) == old
        with pytest.raises(MergeError):
            check_merged(tmp_path / "m.trained.partial")
    strict = SMALL.model_copy(update={"limits": Limits(kl_mean=0, kl_max=0)})
    with pytest.raises(ProofError):  # too strict: the old folder comes back and stays
        merge(model, tokenizer, probes, folder, origin, strict)
    assert check_merged(folder) == old
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def _kill_at(place: str) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place != "rename":
        setattr(room, place, die)
        return
    rename = Path.rename

    def second(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):  # the old folder is aside, the new one not yet there
            die()
        return rename(path, target)

    Path.rename = second  # type: ignore[method-assign, assignment]


def test_a_folder_that_was_changed_is_no_proved_merge(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(published, folder)
    proof = check_merged(folder)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(MergeError, match=r"model\.safetensors is not what was proved"):
        check_merged(folder)
    weights.write_bytes(good)
    assert check_merged(folder) == proof
    (folder / "extra.safetensors").write_bytes(b"")
    with pytest.raises(MergeError, match="extra"):
        check_merged(folder)
    (folder / "extra.safetensors").unlink()
    failed = proof.model_copy(update={"passed": False, "problems": ("it is another",)})
    (folder / "proof.json").write_text(failed.model_dump_json())
    with pytest.raises(MergeError, match="the proof failed: it is another"):
        check_merged(folder)
    with pytest.raises(MergeError, match="the proof failed"):
        push(folder, "someone/model", endpoint="http://127.0.0.1:9")
    (folder / "proof.json").unlink()
    with pytest.raises(MergeError, match="no proved merge"):
        push(folder, "someone/model", endpoint="http://127.0.0.1:9")


class Hub(BaseHTTPRequestHandler):
    """A Hub of one repository that takes all files inline."""

    got: ClassVar[dict[str, bytes]] = {}
    seen: ClassVar[list[tuple[str, str]]] = []

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.path, self.headers.get("Authorization", "")))
        here = f"http://{self.headers['Host']}"
        if self.path.endswith("/preupload/main"):
            files = json.loads(raw)["files"]
            said: Any = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
            }
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, raw.decode().splitlines()):
                if line["key"] == "file":
                    self.got[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            said = {
                "commitUrl": f"{here}/someone/model/commit/1",
                "commitOid": "1" * 40,
                "hookOutput": "",
                "success": True,
            }
        else:
            said = {"url": f"{here}/someone/model", "name": "someone/model", "id": "1"}
        self._say(said)

    def do_GET(self) -> None:
        self._say({"id": "someone/model", "sha": "0" * 40, "siblings": []})

    def _say(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_proved_folder_reaches_the_hub_whole(hub: str, published: Path) -> None:
    token = "hf_of_nobody"
    url = push(published, "someone/model", token, endpoint=hub)
    assert url.endswith("/someone/model/commit/1")
    assert Hub.got == {path.name: path.read_bytes() for path in published.iterdir()}
    assert {word for _, word in Hub.seen} == {f"Bearer {token}"}


# The measure


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-8, 8), min_size=3, max_size=6), st.randoms())
def test_no_flip_is_cheaper_than_the_flip_cost(logits: list[float], random: Any) -> None:
    p = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    cost = float(flip_cost(p[None])[0])
    noise = torch.tensor([random.gauss(0, 3) for _ in logits], dtype=torch.float64)
    q = (p + noise).log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum())
    if q.argmax() != p.argmax():
        assert kl >= cost - 1e-12
    two = p.topk(2).indices
    level = p.exp()
    level[two] = level[two].mean()
    least = float((p.exp() * (p - level.log())).sum())
    assert least == pytest.approx(cost, abs=1e-9)


def test_what_counts_as_a_tie_and_as_a_failure() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.05, 0.0, -9.0]])
    before = [Seen(logits, [0, 0], flip_cost(logits).tolist(), calls=True)]
    flipped = logits.clone()
    flipped[1] = torch.tensor([0.0, 0.05, -9.0])
    late = parity(before, [Seen(flipped, [0, 1], [0, 0], calls=True)], tie=1e-2)
    assert (late.ties, late.same_choice, late.same_decided) == (1, 0.5, 1)
    assert (late.same_text, late.same_to_tie) == (0, 1)
    early = parity(before, [Seen(flipped, [1, 0], [0, 0], calls=False)], tie=1e-2)
    assert early.same_to_tie == 0
    problems = failures(early, Limits(kl_mean=1, kl_max=1))
    assert len(problems) == 2
    nan = late.model_copy(update={"kl_mean": float("nan"), "kl_max": float("nan")})
    assert len(failures(nan, LIMITS["bfloat16"])) == 2
