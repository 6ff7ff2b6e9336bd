"""What a model writes harms nothing: not the machine, not the checker, not the other answers."""

from __future__ import annotations

import contextlib
import json
import keyword
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_server import SmallServer, model_folder

from toolpost.bench.bfcl import (
    CategoryScore,
    Plan,
    generate,
    questions,
    result_file,
    score,
    truths,
    write_plan,
    write_rows,
)
from toolpost.bench.harness import ANSWERS
from toolpost.bench.sandbox import LONGEST, read_call
from toolpost.bench.worker import harmless, tool_calls

CODE = Path(str(files("toolpost"))).parent
CATEGORY = "multi_turn_base"
DIALOGUES = questions(CATEGORY)
TRUTHS = truths(CATEGORY)
STAGE = "evil"


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))  # of Python's own, from other tests
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


# ------------------------------------------------------------------------------------ the attacks


def call(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def codes(trap: Path, port: int) -> list[str]:
    """Python that does harm where it is run."""
    checker = "bfcl_eval.eval_checker"
    return [
        f"__import__('os').system('touch {trap}')",
        f"open('{trap}', 'w').write('x')",
        f"__import__('pathlib').Path('{trap}').touch()",
        f"__import__('subprocess').run(['touch', '{trap}'])",
        f"__import__('socket').create_connection(('127.0.0.1', {port}))",
        f"__import__('urllib.request', fromlist=['x']).urlopen('http://127.0.0.1:{port}')",
        "[__import__('os').fork() for _ in iter(int, 1)]",
        "__import__('os')._exit(0)",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "__import__('sys').exit()",
        "exit()",
        "exec('while True: pass')",
        "[0 for _ in iter(int, 1)]",
        "10**10**10",
        "'a'*10**10",
        "[0]*10**10",
        "().__class__.__base__.__subclasses__()",
        "execute_multi_turn_func_call.__globals__['__builtins__']['exec']('raise SystemExit')",
        f"setattr(__import__('{checker}.eval_runner', fromlist=['x']), 'multi_turn_checker', "
        "lambda *a: {'valid': True})",
        f"__import__('{checker}.multi_turn_eval.multi_turn_checker', fromlist=['x'])"
        ".state_checker.__code__.__class__",
        "globals().clear()",
    ]


def places(code: str) -> list[str]:
    """Answers that carry code as a tool's name, as an argument's name, and as a value."""
    return [
        call(code, {}),
        call(f"{code} or cd", {"folder": "document"}),
        call("cd", {f"folder={code}, _": 1}),
        call("cd", {f"**{code}, _": 1}),
        call("cd", {"folder": code}),
        call("cd", json.dumps({"folder": code})),
    ]


def instance(dialogue: str, name: str, *, truth: bool = False) -> str:
    """Name a simulator as the scoring process does."""
    stage = f"toolpost_{STAGE}_FC{'_ground_truth' if truth else ''}_eval"
    return f"{stage}_{dialogue}_{name}_instance"


def cheats(dialogue: str) -> list[str]:
    """Attacks on the simulators and on the ground truth's: make both the same, or private calls."""
    name = "GorillaFileSystem"
    return [
        call(f"{instance(dialogue, name, truth=right)}.{method}{gap}", {"scenario": {}})
        for right in (False, True)
        for method in ("_load_scenario", "__init__", "ls.__func__.__globals__.clear", "l\uff53")
        for gap in ("", "\\\n")
    ]


KNOT = [
    *(call("mkdir", {"dir_name": "d0"}), call("cp", {"source": "d0", "destination": "d0"})),
    *(call("cp", {"source": f"d{n}", "destination": f"d{n + 1}"}) for n in range(3)),
    *(
        call("mkdir", {"dir_name": f"e{n}"}) + call("mv", {"source": f"e{n}", "destination": "e"})
        for n in range(3)
    ),
]
DOUBLING = [call("mkdir", {"dir_name": "x0"})]
for level in range(1, 60):  # each folder holds the one before twice
    low, high = f"x{level - 1}", f"x{level}"
    DOUBLING += [
        call("mkdir", {"dir_name": high}),
        call("cp", {"source": low, "destination": f"y{level}"}),
        call("mv", {"source": low, "destination": high}),
        call("mv", {"source": f"y{level}", "destination": high}),
    ]


def abuse() -> dict[str, list[str]]:
    """Calls of the simulators with arguments that ask for too much, by class."""
    folder = [
        "".join([*DOUBLING, call("du", {}), call("find", {"path": "."})]),
        "".join([*KNOT, call("du", {}), call("find", {"path": "."}), call("ls", {})]),
        call("echo", {"content": "a" * 10_000_000, "file_name": "x"}),
        call("cd", {"folder": json.loads("[" * 900 + "]" * 900)}),
        call("cd", {f"a{n}": n for n in range(3000)}),
        call("cd", {"folder": "\ud800", "\udfff": 1}) + call("\ud800", {}),
        call("ls", {}) * 5000,
        "x" * 10_000_000,
        "<tool_call>\n" * 800_000,
        call("cd", {"folder": "("}) + "<tool_call>\n" + "[" * 100_000 + "\n</tool_call>",
    ]
    huge = 10**4000
    numbers = [
        call("power", {"base": 10, "exponent": 10**10}),
        call("power", {"base": 10.0, "exponent": 10**10}),
        call("power", {"base": huge, "exponent": huge}),
        call("square_root", {"number": 2, "precision": 10**9}),
        call("logarithm", {"value": 2, "base": 10, "precision": 10**9}),
        call("logarithm", {"value": 2, "base": 10, "precision": "1000000000"}),
        call("logarithm", {"value": "1e9999999999", "base": 10, "precision": 5}),
        call("logarithm", {"value": "1e9999999999+1e9999999999j", "base": 10, "precision": 5}),
        call("round_number", {"number": 5, "decimal_places": -(10**10)}),
        call("multiply", {"a": huge, "b": huge}) * 200,
    ]
    return {"GorillaFileSystem": folder, "MathAPI": numbers}


# --------------------------------------------------------------------------- scoring, and asking


def test_hostile_dialogues_are_wrong_and_nothing_else_is(tmp_path: Path) -> None:
    """Attacks and right answers stand in one file, are asked for, and scored in one process."""
    root, trap = tmp_path / "run", tmp_path / "trap"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        rows, evil = hostile_rows(trap, listening.getsockname()[1])
        ids = {CATEGORY: tuple(row["id"] for row in rows)}
        write_plan(root, STAGE, Plan(ids=ids, max_tokens=0))
        write_rows(result_file(root, STAGE, CATEGORY), rows)
        asked = ask_for_harm(root, tmp_path, trap, listening.getsockname()[1])

        scores = score(root, [STAGE, "asked"], timeout_s=300)
        with pytest.raises(TimeoutError):
            listening.accept()

    found = scores[STAGE].categories[CATEGORY]
    passed = {i for i, ok in zip(found.ids, found.passed, strict=True) if ok}
    assert passed == set(found.ids) - evil
    assert len(passed) >= 10
    assert len(evil) >= 150
    assert not trap.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model", "server"}
    check_asked(scores["asked"].categories[CATEGORY], asked, root)


def hostile_rows(trap: Path, port: int) -> tuple[list[dict[str, Any]], set[str]]:
    """Give one attack to each dialogue that can carry it, and the right answer to the others."""
    texts = [text for code in codes(trap, port) for text in places(code)]
    of_class = abuse()
    rows, evil = [], set()
    for n, dialogue in enumerate(DIALOGUES):
        right = ANSWERS["oracle"](CATEGORY, dialogue, TRUTHS[dialogue["id"]])
        mine = [c for c in dialogue["involved_classes"] if of_class.get(c)]
        if n % 12 == 0:
            rows.append({"id": dialogue["id"], "result": right})
            continue
        if mine:
            text = of_class[mine[0]].pop()
        elif n % 12 == 1 and "GorillaFileSystem" in dialogue["involved_classes"]:
            text = "".join(cheats(dialogue["id"]))
        elif texts:
            text = texts.pop()
        else:
            text = "".join(places("__import__('sys').exit()"))
        evil.add(dialogue["id"])
        rows.append({"id": dialogue["id"], "result": [[text] for _ in right]})
    assert not texts
    assert not any(of_class.values())
    return rows, evil


def ask_for_harm(root: Path, folder: Path, trap: Path, port: int) -> dict[str, bool]:
    """Let a served model attack the process that asks it; say which dialogues it answers right."""
    chosen = [d for d in DIALOGUES if "GorillaFileSystem" in d["involved_classes"]][:4]
    good, bad, loop, odd = (d["id"] for d in chosen)
    attack = "".join(text for code in codes(trap, port) for text in places(code))
    texts = {
        good: None,
        bad: attack + abuse()["GorillaFileSystem"][0] + "\ud800",
        loop: call("ls", {}),
        odd: "".join(cheats(odd)) + call("cd", {"folder": "\ud800"}) + call("\ud800", {}),
    }
    answers = {}
    for dialogue in chosen:
        turns = ANSWERS["oracle"](CATEGORY, dialogue, TRUTHS[dialogue["id"]])
        for turn, right in zip(dialogue["question"], turns, strict=True):
            answers[turn[-1]["content"]] = texts[dialogue["id"]] or right[0]
    model = model_folder(folder / "model")
    (folder / "server").mkdir()
    with SmallServer(folder / "server", model, answers) as server:
        server.answers = answers
        generate(
            root, "asked", {CATEGORY: (good, bad, loop, odd)}, model, server.base_url, threads=4
        )
    return {good: True, bad: False, loop: False, odd: False}


def check_asked(found: CategoryScore, right: dict[str, bool], root: Path) -> None:
    assert dict(zip(found.ids, found.passed, strict=True)) == right
    log = result_file(root, "asked", CATEGORY).read_text()
    assert "Error during execution: name '__import__' is not defined" in log
    assert "the call was ended after 1000000 steps" in log


# ----------------------------------------------------------------------------- reading, not running

METHODS = {"cd": "fs", "add": "math"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
NAMES = st.text("abcdefgh_", min_size=1, max_size=6).filter(
    lambda name: not keyword.iskeyword(name)
)


class Simulator:
    def cd(self, **given: Any) -> dict[str, Any]:
        return given


@given(st.dictionaries(NAMES, JSON, max_size=4))
def test_honest_calls_give_what_eval_gives(arguments: dict[str, Any]) -> None:
    """BFCL writes the text of a call from an answer's JSON; `NaN` is a name that nobody knows."""
    text = f"fs.cd({','.join(f'{key}={value!r}' for key, value in arguments.items())})"
    try:
        want = eval(text, {"fs": Simulator()})  # noqa: S307 # the text is ours
    except NameError as problem:
        with pytest.raises(NameError, match=re.escape(str(problem))):
            read_call(text, METHODS)
        return
    found = read_call(text, METHODS)
    assert (found.method, found.args, found.kwargs) == ("cd", (), want)


def hostile_texts() -> list[str]:
    wrapped = ["{}()", "fs.cd(folder={})", "fs.cd({})", "{} or fs.cd()", "fs.cd(**{})", "[{}]"]
    code = [text for text in codes(Path("/nowhere"), 9) if "'" in text or "(" in text]
    chains = [
        *("(" * 90_000, "-" * 90_000 + "1", "not " * 20_000 + "1", "fs" + ".cd" * 30_000),
        *("1" + "+1" * 40_000, "fs.cd" + "()" * 40_000, "lambda:" * 10_000, "1" + "<1" * 40_000),
        *(
            "fs.cd(" + "*" * 90_000 + ")",
            "{1:" * 190 + "1" + "}" * 190,
            "fs.cd(x=" + "9" * 9000 + ")",
        ),
        *(
            "f'{" * 50 + "1",
            "\0",
            "fs.cd(\0)",
            "fs.cd(x='\ud800')",
            "a" * (LONGEST + 1),
            "",
            "fs.cd",
        ),
    ]
    others = [
        *(
            "fs._load()",
            "fs.__class__()",
            "fs.add(a=1)",
            "math.cd()",
            "fs.cd.__call__()",
            "(fs).cd.x()",
        ),
        *(
            "fs.cd(folder=fs)",
            "fs.cd(folder=fs.cd())",
            "fs.cd(*[1])",
            "fs.cd(x:=1)",
            "fs.cd(f'{1}')",
        ),
        *(
            "fs.cd();fs.cd()",
            "fs.cd()\nimport os",
            "fs.cd(x=1, x=2)",
            "await fs.cd()",
            "fs.cd(__import__)",
        ),
    ]
    return [w.format(c) for w in wrapped for c in code] + chains + others


def test_nothing_but_a_plain_call_gets_through() -> None:
    ordinary = (NameError, ValueError, SyntaxError, RecursionError, MemoryError)
    for text in hostile_texts():
        read = None
        with contextlib.suppress(*ordinary):
            read = read_call(text, METHODS)
        assert read is None, text[:100]


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "\n",
    "<tool_call>\n",
    "\n</tool_call>",
    "{}",
    '{"a":1}',
    " ",
    "x",
]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PARTS), max_size=14).map("".join))
def test_calls_are_found_where_bfcl_finds_them(text: str) -> None:
    blocks = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)
    want = []
    for block in blocks:
        with contextlib.suppress(ValueError):
            want.append(json.loads(block))
    assert tool_calls(text) == want


@given(JSON)
def test_honest_values_stay_as_they_are(value: Any) -> None:
    assert repr(harmless(value)) == repr(value)


def test_ten_megabytes_of_tags_are_read_once() -> None:
    assert tool_calls("<tool_call>\n" * 900_000) == []
    deep = tool_calls("<tool_call>\n" + "[" * 900 + "]" * 900 + "\n</tool_call>")
    assert str(deep).count("[") == 101


# -------------------------------------------------------------------------- the fence, with a door

DOOR = """
import os, pathlib, socket, sys, threading
from toolpost.bench.sandbox import fence, limit, within_steps
open_port, shut_port = map(int, sys.argv[1:])
limit()
fence(pathlib.Path("inside"), ("localhost", open_port))
socket.create_connection(("localhost", open_port)).close()
socket.create_connection(("127.0.0.1", open_port)).close()

def forever():
    while True:
        pass

def refused(attempt, kind=PermissionError):
    try:
        attempt()
    except kind:
        return
    os._exit(7)

refused(lambda: socket.create_connection(("127.0.0.1", shut_port)))
refused(lambda: socket.create_connection(("localhost", shut_port)))
refused(lambda: socket.getaddrinfo("example.org", 80))
refused(lambda: socket.gethostbyname("example.org"))
datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
refused(lambda: datagram.sendto(b"x", ("127.0.0.1", open_port)))
refused(lambda: socket.socket().bind(("127.0.0.1", 0)))
refused(lambda: socket.socket(socket.AF_UNIX).connect("/tmp/x"))
refused(os.fork)
refused(os.forkpty)
refused(lambda: os.kill(os.getppid(), 9))
refused(lambda: os.system("true"))
refused(lambda: bytearray(5 << 30), MemoryError)
within = threading.Thread(target=lambda: refused(lambda: within_steps(forever, 1000), TimeoutError))
within.start(); within.join()
with open("inside/big", "wb") as big:
    refused(lambda: (big.truncate(2 << 30), big.flush()), OSError)
print("held")
"""


def test_a_process_that_asks_reaches_the_server_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    with (
        socket.create_server(("127.0.0.1", 0)) as door,
        socket.create_server(("127.0.0.1", 0)) as wall,
    ):
        done = subprocess.run(
            [sys.executable, "-c", DOOR, *(str(s.getsockname()[1]) for s in (door, wall))],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(CODE)},
            capture_output=True,
            text=True,
            check=False,
        )
        wall.settimeout(0.1)
        with pytest.raises(TimeoutError):
            wall.accept()
    assert (done.stdout, done.returncode) == ("held\n", 0), done.stderr
