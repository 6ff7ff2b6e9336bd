"""What the pocket base is pretrained on: descriptions and requests, and nothing of the protocol."""

from __future__ import annotations

import calendar
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from toolpost.core.split import Splitter, group_identity
from toolpost.data.pocketset import requests
from toolpost.data.table import table
from toolpost.profile import Data, load_profile

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "toolpost" / "models" / "pocket"


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    file = ROOT / "benchmarks" / "pocket_corpus.py"
    spec = importlib.util.spec_from_file_location("pocket_corpus", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def documents(corpus: ModuleType) -> list[str]:
    return list(corpus.request_documents(3000, 0))


def _entries(corpus: ModuleType) -> list[object]:
    return [
        corpus.Entry(
            f"shelf{n // 4}",
            f"OpenDoorNumber{n}",
            f"Opens the door with the number {n} of the house.",
            (
                corpus.Field("doorKey", "string", f"The key of door {n}.", required=True),
                corpus.Field("how", "string", "", required=False, options=("slow", "fast")),
            ),
        )
        for n in range(12)
    ]


def test_every_function_is_described_once_a_seed_and_never_in_the_same_way_twice(
    corpus: ModuleType,
) -> None:
    entries = _entries(corpus)
    first, again, other = (list(corpus.described(entries, seed)) for seed in (0, 0, 1))
    assert first == again != other
    for n in range(12):
        about = f"number {n} of|door {n}\\.|umber_?{n}\\b"
        assert sum(bool(re.search(about, text)) for text in first) == 1


def test_a_listing_in_json_is_json(corpus: ModuleType) -> None:
    entries = _entries(corpus)
    texts = [text for seed in range(20) for text in corpus.described(entries, seed)]
    found = 0
    for text in texts:
        for part in text.split("\n"):
            if part.startswith('{"'):
                assert "enum" in json.dumps(json.loads(part))
                found += 1
    assert found > 50


def test_docstrings_are_read_in_both_usual_forms(corpus: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        'def scale(x, by=2):\n    """Scale a number by a factor.\n\n    Parameters\n    '
        "----------\n"
        "    x : float\n        The number to scale.\n    by : int, optional\n        The factor.\n"
        '    """\n\n\ndef _hidden(x):\n    """Not to be read by anybody at all."""\n'
    )
    (tmp_path / "two.py").write_text(
        'def cut(text):\n    """Cut a text into two halves.\n\n    Args:\n        text (`str`):\n'
        '            The text to be cut.\n\n    Returns:\n        two texts\n    """\n'
    )
    (scale, _), (cut, doc) = corpus.documented("toys", tmp_path)
    assert [(f.name, f.kind, f.about, f.required) for f in scale.fields] == [
        ("x", "float", "The number to scale.", True),
        ("by", "int", "The factor.", False),
    ]
    assert (cut.place, cut.name, cut.about) == ("toys.two", "cut", "Cut a text into two halves.")
    assert [(f.name, f.about) for f in cut.fields] == [("text", "The text to be cut.")]
    assert "Returns" in doc


def _is_said(value: object, text: str, corpus: ModuleType) -> bool:
    """Tell whether an English text, in lower case, states a value of an example."""
    if isinstance(value, list):
        return all(_is_said(one, text, corpus) for one in value)
    if isinstance(value, bool):
        return bool(re.search(r"\b(yes|true|on)\b" if value else r"\b(no|false|off)\b", text))
    if isinstance(value, int):
        word = corpus.NUMBERS[value] if value <= 20 else str(value)
        return word in text or str(value) in text or f"{value:,}" in text
    if re.fullmatch(r"\d{4}-\d\d-\d\d", str(value)):
        year, month, day = str(value).split("-")
        name = calendar.month_name[int(month)].lower()
        return f"{int(day)} {name} {year}" in text or f"{name} {int(day)}, {year}" in text
    return str(value).lower() in text


def test_an_example_states_what_its_input_holds(corpus: ModuleType) -> None:
    field = corpus.Field
    kinds = {"number": "integer", "width": "number", "given": "boolean", "days": "array"}
    fields = [field(name, kind, "", required=True) for name, kind in kinds.items()]
    entries = [
        corpus.Entry(
            "shop", f"Order{n}", f"Orders {n}.", (*fields[:n], field("who", "string", "", n < 3))
        )
        for n in range(4)
    ]
    words = [
        "The brown rabbits meet Anna, Rashid and Quentin while seven geese watch them closely."
    ]
    styles = ("as it is", "snake", "camel")
    converted = {corpus._cased(f.name, style) for f in corpus.CONVERTED for style in styles}
    pages = [page for seed in range(60) for page in corpus.exemplified(entries, words, seed)]
    inputs = 0
    for page in pages:
        _, *examples = page.split("\n\n")
        for example in filter(lambda text: text.endswith("}"), examples):
            said = example.split("\n")[0].lower()
            for line in filter(lambda text: text.startswith("{"), example.split("\n")):
                for name, value in json.loads(line).items():
                    assert name in converted or _is_said(value, said, corpus), example
                    inputs += 1
    assert inputs > 500


def test_what_is_said_in_another_unit_is_converted(corpus: ModuleType) -> None:
    def draw(maker: Any) -> dict[str, Any]:
        rng = random.Random(0)
        return dict(maker(rng) for _ in range(4000))

    times, spans = draw(corpus.a_time), draw(corpus.a_span)
    assert times["half past six in the evening"] == "18:30"
    assert times["a quarter past eleven in the morning"] == "11:15"
    assert times["twelve in the afternoon"] == "12:00"
    assert (spans["two hours"], spans["an hour and a half"], spans["45 minutes"]) == (120, 90, 45)
    for said, meant in times.items():
        clock = re.fullmatch(r"(\d+):(\d\d)(?: (am|pm))?", said)
        if clock:
            hour = int(clock[1]) % 12 + 12 * (clock[3] == "pm") if clock[3] else int(clock[1])
            assert meant == f"{hour:02}:{clock[2]}"
    for said, meant in draw(corpus.a_share).items():
        assert meant == pytest.approx(int(re.findall(r"\d+", said)[0]) / 100)
    for said, meant in draw(corpus.a_distance).items():
        assert meant == pytest.approx(1000 * float(said.split()[0]))
    for said, meant in draw(corpus.a_price).items():
        whole, *rest = re.findall(r"\d+", said)
        assert meant == pytest.approx(int(whole) + int((*rest, 0)[0]) / 100)


def test_requests_come_back_in_other_words(documents: list[str]) -> None:
    assert len(documents) > 500
    lines = [line for text in documents for line in text.splitlines()]
    assert len(set(lines)) > 0.9 * len(lines)


def test_the_base_reads_no_request_of_the_dev_and_test_groups(
    corpus: ModuleType, documents: list[str]
) -> None:
    settings = load_profile("pocket", "runs/none")["20_data"]
    assert isinstance(settings, Data)
    splitter = Splitter(settings.seed, (settings.dev, settings.test))
    held = [g for g in table().groups if splitter.place([group_identity(g)]) != "train"]
    assert held
    assert not set(held) & set(corpus.training_groups())
    lines = {line.lstrip("-> ") for text in documents for line in text.splitlines()}
    kept_back = {text for texts in requests(3000, 0, held) if len(texts) > 1 for text in texts}
    assert len(kept_back) > 1000
    assert not lines & kept_back


def test_the_base_reads_no_tool_and_no_call(corpus: ModuleType, documents: list[str]) -> None:
    text = "\n".join(documents)
    names = [name for tool in table().tools for name in tool.names if re.search(r"[._]", name)]
    assert len(names) > 300
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]
    assert not re.search(r'[{}]|"arguments"', text)
    shown = corpus.operations(corpus.folder_of("botocore") / "data")
    assert not {entry.name for entry in shown} & set(names)
    assert not corpus.fit("A long text about a <tool_call> and what stands in it, and more text")
    assert corpus.fit("A long text about something else, and what stands in it, and more of it")


def test_the_card_says_what_the_manifests_say() -> None:
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    sources = json.loads((SHIPPED / "corpus.json").read_text(encoding="utf-8"))
    about = json.loads((SHIPPED / "training.json").read_text(encoding="utf-8"))
    for source in sources:
        assert source["sha256"] in card
        assert f"| {source['licence']} |" in card
    assert f"{about['parameters']:,} parameters" in card
    assert f"{about['tokens']:,} tokens" in card
    assert sum(source["characters"] for source in sources) > 10**7
    last = about["curve"][-1]["held_out"]
    assert all(str(loss) in card for loss in last.values())


def test_the_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 20 * 2**20
