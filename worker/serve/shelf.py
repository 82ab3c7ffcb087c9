"""Which adapters lie beside the base: loaded when they are asked for, the least recently used one making room."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import InfraError, TooLarge
from worker.serve.catalog import Adapter
from worker.serve.model_process import ModelProcess
from worker.serve.naming import Part

Key = tuple[Part, ...]
Wanted = Sequence[tuple[Part, Adapter]]


@dataclass
class _Place:
    """An adapter that is loaded or being loaded. One that is used, were it only by its load, is not evicted."""

    name: str
    bytes: int
    users: int = 0
    loading: asyncio.Task[None] = field(init=False)


class Shelf:
    """The adapters in `process`: at most `max_adapters`, of `max_bytes` together; `folder` is for their files.

    A sum of adapters is one of its own here. The files are kept no longer than it takes to load them. Nothing but a
    load waits here, so that whoever leaves, cancelled or not, leaves at once.
    """

    def __init__(self, process: ModelProcess, folder: Path, max_adapters: int, max_bytes: int):
        self._process = process
        self._folder = folder
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._places: OrderedDict[Key, _Place] = OrderedDict()
        self._freed = asyncio.Event()
        self._numbers = itertools.count(1)
        process.on_lost = self._places.clear

    @asynccontextmanager
    async def hold(self, wanted: Wanted) -> AsyncIterator[str]:
        """Yield the name under which the model has the sum of the wanted adapters, and keep it there for the block.

        Raises:
            TooLarge: it is larger than all adapters together may be.
            TuneryError: it cannot be fetched or loaded.
        """
        place = await self._take_place(wanted)
        try:
            # Whoever leaves must not stop a load for which others wait.
            await asyncio.shield(place.loading)
            yield place.name
        finally:
            self._leave(place)

    async def _take_place(self, wanted: Wanted) -> _Place:
        key = tuple(part for part, _ in wanted)
        num_bytes = sum(adapter.bytes for _, adapter in wanted)
        if num_bytes > self._max_bytes:
            raise TooLarge(
                f"model: it takes {num_bytes:,} bytes; all adapters together may have {self._max_bytes:,}",
                param="model",
                hint="Ask the operator about TUNERY_SERVE_MAX_ADAPTER_BYTES.",
            )
        while key not in self._places and not self._can_make_room(num_bytes):
            await self._freed.wait()
        if key not in self._places:
            self._make_room(num_bytes)
            place = self._places[key] = _Place(f"adapter-{next(self._numbers)}", num_bytes, users=1)
            place.loading = asyncio.create_task(self._load(key, place, wanted))
            # Everybody who waited for it may have left.
            place.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._places.move_to_end(key)
        self._places[key].users += 1
        return self._places[key]

    def _leave(self, place: _Place) -> None:
        place.users -= 1
        self._freed.set()
        self._freed = asyncio.Event()

    def _can_make_room(self, num_bytes: int) -> bool:
        used = [place for place in self._places.values() if place.users]
        return len(used) < self._max_adapters and sum(place.bytes for place in used) + num_bytes <= self._max_bytes

    def _make_room(self, num_bytes: int) -> None:
        idle = [key for key, place in self._places.items() if not place.users]
        while len(self._places) >= self._max_adapters or self._bytes() + num_bytes > self._max_bytes:
            self._process.unload(self._places.pop(idle.pop(0)).name)

    def _bytes(self) -> int:
        return sum(place.bytes for place in self._places.values())

    async def _load(self, key: Key, place: _Place, wanted: Wanted) -> None:
        folder = self._folder / place.name
        try:
            parts = [
                (str(await asyncio.to_thread(_fetch, adapter, folder / str(index))), part.weight)
                for index, (part, adapter) in enumerate(wanted)
            ]
            if self._places.get(key) is not place:
                raise InfraError("the model died and is started again", code="model_died")
            place.bytes = await self._process.load(place.name, parts)
        except BaseException:
            if self._places.get(key) is place:
                del self._places[key]
            raise
        finally:
            self._leave(place)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _fetch(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir(parents=True)
    return adapter.fetch(folder)
