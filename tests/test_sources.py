"""Files of rows, whole and broken; the Hub, answered by a local server; W&B, offline."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolpost.data.sources import (
    HUB,
    HubFile,
    SourceError,
    load_rows,
    local_file,
    log_artifact,
    sniff,
    stream_rows,
)

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason=f"no real rows in {SHARED.name}/")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
XLAM = {"id": 0, "query": "Is it day?", "tools": "[]", "answers": "[]"}
TOOLACE = {"system": "You are an expert.", "conversations": []}


def streamed(path: Path, content: str | bytes, chunk: int = 64) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(stream_rows(path, chunk))


@settings(deadline=None)
@given(
    st.lists(JSON, max_size=6),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 9),
    st.sampled_from(["", " ", "\r\n", "\n\t "]),
)
def test_any_list_is_streamed_as_json_load_reads_it(
    rows: list[Any], indent: int | None, escape: bool, chunk: int, space: str
) -> None:
    text = space + json.dumps(rows, indent=indent, ensure_ascii=escape) + space
    raw = text.encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_bytes(raw)
        assert list(stream_rows(path, chunk)) == json.loads(raw)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON, min_size=1), max_size=5), st.integers(1, 9))
def test_any_lines_are_streamed_whatever_ends_them(rows: list[dict[str, Any]], chunk: int) -> None:
    for end in ("\n", "\r\n", "\n\n"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.write_text("".join(json.dumps(r) + end for r in rows), newline="")
            if rows:
                assert list(stream_rows(path, chunk)) == rows


@settings(deadline=None)
@given(st.lists(JSON, min_size=1, max_size=4), st.data(), st.integers(1, 99))
def test_a_file_cut_anywhere_is_never_taken_for_whole(
    rows: list[Any], data: st.DataObject, chunk: int
) -> None:
    raw = json.dumps(rows, ensure_ascii=False).encode(errors="replace")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        with pytest.raises(SourceError, match=re.escape(str(path))):
            list(stream_rows(path, chunk))


@pytest.mark.parametrize("content", ["[]", "\ufeff[ ]\r\n", "  [\n]  "])
def test_an_empty_list_is_a_source_without_rows(tmp_path: Path, content: str) -> None:
    assert streamed(tmp_path / "rows.json", content) == []


def test_the_layout_is_told_by_the_content_and_not_by_the_name(tmp_path: Path) -> None:
    assert streamed(tmp_path / "rows.jsonl", '\ufeff[{"a": 1}, 2]') == [{"a": 1}, 2]
    assert streamed(tmp_path / "rows.json", '\ufeff{"a": 1}\r\n{"a": 2}') == [{"a": 1}, {"a": 2}]


def test_a_lone_surrogate_is_a_matter_of_its_row(tmp_path: Path) -> None:
    content = r'[{"q": "\ud83d\ude00 \ud800"}, {"q": 1}]'
    for chunk in (1, 5, 99):
        assert streamed(tmp_path / "rows.json", content, chunk) == json.loads(content)


def test_one_row_in_json_lines_is_a_row(tmp_path: Path) -> None:
    assert streamed(tmp_path / "rows.jsonl", '{"junk": 1}') == [{"junk": 1}]
    assert streamed(tmp_path / "rows.json", json.dumps(TOOLACE)) == [TOOLACE]


def test_an_error_names_the_row_the_line_and_the_byte(tmp_path: Path) -> None:
    """The byte is the place of the fault, also behind characters of several bytes and a BOM."""
    content = '\ufeff[{"q": "é漢😀"},\n{"q": "é" 1}, {"q": 2}]'
    place = content.encode().index(b"1}")
    for chunk in (1, 7, 1 << 20):
        with pytest.raises(SourceError) as caught:
            streamed(tmp_path / "rows.json", content, chunk)
        assert f"row 2 (line 2, byte {place}): Expecting ',' delimiter" in str(caught.value)


WHOLE_FILE = {
    "empty": (b"", "is empty"),
    "blank": (b" \r\n ", "is empty"),
    "cut in a row": (
        b'[{"id": 1},\n{"id": 2, "query": "Is it',
        r"row 2 \(line 2, byte 31\): Unterm",
    ),
    "cut in a row, way out": (b'[{"id": 1}, {"id', "download is not complete. Fetch it again"),
    "cut in a literal": (b'[{"id": 1}, tru', "download is not complete"),
    "cut between rows": (b'[{"id": 1}', "never closed. The download is not complete"),
    "cut after a comma": (b'[{"id": 1},', "download is not complete"),
    "cut in a character": ('[{"id": "é'.encode()[:-1], "not UTF-8"),
    "missing comma": (b'[{"id": 1}\n{"id": 2}]', r"row 1 \(line 2, byte 11\): expected ','"),
    "broken row": (b'[{"id": 1}, {"id" 2}, {"id": 3}]', "row 2 .*':' delimiter.*mend it there"),
    "text after": (b'[{"id": 1}]\nlog: done', "text after the end of the list"),
    "second list": (b"[1]\n[2]", "text after the end of the list"),
    "broken line": (b'{"id": 1}\n{"id": 2,}\n{"id": 3}', "row 2 .line 2, .*mend it there"),
    "cut line": (b'{"id": 1}\n{"id": 2}\n{"id', r"row 3 \(line 3.*download is not complete"),
    "not UTF-8": ('[{"id": "é"}]'.encode("latin-1"), r"byte 9: not UTF-8"),
    "UTF-16": ("[1]".encode("utf-16"), "iconv -f UTF-16"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "long integer": (b"[" + b"1" * 5000 + b"]", "row 1 .*integer string"),
    "web page": (b"\n<!DOCTYPE html><html>", "HTML page"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4e", "git lfs pull"),
    "parquet": (b"PAR1\x15\x04", "read_parquet"),
    "arrow": (b"ARROW1\0\0", "from_file"),
    "zip": (b"PK\x03\x04\x14", "zip archive"),
    "gzip": (gzip.compress(b"[1]"), "gunzip"),
    "text": (b"hello", "starts with 'h'"),
    "scalar": (b"12", "starts with '1'"),
    "wrapped": (b'{"train": [{"id": 1}]}', r"one JSON object \(keys: train\)"),
    "pretty wrapped": (b'{\n "rows": [\n {"id": 1}],\n "n": 1\n}', r"\(keys: rows, n\)"),
    "Hub error": (b'{"error": "restricted"}', r"\(keys: error\), expected a list"),
}


@pytest.mark.parametrize(("content", "says"), WHOLE_FILE.values(), ids=WHOLE_FILE)
@pytest.mark.parametrize("chunk", [1, 1 << 20], ids=["small", "large"])
def test_a_broken_file_says_what_to_do(
    tmp_path: Path, content: bytes, says: str, chunk: int
) -> None:
    path = tmp_path / "rows.json"
    with pytest.raises(SourceError, match=says) as caught:
        streamed(path, content, chunk)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [("no/rows.json", "no such file"), (".", "is a folder"), ("a\0b", "cannot be read")],
)
def test_a_path_that_is_no_file_says_so(path: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        list(stream_rows(Path(path)))


def test_a_row_that_never_ends_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with path.open("wb") as file:
        file.write(b'["')
        file.seek(1 << 30)  # a sparse gigabyte
        file.write(b'"]')
    with pytest.raises(SourceError, match=r"Invalid control character"):
        list(stream_rows(path))
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(b'["' + b"a" * (70 << 20))
    with pytest.raises(SourceError, match="longer than 67,108,864 characters"):
        list(stream_rows(path))
    path.unlink()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / "rows.json"
        with path.open("w", encoding="utf-8") as file:
            file.write("[" + json.dumps(XLAM))
            file.writelines("," + json.dumps(XLAM | {"query": "x" * 500}) for _ in range(rows))
            file.write("]")
        tracemalloc.start()
        assert sum(1 for _ in stream_rows(path, 1 << 16)) == rows + 1
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = peak(1000), peak(8000)
    assert large < 1.1 * small < 2_000_000


@real
@pytest.mark.parametrize("corpus", ["xlam", "toolace"])
def test_real_rows_are_streamed_as_json_load_reads_them(corpus: Any) -> None:
    path = SHARED / f"{corpus}_rows.json"
    expected = json.loads(path.read_text(encoding="utf-8"))
    assert list(stream_rows(path, 4096)) == expected
    assert list(load_rows(corpus, 7, 0, path)) == expected[:7]
    assert {sniff(row) for row in expected} == {corpus}


@pytest.mark.parametrize(
    ("row", "source", "says"),
    [(TOOLACE, "xlam", "--source toolace"), (XLAM, "toolace", "--source xlam")],
)
def test_the_wrong_corpus_is_found_at_the_first_row(
    tmp_path: Path, row: dict[str, Any], source: Any, says: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    with pytest.raises(SourceError, match=f"{path} looks like a .* file.*{says}"):
        list(load_rows(source, None, 0, path))


def test_a_first_row_that_is_junk_is_left_to_the_normalizer(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = ["junk", {"id": 1}, XLAM]
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert list(load_rows("xlam", None, 0, path)) == rows


def test_the_practice_set_is_made_and_reads_no_file() -> None:
    assert len(list(load_rows("practice", 5, 0))) == 5
    assert local_file("practice", None) is None
    with pytest.raises(SourceError, match=r"reads no file; for x\.json, name the corpus"):
        list(load_rows("practice", 5, 0, Path("x.json")))
    with pytest.raises(ValueError, match="say how many rows"):
        list(load_rows("practice", None, 0))
    unknown: Any = "xlan"
    with pytest.raises(SourceError, match="unknown source 'xlan'; there are: practice, xlam"):
        local_file(unknown, None)


# The Hub. HF_ENDPOINT is read when huggingface_hub is imported, so a child process loads.

BODY = json.dumps([XLAM]).encode()
COMMIT = "1" * 40
ANSWERS = {
    "gated": (401, {"X-Error-Code": "GatedRepo"}),
    "waiting": (403, {"X-Error-Code": "GatedRepo"}),
    "missing": (401, {"X-Error-Code": "RepoNotFound"}),
    "moved": (404, {"X-Error-Code": "RevisionNotFound"}),
    "renamed": (404, {"X-Error-Code": "EntryNotFound"}),
    "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {"X-Error-Message": "Please enable access to gated repositories"}),
    "good": (200, {}),
    "changed": (200, {}),
}
LOAD = """
import json, sys
from toolpost.data.sources import HubFile, SourceError, fetch
for repo, size, digest in json.loads(sys.argv[1]):
    pinned = HubFile(repo=repo, name="rows.json", revision="main", size=size, sha256=digest)
    try:
        print(fetch(pinned))
    except SourceError as problem:
        print(repr(str(problem)))
"""


@contextmanager
def hub() -> Iterator[tuple[str, set[str]]]:
    """Serve like the Hub; the owner's name in the address decides the answer."""
    tokens = set()

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, headers = ANSWERS["renamed"]
            if self.path.startswith("/datasets/"):
                tokens.add(self.headers.get("Authorization", ""))
                status, headers = ANSWERS[self.path.split("/")[2]]
            body = BODY if status == 200 else b""
            self.send_response(status)
            about = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(BODY).hexdigest()}"'}
            for name, value in {**about, **headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", tokens
        finally:
            server.shutdown()
            thread.join()


def fetched(home: Path, names: list[str], **variables: str) -> tuple[list[str], str]:
    """Fetch a file of each repository in a child process; its lines, and all it wrote."""
    digest = hashlib.sha256(BODY).hexdigest()
    wanted = [
        (f"{name}/rows", len(BODY), "0" * 64 if name == "changed" else digest) for name in names
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(wanted)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, "HF_HOME": str(home), **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stdout + done.stderr


@pytest.fixture(scope="module")
def hub_said(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], set[str], str]:
    home = tmp_path_factory.mktemp("hub")
    with hub() as (address, tokens):
        secret = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secretsecret"}
        lines, written = fetched(home, list(ANSWERS), **secret)
    on_disk = "".join(p.read_text(errors="replace") for p in home.rglob("*") if p.is_file())
    return dict(zip(ANSWERS, lines, strict=True)), tokens, written + on_disk


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gated", "gated. Accept its terms on https://huggingface.co/datasets/gated/rows and set"),
        ("waiting", "gated. Accept its terms"),
        ("missing", "no such data set, or hides it"),
        ("moved", "no longer has rows.json at revision main"),
        ("renamed", "no longer has rows.json"),
        ("token", "status 401: is HF_TOKEN valid"),
        ("forbidden", "status 403: is HF_TOKEN valid, and may it read gated data sets?"),
        ("changed", f"expected {len(BODY)} bytes with sha256 0000"),
    ],
)
def test_what_the_hub_refuses_has_a_way_out(
    hub_said: tuple[dict[str, str], set[str], str], name: str, says: str
) -> None:
    assert says in hub_said[0][name]
    assert "pass its path" in hub_said[0][name]


def test_a_file_of_the_hub_is_fetched_and_stays(
    hub_said: tuple[dict[str, str], set[str], str],
) -> None:
    assert Path(hub_said[0]["good"]).read_bytes() == BODY
    changed = re.search(r"(/\S+rows\.json) is not the rows\.json", hub_said[0]["changed"])
    assert changed
    assert Path(changed[1]).read_bytes() == BODY


def test_the_token_is_sent_and_never_shown(
    hub_said: tuple[dict[str, str], set[str], str],
) -> None:
    assert hub_said[1] == {"Bearer hf_secretsecret"}
    assert "secretsecret" not in hub_said[2]


def test_offline_the_cache_is_used_and_what_is_not_there_is_named(tmp_path: Path) -> None:
    with hub() as (address, tokens):
        fetched(tmp_path, ["good"], HF_ENDPOINT=address)
    assert tokens == {""}
    lines, _ = fetched(tmp_path, ["good", "gated"], HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert Path(lines[0]).read_bytes() == BODY
    assert "cannot be reached (no network, or HF_HUB_OFFLINE is set)" in lines[1]


def test_the_pins_are_those_of_the_published_files() -> None:
    assert {name: (pin.repo, pin.size) for name, pin in HUB.items()} == {
        "xlam": ("Salesforce/xlam-function-calling-60k", 96_116_570),
        "toolace": ("Team-ACE/ToolACE", 37_154_735),
    }
    assert all(isinstance(p, HubFile) and len(p.sha256) == 64 for p in HUB.values())


# W&B. Also in a child process: it keeps one service per process, and a home of its own.

LOG = """
import sys
from pathlib import Path
from toolpost.data.sources import SourceError, log_artifact, use_artifact
data, work = Path(sys.argv[1]), Path(sys.argv[2])
for job in (
    lambda: log_artifact(data, "practice", "toolpost", work),
    lambda: use_artifact("practice:latest", work / "got", "toolpost", work),
    lambda: log_artifact(data, "a/b c", "toolpost", work),
):
    try:
        print(job())
    except SourceError as problem:
        print(problem)
"""


def wandb_said(tmp_path: Path, mode: str) -> tuple[list[str], str]:
    (tmp_path / "home").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"id": 1}\n')
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", LOG, str(tmp_path / "data"), str(tmp_path / "work")],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path / "home",
        env={**clean, "HOME": str(tmp_path / "home"), "WANDB_MODE": mode},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_an_artifact_is_logged_offline_and_cannot_be_used_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    lines, errors = wandb_said(tmp_path, "offline")
    logged, used, misnamed = lines
    run = Path(logged)
    assert run.is_relative_to(tmp_path / "work")
    assert run.name.startswith("offline-run-")
    record = next(run.glob("run-*.wandb")).read_bytes()
    assert b"practice" in record
    assert b"train.jsonl" in record
    assert "W&B is offline, so artifact practice:latest cannot be fetched" in used
    assert "Invalid name: 'a/b c'" in misnamed
    assert errors == ""
    assert not any((tmp_path / "home").rglob("*"))
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["train.jsonl"]


def test_without_an_account_wandb_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    lines, _ = wandb_said(tmp_path, "online")
    assert "or set WANDB_MODE=offline" in lines[0]


def test_an_artifact_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file or folder to log"):
        log_artifact(tmp_path / "none", "x", "toolpost", tmp_path)
