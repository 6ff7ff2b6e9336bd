"""Augmented rows stay right: who abstains may, who is masked is masked everywhere."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolpost.core.augment import (
    REFUSALS,
    Recipe,
    abstaining,
    augmented,
    draw,
    is_identifier,
    masked,
    renamed,
)
from toolpost.core.format import END, prompt_of, wrap
from toolpost.core.schema import Conversation, Message, ToolCall, ToolSpec
from toolpost.core.toolace import normalize_toolace
from toolpost.core.verify import verify_call, verify_calls
from toolpost.core.xlam import normalize_xlam
from toolpost.data.build import conversations as read_rows
from toolpost.data.build import items
from toolpost.data.pocketset import rows as practice_rows

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
SOURCES = ("practice", "xlam", "toolace")


@functools.cache
def conversations(source: str) -> tuple[Conversation, ...]:
    """Give the rows of a source; the real ones are not in the repository."""
    if source == "practice":
        return tuple(read_rows(items("practice", practice_rows(1500, 0))))
    path = SHARED / f"{source}_rows.json"
    if not path.is_file():
        pytest.skip(f"the real rows are not at {path}")
    read = normalize_xlam if source == "xlam" else normalize_toolace
    done = [read(row, at) for at, row in enumerate(json.loads(path.read_text("utf-8")))]
    return tuple(row for found in done for row in found.conversations)


def tool(name: str, description: str, *parameters: str, **more: Any) -> ToolSpec:
    properties = {p: {"type": "string", "description": f"The {p}."} for p in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return ToolSpec(name=name, description=description, parameters=schema | more)


def row(
    query: str, call: ToolCall, *tools: ToolSpec, history: Iterable[Message] = ()
) -> Conversation:
    return Conversation(
        id=1,
        source="test",
        query=query,
        tools={t.name: t for t in tools},
        gold_calls=(call,),
        history=tuple(history),
    )


WEATHER = tool("get_weather", "Look up the weather of a city.", "city")
PRICE = tool("stock_price", "Give the price of a share.", "ticker")
CALL = ToolCall(name="get_weather", arguments={"city": "Lima"})


# Which rows


def test_a_rows_draw_is_its_own() -> None:
    one = row("Rain?", CALL, WEATHER, PRICE)
    assert draw(one, 0) == draw(one.model_copy(update={"query": "Sun?"}), 0)
    others = [one.model_copy(update=change) for change in ({"id": 2}, {"source": "b"}, {"step": 1})]
    assert len({draw(one, 1), *(draw(other, 0) for other in [one, *others])}) == 5


def test_rows_with_the_same_tools_are_masked_and_wrapped_alike() -> None:
    one = row("Rain?", CALL, WEATHER, PRICE)
    for other in (one.model_copy(update=change) for change in ({"id": 2}, {"step": 1})):
        assert draw(one, 0)[2:] == draw(other, 0)[2:]
        assert not set(draw(one, 0)[:2]) & set(draw(other, 0)[:2])
        hidden, also = masked(one, 0), masked(other, 0)
        assert hidden
        assert also
        assert hidden.tools == also.tools
    other = row("Rain?", CALL, WEATHER)
    assert draw(one, 0)[:2] == draw(other, 0)[:2]
    assert not set(draw(one, 0)[2:]) & set(draw(other, 0)[2:])


def test_the_purposes_are_drawn_apart() -> None:
    tools = [tool(f"get_{at}", "Look up the weather of a city.", "city") for at in range(4000)]
    rows = [
        row("Rain?", ToolCall(name=one.name, arguments={"city": "Lima"}), one).model_copy(
            update={"id": at}
        )
        for at, one in enumerate(tools)
    ]
    draws = [draw(one, 0) for one in rows]
    assert all(0 <= value < 1 for found in draws for value in found)
    for a in range(4):
        for b in range(a):
            both = sum(found[a] < 0.5 and found[b] < 0.5 for found in draws)
            assert 900 < both < 1100
    made = [augmented(one, Recipe(wrapped=0.3)) for one in rows]
    assert all(found.row.wrapped == (found.kinds == ("wrapped",)) for found in made)
    assert 1100 < sum(found.row.wrapped for found in made) < 1300


@pytest.mark.parametrize("source", SOURCES)
def test_about_the_wanted_shares_come_out(source: str) -> None:
    rows = conversations(source)
    kinds = Counter(
        kind for one in rows for kind in augmented(one, Recipe(abstain=0.1, masked=1 / 3)).kinds
    )
    calling = sum(bool(one.gold_calls) for one in rows)
    assert 0.06 < kinds["abstain"] / calling < 0.14
    assert 0.28 < kinds["masked"] / len(rows) < 0.46
    assert all(augmented(one, Recipe()) == (one, ()) for one in rows)


@pytest.mark.parametrize("source", SOURCES)
def test_what_was_done_is_said(source: str) -> None:
    for one in conversations(source):
        after, kinds = augmented(one, Recipe(seed=3, abstain=0.2, masked=0.4))
        assert (after.id, after.source, after.step) == (one.id, one.source, one.step)
        assert ("abstain" in kinds) == (after.gold_calls == () != one.gold_calls)
        assert ("masked" in kinds) == (not set(after.tools) <= set(one.tools))
        assert (kinds == ()) == (after == one)
        assert verify_calls(after.gold_calls, after.tools).ok
        assert after.gold_calls or after.answer


def test_rows_that_begin_alike_still_do() -> None:
    """Training shares the pass over the tools on offer."""
    beginnings, served = dict[str, str](), Counter[str]()
    for one in conversations("practice"):
        before, after = (
            prompt_of(made).split(END)[0]
            for made in (one, augmented(one, Recipe(masked=1 / 3, wrapped=0.5)).row)
        )
        served[before] += 1
        assert beginnings.setdefault(before, after) == after
    assert sum(beginnings[before] != before for before in served if served[before] > 1) > 100


# Abstaining


@pytest.mark.parametrize("source", SOURCES)
def test_no_tool_that_is_left_takes_the_arguments(source: str) -> None:
    count = 0
    for one in conversations(source):
        if after := abstaining(one, draw(one, 0).answer):
            gone = {call.name for call in one.gold_calls}
            assert gone
            assert set(after.tools) == set(one.tools) - gone != set()
            assert after.gold_calls == ()
            assert after.answer in REFUSALS
            assert (after.query, after.history) == (one.query, one.history)
            for call in one.gold_calls:
                for name in after.tools:
                    tried = ToolCall(name=name, arguments=call.arguments)
                    assert not verify_call(tried, after.tools).ok
            count += 1
    assert count > len(conversations(source)) / 6


@pytest.mark.parametrize(
    "left",
    [
        tool("forecast_weather", "Tell what comes.", "place"),  # shares a word of its name
        tool("WeatherAPI", "Tell what comes.", "place"),
        tool("weatherbyplace", "Tell what comes.", "place"),
        tool("umbrellas", "Sell one.", "size"),  # the request says umbrella
        tool("outside", "The weather of any city.", "place"),  # is described alike
        tool("show_map", "Draw a map.", "city"),  # takes the same arguments
    ],
)
def test_a_tool_that_might_do_keeps_the_row_as_it_is(left: ToolSpec) -> None:
    asked = "Is an umbrella a good idea in Lima?"
    assert abstaining(row(asked, CALL, WEATHER, PRICE)) is not None
    assert abstaining(row(asked, CALL, WEATHER, PRICE, left)) is None


def test_rows_without_a_tool_left_or_with_the_tool_in_their_past_stay() -> None:
    assert abstaining(row("Rain?", CALL, WEATHER)) is None
    past = [
        Message(role="user", content="Rain in Oslo?"),
        Message(role="assistant", content="", tool_calls=(CALL,)),
        Message(role="tool", content="[]"),
        Message(role="assistant", content="No."),
    ]
    assert abstaining(row("And in Lima?", CALL, WEATHER, PRICE, history=past)) is None
    other = ToolCall(name="stock_price", arguments={"ticker": "X"})
    past[1] = past[1].model_copy(update={"tool_calls": (other,)})
    assert abstaining(row("And in Lima?", CALL, WEATHER, PRICE, history=past)) is not None


def test_refusals_name_no_tool() -> None:
    assert len(set(REFUSALS)) == len(REFUSALS) >= 6
    for source in SOURCES[:1]:
        names = {name.lower() for one in conversations(source) for name in one.tools}
        assert not any(is_identifier(name) and name in text for text in REFUSALS for name in names)


# Masking


def strings(value: Any) -> list[str]:
    """Give all strings of a JSON value, without its keys."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return (
        [text for item in items for text in strings(item)] if isinstance(value, dict | list) else []
    )


def check_masked(before: Conversation, after: Conversation) -> None:
    """Check all that must hold of a masked row."""
    names = dict(zip(before.tools, after.tools, strict=True))
    assert not set(names) & set(names.values())
    assert all(re.fullmatch(r"fn_[0-9a-f]{6}", new) for new in names.values())
    assert all(name == spec.name for name, spec in after.tools.items())
    called = [call.name for turn in after.history for call in turn.tool_calls]
    assert not set(names) & {*called, *(call.name for call in after.gold_calls)}
    assert verify_calls(after.gold_calls, after.tools).ok
    dumped = after.model_dump(mode="json")
    texts = [text.lower() for text in strings({k: v for k, v in dumped.items() if k != "source"})]
    for old in names:
        word = re.compile(rf"(?<!\w){re.escape(old.lower())}(?!\w)")
        assert not any(word.search(text) for text in texts), old
    assert renamed(after, {new: old for old, new in names.items()}) == before


@pytest.mark.parametrize("source", SOURCES)
def test_masked_rows_hold_no_old_name(source: str) -> None:
    count = 0
    for one in conversations(source):
        if after := masked(one, 0):
            check_masked(one, after)
            count += 1
    assert count > 0.7 * len(conversations(source))


NAMES = st.sampled_from(
    ["get_weather", "getNews", "math.gcd", "weather.get", "search", "Get It Now", "/api/v1", "fn_1"]
)
WORDS = st.sampled_from(
    [
        *("get_weather", "GET_WEATHER", "getNews", "math.gcd", "search", "Get It Now", "research"),
        *("my.get_weather", "get_weather.", "'getNews'", '"name": "Get It Now"', "/api/v1", "\n"),
        *("(math.gcd)", "a", "the", "city", "ünïcode", "fn_1", "fn_1-x", "weather", "xget_weather"),
    ]
)
TEXT = st.lists(WORDS, max_size=4).map(" ".join)


@st.composite
def mentioning(pick: st.DrawFn) -> Conversation:
    """Make a row whose texts mention tools in all ways."""
    names = pick(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    tools = {}
    for at, name in enumerate(names):
        place = {"type": "string", "description": pick(TEXT), "default": pick(TEXT)}
        properties = {"description": place, "n": {"type": "integer", "enum": [1, 2]}}
        schema = {"type": "object", "properties": properties, "description": pick(TEXT)}
        tools[name] = ToolSpec(
            name=name, description=f"Tool number {at} {pick(TEXT)}", parameters=schema
        )
    call = st.builds(
        ToolCall,
        name=st.sampled_from(names),
        arguments=st.fixed_dictionaries({"n": st.just(1)}, optional={"description": TEXT}),
    )
    turn = st.builds(
        Message,
        role=st.sampled_from(["user", "assistant", "tool"]),
        content=TEXT,
        tool_calls=st.lists(call, max_size=1).map(tuple),
    )
    return Conversation(
        id=pick(st.integers(0, 9)),
        source="made",
        query=pick(TEXT),
        tools=tools,
        gold_calls=tuple(pick(st.lists(call, max_size=2))),
        history=tuple(pick(st.lists(turn, max_size=3))),
        answer=pick(st.none() | TEXT),
    )


@settings(max_examples=300, deadline=None)
@given(mentioning())
def test_whatever_a_text_says_masking_is_whole_or_not_done(before: Conversation) -> None:
    if after := masked(before, 0):
        check_masked(before, after)


def test_mentions_are_exchanged_everywhere() -> None:
    spec = tool("get_weather", "Use get_weather for a city. See stock_price.", "city")
    spec.parameters["properties"]["city"]["description"] = "What get_weather looks up (get_weather)"
    past = [
        Message(role="user", content="Call get_weather!"),
        Message(role="assistant", content="get_weather it is.", tool_calls=(CALL,)),
        Message(role="tool", content='[{"name": "get_weather", "results": 3}]'),
    ]
    before = row("Call `get_weather` or 'stock_price'.", CALL, spec, PRICE, history=past)
    after = masked(before.model_copy(update={"answer": "get_weather."}), 0)
    assert after is not None
    new, price = after.tools
    assert after.query == f"Call `{new}` or '{price}'."
    assert after.answer == f"{new}."
    assert after.tools[new].description == f"Use {new} for a city. See {price}."
    city = after.tools[new].parameters["properties"]["city"]
    assert city["description"] == f"What {new} looks up ({new})"
    assert json.loads(after.tools[new].schema_text) == after.tools[new].parameters
    assert [turn.content for turn in after.history] == [
        f"Call {new}!",
        f"{new} it is.",
        f'[{{"name": "{new}", "results": 3}}]',
    ]
    assert after.history[1].tool_calls[0].name == after.gold_calls[0].name == new


def test_a_name_with_spaces_is_exchanged_where_a_result_states_it() -> None:
    spec = tool("Get It Now", "Order a thing.", "thing")
    call = ToolCall(name="Get It Now", arguments={"thing": "pen"})
    past = [
        Message(role="user", content="A pen!"),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content='[{"name": "Get It Now", "results": "ok"}]'),
    ]
    after = masked(row("Another.", call, spec, history=past), 0)
    assert after is not None
    assert json.loads(after.history[2].content)[0]["name"] == next(iter(after.tools))
    assert masked(row("Please get it now.", call, spec), 0) is None


@pytest.mark.parametrize(
    ("query", "spec"),
    [
        ("Search for it.", tool("search", "Look for things.", "city")),  # an ordinary word
        ("What is get_weather?", tool("get_weather", "Look it up.", "city", default="get_weather")),
        ("Ask my.get_weather.", WEATHER),  # part of another name
        ("Rain?", tool("get_weather", "python", "city")),  # nothing but its name tells it
        ("Rain?", tool('say "it"', "Say it aloud.", "city")),
    ],
)
def test_an_ambiguous_row_is_not_masked(query: str, spec: ToolSpec) -> None:
    call = ToolCall(name=spec.name, arguments={"city": "Lima"})
    assert masked(row(query, call, spec), 0) is None


def test_tools_that_only_their_names_tell_apart_keep_them() -> None:
    twin = tool("get_rain", WEATHER.description, "city")
    assert masked(row("Rain?", CALL, WEATHER, twin), 0) is None
    assert masked(row("Rain?", CALL, WEATHER, PRICE), 0) is not None


# Both printed forms


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Load the practice model's tokenizer; its chat template is Qwen3-Instruct-2507's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(files("toolpost") / "models" / "pocket"))


def as_client(message: Message) -> dict[str, Any]:
    """Give a message the way a client of the OpenAI API sends it."""
    calls = [
        {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in message.tool_calls
    ]
    sent = {"role": message.role, "content": message.content}
    return sent | ({"tool_calls": calls} if calls else {})


def by_template(one: Conversation, tokenizer: Any) -> str:
    asked = one.history[-1:] and one.history[-1].role == "tool"
    messages = [as_client(turn) for turn in one.history]
    messages += [] if asked else [{"role": "user", "content": one.query}]
    tools = [wrap(spec) for spec in one.tools.values()]
    text = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("source", SOURCES)
def test_a_wrapped_prompt_is_the_one_of_the_chat_template(source: str, tokenizer: Any) -> None:
    for one in conversations(source)[:400]:
        text = prompt_of(one.model_copy(update={"wrapped": True}))
        assert text == by_template(one, tokenizer)
        assert (text == prompt_of(one)) == (not one.tools)


def test_a_wrapped_dialogue_in_other_letters_is_the_templates(tokenizer: Any) -> None:
    spec = tool("wetter.für", "Gibt das Wetter einer Stadt; 天气.", "Stadt")
    call = ToolCall(name="wetter.für", arguments={"Stadt": "Zürich <&'>"})
    past = [
        Message(role="system", content="Sei knapp."),
        Message(role="user", content="Wetter in Zürich und Köln?"),
        Message(role="assistant", content="Moment.", tool_calls=(call, call)),
        Message(role="tool", content='{"°C": 3}'),
        Message(role="tool", content="Schnee"),
        Message(role="assistant", content="Kalt."),
    ]
    for history in (past, past[:5]):
        one = row("Und Bern?", call, spec, history=history)
        assert prompt_of(one.model_copy(update={"wrapped": True})) == by_template(one, tokenizer)
