"""The HTTP side: `POST /v1/chat/completions` and `GET /v1/models` as OpenAI's clients know them, and health."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from common import fine_tuned
from common.errors import TooLarge, TuneryError
from common.keys import Caller
from worker.serve import answers, errors
from worker.serve.answers import Completion
from worker.serve.model_process import Hearing
from worker.serve.protocol import Accepted, Finished, Piece
from worker.serve.requests import ChatRequest, parse
from worker.serve.service import Service

_BODY_BYTES = 4 * 2**20
_PING_S = 15.0
# Nobody reads it but the log; the number is nginx's.
_CLIENT_LEFT = 499
_access = logging.getLogger("serve.access")
T = TypeVar("T")


def create_app(service: Service) -> FastAPI:
    """Return the application over `service`, whose model lives as long as the application."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.process.start()
        yield
        await asyncio.to_thread(service.process.close)

    app = FastAPI(title="Tunery serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    routes = _Routes(service)
    app.add_api_route("/livez", routes.livez)
    app.add_api_route("/readyz", routes.readyz)
    app.add_api_route("/v1/models", routes.models)
    app.add_api_route("/v1/models/{model:path}", routes.model)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"])
    return app


class _Routes:
    def __init__(self, service: Service):
        self._service = service
        self._began = int(time.time())

    def livez(self) -> dict[str, bool]:
        return {"alive": True}

    def readyz(self) -> JSONResponse:
        ready = self._service.process.ready
        if ready is None:
            return JSONResponse({"ready": False}, 503, {"Retry-After": str(errors.RETRY_AFTER_S)})
        held = {"base": self._service.base.id, "device": ready.device, "precision": ready.precision}
        return JSONResponse({"ready": True, **held, "bytes": ready.bytes, "context": ready.context})

    async def models(self, request: Request) -> dict[str, Any]:
        caller = await self._caller(request)
        adapters = await asyncio.to_thread(self._service.catalog.adapters, caller)
        data = [answers.model(adapter.name, adapter.created, adapter.owner) for adapter in adapters]
        return {"object": "list", "data": [self._base(), *data]}

    async def model(self, request: Request, model: str) -> dict[str, Any]:
        caller = await self._caller(request)
        if model == self._service.base.id:
            return self._base()
        adapter = await asyncio.to_thread(self._service.catalog.adapter, caller, fine_tuned.job_id(model))
        return answers.model(adapter.name, adapter.created, adapter.owner)

    async def chat(self, request: Request) -> Response:
        caller = await self._caller(request)
        stack = AsyncExitStack()
        try:
            asked = parse(await _body(request))
            return await _unless_gone(request, self._answer(stack, caller, asked))
        except BaseException as error:
            await stack.aclose()
            if isinstance(error, ClientDisconnect):
                return Response(status_code=_CLIENT_LEFT)
            raise

    async def _answer(self, stack: AsyncExitStack, caller: Caller, asked: ChatRequest) -> Response:
        """Return the whole answer, or the stream that it comes in, which then closes `stack`."""
        began = time.perf_counter()
        heard = await stack.enter_async_context(self._service.answering(caller, asked))
        accepted = await heard.next()
        assert isinstance(accepted, Accepted), accepted
        completion = Completion(asked.model, accepted.prompt_tokens)
        stack.callback(_log_answer, caller, completion, began)
        if asked.stream:
            return _Streamed(stack, _chunks(heard, completion, asked.stream_options.include_usage))
        async with stack:
            text = ""
            while isinstance(message := await heard.next(), Piece):
                text += message.text
            assert isinstance(message, Finished), message
            completion.completion_tokens = message.completion_tokens
            return JSONResponse(completion.whole(text, message.reason))

    async def _caller(self, request: Request) -> Caller:
        authorization = request.headers.get("authorization", "")
        return await asyncio.to_thread(self._service.catalog.identify, authorization)

    def _base(self) -> dict[str, Any]:
        return answers.model(self._service.base.id, self._began, "tunery")


class _Streamed(EventSourceResponse):
    """A stream that closes `stack` with itself, were it cut off before its first word."""

    def __init__(self, stack: AsyncExitStack, content: AsyncIterator[bytes]):
        super().__init__(content, headers={"Cache-Control": "no-store"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _chunks(heard: Hearing, completion: Completion, with_usage: bool) -> AsyncIterator[bytes]:
    yield completion.chunk({"role": "assistant", "content": ""})
    try:
        while not heard.finished:
            try:
                async with asyncio.timeout(_PING_S):
                    message = await heard.next()
            except TimeoutError:
                yield KEEPALIVE_COMMENT
                continue
            if isinstance(message, Piece):
                yield completion.chunk({"content": message.text})
            elif isinstance(message, Finished):
                completion.completion_tokens = message.completion_tokens
                yield completion.chunk({}, message.reason)
    except TuneryError as error:
        yield answers.event(errors.shape(error))
        return
    if with_usage:
        yield completion.last_chunk()
    yield answers.DONE


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_BYTES:
            raise TooLarge(f"the body is longer than {_BODY_BYTES} bytes")
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it when the client hangs up, and raise ClientDisconnect."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _gone(request: Request) -> None:
    # The body is read: all that can still come is the end of the connection.
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _log_answer(caller: Caller, completion: Completion, began: float) -> None:
    _access.info(
        "%s model=%s tenant=%s key=%s prompt_tokens=%d completion_tokens=%d ms=%.0f",
        completion.id, completion.model, caller.tenant, caller.key_id, completion.prompt_tokens,
        completion.completion_tokens, (time.perf_counter() - began) * 1000,
    )  # fmt: skip
