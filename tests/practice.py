"""Practice rows that suit a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolpost.core.format import completion_of, prompt_of
from toolpost.core.schema import Conversation
from toolpost.data.build import conversations, items
from toolpost.data.pocketset import rows as practice_rows
from toolpost.data.sources import sniff


def xlam_rows(n: int) -> list[dict[str, Any]]:
    """Give raw practice rows in the layout of xLAM alone."""
    found = [row for row in practice_rows(4 * n + 16, 0) if sniff(row) == "xlam"]
    assert len(found) >= n
    return found[:n]


def short_rows(n: int) -> list[Conversation]:
    """Give the shortest of some practice rows that are one question and its answer."""
    rows = conversations(items("practice", practice_rows(6 * n, 0)))
    single = [row for row in rows if not row.history]
    found = sorted(
        single, key=lambda row: len(prompt_of(row) + completion_of(row.gold_calls, row.answer))
    )
    assert len(found) >= n
    return found[:n]


def in_one_table(rows: Sequence[Conversation]) -> list[Conversation]:
    """Give the rows that an Arrow table can hold together: their arguments are texts, or none."""

    def values(row: Conversation) -> list[Any]:
        calls = [*row.gold_calls, *(call for turn in row.history for call in turn.tool_calls)]
        return [value for call in calls for value in call.arguments.values()]

    return [row for row in rows if all(isinstance(value, str) for value in values(row))]
