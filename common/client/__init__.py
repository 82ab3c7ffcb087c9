"""The Python client: `from common.client import Tunery`, or `AsyncTunery` for event loops."""

from __future__ import annotations

from common.client.async_jobs import AsyncJob
from common.client.clients import AsyncTunery, Tunery
from common.client.errors import (
    ApiError,
    BodyTooLarge,
    CannotConnect,
    DownloadFailed,
    Missing,
    NotAuthenticated,
    NotPermitted,
    RateLimited,
    RequestInvalid,
    ServerFault,
    ServerNotFound,
    StateConflict,
    UnexpectedAnswer,
    UploadFailed,
)
from common.client.jobs import Job
from common.client.pages import Page
from common.client.retries import Retries

__all__ = [
    "ApiError",
    "AsyncJob",
    "AsyncTunery",
    "BodyTooLarge",
    "CannotConnect",
    "DownloadFailed",
    "Job",
    "Missing",
    "NotAuthenticated",
    "NotPermitted",
    "Page",
    "RateLimited",
    "RequestInvalid",
    "Retries",
    "ServerFault",
    "ServerNotFound",
    "StateConflict",
    "Tunery",
    "UnexpectedAnswer",
    "UploadFailed",
]
