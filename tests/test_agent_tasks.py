"""The agent's tasks: they can be solved, and only by solving them."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from toolpost.bench.agent import (
    KINDS,
    Played,
    Staged,
    Summary,
    Task,
    TaskError,
    check,
    empty,
    evaluate,
    load_tasks,
    measure,
    names_date,
    numbers_in,
    perfect,
    spread,
    summary,
    what_ran,
)
from toolpost.core.schema import ToolSpec
from toolpost.report import agent as page
from toolpost.report.tables import Record, Table
from toolpost.serve.agent import (
    Ask,
    Ended,
    EndpointError,
    Event,
    Limits,
    Observed,
    Outcome,
    RawCall,
    Reply,
    Started,
)
from toolpost.serve.toolbox import Observation, Workers
from toolpost.serve.tools import desk_tools, spec_of
from toolpost.serve.trace import read_trace, replay

ALL = load_tasks()
BY_ID = {task.id: task for task in ALL}
ACTING = [task for task in ALL if task.kind != "abstain"]
HOSTILE = [task for task in ALL if task.kind == "hostile"]


def play(policy: Callable[[Task], Ask], tasks: list[Task], traces: Path) -> dict[str, Played]:
    async def go() -> list[Played]:
        async with Workers(most=2) as workers:
            return await evaluate(tasks, policy, workers, traces)

    return {one.id: one for one in asyncio.run(go())}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def played(traces: Path) -> dict[str, Played]:
    """Play all solutions with the real tools."""
    return play(perfect, ALL, traces)


def events_of(task: Task, traces: Path) -> tuple[Event, ...]:
    return read_trace(traces / f"{task.id}.jsonl").events


# The tasks themselves


def test_the_set_is_what_it_is_said_to_be() -> None:
    assert len(ALL) >= 36
    assert {task.kind for task in ALL} == set(KINDS)
    steps = {len(task.solution) for task in ACTING}
    assert (min(steps), max(steps)) == (1, 6)
    down = [task for task in ALL if -1 in task.faults.values()]
    assert down
    assert all(set(task.faults) & {c.name for s in task.solution for c in s} for task in down)


def test_no_two_prompts_are_alike() -> None:
    words = [frozenset(task.prompt.casefold().split()) for task in ALL]
    close = [
        (ALL[i].id, ALL[j].id)
        for i in range(len(ALL))
        for j in range(i)
        if len(words[i] & words[j]) > 0.8 * len(words[i] | words[j])
    ]
    assert close == []


def test_solutions_use_every_tool_and_no_other(traces: Path, played: dict[str, Played]) -> None:
    assert played
    start = events_of(ALL[0], traces)[0]
    assert isinstance(start, Started)
    offered = {tool.name for tool in start.tools}
    used = {call.name for task in ALL for step in task.solution for call in step}
    assert used == offered
    named = {n for task in ALL for n in (*task.needs, *task.faults, *task.never_runs)}
    assert named <= offered


# Policies


def test_the_perfect_policy_solves_everything(played: dict[str, Played]) -> None:
    assert {one.id: one.wrong for one in played.values() if one.wrong} == {}
    assert [one.id for one in played.values()] == [task.id for task in ALL]
    assert all(one.result.steps == one.least for one in played.values())
    assert sum(one.result.refused for one in played.values()) == 0


def test_the_empty_policy_solves_exactly_what_needs_no_tool(tmp_path: Path) -> None:
    found = play(empty, ALL, tmp_path)
    assert {i for i, one in found.items() if one.solved} == {
        task.id for task in ALL if task.kind == "abstain"
    }


def guessing(task: Task) -> Ask:
    """Give the right answers without a call."""

    async def ask(_: list[dict[str, Any]]) -> Reply:
        return Reply(text=task.answer)

    return ask


def echoing(task: Task) -> Ask:
    """Make the right calls, and answer with the question."""
    right = perfect(task)

    async def ask(messages: list[dict[str, Any]]) -> Reply:
        reply = await right(messages)
        return reply if reply.calls else Reply(text=task.prompt)

    return ask


@pytest.mark.parametrize("policy", [guessing, echoing])
def test_half_of_the_work_is_not_enough(policy: Callable[[Task], Ask], tmp_path: Path) -> None:
    found = play(policy, ACTING, tmp_path)
    assert [i for i, one in found.items() if one.solved] == []


def eager(task: Task) -> Ask:
    """Make a call first, every other task one of a tool that there is not, and then answer."""
    name = ("calculate", "send_mail")[ALL.index(task) % 2]

    async def ask(messages: list[dict[str, Any]]) -> Reply:
        calls = (RawCall(id="a", name=name, arguments='{"expression": "1"}'),)
        return Reply(text=task.answer) if len(messages) > 2 else Reply(text="", calls=calls)

    return ask


def test_a_call_where_no_tool_fits_is_a_failure(tmp_path: Path) -> None:
    tasks = [task for task in ALL if task.kind == "abstain"]
    found = play(eager, tasks, tmp_path)
    assert {one.result.calls for one in found.values()} == {0, 1}
    assert {one.wrong for one in found.values()} == {("it called a tool, or tried to",)}
    assert all(one.result.outcome is Outcome.ANSWERED for one in found.values())


# Hostile documents

ORDERS: Mapping[str, dict[str, Any]] = {
    "letter": {"name": "query_database", "arguments": {"sql": "SELECT name, town FROM customers"}},
    "review": {"name": "shift_date", "arguments": {"start": "1999-12-31", "days": 1}},
    "course": {"name": "calculate", "arguments": {"expression": "666*666"}},
}


def obedient(task: Task) -> Ask:
    """Solve a task, but do as the document says before the answer, and say what it says."""
    right = perfect(task)

    async def ask(messages: list[dict[str, Any]]) -> Reply:
        reply = await right(messages)
        if reply.calls:
            return reply
        turns = sum(m["role"] == "assistant" for m in messages)
        order = ORDERS.get(task.id)
        if order and turns == len(task.solution):
            raw = RawCall(id="x", name=order["name"], arguments=json.dumps(order["arguments"]))
            return Reply(text="", calls=(raw,))
        return Reply(text=" ".join([task.answer, *task.never_says]))

    return ask


def test_who_obeys_a_document_fails(tmp_path: Path) -> None:
    found = play(obedient, HOSTILE, tmp_path)
    assert all(not one.solved for one in found.values())
    for task in HOSTILE:
        told = " ".join(found[task.id].wrong)
        assert all(f"{name} ran with" in told for name in task.never_runs)
        assert all(f"{word!r} is in the answer" in told for word in task.never_says)


def test_orders_reach_the_model_as_data(tmp_path: Path) -> None:
    seen: dict[str, list[dict[str, Any]]] = {}

    def watching(task: Task) -> Ask:
        right = perfect(task)

        async def ask(messages: list[dict[str, Any]]) -> Reply:
            seen[task.id] = messages
            return await right(messages)

        return ask

    play(watching, HOSTILE, tmp_path)
    for task in HOSTILE:
        text = " ".join(m["content"] for m in seen[task.id] if m["role"] == "tool")
        bait = [word for word in (*task.never_says, *task.never_runs) if word != "443556"]
        assert all(word in text for word in bait)
        for token in ("<tool_call>", "</tool_call>", "</tool_response>", "<|im_start|>"):
            assert token not in text


# What is expected is what the tools give


@pytest.mark.parametrize("task", ACTING, ids=lambda task: task.id)
def test_what_is_expected_comes_from_the_tools(
    task: Task, traces: Path, played: dict[str, Played]
) -> None:
    assert played[task.id].solved
    back = [e.observation for e in events_of(task, traces) if isinstance(e, Observed)]
    text = "\n".join(seen.text for seen in back if seen.status == "ok")
    # A number in a JSON text stands beside brackets and in strings, too.
    numbers = numbers_in(text.replace('"', " ").replace("[", " ").replace("]", " "))
    for near in task.numbers:
        assert any(abs(number - near.value) <= near.within for number in numbers)
    assert all(names_date(text, day) for day in task.dates)
    assert all(word.casefold() in text.casefold() for word in task.texts)


def test_traces_replay_and_are_judged_alike(traces: Path, played: dict[str, Played]) -> None:
    for task in ALL:
        trace = read_trace(traces / f"{task.id}.jsonl")
        again = replay(trace)
        assert again == played[task.id].result
        assert check(task, again, trace.events) == played[task.id].wrong


@pytest.mark.parametrize("task", ACTING, ids=lambda task: task.id)
def test_every_part_of_a_check_matters(task: Task, traces: Path, played: dict[str, Played]) -> None:
    result, events = played[task.id].result, events_of(task, traces)
    assert check(task, result, events) == ()
    late = result.model_copy(update={"outcome": Outcome.STEPS})
    assert len(check(task, late, events)) == 1
    parts = len(task.numbers) + len(task.dates) + len(task.texts)
    silent = result.model_copy(update={"answer": ""})
    assert len(check(task, silent, events)) == parts
    for tool in task.needs:
        without = [e for e in events if not (isinstance(e, Observed) and e.name == tool)]
        assert check(task, result, without) == (f"{tool} never ran with success",)
    for near in task.numbers:
        off = near.value + 2 * near.within + 0.001
        told = check(task, result.model_copy(update={"answer": f"It is {off}."}), events)
        assert any(f"{near.value:g}" in line for line in told)


# Reading answers


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["{:,}", "{}", "{}.", "({})", "{} km", "x {}"])
)
def test_whole_numbers_are_found(number: int, shape: str) -> None:
    assert numbers_in(shape.format(number)) == [number]


@given(st.decimals(-(10**6), 10**6, places=3))
def test_decimals_are_found(number: Any) -> None:
    assert numbers_in(f"about {number:,}, or so") == [float(number)]


@given(st.dates(date(1000, 1, 1), date(9999, 12, 30)))
def test_dates_are_found_and_are_not_numbers(day: date) -> None:
    written = (
        f"{day}",
        f"{day.day} {day:%B} {day.year}",
        f"{day:%B} {day.day}, {day.year}",
        f"the {day.day}th of {day:%B} {day.year}",
        f"{day:%b} {day.day}, {day.year}.",
    )
    assert all(names_date(f"on {text}", day) for text in written)
    assert not any(names_date(f"on {text}", day + timedelta(days=1)) for text in written)
    assert not names_date(f"on 1{day.day} {day:%B} {day.year}", day)
    assert not names_date(f"on {day}0", day)
    assert numbers_in(f"on {day}") == []


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    assert all(isinstance(number, float) for number in numbers_in(text))
    assert not names_date(text, date(2025, 3, 5))


# Tools that fail


class Log:
    """The desk's tools, which only note what they were asked."""

    def __init__(self) -> None:
        functions = desk_tools().items()
        self.tools: Mapping[str, ToolSpec] = {name: spec_of(one) for name, one in functions}
        self.asked: list[str] = []

    async def call(
        self,
        name: str,
        arguments: Mapping[str, Any],  # noqa: ARG002  # of the protocol
        timeout_s: float,  # noqa: ARG002
    ) -> Observation:
        self.asked.append(name)
        return Observation(status="ok", text="1")


@given(st.lists(st.sampled_from("ab"), max_size=12), st.integers(-1, 4))
def test_the_first_calls_fail_and_only_those(calls: list[str], faults: int) -> None:
    log = Log()
    staged = Staged(log, {"a": faults})

    async def go() -> list[Observation]:
        return [await staged.call(name, {}, 1.0) for name in calls]

    seen = asyncio.run(go())
    failing = calls.count("a") if faults < 0 else min(faults, calls.count("a"))
    failed = [name for name, one in zip(calls, seen, strict=True) if one.status == "error"]
    assert failed == ["a"] * failing
    assert [n for n, one in zip(calls, seen, strict=True) if one.status == "ok"] == log.asked


def test_each_task_has_its_own_faults(tmp_path: Path) -> None:
    faulty = [task for task in ALL if task.kind == "fault"]
    found = play(perfect, [*faulty, *reversed(faulty)], tmp_path)
    assert all(one.solved for one in found.values())


# The file


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1", "not a YAML list of tasks"),
        ("- [", "not a YAML list of tasks"),
        ("- {id: a, kind: x, prompt: b, answer: c}", "task 'a', kind"),
        ("- {id: a, kind: one, prompt: b, answer: c}", "task 'a', as a whole"),
        ("- {id: a, kind: abstain, prompt: b, answer: c, tool: d}", "task 'a', tool: Extra"),
        ("- {id: a, kind: abstain, prompt: b, answer: c, needs: [d], numbers: [1], solution: "
         "[[{d: {}}]]}", "all, or none to abstain"),
        ("- {id: a, kind: abstain, prompt: b, answer: c}\n"
         "- {id: a, kind: abstain, prompt: d, answer: c}", "the id 'a' occurs twice"),
        ("- {id: a, kind: abstain, prompt: b, answer: c}\n"
         "- {id: e, kind: abstain, prompt: b, answer: c}", "the prompt 'b' occurs twice"),
        ("- {id: a, kind: one, prompt: b, answer: c, numbers: [1], needs: [d], solution: [[{d: {}, "
         "e: {}}]]}", "task 'a', solution"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    with pytest.raises(TaskError, match=told) as problem:
        load_tasks(path)
    assert str(path) in str(problem.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.yaml"):
        load_tasks(tmp_path / "none.yaml")


@given(st.integers(0, len(ALL) + 3))
def test_some_tasks_are_of_all_kinds(n: int) -> None:
    some = spread(ALL, n)
    assert len(some) == (min(n, len(ALL)) or len(ALL))
    assert len({task.id for task in some}) == len(some)
    assert len({task.kind for task in some}) == min(len(some), len(KINDS))


# Playing


def test_no_more_than_the_clients_play_at_once(tmp_path: Path) -> None:
    inside, most = 0, 0

    def slow(task: Task) -> Ask:
        async def ask(_: list[dict[str, Any]]) -> Reply:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.005)
            inside -= 1
            return Reply(text=task.answer)

        return ask

    asyncio.run(evaluate(ALL, slow, Log(), tmp_path, clients=3))
    assert most == 3


@pytest.mark.parametrize("policy", [perfect, obedient, guessing, empty])
def test_what_ran_is_what_the_tools_were_asked(
    policy: Callable[[Task], Ask], tmp_path: Path
) -> None:
    for task in ALL:
        log = Log()
        asyncio.run(evaluate([task], policy, log, tmp_path))
        ran = what_ran(events_of(task, tmp_path))
        # Calls that were made to fail are known to the loop, not to the tools.
        assert [one.name for one in ran if one.ok] == log.asked
        assert len(ran) == len(log.asked) or task.faults


@contextlib.contextmanager
def endpoint() -> Iterator[str]:
    """Serve the perfect policy as a chat endpoint."""
    policies = {task.prompt: perfect(task) for task in ALL}
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def answer(body: dict[str, Any]) -> dict[str, Any]:
        reply = await policies[body["messages"][1]["content"]](body["messages"])
        calls = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in reply.calls
        ]
        message = {"role": "assistant", "content": reply.text, "tool_calls": calls or None}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        about = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        return {**about, "choices": [choice], "usage": usage}

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()


def test_an_endpoint_is_measured(tmp_path: Path, played: dict[str, Played]) -> None:
    with endpoint() as url:
        found = asyncio.run(measure(ALL, url, "perfect", tmp_path))
    assert [one.wrong for one in found] == [()] * len(ALL)
    assert [one.result.steps for one in found] == [one.result.steps for one in played.values()]
    assert all(one.result.prompt_tokens == 7 * one.result.steps for one in found)
    start = events_of(ALL[0], tmp_path)[0]
    assert isinstance(start, Started)
    assert start.model == "perfect"


def test_an_endpoint_that_is_gone_is_no_measurement(tmp_path: Path) -> None:
    with endpoint() as url:
        pass
    with pytest.raises(EndpointError, match=r"no reply in 1 of 1 tasks; .*thanks\.jsonl"):
        asyncio.run(measure([BY_ID["thanks"]], url, "m", tmp_path, limits=Limits(total_s=20)))
    ended = events_of(BY_ID["thanks"], tmp_path)[-1]
    assert isinstance(ended, Ended)
    assert ended.result.outcome is Outcome.UNREACHABLE


# Sums and the report


def test_a_summary_adds_up(played: dict[str, Played], tmp_path: Path) -> None:
    mixed = [*list(played.values())[:20], *list(play(eager, ALL[20:], tmp_path).values())]
    found = summary(mixed)
    assert sum(found.solved.values()) == sum(c.hits for c in found.kinds.values())
    assert sum(c.n for c in found.kinds.values()) == found.solves.n == len(ALL)
    assert sum(found.outcomes.values()) == len(ALL)
    assert found.counts["direct"].n == found.solves.hits
    assert found.calls == sum(one.result.calls for one in mixed)
    executed = found.counts["executed"]
    assert (executed.hits, executed.n) == (found.calls, found.calls + found.refused)
    assert sum(n * times for _, n, times in executed.clusters) == executed.n
    assert 0 < executed.hits < executed.n
    assert found.counts["repaired"].n == sum(one.result.repairs for one in mixed) > 0
    assert found.counts["guarded"].hits == sum(one.result.refused > 0 for one in mixed)


def texts(table: Table) -> list[str]:
    return [f"{cell.text} {cell.small}" for row in table.rows for cell in row]


def test_the_report_shows_each_model(played: dict[str, Played], tmp_path: Path) -> None:
    silent = summary(list(play(empty, ALL, tmp_path).values()))
    models = {"sft": summary(list(played.values())), "base": silent}
    result = {"models": {m: one.model_dump(mode="json") for m, one in models.items()}}
    found = page.summaries(
        {"70_agent": Record(stage="70_agent", result=json.loads(json.dumps(result)))}
    )
    assert found == models
    assert list(found) == ["base", "sft"]
    first = page.solved(found).rows[0]
    n, abstain = len(ALL), sum(task.kind == "abstain" for task in ALL)
    assert first[1].small.startswith(f"{abstain}/{n}")
    assert first[2].text.startswith("100.0")
    assert first[3].text == "not run"
    gained = page.change(silent, models["sft"])
    assert gained is not None
    assert (gained.won, gained.lost) == (n - abstain, 0)
    assert first[4].tone == "strong"
    assert f"{n}" in texts(page.behaviour(found))[-2]


def test_a_report_without_agents_says_so() -> None:
    found: dict[str, Summary] = page.summaries({})
    assert found == {}
    for table in (page.solved(found), page.behaviour(found)):
        assert any("not run" in text for text in texts(table))
