"""The practice services: every call is run, every result is real, every goal is reached."""

from __future__ import annotations

import collections
import copy
import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from toolpost.core.schema import ToolCall, ToolSpec
from toolpost.core.verify import verify_calls, verify_spec
from toolpost.data.scenes import (
    PlanError,
    Rows,
    Scene,
    Service,
    ServiceError,
    State,
    Step,
    play,
    say,
)
from toolpost.data.services import SERVICES, Dialogue, dialogue, replay

MADE = [dialogue(random.Random(f"test:{at}")) for at in range(3000)]
ROOT = Path(__file__).parents[1]


def _steps(made: Dialogue) -> Iterator[Step]:
    for turn in made.turns:
        yield from turn.steps


def _calls(made: Dialogue) -> list[dict[str, Any]]:
    return [call for step in _steps(made) for call in step.calls]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _refused(made: Dialogue) -> list[str]:
    results = [result for step in _steps(made) for result in step.results]
    return [r["error"] for r in results if isinstance(r, dict) and "error" in r]


def test_every_call_is_valid_for_the_tools_on_offer() -> None:
    for made in MADE:
        tools = {tool["name"]: ToolSpec(**tool) for tool in made.tools}
        calls = [ToolCall(**call) for call in _calls(made)]
        assert verify_calls(calls, tools).ok, made


def test_every_listing_is_a_schema_under_a_name_of_its_own() -> None:
    names = [name for service in SERVICES.values() for name in service.listed]
    assert len(names) == len(set(names))
    for service in SERVICES.values():
        assert 4 <= len(service.tools) <= 6, service.name
        for listing in service.listed.values():
            assert verify_spec(ToolSpec(**listing.spec)).ok
            entries = listing.spec["parameters"]["properties"]
            assert all(entry["description"] for entry in entries.values())


def test_every_result_comes_back_when_the_calls_are_run_again() -> None:
    assert all(map(replay, MADE))


def test_a_changed_call_is_found_out() -> None:
    """Another argument gives another result, so the results are those of these calls."""
    changed = 0
    for made in MADE[:300]:
        wrong = copy.deepcopy(made)
        arguments = _calls(wrong)[0]["arguments"]
        for name, value in arguments.items():
            if isinstance(value, str) and re.fullmatch(r"[A-Z]{1,2}-?\d{2,}", value):
                arguments[name] = value + "0"
                assert not replay(wrong), made
                changed += 1
                break
    assert changed > 50


@dataclass
class Lamp(State):
    lamps: Rows


@pytest.fixture
def lamp() -> Service[Lamp]:
    made = Service("one lamp", "one", lambda rng: Lamp(rng, {"lamp": {"on": False}}))

    @made.tool("flick_switch")
    def press_button(at: Lamp, on: Annotated[bool, "On or off."]) -> Any:
        """Switch the lamp."""
        if at.lamps["lamp"]["on"] == on:
            raise ServiceError("It is so already.")
        at.lamps["lamp"]["on"] = on
        return {"on": on}

    return made


def test_a_plan_that_leaves_another_state_than_wanted_raises(lamp: Service[Lamp]) -> None:
    @lamp.plan
    def forgets(s: Scene[Lamp]) -> None:
        s.user("switch the lamp on")
        s.call("press_button", on=True)
        s.reply("It is on.")

    with pytest.raises(PlanError, match=r"one lamp: .*True.* is not .*False"):
        play(lamp, random.Random(0))


@pytest.mark.parametrize(("on", "method"), [(False, "call"), (True, "refused")])
def test_a_plan_that_errs_about_a_refusal_raises(
    lamp: Service[Lamp], on: bool, method: str
) -> None:
    @lamp.plan
    def errs(s: Scene[Lamp]) -> None:
        s.user("switch the lamp")
        getattr(s, method)("press_button", on=on)
        s.reply("Done.")

    with pytest.raises(PlanError, match="one lamp, press_button"):
        play(lamp, random.Random(0))


def test_a_service_without_a_plan_that_can_be_played_is_named(lamp: Service[Lamp]) -> None:
    with pytest.raises(PlanError, match="one lamp: no plan can be played"):
        play(lamp, random.Random(0))


def test_a_plan_speaks_in_turn(lamp: Service[Lamp]) -> None:
    scene = Scene(lamp, 0, random.Random(0))
    with pytest.raises(PlanError, match="a reply to nothing"):
        scene.reply("Done.")
    scene.user("Switch it on.")
    with pytest.raises(PlanError, match=r"'Switch it on\.' has no reply"):
        scene.user("And off.")


def test_dialogues_have_the_shape_that_they_promise() -> None:
    turns, steps, parallel = (collections.Counter[int]() for _ in range(3))
    for made in MADE:
        assert 3 <= len(made.tools) <= 6
        turns[len(made.turns)] += 1
        for turn in made.turns:
            steps[len(turn.steps)] += 1
            parallel.update(len(step.calls) for step in turn.steps)
            assert turn.request[0].isupper() or not turn.request[0].isalpha()
            assert turn.request[-1] in ".?!", turn.request
            assert turn.answer[-1] in ".?!", turn.answer
            assert not re.search(r"[{}|]|  |[.?!:,;][.?!]", turn.request + turn.answer), turn
    assert set(turns) == {1, 2, 3, 4}
    assert set(steps) == {0, 1, 2, 3}
    assert set(parallel) == {1, 2, 3}
    assert min(turns[n] for n in (1, 2, 3)) > 0.1 * len(MADE)
    assert steps[0] > 0.08 * steps.total()
    assert steps[2] + steps[3] > 0.35 * steps.total()
    assert parallel[2] + parallel[3] > 0.08 * parallel.total()


def test_dialogues_are_short() -> None:
    sizes = sorted(
        len(json.dumps(made.tools)) + sum(len(json.dumps(turn)) for turn in made.turns)
        for made in MADE
    )
    assert sizes[int(0.93 * len(sizes))] <= 2500


def test_every_service_and_every_tool_occurs() -> None:
    used = {call["name"] for made in MADE for call in _calls(made)}
    offered = {tool["name"] for made in MADE for tool in made.tools}
    for service in SERVICES.values():
        for own, styles in service.tools.items():
            names = {listing.spec["name"] for pair in styles.values() for listing in pair}
            assert names & used, (service.name, own)
            assert names <= offered, (service.name, own)
    assert {made.service for made in MADE} == set(SERVICES)


def test_every_service_refuses_something_and_the_dialogue_goes_on() -> None:
    refusals = collections.Counter(made.service for made in MADE if _refused(made))
    for name in SERVICES:
        total = sum(made.service == name for made in MADE)
        assert refusals[name] > 0.05 * total, name
    assert len({re.sub(r"\S*\d\S*", "#", text) for made in MADE for text in _refused(made)}) > 30


def test_no_request_is_so_short_that_it_could_be_anywhere() -> None:
    """A turn that is only "Thanks!" would be found in any benchmark."""
    for made in MADE:
        for turn in made.turns:
            assert len(turn.request.split()) >= 4 or re.search(r"\d", turn.request), turn


def test_requests_rarely_repeat() -> None:
    requests = [turn.request for made in MADE for turn in made.turns if turn.steps]
    assert len(set(requests)) > 0.9 * len(requests)
    assert len({made.turns[0].request for made in MADE}) > 0.97 * len(MADE)


def _said(value: str) -> list[str]:
    """The ways in which a text may stand in a request."""
    return [value, value.replace("_", " "), value.capitalize()]


def test_every_text_of_a_call_was_said_or_returned_before() -> None:
    for made in MADE:
        before = ""
        for turn in made.turns:
            before += turn.request + "\n"
            for step in turn.steps:
                for value in _leaves([call["arguments"] for call in step.calls]):
                    if isinstance(value, str):
                        assert any(form in before for form in _said(value)), (made, value)
                before += json.dumps(step.results, ensure_ascii=False) + "\n"


def test_values_that_come_from_results_do_not_stand_in_the_request() -> None:
    """A code that a call takes from a result of its turn is nowhere to be read but there."""
    late = 0
    for made in MADE:
        for turn in made.turns:
            known, returned = set[str](), set[str]()
            for step in turn.steps:
                for value in _leaves([call["arguments"] for call in step.calls]):
                    if str(value) in returned - known and re.search(r"^[A-Z].*\d", str(value)):
                        assert not re.search(rf"\b{re.escape(str(value))}\b", turn.request), turn
                        late += 1
                    known.add(str(value))
                returned |= {str(value) for value in _leaves(step.results)}
    assert late > 0.5 * len(MADE)


@pytest.mark.parametrize("hashseed", ["0", "4242"])
def test_every_process_makes_the_same_dialogues(hashseed: str) -> None:
    code = (
        "import hashlib, json, random; from toolpost.data.services import dialogue;"
        "made = json.dumps([dialogue(random.Random(at)) for at in range(300)]);"
        "print(hashlib.sha256(made.encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": hashseed},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    made = json.dumps([dialogue(random.Random(at)) for at in range(300)])
    assert done.stdout.strip() == hashlib.sha256(made.encode()).hexdigest()


def test_a_text_is_put_together() -> None:
    rng = random.Random(0)
    assert {say("(A|B (c|d)) x.", rng) for _ in range(100)} == {"A x.", "B c x.", "B d x."}
    assert {"Please take an orange.", "Take an orange, please."} <= {
        say("take a orange", rng) for _ in range(300)
    }
    assert "Next, take it." in {say("take it", rng, "more") for _ in range(100)}


def test_names_are_our_own() -> None:
    """No tool is called as one of the table of single requests, or as one of BFCL."""
    ours = {name for service in SERVICES.values() for name in service.listed}
    files = [p for p in (ROOT / "toolpost" / "data").glob("**/*.yaml") if "service" not in p.name]
    tables = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in files]
    domains = [domain for table in tables for domain in table.get("domains", {}).values()]
    theirs = {name for domain in domains for tool in domain["tools"] for name in tool["names"]}
    assert theirs
    assert not ours & theirs
    package = importlib.util.find_spec("bfcl_eval")
    if package is None or package.origin is None:
        pytest.skip("bfcl-eval is not installed")
    folder = Path(package.origin).parent / "data"
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("**/*.json")))
    assert not [name for name in sorted(ours) if f'"name": "{name}"' in text]
