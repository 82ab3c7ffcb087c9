"""Moments as people type them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from common.cli.moments import parse_moment
from common.errors import InvalidInput


@pytest.mark.parametrize(("text", "ahead"), [("+90m", 90), ("+2h", 120), ("+1d", 1440)])
def test_from_now(text: str, ahead: int):
    assert abs(parse_moment(text, "--x") - datetime.now(UTC) - timedelta(minutes=ahead)) < timedelta(seconds=5)


def test_of_a_calendar():
    assert parse_moment("2026-12-24T02:00Z", "--x") == datetime(2026, 12, 24, 2, tzinfo=UTC)
    assert parse_moment("2026-12-24T02:00+02:00", "--x") == datetime(2026, 12, 24, 0, tzinfo=UTC)
    assert parse_moment("2026-12-24T02:00", "--x") == datetime(2026, 12, 24, 2).astimezone()


@pytest.mark.parametrize("text", ["tomorrow", "+2w", "", "+", "0001-01-01"])
def test_what_is_no_moment(text: str):
    with pytest.raises(InvalidInput, match="--not-before"):
        parse_moment(text, "--not-before")
