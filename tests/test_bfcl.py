"""BFCL through our runner: known answers, a small real server, bad rows, hostile answers."""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from toolpost.bench.bfcl import (
    CATEGORIES,
    MULTI_TURN,
    NON_LIVE,
    SINGLE_TURN,
    BenchError,
    CategoryScore,
    ModelScores,
    Overall,
    Plan,
    check_alike,
    check_complete,
    check_server,
    cluster,
    generate,
    groups,
    keep_good_rows,
    overall,
    questions,
    result_file,
    sample_ids,
    score,
    truths,
    write_plan,
    write_rows,
)
from toolpost.bench.harness import ANSWERS, deviations, oracle_calls, prove, write_answers
from toolpost.core.format import render_calls

CODE = Path(str(files("toolpost"))).parent


# ---------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(("small", "big"), [(1, 2), (3, 20), (16, 17), (20, None)])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_bigger_sample_contains_the_smaller(small: int, big: int | None, seed: int) -> None:
    few, many = sample_ids(small, seed), sample_ids(big, seed)
    assert list(few) == list(many) == list(SINGLE_TURN)
    assert all(set(few[c]) <= set(many[c]) for c in SINGLE_TURN)
    assert few == sample_ids(small, seed)


def test_sampled_ids_are_real_and_unique() -> None:
    for category, ids in sample_ids(20, seed=1).items():
        real = [question["id"] for question in questions(category)]
        assert len(set(ids)) == len(ids) == min(20, len(real))
        assert [i for i in real if i in set(ids)] == list(ids)
    assert len(sample_ids(20, seed=1)["live_parallel"]) == 16
    assert sum(map(len, sample_ids(None, seed=1).values())) == 3641
    assert sample_ids(20, seed=1) != sample_ids(20, seed=2)


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sample_ids(0, seed=0)


# ----------------------------------------------------------------------------------- known answers


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ModelScores]]:
    root = tmp_path_factory.mktemp("proof")
    return root, prove(root)


def hits(scores: ModelScores) -> dict[str, int]:
    return {name: category.hits for name, category in scores.categories.items()}


SIZES = {
    "simple_python": 400,
    "simple_java": 100,
    "simple_javascript": 50,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "irrelevance": 240,
    "live_simple": 258,
    "live_multiple": 1053,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
    "live_irrelevance": 884,
    "live_relevance": 16,
    "multi_turn_base": 200,
    "multi_turn_miss_func": 200,
    "multi_turn_miss_param": 200,
    "multi_turn_long_context": 200,
}


def test_the_oracle_misses_only_what_nobody_can_hit(
    proof: tuple[Path, dict[str, ModelScores]],
) -> None:
    scores = proof[1]["oracle"]
    assert {name: c.n for name, c in scores.categories.items()} == SIZES
    assert hits(scores) == SIZES | {"simple_java": 97, "live_simple": 256, "live_multiple": 1051}
    missed = {i for c in scores.categories.values() for i in c.errors}
    assert missed == {
        "simple_java_36",
        "simple_java_64",
        "simple_java_65",
        "live_simple_106-63-0",
        "live_simple_112-68-0",
        "live_multiple_862-181-3",
        "live_multiple_964-207-0",
    }
    rounded = {name: round(100 * value, 2) for name, value in groups(scores).items()}
    assert rounded == {"non_live": 99.75, "live": 99.70, "irrelevance": 100, "multi_turn": 100}


def test_saying_nothing_scores_nothing_but_irrelevance(
    proof: tuple[Path, dict[str, ModelScores]],
) -> None:
    scores = proof[1]["null"]
    assert hits(scores) == dict.fromkeys(SIZES, 0) | {"irrelevance": 240, "live_irrelevance": 884}
    assert groups(scores) == {"non_live": 0, "live": 0, "irrelevance": 1, "multi_turn": 0}


def test_always_calling_scores_nothing_but_relevance(
    proof: tuple[Path, dict[str, ModelScores]],
) -> None:
    scores = proof[1]["always"]
    some = {"live_simple": 1, "live_multiple": 20, "live_relevance": 16}
    assert hits(scores) == dict.fromkeys(SIZES, 0) | some
    assert groups(scores)["irrelevance"] == 0


def test_the_check_finds_nothing_and_sees_what_is_wrong(
    proof: tuple[Path, dict[str, ModelScores]],
) -> None:
    assert deviations(proof[1]) == []
    swapped = {"oracle": proof[1]["null"], "null": proof[1]["null"], "always": proof[1]["oracle"]}
    found = deviations(swapped)
    assert "oracle, multi_turn_base: 0 of 200 passed, expected 200" in found
    assert len(found) == 15 + 16


OFFICIAL = """
import os, sys
from bfcl_eval.constants.eval_config import SCORE_PATH
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig
from bfcl_eval.eval_checker import eval_runner_helper as helper
known = dict(url="", org="", license="", is_fc_model=True, underscore_to_dot=False)
for name in os.listdir(SCORE_PATH):
    MODEL_CONFIG_MAPPING[name] = ModelConfig(
        model_name=name, display_name=name, model_handler=object, **known
    )
table = {}
helper.update_leaderboard_table_with_local_score_file(table, SCORE_PATH)
helper.generate_leaderboard_csv(table, SCORE_PATH)
"""
COLUMNS = {"non_live": "Non-Live AST Acc", "live": "Live Acc", "multi_turn": "Multi Turn Acc"}


def test_groups_and_overall_are_those_of_the_official_table(tmp_path: Path) -> None:
    draw = random.Random(0)
    models: dict[str, ModelScores] = {}
    for number in range(5):
        name, scores = f"m{number}", {}
        for category in CATEGORIES:
            ids = sample_ids(None, 0, [category])[category]
            passed = tuple(draw.random() < draw.choice((0.1, 0.5, 0.9)) for _ in ids)
            errors = {i: "x" for i, ok in zip(ids, passed, strict=True) if not ok}
            one = CategoryScore(category=category, ids=ids, passed=passed, errors=errors)
            scores[category] = one
            result = result_file(tmp_path, name, category)
            path = tmp_path / "score" / name / result.parent.name
            path.mkdir(parents=True, exist_ok=True)
            total = {"accuracy": one.accuracy, "correct_count": one.hits, "total_count": one.n}
            (path / f"BFCL_v4_{category}_score.json").write_text(json.dumps(total) + "\n")
        models[name] = ModelScores(model=name, categories=scores, max_tokens=0)
    environment = os.environ | {"BFCL_PROJECT_ROOT": str(tmp_path)}
    subprocess.run([sys.executable, "-c", OFFICIAL], env=environment, cwd=tmp_path, check=True)
    with (tmp_path / "score" / "data_overall.csv").open(newline="") as file:
        rows = {row["Model"]: row for row in csv.DictReader(file)}
    for name, scores_of in models.items():
        found = groups(scores_of)
        ours = {column: found[group] for group, column in COLUMNS.items()}
        ours |= {"Irrelevance Detection": found["irrelevance"]}
        ours |= {"Overall Acc": overall(found).points}
        assert {c: f"{100 * v:.2f}%" for c, v in ours.items()} == {c: rows[name][c] for c in ours}
    assert overall(found).coverage == pytest.approx(0.6)
    assert overall({"live": 1.0}) == Overall(points=0.1, coverage=0.1)


def test_questions_of_a_cluster_share_tools() -> None:
    """A live question's number names its tools; a few tool lists have several numbers."""
    everything = sample_ids(None, 0, CATEGORIES)
    counts = {c: len({cluster(i) for i in ids}) for c, ids in everything.items()}
    assert counts["live_multiple"] == 280
    assert counts["live_irrelevance"] == 369
    assert counts["live_simple"] == 138
    assert all(counts[c] == len(everything[c]) for c in NON_LIVE)
    dialogues = {cluster(i) for c in MULTI_TURN for i in everything[c]}
    assert len(dialogues) == 200
    shown: dict[str, set[str]] = {}
    for question in questions("live_multiple"):
        names = {tool["name"] for tool in question["function"]}
        shown[cluster(question["id"])] = shown.get(cluster(question["id"]), names) & names
    assert all(shown.values())  # the questions of a cluster have a tool in common
    several = {}
    for category in ("live_simple", "live_multiple", "live_irrelevance"):
        numbers: dict[str, set[str]] = {}
        for question in questions(category):
            tools = sorted(json.dumps(tool, sort_keys=True) for tool in question["function"])
            numbers.setdefault(json.dumps(tools), set()).add(cluster(question["id"]))
        several[category] = sum(len(some) > 1 for some in numbers.values())
    # BFCL gave these lists more than one number; for us they are clusters of their own.
    assert several == {"live_simple": 0, "live_multiple": 5, "live_irrelevance": 5}


def test_scores_survive_json(proof: tuple[Path, dict[str, ModelScores]]) -> None:
    for scores in proof[1].values():
        assert ModelScores.model_validate(json.loads(scores.model_dump_json())) == scores
        assert ModelScores.model_validate(scores.model_dump()) == scores


def test_a_score_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="errors do not match"):
        CategoryScore(category="multiple", ids=("a",), passed=(False,), errors={})
    with pytest.raises(ValueError, match="ids repeat"):
        CategoryScore(category="multiple", ids=("a", "a"), passed=(True, True), errors={})


# ---------------------------------------------------------------------------------------- bad rows

IDS = {"multiple": tuple(f"multiple_{n}" for n in range(6))}
ENDS = {"finish_reason": ["stop"]}
GOOD: list[dict[str, Any]] = [{"id": i, "result": f"answer to {i}"} | ENDS for i in IDS["multiple"]]
ERROR = {"result": "Error during inference: Connection error.", "traceback": "Traceback ..."}


@settings(max_examples=60, deadline=None)
@given(
    fates=st.lists(st.sampled_from(["good", "error", "missing", "twice"]), min_size=6, max_size=6),
    cut=st.integers(min_value=0, max_value=60),
    junk=st.lists(st.sampled_from(["", "null", "[1]", "{", '{"id": 3}', "\x00", "é"]), max_size=3),
)
def test_exactly_the_good_rows_are_kept(
    tmp_path_factory: pytest.TempPathFactory, fates: list[str], cut: int, junk: list[str]
) -> None:
    root = tmp_path_factory.mktemp("rows")
    path = result_file(root, "base", "multiple")
    lines = []
    for row, fate in zip(GOOD, fates, strict=True):
        text = json.dumps(row | (ERROR if fate == "error" else {}))
        lines += [text] * {"missing": 0, "twice": 2}.get(fate, 1)
    last = json.dumps({"id": "multiple_9", "result": "x" * 60} | ENDS)[: 10 + cut]
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([*junk, *lines, last]), "utf-8")

    want = [row for row, fate in zip(GOOD, fates, strict=True) if fate in ("good", "twice")]
    assert keep_good_rows(root, "base", IDS) == len(want)
    left = path.read_text("utf-8").splitlines() if path.exists() else []
    assert [json.loads(line) for line in left] == want
    assert keep_good_rows(root, "base", IDS) == len(want)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([*GOOD[:5], GOOD[5] | ERROR], "1 of 6 questions have no good.*multiple_5: Error during"),
        (GOOD[:5], "multiple has 5 rows for 6 questions"),
        ([*GOOD, GOOD[0]], "multiple has 7 rows for 6 questions"),
        ([*GOOD[:5], GOOD[5] | {"id": "multiple_77"}], "do not hold the questions asked"),
        ([], "multiple has 0 rows"),
    ],
)
def test_an_incomplete_run_is_not_scored(
    tmp_path: Path, rows: list[dict[str, Any]], text: str
) -> None:
    write_plan(tmp_path, "base", Plan(ids=IDS, max_tokens=8))
    write_rows(result_file(tmp_path, "base", "multiple"), rows)
    with pytest.raises(BenchError, match=text):
        score(tmp_path, ["base"])


NO_ANSWERS: list[Any] = [None, 5, [], {}, ["x"], [["x"]]]
NO_DIALOGUES: list[Any] = [None, 5, "x", {}, ["x"], [[5]], [["x"], None], [[["x"]]]]


@pytest.mark.parametrize(
    ("category", "change"),
    [
        *[("irrelevance", {"result": result}) for result in NO_ANSWERS],
        *[("multi_turn_base", {"result": result}) for result in NO_DIALOGUES],
        ("irrelevance", {"finish_reason": None}),  # as old runs have them
        ("irrelevance", {"finish_reason": []}),
        ("irrelevance", {"finish_reason": "stop"}),
        ("irrelevance", {"finish_reason": ["abort"]}),
        ("irrelevance", {"finish_reason": [["stop"]]}),
    ],
)
def test_what_is_no_answer_is_not_scored(
    tmp_path: Path, category: str, change: dict[str, Any]
) -> None:
    ids = (f"{category}_0", f"{category}_1")
    result: Any = [["Hi."]] if category in MULTI_TURN else "Hi."
    rows = [{"id": i, "result": result} | ENDS for i in ids]
    path = result_file(tmp_path, "base", category)
    plan = Plan(ids={category: ids}, max_tokens=8)
    write_plan(tmp_path, "base", plan)
    write_rows(path, rows)
    check_complete(tmp_path, "base", plan)

    write_rows(path, [rows[0], rows[1] | change])
    with pytest.raises(BenchError, match=f"1 of 2 questions have no good answer.*{ids[1]}"):
        score(tmp_path, ["base"])
    assert keep_good_rows(tmp_path, "base", {category: ids}) == 1
    assert json.loads(path.read_text()) == rows[0]


def test_a_model_may_say_that_an_error_occurred(tmp_path: Path) -> None:
    rows = [GOOD[0] | {"result": ERROR["result"]}, *GOOD[1:]]
    write_rows(result_file(tmp_path, "base", "multiple"), rows)
    assert keep_good_rows(tmp_path, "base", IDS) == 6
    check_complete(tmp_path, "base", Plan(ids=IDS, max_tokens=8))


def test_models_that_were_asked_differently_are_not_compared(tmp_path: Path) -> None:
    """Their weights and their questions may differ, and known answers stand beside any."""
    plan = Plan(ids=IDS, max_tokens=8, engine="one 1.0", window=512)
    few = {"ids": {"multiple": IDS["multiple"][:2]}, "fingerprint": "b"}
    plans = {"base": plan, "sft": plan.model_copy(update=few), "null": Plan(ids=IDS, max_tokens=0)}
    check_alike(plans)
    for key, other in (
        ("max_tokens", 9),
        ("temperature", 0.7),
        ("window", 256),
        ("engine", "one 1.1"),
        ("bfcl_eval", "2026.3.23"),
    ):
        write_plan(tmp_path, "base", plan)
        write_plan(tmp_path, "dpo", plan.model_copy(update={key: other}))
        with pytest.raises(BenchError, match=f"'base' and 'dpo' were not asked alike.*{key}"):
            score(tmp_path, ["base", "dpo"])


def test_a_cut_line_is_not_scored(tmp_path: Path) -> None:
    plan = Plan(ids=IDS, max_tokens=8)
    path = result_file(tmp_path, "base", "multiple")
    write_rows(path, GOOD)
    check_complete(tmp_path, "base", plan)
    path.write_text(path.read_text() + '{"id": "mul')
    with pytest.raises(BenchError, match="7 rows for 6"):
        check_complete(tmp_path, "base", plan)


def test_a_model_that_was_never_asked_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="'sft' was never asked"):
        score(tmp_path, ["sft"])


def test_other_weights_or_another_cap_make_old_answers_void(tmp_path: Path) -> None:
    path = result_file(tmp_path, "base", "multiple")
    plan = Plan(ids=IDS, max_tokens=8, fingerprint="abc")
    write_plan(tmp_path, "base", plan)
    more = plan.model_copy(update={"ids": {"multiple": ("multiple_0",)}})
    other = plan.model_copy(update={"fingerprint": "abd"})
    engine = other.model_copy(update={"engine": "vllm 0.21.0"})
    for new, void in (
        (plan, False),
        (more, False),
        (other, True),
        (engine, True),
        (Plan(ids=IDS, max_tokens=9), True),
    ):
        write_rows(path, GOOD)
        write_plan(tmp_path, "base", new)
        assert path.exists() is not void


def test_answers_are_not_forgotten_for_a_server_that_is_not_there(
    tmp_path: Path, model: str
) -> None:
    write_plan(tmp_path, "base", Plan(ids=IDS, max_tokens=8))
    path = result_file(tmp_path, "base", "multiple")
    write_rows(path, GOOD)
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    assert generate(tmp_path, "base", IDS, model, nobody, max_tokens=8).total == 6
    with pytest.raises(BenchError, match="start the model's server"):
        generate(tmp_path, "base", IDS, model, nobody, max_tokens=9)
    assert path.exists()


# ----------------------------------------------------------------------------------- a real server

CAP = 48
SAMPLE = sample_ids(2, seed=3)


class Server(ThreadingHTTPServer):
    """Answers BFCL's prompts with what `answers` holds for the last user message in them."""

    daemon_threads = True

    def __init__(self, model: str, answers: Mapping[str, str]) -> None:
        self.model, self.answers = model, answers
        self.seen: list[dict[str, Any]] = []
        self.refuse: set[str] = set()  # user messages that get a 400
        self.hang = False
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def reply(self, code: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        found = self.path == "/v1/models"
        models = [{"id": self.server.model, "object": "model"}]
        self.reply(200 if found else 404, {"object": "list", "data": models})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(request | {"path": self.path})
        if self.server.hang:
            time.sleep(60)
        user = request["prompt"].split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        if user in self.server.refuse:
            self.reply(400, {"error": {"message": "the prompt is too long"}})
            return
        text = self.server.answers[user]
        cut = text.startswith("None")
        used = CAP if cut else 7
        self.reply(  # a lone surrogate cannot be written as UTF-8, but JSON carries it
            200,
            {
                "id": "c",
                "object": "text_completion",
                "created": 0,
                "model": request["model"],
                "choices": [
                    {
                        "index": 0,
                        "text": text + "\ud800",
                        "finish_reason": "length" if cut else "stop",
                        "logprobs": None,
                    }
                ],
                "usage": {"prompt_tokens": 9, "completion_tokens": used, "total_tokens": 9 + used},
            },
        )

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make a model folder as BFCL needs it: no weights, a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "qwen3", "max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(config))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return str(folder)


@pytest.fixture(scope="module")
def oracle() -> dict[str, str]:
    """Map the last user message of every sampled question to the oracle's answer."""
    answers = {}
    for category, ids in SAMPLE.items():
        right = truths(category)
        for question in questions(category):
            if question["id"] in ids:
                text = str(ANSWERS["oracle"](category, question, right.get(question["id"])))
                answers[question["question"][0][-1]["content"]] = text
    assert len(answers) == 26
    return answers


@pytest.fixture
def server(model: str, oracle: dict[str, str]) -> Iterator[Server]:
    with Server(model, oracle) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def hostile_answers(trap: Path) -> dict[str, dict[str, str]]:
    """Give answers that attack the scorer, by category and question id."""
    code = f"__import__('os').system('touch {trap}')"
    tag = "<tool_call>\n{}\n</tool_call>".format
    name = questions("simple_python")[0]["function"][0]["name"]
    nasty = [
        tag(json.dumps(code)),
        tag(json.dumps({"name": code, "arguments": {}})),
        tag(json.dumps({"name": name, "arguments": code})),
        tag(json.dumps({"name": name, "arguments": {"base": code, "height": code}})),
        tag('{"name": "\\ud800", "arguments": {"\\udfff": "\\ud800"}}'),
        tag('{"name": "f", "arguments": {"x": ' + "[" * 900 + "]" * 900 + "}}"),
        tag('{"name": "f", "arguments": {"x": NaN, "y": 1e999, "z": -Infinity}}'),
        tag('{"name": {"f": 1}, "arguments": {}}'),
        tag('[[["f"]]]'),
        "<tool_call>\n" * 500,
        f"[{code}]",
        "\x00\x1b[2J\u2028",
    ]
    (pages,) = oracle_calls(
        "simple_java",
        truths("simple_java")["simple_java_18"],
        questions("simple_java")[18]["function"],
    )
    endless = pages.model_copy(update={"arguments": pages.arguments | {"pageNo": "9" * 5000}})
    return {
        "simple_python": {f"simple_python_{n}": text for n, text in enumerate(nasty)},
        "simple_java": {"simple_java_18": render_calls([endless])},
    }


def test_a_served_model_is_asked_and_scored(
    tmp_path: Path, server: Server, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long story, because every step starts a process: fail, resume, extend, score."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # must reach neither probe nor child
    root, lines = tmp_path / "run", list[str]()

    def ask(count: int) -> Plan:
        ids = {category: ids[:count] for category, ids in SAMPLE.items()}
        return generate(
            root, "base", ids, model, server.url, max_tokens=CAP, threads=4, say=lines.append
        )

    # One question is refused: the run says so, and the other answers stay.
    bad = SAMPLE["live_multiple"][0]
    asked = {q["id"]: q["question"][0][-1]["content"] for q in questions("live_multiple")}
    server.refuse = {asked[bad]}
    with pytest.raises(BenchError, match=f"1 of 13 questions.*{bad}.*too long") as failure:
        ask(1)
    assert "ask again" in str(failure.value)
    assert lines[-1].startswith("bfcl base: 13/13 questions, ")
    with pytest.raises(BenchError, match="1 of 13"):
        score(root, ["base"])

    # What was sent: every question once (a 400 is not repeated), capped, greedy, in Qwen's format.
    assert len(server.seen) == 13
    for request in server.seen:
        assert request["path"] == "/v1/completions"
        assert request["max_tokens"] == CAP
        assert request["temperature"] == 0
        assert request["model"] == model
        assert request["prompt"].startswith("<|im_start|>system\n")
        assert request["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert set(request) == {"path", "max_tokens", "temperature", "model", "prompt"}

    # A killed run leaves a cut line; only this row, the failed one and the new ones are asked.
    server.refuse = set()
    path = result_file(root, "base", "live_simple")
    path.write_text(path.read_text()[:-20])
    plan = ask(2)
    assert plan.total == 26
    assert len(server.seen) == 13 + 13 + 2
    ask(2)
    assert len(server.seen) == 28

    # Hostile answers stand beside good ones and change nothing.
    trap = tmp_path / "trap"
    evil = hostile_answers(trap)
    write_plan(root, "evil", Plan(ids={c: tuple(rows) for c, rows in evil.items()}, max_tokens=CAP))
    for category, rows in evil.items():
        path = result_file(root, "evil", category)
        write_rows(path, [{"id": i, "result": text} | ENDS for i, text in rows.items()])

    # So do the answers of a model that was asked one question, and a folder nobody knows.
    write_answers(root, "oracle", {"simple_java": ("simple_java_0",)})
    path = result_file(root, "oracle", "simple_java")
    write_rows(path, [json.loads(path.read_text()) | {"latency": 0.5, "output_token_count": 3}])
    (root / "score" / "left-over").mkdir(parents=True)
    scores = score(root, ["base", "evil", "oracle"])
    assert hits(scores["oracle"]) == {"simple_java": 1}
    assert groups(scores["oracle"]) == {}
    assert hits(scores["base"]) == dict.fromkeys(SINGLE_TURN, 2)
    assert groups(scores["base"]) == {"non_live": 1, "live": 1, "irrelevance": 1}
    assert {c.capped for n, c in scores["base"].categories.items() if "irrel" in n} == {2}
    assert {c.capped for n, c in scores["base"].categories.items() if "irrel" not in n} == {0}
    assert scores["base"].max_tokens == CAP
    assert hits(scores["evil"]) == {"simple_python": 0, "simple_java": 0}
    errors = scores["evil"].categories["simple_java"].errors
    assert errors == {"simple_java_18": "checker:raised"}
    assert not trap.exists()


# -------------------------------------------------------------------------------- what goes wrong


def free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port: int = probe_socket.getsockname()[1]
    return port


def test_no_server_is_an_error_and_not_a_wait(tmp_path: Path, model: str) -> None:
    with pytest.raises(BenchError, match="start the model's server"):
        generate(tmp_path, "base", SAMPLE, model, f"http://127.0.0.1:{free_port()}/v1")


def test_a_silent_server_is_an_error_and_not_a_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(BenchError, match="ReadTimeout"):
            check_server(url, "m", timeout_s=0.3)


def test_another_model_on_the_port_is_an_error(tmp_path: Path, server: Server, model: str) -> None:
    server.model = "somebody-else"
    with pytest.raises(BenchError, match="serves \\['somebody-else'\\]"):
        generate(tmp_path, "base", SAMPLE, model, server.url)


@pytest.mark.parametrize("cap", [-1, 0, 4097, 8192])
def test_a_cap_that_bfcl_does_not_ask_for_is_refused(tmp_path: Path, cap: int) -> None:
    with pytest.raises(ValueError, match=f"max_tokens is {cap};.*never asks for more than 4096"):
        generate(tmp_path, "base", SAMPLE, tmp_path, "http://127.0.0.1:1/v1", max_tokens=cap)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ({"multiple": ("multiple_9999",)}, "multiple_9999"),
        ({"multiple": ("multiple_1", "multiple_1")}, "twice"),
        ({"web_search_base": ("web_search_base_0",)}, "no category 'web_search_base'"),
        ({"multiple": ()}, "the sample is empty"),
    ],
)
def test_questions_that_do_not_exist_are_refused(
    tmp_path: Path, ids: dict[str, tuple[str, ...]], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        generate(tmp_path, "base", ids, tmp_path, "http://127.0.0.1:1/v1")


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"has no config\.json"):
        generate(tmp_path, "base", SAMPLE, tmp_path, "http://127.0.0.1:1/v1")


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path, server: Server, model: str) -> None:
    with pytest.raises(BenchError, match=r"after its 0\.5 s were over"):
        generate(tmp_path, "base", SAMPLE, model, server.url, timeout_s=0.5)
    assert not psutil.Process().children(recursive=True)


def test_a_killed_parent_leaves_no_child(tmp_path: Path, server: Server, model: str) -> None:
    server.hang = True
    call = f"generate(Path({str(tmp_path)!r}), 'base', {SAMPLE!r}, {model!r}, {server.url!r})"
    code = f"from pathlib import Path; from toolpost.bench.bfcl import generate; {call}"
    secret = os.environ | {"HF_TOKEN": "secret"}
    with subprocess.Popen([sys.executable, "-c", code], cwd=CODE, env=secret) as parent:
        children: list[psutil.Process] = []
        while not children and parent.poll() is None:
            time.sleep(0.05)
            found = psutil.Process(parent.pid).children(recursive=True)
            children = [child for child in found if "toolpost.bench.worker" in child.cmdline()]
        known = [child.environ() for child in children]
        parent.kill()
    assert children
    assert all("BFCL_PROJECT_ROOT" in env and "HF_TOKEN" not in env for env in known)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


# --------------------------------------------------------------------------------------- the fence


@pytest.mark.parametrize(
    "attack",
    [
        "os.system('touch {trap}')",
        "subprocess.run(['touch', '{trap}'])",
        "os.posix_spawnp('touch', ['touch', '{trap}'], os.environ)",
        "os.execvp('touch', ['touch', '{trap}'])",
        "os.fork()",
        "open('{trap}', 'w')",
        "os.close(os.open('{trap}', os.O_CREAT | os.O_RDWR))",
        "os.mkdir('{trap}')",
        "os.rename('inside/file', '{trap}')",
        "os.symlink('{trap}', 'inside/link'); open('inside/link', 'w')",
        "os.remove('precious')",
        "os.truncate('precious', 0)",
        "pathlib.Path('inside/../precious').unlink()",
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.socket()",
        "urllib.request.urlopen('http://127.0.0.1:9')",
        "ctypes.CDLL(None).system(b'touch {trap}')",
        "os.kill(os.getppid(), 0)",
    ],
)
def test_the_fence_refuses_harm(tmp_path: Path, attack: str) -> None:
    (tmp_path / "inside").mkdir()
    for name in ("inside/file", "precious"):
        (tmp_path / name).write_text("x")
    trap = tmp_path / "trap"
    code = (
        "import os, pathlib, socket, subprocess, urllib.request, ctypes\n"
        "from toolpost.bench.worker import fence\n"
        "fence(pathlib.Path('inside'))\n"
        "open('inside/allowed', 'w').close(); open('precious').close()\n"
        f"{attack.format(trap=trap)}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CODE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "refused" in done.stderr
    assert (tmp_path / "inside" / "allowed").exists()
    assert (tmp_path / "precious").read_text() == "x"
    assert not trap.exists()
