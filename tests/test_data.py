"""From rows to splits: nothing is lost, nothing leaks, nothing moves."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolpost.bench.bfcl import benchmark_texts
from toolpost.core.augment import Recipe
from toolpost.core.decontaminate import Benchmark, benchmark
from toolpost.core.schema import Conversation, canonical
from toolpost.core.split import SPLITS, Splitter, identities, query_identity, tool_identity
from toolpost.core.verify import verify_calls
from toolpost.data.build import (
    Account,
    Item,
    build,
    conversations,
    items,
    normalize_rows,
    packets,
    read_split,
    summary,
    training_rows,
)
from toolpost.data.pocketset import rows as practice_rows
from toolpost.data.sources import sniff, stream_rows

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
FILES = {"xlam": SHARED / "xlam_rows.json", "toolace": SHARED / "toolace_rows.json"}
real = pytest.mark.skipif(not SHARED.exists(), reason=f"no real rows at {SHARED.name}")
AUGMENTED = Recipe(seed=1, abstain=0.1, masked=0.33, wrapped=0.5)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def real_items() -> Iterator[Item]:
    for source, file in FILES.items():
        yield from items(source, stream_rows(file))


@pytest.fixture(scope="module")
def exam() -> Benchmark:
    return benchmark(*benchmark_texts())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, exam: Benchmark) -> tuple[Path, Account]:
    folder = tmp_path_factory.mktemp("real")
    return folder, build(real_items(), AUGMENTED, folder, (0.1, 0.1), exam)


def where(folder: Path) -> dict[tuple[str, int], str]:
    """Give the split of every row."""
    return {(r.source, r.id): name for name in SPLITS for r in read_split(folder, name)}


@real
def test_real_rows_in_are_rows_kept_and_rows_quarantined(built: tuple[Path, Account]) -> None:
    folder, account = built
    refused = [json.loads(line) for line in (folder / "quarantine.jsonl").open(encoding="utf-8")]
    ids = Counter((why["source"], why["id"]) for why in refused)
    ids.update(where(folder).keys())
    assert set(ids.values()) == {1}, "a row is in one place"
    assert ids.total() == account.rows == sum(1 for _ in real_items())
    assert Counter(why["reason"] for why in refused) == account.quarantined
    assert all(why["stage"] and why["reason"] and why["detail"] for why in refused)
    assert all(1 <= len(shown) <= 3 for shown in account.examples.values())
    assert set(account.examples) == set(account.quarantined)


@real
def test_no_tool_and_no_question_of_real_rows_is_in_two_splits(tmp_path: Path) -> None:
    build(real_items(), Recipe(seed=1), tmp_path, (0.1, 0.1))
    splits = {name: read_split(tmp_path, name) for name in SPLITS}
    assert all(len(rows) > 50 for rows in splits.values())
    for one, other in (("train", "test"), ("train", "dev"), ("dev", "test")):
        for keys in (
            lambda r: [query_identity(r.query)],
            lambda r: [tool_identity(t) for t in r.tools.values()],
            lambda r: [t.name + canonical(t.parameters) for t in r.tools.values()],
        ):
            left, right = ({k for r in splits[s] for k in keys(r)} for s in (one, other))
            assert left
            assert not left & right


@real
def test_adding_a_tenth_of_real_rows_moves_no_old_row(tmp_path: Path) -> None:
    """The order of the file decides who came first; the new rows stand behind the old ones."""
    rows = list(real_items())
    Random(5).shuffle(rows)
    old = rows[: len(rows) * 10 // 11]
    build(old, Recipe(seed=3), tmp_path / "before", (0.1, 0.1))
    build(rows, Recipe(seed=3), tmp_path / "after", (0.1, 0.1))
    before, after = where(tmp_path / "before"), where(tmp_path / "after")
    assert len(after) > len(before)
    assert {key: after[key] for key in before} == before


@real
def test_only_training_rows_are_augmented_and_in_the_wanted_share(
    built: tuple[Path, Account],
) -> None:
    folder, account = built
    train, dev = read_split(folder, "train"), read_split(folder, "dev")
    plain = {(c.source, c.id, c.step): c for c in conversations(real_items())}
    changed = [r for r in train if plain[r.source, r.id, r.step] != r]
    assert not [r for r in dev if plain[r.source, r.id, r.step] != r]
    assert sum(account.augmented.values()) >= len(changed) > 0.5 * len(train)
    calling = [r for r in train if plain[r.source, r.id, r.step].gold_calls]
    lost = sum(not r.gold_calls for r in calling)
    assert 0.07 < lost / len(calling) < 0.13
    assert 0.25 < account.augmented["masked"] / len(train) < 0.4
    assert 0.4 < account.augmented["wrapped"] / len(train) < 0.6


@pytest.mark.parametrize(
    "source", [pytest.param("xlam", marks=real), pytest.param("toolace", marks=real), "practice"]
)
def test_every_row_that_was_written_calls_only_tools_it_offers(source: str, tmp_path: Path) -> None:
    """Names are masked after the texts of the tools were made once: no old text may stay."""
    rows = stream_rows(FILES[source]) if source in FILES else practice_rows(800, 0)
    build(items(source, rows), AUGMENTED, tmp_path, (0.1, 0.1))
    train = read_split(tmp_path, "train")
    assert len(train) > 300
    for row in train:
        assert {name: tool.name for name, tool in row.tools.items()} == {n: n for n in row.tools}
        assert verify_calls(row.gold_calls, row.tools).ok


@real
def test_several_processes_give_what_one_gives(exam: Benchmark) -> None:
    rows = [*real_items()]
    assert list(packets(rows, AUGMENTED, exam, num_proc=2)) == list(packets(rows, AUGMENTED, exam))


@real
@pytest.mark.parametrize("source", FILES)
def test_the_summary_of_a_real_file(source: str, tmp_path: Path) -> None:
    found = summary(normalize_rows(items(source, stream_rows(FILES[source])), tmp_path))
    assert found["rows"] == found["kept"] + sum(found["quarantined"].values())
    assert found["valid_calls"] / found["calls"] >= {"xlam": 0.98, "toolace": 0.999}[source]
    lines = (tmp_path / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == found["conversations"]
    assert len({Conversation.model_validate_json(line).id for line in lines}) == found["kept"]


@pytest.mark.parametrize("made", [practice_rows(2400, 0), practice_rows(500, 7)])
def test_the_practice_set_shares_nothing_with_the_exam(made: list[Any], exam: Benchmark) -> None:
    account = build(items("practice", made), Recipe(), None, (0.1, 0.1), exam)
    assert set(account.quarantined) <= {"repeated_query"}


def test_every_practice_row_is_accounted_for(tmp_path: Path) -> None:
    made = [*practice_rows(500, 0), "junk", {"id": 1, "query": "x"}]
    account = build(items("practice", made), Recipe(), tmp_path, (0.1, 0.1))
    assert account.rows == 502 == account.kept + account.quarantined.total()
    assert {"bad_row", "missing_key"} <= set(account.quarantined)
    splits = {name: read_split(tmp_path, name) for name in SPLITS}
    assert {name: len(found) for name, found in splits.items()} == account.conversations
    found = [row for split in splits.values() for row in split]
    assert len({row.id for row in found}) == account.kept < len(found)  # dialogues have several
    openings = {query_identity(row.query) for row in found if not row.history}
    assert len(openings) == account.kept
    for one, other in (("train", "test"), ("train", "dev"), ("dev", "test")):
        left, right = ({key for row in splits[s] for key in identities(row)} for s in (one, other))
        assert left
        assert not left & right
    rows = training_rows(splits["train"])
    assert all(row["completion"].endswith("<|im_end|>") for row in rows)


KEY = st.integers(0, 30).map(str).map(str.encode)
KEYS = st.lists(st.lists(KEY, min_size=1, max_size=4), max_size=40)


@given(KEYS, KEYS, st.integers(0, 9))
def test_whatever_is_added_no_key_is_in_two_splits_and_no_row_moves(
    old: list[list[bytes]], new: list[list[bytes]], seed: int
) -> None:
    before, after = Splitter(seed, (0.3, 0.3)), Splitter(seed, (0.3, 0.3))
    places = [after.place(row) for row in (*old, *new)]
    assert [before.place(row) for row in old] == places[: len(old)]
    of: dict[bytes, set[str]] = {}
    for row, place in zip((*old, *new), places, strict=True):
        for key in row if place else ():
            of.setdefault(key, set()).add(str(place))
    assert all(len(splits) == 1 for splits in of.values())


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_row_that_shares_nothing_is_placed_whatever_came_before(seed: int) -> None:
    rows = conversations(items("practice", practice_rows(1, seed)))
    alone = Splitter(seed).place(identities(rows[0]))
    crowded = Splitter(seed)
    for n in range(50):
        crowded.place([b"%d" % n])
    assert crowded.place(identities(rows[0])) == alone


def test_text_that_no_file_can_hold_is_refused() -> None:
    made, text = practice_rows(40, 0), "Rain in \ud800?"
    xlam = next(row for row in made if sniff(row) == "xlam") | {"query": text}
    toolace = next(row for row in made if sniff(row) == "toolace")
    toolace["conversations"][0]["value"] = text
    account = normalize_rows(items("practice", [xlam, toolace]))
    assert account.quarantined == {"bad_unicode": 2}


def test_a_failed_build_leaves_no_half_files(tmp_path: Path) -> None:
    def broken() -> Iterator[Item]:
        yield from items("practice", practice_rows(10, 0))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        build(broken(), Recipe(), tmp_path, (0.1, 0.1))
    assert not list(tmp_path.iterdir())


def test_a_broken_line_of_a_split_is_named(tmp_path: Path) -> None:
    build(items("practice", practice_rows(20, 0)), Recipe(), tmp_path, (0.1, 0.1))
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": 1}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line \d+"):
        read_split(tmp_path, "train")


@given(st.dictionaries(st.text(), JSON, min_size=2))
def test_the_canonical_text_is_json_and_ignores_the_order_of_keys(value: dict[str, Any]) -> None:
    text = canonical(value)
    assert canonical(json.loads(text)) == text
    assert canonical(dict(reversed(value.items()))) == text
