"""What routes ask for: the parts of the installation, a session, the caller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Header, Request
from sqlalchemy.orm import Session

from common.context import Context
from common.errors import Forbidden
from common.keys import Caller

# Those that only look something up are coroutines: FastAPI gives each plain function a thread, which costs more.


async def installation(request: Request) -> Context:
    """Return the parts of this installation."""
    context: Context = request.app.state.context
    return context


def reading(request: Request) -> Iterator[Session]:
    """Yield a session for looking. It takes a connection at its first query only."""
    context: Context = request.app.state.context
    with context.read() as session:
        yield session


def writing(request: Request) -> Iterator[Session]:
    """Yield a session that is committed once the route has returned; then the bell rings."""
    context: Context = request.app.state.context
    with context.write() as session:
        yield session


async def caller(request: Request) -> Caller:
    """Return who makes the request; `api.auth` has found it out."""
    found: Caller = request.state.caller
    return found


async def administrator(request: Request) -> Caller:
    """Return who makes the request.

    Raises:
        Forbidden: it is no administrator.
    """
    who: Caller = request.state.caller
    if not who.admin:
        raise Forbidden("only an administrator's key may do this", hint="Ask the operator.")
    return who


def own_tenant(who: Caller, wanted: str | None) -> str:
    """Return the tenant that a request is about: the caller's, or another one that an administrator names.

    Raises:
        Forbidden: another tenant is named without an administrator's key.
    """
    if wanted not in (None, who.tenant) and not who.admin:
        raise Forbidden(
            "tenant: only an administrator's key may name another tenant",
            param="tenant",
            hint="Leave the tenant out.",
        )
    return wanted or who.tenant


Installation = Annotated[Context, Depends(installation)]
# "function": the session ends before the answer is sent, so that nobody hears of a change that is then rolled back.
Reading = Annotated[Session, Depends(reading, scope="function")]
Writing = Annotated[Session, Depends(writing, scope="function")]
WhoCalls = Annotated[Caller, Depends(caller)]
Administrator = Annotated[Caller, Depends(administrator)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description=(
            "The same key with the same body answers the job that the first call made. Without one, the same body from "
            "the same API key does so for TUNERY_REPEAT_WINDOW_S (30), unless that job was cancelled."
        ),
    ),
]
