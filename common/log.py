"""Logging of every server process: one line an event, UTC, to standard error."""

from __future__ import annotations

import logging
import re
import time

from common.settings import Settings

# Controls but the tab, other separators of lines, and what turns the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class Formatter(logging.Formatter):
    """Writes lines that begin with their time. What users have sent may stand in a message or a trace.

    So only this begins a line at the margin, and no character is written that a terminal acts on: nobody forges lines.
    """

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text; lines after its first are indented."""
        return "\n  ".join(_CONTROL.sub(_escaped, line) for line in super().format(record).split("\n"))


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def configure(settings: Settings) -> None:
    """Send this process's log to standard error at the level of the settings."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    # These write each request, signed links included.
    for noisy in ("botocore", "boto3", "urllib3", "httpx2", "httpcore2", "huggingface_hub", "kombu", "amqp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
