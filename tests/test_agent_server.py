"""The agent on a real server: a model that errs on demand, tools in processes, traces that replay.

The model is the parrot (see `parrot.py`); all that it can say goes through the loop once.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from parrot import BROKEN, CASES, NOTES, PARROT, RIGHT, WRONG, write_notes
from served import Served

from toolpost.core.format import parse_answer
from toolpost.core.schema import ToolCall
from toolpost.serve.agent import (
    Called,
    Ended,
    Event,
    Limits,
    Observed,
    Outcome,
    Reason,
    Refused,
    Replied,
    Result,
    chat,
    run_agent,
)
from toolpost.serve.toolbox import Workers
from toolpost.serve.trace import TraceFile, read_trace, read_traces, replay

TOOLS = "parrot:parrot_tools"
MOST = 80  # tokens of a turn
CUT = 400  # characters of a result
LIMITS = Limits(observation_chars=CUT)
SLOW = LIMITS.model_copy(update={"call_s": 3.0})
SHORT = LIMITS.model_copy(update={"steps": 3})


class Played(NamedTuple):
    """A task after it was done."""

    result: Result
    events: list[Event]

    @property
    def ran(self) -> list[ToolCall]:
        """The calls that were executed."""
        found = [e for e in self.events if isinstance(e, Called)]
        return [ToolCall(name=e.name, arguments=e.arguments) for e in found]

    @property
    def refused(self) -> list[Refused]:
        """What the guard kept from being executed."""
        return [e for e in self.events if isinstance(e, Refused)]

    @property
    def statuses(self) -> list[str]:
        """How the executed calls went."""
        return [e.observation.status for e in self.events if isinstance(e, Observed)]

    @property
    def said(self) -> list[str]:
        """The texts of the model's turns."""
        return [e.reply.text for e in self.events if isinstance(e, Replied)]


async def play(served: Served, box: Workers, name: str, path: Path) -> Played:
    """Do the task of a case, and check that its trace tells the same."""
    limits = {"slow": SLOW, "slow and quick": SLOW, "one after the other": SHORT}
    events: list[Event] = []
    async with chat(served.base_url, served.model, box.tools, max_tokens=MOST) as ask:
        with TraceFile(path) as file:

            def record(event: Event) -> None:
                file(event)
                events.append(event)

            task, limit = CASES[name].task, limits.get(name, LIMITS)
            result = await run_agent(task, ask, box, limit, model=served.model, record=record)
    trace = read_trace(path)
    assert list(trace.events) == events
    assert replay(trace) == result
    return Played(result, events)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server, which is told to end when all has been asked."""
    with Served(PARROT, tmp_path_factory.mktemp("served")) as running:
        yield running
        running.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="module")
def played(
    served: Served, notes: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Played]:
    """Every case, done by as many agents at once."""
    traces = tmp_path_factory.mktemp("traces")

    async def main() -> list[Played]:
        async with Workers(TOOLS, notes, most=3) as box:
            places = {name: traces / f"{n}.jsonl" for n, name in enumerate(CASES)}
            return await asyncio.gather(*(play(served, box, *one) for one in places.items()))

    found = dict(zip(CASES, asyncio.run(main()), strict=True))
    assert children(served) == []
    return found


def children(served: Served) -> list[str]:
    """Name our processes but the server's."""
    served.note_family()
    known = {served.process.pid, *(one.pid for one in served.family)}
    found = psutil.Process().children(recursive=True)
    return [" ".join(one.cmdline()) for one in found if one.pid not in known]


def meant(text: str) -> list[ToolCall]:
    return list(parse_answer(text).calls)


# What ends with an answer


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_executed_and_answered(name: str, played: dict[str, Played]) -> None:
    one, says = played[name], CASES[name].says
    assert (one.result.outcome, one.result.answer) == (Outcome.ANSWERED, says[-1])
    wanted = [call for said in says[:-1] for call in meant(said)]
    if name == "same call twice":
        assert [e.reason for e in one.refused] == [Reason.REPEATED]
        wanted.pop()
    else:
        assert one.refused == []
    assert one.ran == wanted
    assert (one.result.steps, one.result.calls) == (len(says), len(wanted))
    assert (one.result.repairs, one.result.repaired) == (0, 0)
    assert one.result.completion_tokens > 0


@pytest.mark.parametrize(
    "name", sorted((BROKEN | WRONG).keys() - {"never repaired", "never right"})
)
def test_what_is_wrong_never_runs_and_is_repaired(name: str, played: dict[str, Played]) -> None:
    one, says = played[name], CASES[name].says
    assert (one.result.outcome, one.result.answer) == (Outcome.ANSWERED, says[-1])
    assert (one.result.repairs, one.result.repaired) == (1, 1)
    reasons = {"unknown tool": "unknown_tool", "obeys a note": "unknown_tool"}
    reason = "unparseable" if name in BROKEN else reasons.get(name, "schema_violation")
    assert [e.reason for e in one.refused] == [reason]
    assert "not executed" in one.refused[0].told
    right = {
        "one wrong of two": [*meant(says[0])[:1], *meant(says[1])],
        "unknown tool": [],
        "obeys a note": meant(says[0]),
    }
    assert one.ran == right.get(name, meant(says[1]))
    assert set(one.statuses) <= {"ok"}


def test_the_reason_names_the_tools_that_there_are(played: dict[str, Played]) -> None:
    told = played["unknown tool"].refused[0].told
    assert all(name in told for name in ("weather", "add", "read_note", "wait"))


def test_a_call_that_hangs_holds_up_neither_the_others_nor_the_answer(
    played: dict[str, Played],
) -> None:
    assert played["slow"].statuses == ["timeout"]
    assert played["slow and quick"].statuses == ["timeout", "ok"]


def test_a_tool_that_fails_is_an_observation(played: dict[str, Played]) -> None:
    one = played["no such note"]
    assert one.statuses == ["error"]
    assert one.result.repairs == 0


def test_a_note_that_gives_orders_is_data(played: dict[str, Played], notes: Path) -> None:
    one = played["hostile note"]
    assert [call.name for call in one.ran] == ["read_note"]
    observed = [e.observation.text for e in one.events if isinstance(e, Observed)]
    assert json.loads(observed[0]) == NOTES["letter"]
    # Even a model that obeys gets nowhere.
    assert [call.name for call in played["obeys a note"].ran] == ["read_note"]
    assert sorted(p.stem for p in notes.iterdir()) == sorted(NOTES)


def test_a_long_result_is_cut_with_a_notice(played: dict[str, Played]) -> None:
    observed = [e.observation.text for e in played["long note"].events if isinstance(e, Observed)]
    assert len(NOTES["book"]) > 10 * CUT
    assert len(observed[0]) == CUT
    assert "[cut: " in observed[0]


def test_what_is_only_thought_of_is_not_done(played: dict[str, Played]) -> None:
    one = played["inside a thought"]
    assert (one.result.outcome, one.ran) == (Outcome.ANSWERED, [])
    assert "<" not in one.result.answer


def test_an_empty_answer_is_an_answer(played: dict[str, Played]) -> None:
    assert played["empty"].result.outcome == Outcome.ANSWERED
    assert played["empty"].result.answer == ""


# What ends without one


@pytest.mark.parametrize("name", ["never repaired", "never right"])
def test_patience_ends(name: str, played: dict[str, Played]) -> None:
    one = played[name]
    assert (one.result.outcome, one.ran) == (Outcome.UNREPAIRED, [])
    assert one.result.steps == LIMITS.repairs + 1
    assert (one.result.repairs, one.result.repaired) == (LIMITS.repairs, 0)


def test_the_same_call_again_and_again_runs_once(played: dict[str, Played]) -> None:
    one = played["again and again"]
    assert (one.result.outcome, len(one.ran)) == (Outcome.REPEATED, 1)
    assert [e.reason for e in one.refused] == [Reason.REPEATED] * LIMITS.repeats


def test_the_turns_are_counted(played: dict[str, Played]) -> None:
    one = played["one after the other"]
    assert one.result.outcome == Outcome.STEPS
    assert one.result.steps == len(one.ran) == SHORT.steps
    assert one.ran == [
        call for said in CASES["one after the other"].says[: SHORT.steps] for call in meant(said)
    ]


@pytest.mark.parametrize("name", ["endless", "endless call", "endless thought"])
def test_an_answer_without_end_is_none(name: str, played: dict[str, Played]) -> None:
    one = played[name]
    assert (one.result.outcome, one.result.answer) == (Outcome.TRUNCATED, "")
    assert (one.result.completion_tokens, one.ran) == (MOST, [])


def test_every_outcome_but_those_from_outside_was_seen(played: dict[str, Played]) -> None:
    outside = {Outcome.TIME, Outcome.CANCELLED, Outcome.REJECTED, Outcome.UNREACHABLE}
    assert {one.result.outcome for one in played.values()} == set(Outcome) - outside


# What ends from outside


def test_the_seconds_for_all(served: Served, notes: Path, tmp_path: Path) -> None:
    async def main() -> Result:
        async with (
            Workers(TOOLS, notes) as box,
            chat(served.base_url, served.model, box.tools, max_tokens=MOST) as ask,
        ):
            limits = Limits(total_s=5, call_s=60)
            with TraceFile(tmp_path / "t.jsonl") as record:
                return await run_agent(CASES["slow"].task, ask, box, limits, record=record)

    result = asyncio.run(main())
    assert (result.outcome, result.calls) == (Outcome.TIME, 1)
    assert replay(read_trace(tmp_path / "t.jsonl")) == result
    assert children(served) == []


def test_whoever_cancels_leaves_no_process(served: Served, notes: Path, tmp_path: Path) -> None:
    path, called = tmp_path / "t.jsonl", asyncio.Event()

    async def main() -> None:
        async with (
            Workers(TOOLS, notes) as box,
            chat(served.base_url, served.model, box.tools, max_tokens=MOST) as ask,
        ):
            with TraceFile(path) as file:

                def record(event: Event) -> None:
                    file(event)
                    if isinstance(event, Called):
                        called.set()

                limits = Limits(call_s=60)
                run = run_agent(CASES["slow"].task, ask, box, limits, record=record)
                task = asyncio.create_task(run)
                await called.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(main())
    assert replay(read_trace(path)).outcome == Outcome.CANCELLED
    assert children(served) == []


@pytest.mark.parametrize(
    ("model", "most", "outcome", "word"),
    [
        ("another model", MOST, Outcome.UNREACHABLE, "not served here"),
        ("parrot", 10**6, Outcome.REJECTED, "max_tokens"),
    ],
)
def test_an_endpoint_that_refuses_says_why(
    model: str,
    most: int,
    outcome: Outcome,
    word: str,
    served: Served,
    notes: Path,
    tmp_path: Path,
) -> None:
    async def main() -> Result:
        async with (
            Workers(TOOLS, notes) as box,
            chat(served.base_url, model, box.tools, max_tokens=most) as ask,
        ):
            with TraceFile(tmp_path / "t.jsonl") as record:
                return await run_agent("Hello", ask, box, record=record)

    result = asyncio.run(main())
    assert (result.outcome, result.steps) == (outcome, 0)
    trace = read_trace(tmp_path / "t.jsonl")
    end = trace.events[-1]
    assert isinstance(end, Ended)
    assert word in end.detail
    assert replay(trace) == result


# Many, and the command


def test_many_agents_share_server_tools_and_file(
    served: Served, notes: Path, tmp_path: Path, played: dict[str, Played]
) -> None:
    path = tmp_path / "traces.jsonl"
    names = [n for n in CASES if not n.startswith("slow")][:24]
    threads = set(threading.enumerate())

    async def one(box: Workers, name: str) -> Result:
        async with chat(served.base_url, served.model, box.tools, max_tokens=MOST) as ask:
            with TraceFile(path) as record:
                task = CASES[name].task
                return await run_agent(task, ask, box, LIMITS, model=served.model, record=record)

    async def main() -> list[Result]:
        async with Workers(TOOLS, notes, most=2) as box:
            return await asyncio.gather(*(one(box, name) for name in names))

    results = dict(zip(names, asyncio.run(main()), strict=True))
    assert results == {name: played[name].result for name in names}
    traces = read_traces(path)
    assert len(traces) == len(names)
    assert sorted(map(str, map(replay, traces))) == sorted(map(str, results.values()))
    assert children(served) == []
    assert set(threading.enumerate()) <= threads


def test_the_command_answers_and_its_trace_plays_again(served: Served, tmp_path: Path) -> None:
    command, trace = served.command[0], tmp_path / "t.jsonl"
    where = ("--base-url", served.base_url, "--model", served.model, "--trace", str(trace))
    limits = ("--max-tokens", str(MOST))
    done = [
        subprocess.run(
            [command, "agent", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        for words in ((CASES["endless"].task, *where, *limits), ("replay", str(trace)))
    ]
    end = read_trace(trace).events[-1]
    assert isinstance(end, Ended)
    outcome = end.result.outcome
    wanted = 0 if outcome is Outcome.ANSWERED else 1
    assert [one.returncode for one in done] == [wanted, 0], [one.stderr for one in done]
    assert all(outcome in one.stdout for one in done)
