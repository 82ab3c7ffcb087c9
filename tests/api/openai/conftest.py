"""The stock `openai` client, pointed at a real API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.api.conftest import Api

Connect = Callable[..., OpenAI]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Return a client of an API, with its administrator's key or another."""
    with ExitStack() as stack:

        def made(api: Api, key: str | None = None, **options: Any) -> OpenAI:
            client = OpenAI(
                base_url=f"{api.url}/v1",
                api_key=api.key if key is None else key,
                http_client=openai.DefaultHttpxClient(trust_env=False),
                **options,
            )
            return stack.enter_context(client)

        yield made


@pytest.fixture
def sdk(api: Api, connect: Connect) -> OpenAI:
    """A client of `api`."""
    return connect(api)


def conforms(answer: Any) -> Any:
    """Return `answer` if each of its fields is what the client's own type says; the client itself does not look."""
    type(answer).model_validate(answer.model_dump(mode="json"), strict=True)
    return answer
