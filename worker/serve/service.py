"""One request from its model's name to its answer: who may ask whom, with which adapter in place."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from common.errors import InfraError, InvalidInput
from common.ids import new_id
from common.keys import Caller
from common.settings import Settings
from worker.bases import Base
from worker.serve import naming
from worker.serve.catalog import Catalog
from worker.serve.model_process import Hearing, ModelProcess
from worker.serve.protocol import Ask
from worker.serve.requests import ChatRequest
from worker.serve.shelf import Shelf


class Service:
    """Answers for `base`, which `process` holds, with the adapters of `catalog` that lie on `shelf`."""

    def __init__(self, base: Base, catalog: Catalog, process: ModelProcess, shelf: Shelf, settings: Settings):
        self.base = base
        self.catalog = catalog
        self.process = process
        self._shelf = shelf
        self._settings = settings
        self._open: Counter[str] = Counter()

    @asynccontextmanager
    async def answering(self, caller: Caller, request: ChatRequest) -> AsyncIterator[Hearing]:
        """Yield what the model says to the request; leaving the block ends the answer.

        Raises:
            NotFound: the caller has no such model.
            InvalidInput: it is not one of this base, or the request cannot be answered.
            InfraError: the model is not there, or too many wait for it.
        """
        self._check(request)
        self._check_room(caller.tenant)
        self._open[caller.tenant] += 1
        try:
            async with AsyncExitStack() as stack:
                adapter = await self._in_place(stack, caller, request.model)
                yield await stack.enter_async_context(self.process.asking(_ask(request, adapter, caller.tenant)))
        finally:
            self._open -= Counter([caller.tenant])

    async def _in_place(self, stack: AsyncExitStack, caller: Caller, model: str) -> str | None:
        """Return the name of what `model` says, loaded for as long as `stack` is open; None for the bare base."""
        if model == self.base.id:
            return None
        parts = naming.parts(model)
        wanted = [
            (part, await asyncio.to_thread(self.catalog.adapter, caller, part.job_id))
            for part in sorted(parts, key=lambda part: part.job_id)
        ]
        return await stack.enter_async_context(self._shelf.hold(wanted))

    def _check_room(self, tenant: str) -> None:
        most, num_open = self._settings.serve_max_waiting, self._open.total()
        if num_open >= most:
            raise InfraError(f"{num_open} requests are being answered or wait", code="busy")
        # A quarter is kept for the others.
        if self._open[tenant] >= max(1, most * 3 // 4):
            raise InfraError(f"{self._open[tenant]} requests of your tenant are being answered or wait", code="busy")

    def _check(self, request: ChatRequest) -> None:
        most = self._settings.serve_max_tokens
        if request.max_tokens is not None and request.max_tokens > most:
            raise InvalidInput(
                f"max_tokens: {request.max_tokens} are asked for; this server writes {most} at most",
                param="max_tokens",
            )
        if self.process.ready is None:
            raise InfraError("the model is being loaded", code="model_loading")


def _ask(request: ChatRequest, adapter: str | None, tenant: str) -> Ask:
    return Ask(
        id=new_id("ask"),
        adapter=adapter,
        messages=[{"role": turn.role, "content": turn.content} for turn in request.messages],
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=list(request.stop),
        tenant=tenant,
    )
