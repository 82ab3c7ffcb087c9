"""Logging of every server process: one line an event, UTC, to standard error."""

from __future__ import annotations

import logging
import time

from common.settings import Settings


def configure(settings: Settings) -> None:
    """Send this process's log to standard error at the level of the settings."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    # These write each request, signed links included.
    for noisy in ("botocore", "boto3", "urllib3", "httpx2", "httpcore2", "huggingface_hub", "kombu", "amqp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
