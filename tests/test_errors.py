"""Known damage to right answers gets its own class; counts add up; tables say what was not run."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolpost.bench.bfcl import (
    SINGLE_TURN,
    TOO_LONG,
    BenchError,
    CategoryScore,
    ModelScores,
    Plan,
    questions,
    result_file,
    score,
    truths,
    write_plan,
    write_rows,
)
from toolpost.bench.errors import (
    CLASS_OF,
    ErrorClass,
    Errors,
    Move,
    bfcl_metrics,
    classify,
    draw_ids,
    error_classes,
    find_errors,
    grade_bfcl,
    moves,
    shown_tools,
)
from toolpost.bench.harness import dialogue_calls, oracle_calls
from toolpost.bench.probes import Completion, Probed, compare, complete, probe
from toolpost.core.format import completion_of, render_calls
from toolpost.core.metrics import row_cluster, tally
from toolpost.core.schema import Conversation, ToolCall, ToolSpec
from toolpost.core.verify import verify_spec
from toolpost.data.build import conversations, items
from toolpost.data.pocketset import rows as practice_rows
from toolpost.report import flow as report
from toolpost.report.tables import Record, to_html

E: Final = ErrorClass
CAP: Final = 64
PRACTICE: Final = conversations(items("practice", practice_rows(60, 0)))

# ------------------------------------------------------------------------------------- every type


def sources() -> Iterator[Path]:
    spec = find_spec("bfcl_eval")
    assert spec
    assert spec.submodule_search_locations
    yield from (Path(spec.submodule_search_locations[0]) / "eval_checker").rglob("*.py")
    yield Path(str(files("toolpost"))) / "bench" / "worker.py"


def test_every_class_is_explained_on_the_page() -> None:
    assert set(report.EXPLAINED) == set(ErrorClass)
    scored = CategoryScore(
        category="multiple", ids=("a",), passed=(False,), errors={"a": TOO_LONG}, too_long=1
    )
    asked = ModelScores(model="base", categories={"multiple": scored}, max_tokens=CAP)
    found = Errors(classes={"base": {E.PROMPT_TOO_LONG: ("a",)}}, metrics={}, examples=())
    html = to_html(report.taxonomy(found, {"base": asked}))
    assert E.PROMPT_TOO_LONG.value in html
    assert report.EXPLAINED[E.PROMPT_TOO_LONG] in html


def test_every_error_type_in_the_source_of_bfcl_has_a_class() -> None:
    pattern = re.compile(r"""["']error_type["']\]?\s*[:=]\s*f?["']([^"']+)["']""")
    found = {name for path in sources() for name in pattern.findall(path.read_text("utf-8"))}
    assert len(found) > 35
    assert found | {TOO_LONG} == set(CLASS_OF)


QUESTION: Final = {"function": [{"name": "f", "parameters": {"required": ["a"]}}]}
TYPES = st.sampled_from([*CLASS_OF, "a type of next year"])
TEXTS = st.lists(
    st.sampled_from(
        ["<tool_call>\n", "\n</tool_call>", '{"name": "f", "arguments": {"a": 1}}', "<|im_end|>"]
    )
    | st.text(max_size=8)
).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
TRUTHS = st.lists(
    st.fixed_dictionaries(
        {"f": st.dictionaries(st.sampled_from("ab"), st.lists(VALUES, max_size=3))}
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(TYPES, TEXTS | st.lists(st.lists(TEXTS, max_size=3), max_size=3), TRUTHS, st.booleans())
def test_every_answer_has_a_class(kind: str, said: Any, truth: list[Any], capped: bool) -> None:
    found = classify(kind, said, QUESTION, truth, capped)
    assert isinstance(found, ErrorClass)
    assert capped or found is not E.RAN_AWAY
    if kind not in CLASS_OF and not capped:
        assert found is E.OTHER


# ----------------------------------------------------------------------------------- known damage


class Asked(NamedTuple):
    """A question with its right calls."""

    category: str
    question: dict[str, Any]
    truth: list[Any]
    calls: list[ToolCall]


Damage = Callable[[Asked], str | list[list[str]] | None]  # None: it cannot be done here


def changed(asked: Asked, **update: Any) -> str:
    return render_calls([asked.calls[0].model_copy(update=update), *asked.calls[1:]])


def argued(asked: Asked, key: str, value: Any) -> str:
    return changed(asked, arguments={**asked.calls[0].arguments, key: value})


def properties(asked: Asked) -> dict[str, Any]:
    tool = next(t for t in asked.question["function"] if t["name"] == asked.calls[0].name)
    found: dict[str, Any] = tool["parameters"]["properties"]
    return found


def typed(asked: Asked, *types: str) -> str | None:
    """Name an argument of the first call that has one of these types."""
    declared = properties(asked)
    return next((k for k in asked.calls[0].arguments if declared[k]["type"] in types), None)


def unharmed(asked: Asked) -> str | list[list[str]]:
    if asked.category in DIALOGUE:
        return turns(asked)
    return prose(asked) if asked.category in NO_CALL else render_calls(asked.calls)


def renamed(asked: Asked) -> str:
    return changed(asked, name=f"{asked.calls[0].name}_of_nobody")


def another_tool(asked: Asked) -> str | None:
    due = {call.name for call in asked.calls}
    names = [t["name"] for t in asked.question["function"] if t["name"] not in due]
    return changed(asked, name=names[0]) if names else None


def without_argument(asked: Asked) -> str | None:
    first, *others = asked.calls
    if not first.arguments:
        return None
    key = next(iter(first.arguments))
    left = {k: v for k, v in first.arguments.items() if k != key}
    return render_calls([first.model_copy(update={"arguments": left}), *others])


def one_more_argument(asked: Asked) -> str:
    return argued(asked, "of_nobody", 1)


def wrong_type(asked: Asked) -> str | None:
    key = typed(asked, "string", "String", "integer", "float", "boolean", "array", "tuple")
    return argued(asked, key, {"of": "nobody"}) if key else None


def wrong_item(asked: Asked) -> str | None:
    key = typed(asked, "array")
    if key is None or asked.category.startswith("simple_java"):
        return None
    if not asked.calls[0].arguments[key]:
        return None  # an empty list does not tell the type of its items
    item = "nobody" if properties(asked)[key]["items"]["type"] == "dict" else {"of": "nobody"}
    return argued(asked, key, [*asked.calls[0].arguments[key], item])


def wrong_text(asked: Asked) -> str | None:
    key = typed(asked, "string", "String")
    return argued(asked, key, "a word of nobody") if key else None


def wrong_number(asked: Asked) -> str | None:
    key = typed(asked, "integer", "float")
    if key is None or asked.category.startswith("simple_java"):
        return None
    return argued(asked, key, 987_654_321)


def without_call(asked: Asked) -> str | None:
    return render_calls(asked.calls[1:]) if len(asked.calls) > 1 else None


def call_twice(asked: Asked) -> str:
    return render_calls([asked.calls[0], *asked.calls])


def prose(_: Asked) -> str:
    return "I would rather talk about it."


def broken_json(asked: Asked) -> str:
    return render_calls(asked.calls).replace("}\n</tool_call>", "\n</tool_call>", 1)


def open_tag(asked: Asked) -> str:
    return render_calls(asked.calls).removesuffix("\n</tool_call>")


def no_object(asked: Asked) -> str:
    return "\n".join([render_calls(asked.calls), "<tool_call>\n[1, 2]\n</tool_call>"])


def any_call(asked: Asked) -> str | None:
    tools = asked.question["function"]
    return render_calls([ToolCall(name=tools[0]["name"], arguments={})]) if tools else None


def turns(asked: Asked, change: Callable[[str], str] = lambda text: text) -> list[list[str]]:
    right = dialogue_calls(asked.question, asked.truth)
    return [[change(render_calls(calls)), "Done."] for calls in right]


def silent_turns(asked: Asked) -> list[list[str]]:
    return [["I would rather talk about it."] for _ in asked.truth]


def broken_turns(asked: Asked) -> list[list[str]]:
    return turns(asked, lambda text: text.replace("}\n</tool_call>", "\n</tool_call>"))


def fewer_turns(asked: Asked) -> list[list[str]]:
    return turns(asked)[:-1]


def idle_turns(asked: Asked) -> list[list[str]]:
    """Call something harmless where a file is to be made."""
    idle = render_calls([ToolCall(name="pwd", arguments={})])
    return [[idle, "Done."] for _ in asked.truth]


NEEDS_CALL: Final = tuple(c for c in SINGLE_TURN if "relevance" not in c)
TO_CALL: Final = (*NEEDS_CALL, "live_relevance")
NO_CALL: Final = ("irrelevance", "live_irrelevance")
PARALLEL: Final = tuple(c for c in NEEDS_CALL if "parallel" in c)
DIALOGUE: Final = ("multi_turn_base",)
ANY: Final = (*TO_CALL, *NO_CALL, *DIALOGUE)


class Harm(NamedTuple):
    """A damage and the class that it must get; None where it does no harm."""

    damage: Damage
    categories: tuple[str, ...]
    found: ErrorClass | None
    capped: bool = False
    also: tuple[ErrorClass, ...] = ()  # what it may get too: it depends on the question


HARMS: Final = {
    "unharmed": Harm(unharmed, ANY, None),
    "renamed": Harm(renamed, NEEDS_CALL, E.HALLUCINATED_TOOL),
    "another tool": Harm(another_tool, NEEDS_CALL, E.WRONG_TOOL),
    "without argument": Harm(without_argument, NEEDS_CALL, E.MISSING_ARGUMENT),
    "more argument": Harm(one_more_argument, NEEDS_CALL, E.EXTRA_ARGUMENT),
    "wrong type": Harm(wrong_type, NEEDS_CALL, E.WRONG_TYPE),
    "wrong item": Harm(wrong_item, NEEDS_CALL, E.WRONG_TYPE),
    "wrong text": Harm(wrong_text, NEEDS_CALL, E.WRONG_VALUE),
    "wrong number": Harm(wrong_number, NEEDS_CALL, E.WRONG_VALUE),
    "wrong text, capped": Harm(wrong_text, NEEDS_CALL, E.WRONG_VALUE, True),
    "without call": Harm(without_call, PARALLEL, E.WRONG_COUNT),
    "call twice": Harm(call_twice, NEEDS_CALL, E.WRONG_COUNT),
    "call twice, capped": Harm(call_twice, NEEDS_CALL, E.RAN_AWAY, True),
    "prose": Harm(prose, TO_CALL, E.SHOULD_HAVE_CALLED),
    "prose, capped": Harm(prose, TO_CALL, E.RAN_AWAY, True),
    "broken JSON": Harm(broken_json, TO_CALL, E.UNPARSEABLE),
    "open tag": Harm(open_tag, TO_CALL, E.UNPARSEABLE),
    "open tag, capped": Harm(open_tag, TO_CALL, E.RAN_AWAY, True),
    "no object": Harm(no_object, NEEDS_CALL, E.UNPARSEABLE),
    "any call": Harm(any_call, NO_CALL, E.SHOULD_HAVE_ABSTAINED),
    "any call, capped": Harm(any_call, NO_CALL, E.SHOULD_HAVE_ABSTAINED, True),
    "unreadable call": Harm(open_tag, NO_CALL, None),  # to BFCL it is none
    "silent turns": Harm(silent_turns, DIALOGUE, E.EMPTY_TURN),
    "silent turns, capped": Harm(silent_turns, DIALOGUE, E.RAN_AWAY, True),
    "broken turns": Harm(broken_turns, DIALOGUE, E.UNPARSEABLE),
    "fewer turns": Harm(fewer_turns, DIALOGUE, E.FORCED_END),
    "idle turns": Harm(idle_turns, DIALOGUE, E.WRONG_STATE, also=(E.WRONG_RESULT,)),
}
SOME: Final = 30  # dialogues; they take long to score
UNFIT: Final = re.compile(  # no answer passes them, so no damage is the cause of their failure
    "simple_java_(36|64|65)|live_simple_(106-63|112-68)-0|live_multiple_(862-181-3|964-207-0)"
)


def asked_in(category: str) -> Iterator[Asked]:
    right = truths(category)
    for question in questions(category)[: SOME if category in DIALOGUE else None]:
        truth = right.get(question["id"], [])
        calls: list[ToolCall] = []
        if category in NEEDS_CALL:
            calls = oracle_calls(category, truth, question["function"])
        elif category not in DIALOGUE:
            calls = [ToolCall(name=t["name"], arguments={}) for t in question["function"][:1]]
        if not UNFIT.fullmatch(question["id"]):
            yield Asked(category, question, truth, calls)


def harm_all(root: Path, stage: str, categories: tuple[str, ...], shift: int) -> dict[str, str]:
    """Harm each question's right answer in one way, all ways in turn; give them by id."""
    harms: dict[str, str] = {}
    ids = {}
    for category in categories:
        fitting = deque(name for name, harm in HARMS.items() if category in harm.categories)
        fitting.rotate(shift)
        rows = []
        for asked in asked_in(category):
            for name in tuple(fitting):
                fitting.rotate(-1)
                if (said := HARMS[name].damage(asked)) is not None:
                    i, end = asked.question["id"], "length" if HARMS[name].capped else "stop"
                    rows.append({"id": i, "result": said, "finish_reason": ["stop", end]})
                    harms[i] = name
                    break
        ids[category] = tuple(row["id"] for row in rows)
        write_rows(result_file(root, stage, category), rows)
    write_plan(root, stage, Plan(ids=ids, max_tokens=CAP))
    return harms


class Harmed(NamedTuple):
    """Two models that were scored: "base" on everything, "sft" on less and harmed otherwise."""

    root: Path
    harms: dict[str, str]  # of base, by id
    scores: dict[str, ModelScores]


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Harmed:
    root = tmp_path_factory.mktemp("harmed")
    harms = harm_all(root, "base", ANY, 0)
    harm_all(root, "sft", ("simple_python", "parallel", "irrelevance", *DIALOGUE), 5)
    return Harmed(root, harms, score(root, ["base", "sft"]))


def test_each_damage_gets_its_class(harmed: Harmed) -> None:
    classes = error_classes(harmed.root, harmed.scores["base"])
    found = {i: kind for kind, ids in classes.items() for i in ids}
    assert sum(map(len, classes.values())) == len(found)
    seen = Counter(harmed.harms.values())
    assert set(seen) == set(HARMS)
    assert min(seen.values()) >= 3
    strange = {
        i: (name, found.get(i))
        for i, name in harmed.harms.items()
        if found.get(i) not in (HARMS[name].found, *HARMS[name].also)
    }
    assert strange == {}
    assert set(classes) == set(ErrorClass) - {E.OTHER, E.PROMPT_TOO_LONG}


def test_a_key_that_the_tool_requires_is_missing_even_where_another_call_may_lack_it() -> None:
    asked = next(a for a in asked_in("parallel") if a.question["id"] == "parallel_88")
    said = without_argument(asked)
    assert said
    error = "parallel_function_checker_no_order:cannot_find_match"
    assert classify(error, said, asked.question, asked.truth) is E.MISSING_ARGUMENT


def test_an_answer_that_is_gone_is_named(harmed: Harmed) -> None:
    scores = harmed.scores["sft"].model_copy(update={"model": "lost"})
    with pytest.raises(BenchError, match=r"simple_python_result.json has no answer to simple_pyt"):
        error_classes(harmed.root, scores)


# ------------------------------------------------------------------------------------ our metrics


UNRULY: Final = {  # BFCL's own answers break the schema that it shows: an enum, a type, a variable
    "parallel_multiple_21",
    "parallel_multiple_94",
    "live_simple_71-35-0",
    "live_multiple_87-38-4",
    "live_multiple_152-58-6",
    "live_multiple_552-153-1",
    "live_multiple_595-158-1",
    "live_multiple_596-158-2",
    "live_multiple_731-167-2",
    "live_multiple_733-167-4",
    "live_multiple_735-167-6",
    "live_multiple_750-169-5",
    "live_multiple_756-169-11",
    "live_multiple_835-178-10",
    "live_multiple_871-182-8",
    "live_multiple_947-197-0",
    "live_multiple_1038-265-0",
    "live_parallel_multiple_2-2-0",
}


def test_right_answers_have_the_right_form() -> None:
    grades, misfits = [], []
    for category in SINGLE_TURN:
        for asked in asked_in(category):
            if category == "live_relevance":
                continue  # BFCL does not say which call is right
            tools = shown_tools(asked.question, category)
            assert all(verify_spec(tool).ok for tool in tools.values())
            grade = grade_bfcl(asked.question, category, str(unharmed(asked)))
            grades.append(grade)
            if grade.schema_compliance is False and category != "live_relevance":
                misfits.append(asked.question["id"])
    counts = {metric: (count.hits, count.n) for metric, count in tally(grades).items()}
    due = 3641 - 240 - 884 - 16 - 7
    assert counts["protocol"] == counts["must_call"] == counts["json_validity"] == (due, due)
    assert counts["hallucinated_tool"] == (0, due)
    assert counts["abstention"] == (240 + 884, 240 + 884)
    assert counts["run_away"] == (0, 3641 - 16 - 7)
    assert counts["exact_call"] == (0, 0)
    assert counts["schema_compliance"] == (due - len(UNRULY), due)
    assert set(misfits) == UNRULY


def test_metrics_of_harmed_answers_count_the_harm(harmed: Harmed) -> None:
    found = bfcl_metrics(harmed.root, harmed.scores["base"])
    single = {i: HARMS[name] for i, name in harmed.harms.items() if not i.startswith(DIALOGUE)}
    capped = sum(harm.capped for harm in single.values())
    assert (found["run_away"].hits, found["run_away"].n) == (capped, len(single))
    assert found["must_call"].n + found["abstention"].n == len(single)
    prosaic = sum(harm.damage is prose for harm in single.values())
    assert found["must_call"].n - found["must_call"].hits == prosaic
    assert found["hallucinated_tool"].hits == sum(h.damage is renamed for h in single.values())
    assert "exact_call" not in found


# ---------------------------------------------------------------------------------- stage to stage


def model(name: str, passed: Mapping[str, Mapping[str, bool]]) -> ModelScores:
    categories = {
        category: CategoryScore(
            category=category,
            ids=tuple(found),
            passed=tuple(found.values()),
            errors={i: "value_error:string" for i, ok in found.items() if not ok},
        )
        for category, found in passed.items()
        if found
    }
    return ModelScores(model=name, categories=categories, max_tokens=CAP)


ANSWERED = st.fixed_dictionaries(
    {c: st.dictionaries(st.integers(0, 20).map(f"{c}_{{}}".format), st.booleans()) for c in "ab"}
)


@given(ANSWERED, ANSWERED)
def test_every_shared_question_moves_once(
    was: dict[str, dict[str, bool]], now: dict[str, dict[str, bool]]
) -> None:
    old, new = model("base", was), model("sft", now)
    found = moves(old, new)
    assert {c: set(by_id) for c, by_id in found.items()} == {
        c: was[c].keys() & now[c].keys() for c in found
    }
    there, back = (
        Counter(m for by_id in both.values() for m in by_id.values())
        for both in (found, moves(new, old))
    )
    shared = [(was[c][i], now[c][i]) for c in found for i in found[c]]
    assert there[Move.FIXED] - there[Move.BROKEN] == sum(b - a for a, b in shared)
    assert there[Move.FIXED] == back[Move.BROKEN]
    assert there[Move.STILL_WRONG] == back[Move.STILL_WRONG]


@given(ANSWERED, ANSWERED, st.integers(0, 3))
def test_examples_are_drawn_by_lot(
    was: dict[str, dict[str, bool]], now: dict[str, dict[str, bool]], seed: int
) -> None:
    found = moves(model("base", was), model("sft", now))
    drawn = draw_ids(found, seed)
    by_id = {i: move for some in found.values() for i, move in some.items()}
    kinds = Counter(by_id.values())
    shown = (Move.FIXED, Move.BROKEN, Move.STILL_WRONG)
    assert [by_id[i] for i in drawn] == [m for m in shown for _ in range(min(3, kinds[m]))]
    assert len(set(drawn)) == len(drawn)
    other_way = {c: dict(reversed(some.items())) for c, some in reversed(found.items())}
    assert draw_ids(other_way, seed) == drawn


@pytest.fixture(scope="module")
def errors(harmed: Harmed) -> Errors:
    return find_errors(harmed.root, harmed.scores, seed=0)


def record(harmed: Harmed, errors: Errors | None) -> dict[str, Record]:
    models = {name: scores.model_dump(mode="json") for name, scores in harmed.scores.items()}
    kept = {} if errors is None else {"errors": errors.model_dump(mode="json")}
    text = json.dumps({"stage": "60_eval", "result": {"models": models, **kept}})
    return {"60_eval": Record.model_validate_json(text)}


def test_the_record_gives_back_what_was_found(harmed: Harmed, errors: Errors) -> None:
    assert report.errors(record(harmed, errors)) == errors
    assert report.errors(record(harmed, None)) is None
    assert report.errors({}) is None


def test_examples_say_what_was_said(harmed: Harmed, errors: Errors) -> None:
    order = (Move.FIXED, Move.BROKEN, Move.STILL_WRONG)
    assert [e.move for e in errors.examples] == [move for move in order for _ in range(3)]
    for example in errors.examples:
        assert (example.before.stage, example.after.stage) == ("base", "sft")
        right = [shown.verdict.startswith("right") for shown in (example.before, example.after)]
        assert right == [example.move is Move.BROKEN, example.move is Move.FIXED]
        harm = HARMS[harmed.harms[example.id]]
        assert harm.found is None or harm.found in example.before.verdict


def test_tables_add_up(harmed: Harmed, errors: Errors) -> None:
    models = harmed.scores
    asked = sum(c.n for c in models["base"].categories.values())
    table = report.taxonomy(errors, models)
    assert sum(int(row[1].text.replace(",", "")) for row in table.rows) == sum(
        c.n - c.hits for c in models["base"].categories.values()
    )
    assert all(f"of {asked:,}" in row[1].small for row in table.rows)
    assert {row[3].text for row in table.rows} == {"not run"}

    flow = report.flow(models, "base", "sft")
    shared = sum(c.n for c in models["sft"].categories.values())
    columns = [[int(row[k].text.replace(",", "")) for row in flow.rows] for k in range(1, 6)]
    assert all(sum(column[:-1]) == column[-1] for column in columns)
    assert sum(column[-1] for column in columns[:4]) == columns[4][-1] == shared

    matrix = report.matrix(errors, models, "base", "sft")
    cells = [[int(cell.text.replace(",", "")) for cell in row[1:]] for row in matrix.rows]
    assert sum(map(sum, cells)) == shared
    assert sum(row[0] for row in cells[1:]) == columns[0][-1]
    assert sum(cells[0][1:]) == columns[1][-1]
    became = dict(zip(matrix.head[1:], map(sum, zip(*cells, strict=True)), strict=True))
    classes = {kind.value: len(ids) for kind, ids in errors.classes["sft"].items()}
    assert became == {"right": shared - sum(classes.values())} | classes


def test_an_older_record_has_tables_that_say_not_run(harmed: Harmed) -> None:
    for table in (
        report.taxonomy(None, harmed.scores),
        report.matrix(None, harmed.scores, "base", "sft"),
        report.flow(harmed.scores, "sft", "dpo"),
        report.bfcl_metrics(None),
    ):
        assert {cell.text for row in table.rows for cell in row[1:]} == {"not run"}
        assert "not run" in to_html(table)
    assert report.examples(None, "base", "sft").html == "<p>not run</p>"


def test_examples_cannot_break_the_page(errors: Errors) -> None:
    first = errors.examples[0]
    evil = '</pre><script src="https://example.org/x.js"></script>'
    shown = first.before.model_copy(update={"answer": evil, "verdict": evil})
    hostile = first.model_copy(update={"asked": evil, "id": evil, "before": shown, "after": shown})
    found = errors.model_copy(
        update={"examples": (hostile.model_copy(update={"after": first.after}),)}
    )
    html = report.examples(found, "base", "sft").html
    assert "<script" not in html
    assert html.count("</pre>") == 2


# ------------------------------------------------------------------------------------ the token cap


class Server(BaseHTTPRequestHandler):
    """Answers completions; those of prompts that want much are cut off."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        done = "length" if "much" in asked["prompt"] else "stop"
        choice = {"index": 0, "text": "I say it.", "finish_reason": done, "logprobs": None}
        frame = {"id": "1", "object": "text_completion", "created": 0, "model": asked["model"]}
        body = json.dumps({**frame, "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, *_: Any) -> None:
        """Say nothing."""


def test_the_server_says_who_ran_away() -> None:
    tool = ToolSpec(name="f", description="", parameters={"type": "object"})
    rows = [
        Conversation(
            id=n, source="test", query=query, tools={"f": tool}, gold_calls=(), answer="No."
        )
        for n, query in enumerate(("say much", "say little", "say much more"))
    ]
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        found = probe(rows, partial(complete, url, "m", max_tokens=9, clients=1))
        server.shutdown()
    assert (found.metrics["run_away"].hits, found.metrics["run_away"].n) == (2, 3)
    assert found.texts == ("I say it.",) * 3


@given(st.data())
def test_two_models_are_compared_on_the_rows_that_count(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.sampled_from(PRACTICE), min_size=1, max_size=30))

    def answers(name: str) -> Probed:
        right = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)), name)
        texts = [
            completion_of(row.gold_calls, row.answer) if good else "<tool_call>"
            for row, good in zip(rows, right, strict=True)
        ]
        return probe(rows, lambda _: [Completion(text, capped=False) for text in texts])

    before, after = answers("before"), answers("after")
    found = compare(rows, before, after)
    for metric, seen in found.items():
        was, now = before.metrics[metric], after.metrics[metric]
        assert (seen.before, seen.after, seen.n) == (was.hits, now.hits, was.n)
        assert seen.won - seen.lost == now.hits - was.hits
        assert seen.clusters == len(
            {row_cluster(r) for r in rows if bool(r.gold_calls) == (metric != "abstention")}
        )
    due = {bool(row.gold_calls) for row in rows}
    assert ("exact_call" in found, "abstention" in found) == (True in due, False in due)
    back = compare(rows, after, before)
    assert {m: (c.lost, c.won) for m, c in back.items()} == {
        m: (c.won, c.lost) for m, c in found.items()
    }
