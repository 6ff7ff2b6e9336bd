"""The doctor on real folders: what it finds, what it lets pass, what it refuses to read."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from datasets import Dataset
from practice import in_one_table
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from toolpost.core.schema import Conversation, ToolCall, ToolSpec, json_line
from toolpost.data.build import conversations, items
from toolpost.data.pocketset import rows as practice_rows
from toolpost.serve.checks import ModelFolderError
from toolpost.train.doctor import (
    PROTOCOL,
    Finding,
    UnhealthyError,
    diagnose,
    embedding,
    examine,
    invented_nulls,
    lines,
    protocol_ids,
    repair,
    require_healthy,
)
from toolpost.train.models import POCKET, ModelSpec, load_model, load_tokenizer, lora
from toolpost.train.stack import stack

REAL: Final = Path(__file__).parents[2] / "shared" / "data" / "xlam_rows.json"
END: Final = "<|im_end|>"
START: Final = "<|im_start|>"
IDS: Final = len(load_tokenizer(POCKET))
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(POCKET)


def saved(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    """Save a model with a tokenizer and end tokens that nothing is wrong with."""
    speaker = load_tokenizer(POCKET)
    speaker.eos_token = END
    end = protocol_ids(speaker)[END]
    model.config.eos_token_id = end
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [end, 0]
    model.save_pretrained(folder, **how)
    speaker.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    model = load_model(ModelSpec(dtype="bfloat16"))
    repair(model, tokenizer)
    return saved(model, tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def findings(folder: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(folder).findings}


def test_the_pocket_model_has_the_faults_of_a_base_and_no_other(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    diagnosis = diagnose(POCKET)
    assert {f.name for f in diagnosis.findings} == {"token rows", "eos"}
    assert all(f.blocks and f.by_sft for f in diagnosis.findings)
    assert [row.token for row in diagnosis.rows if row.untrained] == list(PROTOCOL)
    assert diagnosis.exit_code == 1
    require_healthy(diagnosis)  # sft repairs both
    end = protocol_ids(tokenizer)[END]
    with pytest.raises(UnhealthyError, match=rf"token rows: untrained.*eos: .*: {end}\b"):
        require_healthy(diagnosis, repairs=False)


def test_a_sound_folder_has_none(sound: Path) -> None:
    diagnosis = diagnose(sound)
    assert diagnosis.findings == ()
    assert diagnosis.exit_code == 0
    assert diagnosis.tied
    assert lines(diagnosis)[-1] == "healthy"
    require_healthy(diagnosis, repairs=False)


def edit(name: str, **values: Any) -> Change:
    """Change keys of a JSON file; None takes one out."""

    def change(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")) | values
        kept = {key: value for key, value in found.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return change


def replace(name: str, old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


def drop(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def token(name: str, **values: Any) -> Change:
    """Change an added token in tokenizer.json."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        for one in found["added_tokens"]:
            if one["content"] == name:
                one.update(values)
        path.write_text(json.dumps(found), encoding="utf-8")

    return change


def normalizer(name: str) -> Change:
    return replace("tokenizer.json", '"type": "NFC"', f'"type": "{name}"')


JINJA = "chat_template.jinja"
OPENING = "{{- '<|im_start|>assistant\\n' }}"


def opened(folder: Path) -> None:
    """Put a token before every text."""
    single, pair = ([{"Sequence": {"id": name, "type_id": 0}} for name in ab] for ab in ("A", "AB"))
    at = protocol_ids(load_tokenizer(folder))[START]
    before = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": START, "type_id": 0}}, *single],
        "pair": pair,
        "special_tokens": {START: {"id": START, "ids": [at], "tokens": [START]}},
    }
    edit("tokenizer.json", post_processor=before)(folder)


FAULTS = {
    "config eos": ("eos", edit("config.json", eos_token_id=3)),
    "no config eos": ("eos", edit("config.json", eos_token_id=None)),
    "generation eos": ("eos", edit("generation_config.json", eos_token_id=[3, 4])),
    "no generation config": ("eos", drop("generation_config.json")),
    "tokenizer eos": ("eos", edit("tokenizer_config.json", eos_token=START)),
    "no pad": ("pad", edit("tokenizer_config.json", pad_token=None)),
    "pad is eos": ("pad", edit("tokenizer_config.json", pad_token=END)),
    "no template": ("chat template", drop(JINJA)),
    "broken template": ("chat template", replace(JINJA, "{%- endif %}", "")),
    "thinks": ("chat template", replace(JINJA, OPENING, OPENING + "{{- '<think>' }}")),
    "thinks if not asked to": (
        "chat template",
        replace(
            JINJA,
            OPENING,
            OPENING + "{%- if enable_thinking is false %}{{- '<think>' }}{%- endif %}",
        ),
    ),
    "another prompt": ("chat template", replace(JINJA, "# Tools", "# Functions")),
    "folds letters": ("tokenizer", normalizer("NFKC")),
    "lowers letters": ("tokenizer", normalizer("Lowercase")),
    "takes the line break": ("tokenizer", token("<tool_call>", rstrip=True)),
    "only whole words": ("tokenizer", token("<|im_end|>", single_word=True)),
    "adds a token": ("tokenizer", opened),
    "says untied": ("tied", edit("config.json", tie_word_embeddings=False)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_one_finding(copy: Path, fault: str) -> None:
    name, change = FAULTS[fault]
    change(copy)
    diagnosis = diagnose(copy)
    assert [f.name for f in diagnosis.findings] == [name]
    (found,) = diagnosis.findings
    assert "\n" not in found.measured + found.repair
    text = "\n".join(lines(diagnosis))
    assert found.measured in text
    assert found.repair in text
    if found.blocks and not found.by_sft:
        with pytest.raises(UnhealthyError) as caught:
            require_healthy(diagnosis)
        assert found.repair in str(caught.value)
    else:
        require_healthy(diagnosis)


# Rows, in folders of every shape.


def test_parts_and_precision_do_not_change_the_diagnosis(
    sound: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(ModelSpec(name=str(sound)))
    parts = saved(model, tmp_path / "parts", max_shard_size="3MB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    assert diagnose(parts).rows == diagnose(sound).rows
    assert findings(parts) == {}
    assert tuple(examine(model, tokenizer)) == diagnose(sound).rows


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loaded_model_says_what_its_folder_says(
    tokenizer: PreTrainedTokenizerBase, quantize: Any, dtype: Any
) -> None:
    model = load_model(ModelSpec(quantize=quantize, dtype=dtype))
    assert tuple(examine(model, tokenizer)) == diagnose(POCKET).rows
    with_adapter: Any = stack(model, [], lora(2))
    assert tuple(examine(with_adapter, tokenizer)) == diagnose(POCKET).rows


def two_matrices(folder: Path, tokenizer: PreTrainedTokenizerBase, sick: bool) -> PreTrainedModel:
    """Save a model with a head of its own, whose protocol rows are alike if it is sick."""
    model = random_model(0, tie_word_embeddings=False)
    if sick:
        with torch.no_grad():
            model.get_output_embeddings().weight[list(protocol_ids(tokenizer).values())] = 0.01
    saved(model, folder)
    return model


def test_two_matrices_are_both_examined(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    two_matrices(tmp_path / "sound", tokenizer, sick=False)
    diagnosis = diagnose(tmp_path / "sound")
    assert not diagnosis.tied
    assert [row.matrix for row in diagnosis.rows] == ["embedding"] * 6 + ["head"] * 6
    assert diagnosis.findings == ()

    model = two_matrices(tmp_path / "sick", tokenizer, sick=True)
    diagnosis = diagnose(tmp_path / "sick")
    assert {row.matrix for row in diagnosis.rows if row.untrained} == {"head"}
    assert tuple(examine(model, tokenizer)) == diagnosis.rows
    with pytest.raises(UnhealthyError, match="tied embeddings"):
        require_healthy(diagnosis)
    with pytest.raises(ValueError, match="not tied"):
        repair(model, tokenizer)


def test_a_configuration_that_contradicts_the_weights_is_found(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    two_matrices(tmp_path / "model", tokenizer, sick=False)
    edit("config.json", tie_word_embeddings=True)(tmp_path / "model")
    found = findings(tmp_path / "model")
    assert found.keys() == {"tied"}
    assert "two different matrices" in found["tied"].measured
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert findings(tmp_path / "model") == {}  # one matrix, written twice
    assert diagnose(tmp_path / "model").tied


def test_only_rows_are_read(sound: Path, tmp_path: Path) -> None:
    """The weights' file is 12 GB long, all but the embedding a hole; memory does not notice."""
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    data = table.view(torch.uint8).numpy().tobytes()
    ends = [len(data), len(data) + 12 * 10**9]
    header = {
        "model.embed_tokens.weight": {
            "dtype": "BF16",
            "shape": list(table.shape),
            "data_offsets": [0, ends[0]],
        },
        "model.layers.0.rest": {"dtype": "U8", "shape": [12 * 10**9], "data_offsets": ends},
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
        file.truncate(8 + len(text) + ends[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert diagnose(folder).rows == diagnose(sound).rows
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # KiB


# The rule, on matrices of many kinds.


def random_model(seed: int, hidden: int = 64, rows: int = IDS, **config: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    made = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=rows,
            hidden_size=hidden,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            **{"tie_word_embeddings": True, **config},
        )
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "embed" in name or "lm_head" in name:
                parameter.normal_(std=1.16 / hidden**0.5)
    return made


def direction(table: torch.Tensor) -> torch.Tensor:
    row = torch.randn(table.shape[1])
    unit: torch.Tensor = row / row.norm()
    return unit


def short(table: torch.Tensor, new: list[int]) -> None:
    """As on Qwen3-4B-Base: 0.36 against 1.16, and alike."""
    noise = torch.randn(len(new), table.shape[1]) / table.shape[1] ** 0.5
    rows = direction(table) + 0.1 * noise
    table[new] = 0.36 * rows / rows.norm(dim=1, keepdim=True)


def initial(table: torch.Tensor, new: list[int]) -> None:
    """Never touched since they were drawn, while the others have grown."""
    table[new] = torch.randn(len(new), table.shape[1]) * 0.02


def zero(table: torch.Tensor, new: list[int]) -> None:
    table[new] = 0


def mean(table: torch.Tensor, new: list[int]) -> None:
    """As transformers makes new rows when a matrix is enlarged, in a model that leans."""
    table += 2 * direction(table)
    spread = 1e-3 * torch.randn(len(new), table.shape[1])
    table[new] = table.mean(dim=0) + spread


def long(table: torch.Tensor, new: list[int]) -> None:
    """As in the pocket model: alike, and longer than all others."""
    noise = torch.randn(len(new), table.shape[1]) / table.shape[1] ** 0.5
    table[new] = 2.8 * direction(table) + 0.2 * noise


def same_norm(table: torch.Tensor, new: list[int]) -> None:  # noqa: ARG001
    table /= table.norm(dim=1, keepdim=True)


def leaning(table: torch.Tensor, new: list[int]) -> None:  # noqa: ARG001
    """Every cosine is above 0.9, but the rows are as far apart as before."""
    table += 5 * direction(table)


def uneven(table: torch.Tensor, new: list[int]) -> None:
    """Lengths spread like those of words; the protocol's are at the short end of it."""
    table *= torch.exp(0.25 * torch.randn(len(table), 1))
    table[new] *= 0.7 * table.norm(dim=1).median() / table[new].norm(dim=1, keepdim=True)


def rarely_seen(table: torch.Tensor, new: list[int]) -> None:  # noqa: ARG001
    """A tenth of the ordinary tokens was never seen either."""
    rare = table[: len(table) // 10]
    rare.copy_(0.3 * direction(table) + 0.01 * torch.randn(rare.shape))


UNTRAINED = (short, initial, zero, mean, long)
TRAINED = (same_norm, leaning, uneven, rarely_seen)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hidden", [32, 256])
@pytest.mark.parametrize("padding", [0, 40])
@pytest.mark.parametrize("kind", UNTRAINED + TRAINED)
def test_the_rule_neither_misses_nor_cries_wolf(
    tokenizer: PreTrainedTokenizerBase,
    kind: Callable[[torch.Tensor, list[int]], None],
    padding: int,
    hidden: int,
    seed: int,
) -> None:
    model = random_model(seed, hidden, IDS + padding)
    table = embedding(model)
    new = [*tokenizer.get_added_vocab().values(), *range(IDS, IDS + padding)]
    with torch.no_grad():
        kind(table, sorted(new))
    sick = [row.token for row in examine(model, tokenizer) if row.untrained]
    assert sick == (list(PROTOCOL) if kind in UNTRAINED else [])
    assert repair(model, tokenizer, seed).keys() == set(sick)
    assert not any(row.untrained for row in examine(model, tokenizer))


@pytest.mark.parametrize("padding", [1, 300])
def test_a_row_that_lies_on_padding_is_untrained_and_others_are_not(
    tokenizer: PreTrainedTokenizerBase, padding: int
) -> None:
    """Rows of ordinary length, one of them the padding's, all the others distinct."""
    model = random_model(1, rows=IDS + padding)
    with torch.no_grad():
        table = embedding(model)
        table[IDS:] = table[IDS]
        table[protocol_ids(tokenizer)["</tool_call>"]] = table[IDS] * 1.01
    assert [r.token for r in examine(model, tokenizer) if r.untrained] == ["</tool_call>"]
    with torch.no_grad():
        embedding(model)[IDS:] = 0  # nothing to be mistaken for
    assert not any(row.untrained for row in examine(model, tokenizer))


# The repair.


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_repair_changes_the_protocols_rows_alone_and_is_the_same_every_time(
    tokenizer: PreTrainedTokenizerBase, quantize: Any, dtype: Any
) -> None:
    spec = ModelSpec(quantize=quantize, dtype=dtype)
    model = load_model(spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = repair(model, tokenizer, seed=5)
    assert rows == protocol_ids(tokenizer)
    assert repair(model, tokenizer, seed=5) == {}
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert set(changed) <= {"model.embed_tokens.weight", "lm_head.weight"}
    table = embedding(model)
    assert table.dtype == getattr(torch, dtype)
    old = before["model.embed_tokens.weight"]
    touched = (table != old).any(dim=1).nonzero()[:, 0].tolist()
    assert touched == sorted(rows.values())

    again = load_model(spec)
    repair(again, tokenizer, seed=5)
    assert torch.equal(embedding(again), table)
    other = load_model(spec)
    repair(other, tokenizer, seed=6)
    assert not torch.equal(embedding(other), table)


def test_a_trained_row_is_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_model(ModelSpec())
    ids = protocol_ids(tokenizer)
    with torch.no_grad():
        embedding(model)[ids["<|im_end|>"]] = embedding(model)[100] + embedding(model)[2000]
    kept = embedding(model)[ids["<|im_end|>"]].clone()
    assert repair(model, tokenizer).keys() == PROTOCOL.keys() - {"<|im_end|>"}
    assert torch.equal(embedding(model)[ids["<|im_end|>"]], kept)


# Damage.


def cut(name: str, to: int = 100) -> Change:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:to] if to < len(data) else data[:-1])

    return change


def write(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    return change


def fewer_rows(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = table[: IDS - 1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def no_embedding(folder: Path) -> None:
    save_file({"x": torch.zeros(2, 2)}, folder / "model.safetensors", {"format": "pt"})


WHOLE = {
    "empty weights": ("model.safetensors", write("model.safetensors", "")),
    "pointer": ("model.safetensors", write("model.safetensors", "version https://git-lfs\n" * 9)),
    "cut weights": ("model.safetensors", cut("model.safetensors", 10**9)),
    "no weights": ("safetensors", drop("model.safetensors")),
    "other tokenizer": (f"model.safetensors: {IDS - 1} rows", fewer_rows),
    "other model": ("embed_tokens", no_embedding),
    "cut config": ("config.json", cut("config.json")),
    "config is a list": ("config.json", write("config.json", "[]")),
    "unknown kind": ("config.json", edit("config.json", model_type="qwen99")),
    "cut tokenizer": ("tokenizer.json", cut("tokenizer.json")),
    "empty tokenizer": ("tokenizer.json", write("tokenizer.json", "{}")),
    "no protocol": ("tokenizer.json", token("<tool_call>", content="<call>")),
    "cut settings": ("tokenizer_config.json", cut("tokenizer_config.json")),
    "cut generation": ("generation_config.json", cut("generation_config.json")),
}
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-"


def first(folder: Path) -> Path:
    """Give the first of a model's parts."""
    (found,) = folder.glob(f"{FIRST}*.safetensors")
    return found


PARTS = {
    "no index": (INDEX, drop(INDEX)),
    "cut index": (INDEX, cut(INDEX)),
    "empty index": (INDEX, write(INDEX, "{}")),
    "index of lists": (INDEX, edit(INDEX, weight_map={"a": ["b"]})),
    "no part": (FIRST, lambda folder: first(folder).unlink()),
    "cut part": (FIRST, lambda folder: cut(first(folder).name, 10**9)(folder)),
    "swapped part": (FIRST, lambda folder: no_embedding_in(first(folder))),
}


def no_embedding_in(path: Path) -> None:
    save_file({"x": torch.zeros(2, 2)}, path, {"format": "pt"})


@pytest.mark.parametrize("damage", WHOLE)
def test_a_damaged_folder_is_one_line_that_names_the_file(copy: Path, damage: str) -> None:
    name, change = WHOLE[damage]
    change(copy)
    with pytest.raises(ModelFolderError) as caught:
        diagnose(copy)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", PARTS)
def test_damaged_parts_are_one_line_that_names_the_file(
    sound: Path, tmp_path: Path, damage: str
) -> None:
    model = load_model(ModelSpec(name=str(sound)))
    third = (sound / "model.safetensors").stat().st_size // 3
    folder = saved(model, tmp_path / "parts", max_shard_size=third)
    assert len(list(folder.glob("*.safetensors"))) > 2
    name, change = PARTS[damage]
    change(folder)
    with pytest.raises(ModelFolderError) as caught:
        diagnose(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such folder"):
        diagnose(tmp_path / "model")


# The training file.


def written(rows: list[Conversation], path: Path) -> Path:
    path.write_bytes(b"".join(map(json_line, rows)))
    return path


def through_arrow(rows: list[Conversation], path: Path) -> Path:
    """Write rows after a way through an Arrow table, as a naive pipeline does."""
    unified = Dataset.from_list([json.loads(json_line(row)) for row in rows])
    path.write_text("".join(json.dumps(row) + "\n" for row in unified), encoding="utf-8")
    return path


def test_invented_nulls_of_the_practice_rows_are_found(sound: Path, tmp_path: Path) -> None:
    rows = conversations(items("practice", practice_rows(40, 0)))
    good = written(rows, tmp_path / "good.jsonl")
    assert list(invented_nulls(good)) == []
    require_healthy(diagnose(sound, good))
    together = in_one_table(rows)
    bad = through_arrow(together, tmp_path / "bad.jsonl")
    hit = {line.split(":")[0] for line in invented_nulls(bad)}
    assert len(hit) == len(together) > 5  # each got the tools of all the others
    diagnosis = diagnose(sound, bad)
    assert [f.name for f in diagnosis.findings] == ["nulls"]
    with pytest.raises(UnhealthyError, match=r"bad\.jsonl.* line 1: "):
        require_healthy(diagnosis)


@pytest.mark.skipif(not REAL.is_file(), reason="the real rows are not on this machine")
def test_invented_nulls_of_real_rows_are_found_and_their_own_are_not(tmp_path: Path) -> None:
    rows = conversations(items("xlam", json.loads(REAL.read_text(encoding="utf-8"))))[:60]
    assert len(rows) == 60
    assert list(invented_nulls(written(rows, tmp_path / "good.jsonl"))) == []
    bad = tmp_path / "bad.jsonl"
    changed = hit = 0
    for at in range(0, len(rows), 2):
        try:
            through_arrow(rows[at : at + 2], bad)
        except (ValueError, TypeError):
            continue  # the types of two arguments of one name differ
        found = {line.split(":")[0] for line in invented_nulls(bad)}
        for n, line in enumerate(bad.read_text(encoding="utf-8").splitlines()):
            harmed = json.loads(line) != json.loads(json_line(rows[at + n]))
            assert harmed == (f"line {n + 1}" in found)
            changed += harmed
            hit += 1
    assert hit > 0.8 * len(rows)
    assert changed > 0.9 * hit


def one_call(arguments: dict[str, Any]) -> Conversation:
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": ["string", "null"]},
            "free": {},
            "box": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
        "required": ["city"],
    }
    tool = ToolSpec(name="f", description="", parameters=parameters)
    call = ToolCall(name="f", arguments=arguments)
    return Conversation(id=0, source="x", query="q", tools={"f": tool}, gold_calls=(call,))


@pytest.mark.parametrize("more", [{}, {"unit": None}, {"free": None}, {"free": [None]}])
def test_a_null_that_the_tool_allows_is_none(tmp_path: Path, more: dict[str, Any]) -> None:
    rows = [one_call({"city": "null"} | more)]
    assert list(invented_nulls(written(rows, tmp_path / "rows.jsonl"))) == []


@pytest.mark.parametrize("more", [{"other": None}, {"box": None}, {"box": {"a": None}}])
def test_a_null_that_it_does_not_allow_is_named(tmp_path: Path, more: dict[str, Any]) -> None:
    rows = [one_call({"city": "x"}), one_call({"city": "x"} | more)]
    (name,) = more
    found = list(invented_nulls(written(rows, tmp_path / "rows.jsonl")))
    assert found == [f"line 2: f has null for {name}"]


@pytest.mark.parametrize("line", ["null", "[null]", '{"tools": null', '{"gold_calls": null}'])
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_line(one_call({"city": "x"})) + line.encode() + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: no conversation"):
        list(invented_nulls(path))
