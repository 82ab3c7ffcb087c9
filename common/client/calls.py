"""A request as a value: what is asked, and the shape of its answer. The sync and the async client send the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel

from common.client.answers import parse
from common.client.errors import UnexpectedAnswer, answer_error
from common.client.sending import FileBody
from common.errors import InvalidInput

T = TypeVar("T", bound=BaseModel)

CONNECT_TIMEOUT_S = 5


class Nothing(BaseModel):
    """An answer whose body says nothing, such as that of DELETE."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request and the shape of its answer. `repeatable`: running it twice is the same as running it once."""

    method: str
    path: str
    answer: type[T]
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    upload: FileBody | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = False
    read_timeout_s: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for httpx2's `request`, without the upload."""
        values: dict[str, Any] = {"params": {k: v for k, v in self.params.items() if v is not None}}
        if self.json is not None:
            values["json"] = self.json
        if self.headers:
            values["headers"] = dict(self.headers)
        if self.read_timeout_s is not None:
            values["timeout"] = httpx2.Timeout(self.read_timeout_s, connect=CONNECT_TIMEOUT_S)
        return values


def get(path: str, answer: type[T], **params: Any) -> Call[T]:
    """Return a GET, which may always be sent again."""
    return Call("GET", path, answer, params=params, repeatable=True)


def post(path: str, answer: type[T], *, repeatable: bool = False) -> Call[T]:
    """Return a POST without a body."""
    return Call("POST", path, answer, repeatable=repeatable)


def delete(path: str, **params: Any) -> Call[Nothing]:
    """Return a DELETE, which may always be sent again."""
    return Call("DELETE", path, Nothing, params=params, repeatable=True)


def segment(identifier: str) -> str:
    """Return an id as one segment of a path: whatever it contains, it names no other route.

    Raises:
        InvalidInput: the id is empty or made of dots, which would name the list of everything.
    """
    if identifier.strip(". ") == "":
        raise InvalidInput(f"{identifier!r} is not an id", param="id", hint="`tunery ls` lists the ids of jobs")
    return quote(identifier, safe="")


def read(call: Call[T], response: httpx2.Response, attempt: int) -> T:
    """Return the body of the answer to the given attempt, counted from 1, in its shape.

    Raises:
        ApiError: the status is 400 or more.
        UnexpectedAnswer: the body is not what the call answers.
    """
    if response.status_code == 404 and call.method == "DELETE" and attempt > 1:
        # Gone is what was wanted: an attempt whose answer was lost may have done it.
        return call.answer()
    if response.status_code >= 400:
        raise answer_error(response)
    if response.is_redirect:
        raise UnexpectedAnswer(
            f"{response.request.url} redirects to {response.headers['location']}",
            hint="set TUNERY_URL to the address of the Tunery server itself",
        )
    if call.answer is Nothing:
        return call.answer()
    try:
        data = response.json()
    except ValueError as error:
        raise UnexpectedAnswer(
            f"{response.request.url} answered {response.status_code} without JSON",
            hint="check that the URL is that of a Tunery server, not of a page or a proxy",
        ) from error
    return parse(call.answer, data)
