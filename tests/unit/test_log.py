"""Lines of the log are the server's own, whatever users send."""

from __future__ import annotations

import logging
import sys

from common.log import Formatter

FORGED = "2026-01-01T00:00:00.000Z INFO api.access: all is well"


def written(message: str, *arguments: object, trace: bool = False) -> str:
    record = logging.LogRecord(
        "worker",
        logging.INFO,
        "",
        0,
        message,
        arguments,
        sys.exc_info() if trace else None,  # type: ignore[arg-type]
    )
    return Formatter().format(record)


def test_nobody_forges_a_line() -> None:
    for separator in ("\n", "\r", "\r\n", "\x0b", "\x85", "\u2028"):
        lines = written("model=%s tokens=3", f"ft:x{separator}{FORGED}").splitlines()
        assert not any(line.startswith("2026-01-01") for line in lines), (separator, lines)
    try:
        raise ValueError(f"a row\n{FORGED}")
    except ValueError:
        assert f"\n{FORGED}" not in written("it broke", trace=True)


def test_terminals_have_nothing_to_act_on() -> None:
    text = written("%s", "\x1b]0;owned\x07\x9b31m\u202e rows\té")
    assert text.replace("\t", "").isprintable()
    assert "\\x1b]0;owned\\x07\\x9b31m\\u202e rows\té" in text
