"""A proxy in front of broker, database or store that breaks connections in every way that networks do.

One thread runs its event loop. What it can do to connections:

    refuse      nobody listens; open connections are reset
    reset       every open connection is reset, new ones pass
    delay       each piece of data is late
    half_open   connections are accepted and swallow what is sent; nobody ever answers
    stall       data is held back, and arrives late, in order, when the proxy is healed

`heal` ends all of them. Connections that swallowed data are reset then, as a middlebox would do it: what is lost in
the middle of a stream cannot be mended.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

Address = tuple[str, int] | Path
_CHUNK_BYTES = 65_536
_ANSWER_S = 10.0
_TURN_S = 0.05
# SO_LINGER with no time: closing sends RST and not FIN.
_RESET = struct.pack("ii", 1, 0)


class Link:
    """One client's connection and its other half."""

    def __init__(self, client: asyncio.StreamWriter):
        self.writers = [client]
        self.swallowed = False
        self.gone = asyncio.Event()

    def reset(self) -> None:
        """End both halves at once, without a farewell."""
        for writer in self.writers:
            found: socket.socket | None = writer.get_extra_info("socket")
            if found is not None and found.family != socket.AF_UNIX:
                with contextlib.suppress(OSError):  # it may be closed already
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        self.gone.set()


class Proxy:
    """Listens at `listen` (a loopback port or a unix socket) and hands on to `upstream`."""

    def __init__(self, listen: Address, upstream: Address):
        self.listen = listen
        self.upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._links: set[Link] = set()
        self._server: asyncio.Server | None = None
        self._swallowing = False
        self._delay_s = 0.0
        self._flowing = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{listen}", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        self._do(self._heal())

    def refuse(self) -> None:
        """Stop listening and reset what is open."""
        self._do(self._refuse())

    def reset(self) -> None:
        """Reset every open connection."""
        self._do(self._reset())

    def delay(self, seconds: float) -> None:
        """Let each piece of data wait for `seconds` from now on."""
        self._delay_s = seconds

    def half_open(self) -> None:
        """Swallow everything from now on, and accept new connections only to swallow what they send."""
        self._swallowing = True

    def stall(self) -> None:
        """Hold everything back from now on."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def heal(self) -> None:
        """Let everything pass again."""
        self._do(self._heal())

    def close(self) -> None:
        """End every connection and the thread."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ANSWER_S)
        self._loop.close()

    @property
    def num_links(self) -> int:
        """How many clients are connected."""
        return len(self._links)

    def _do(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(_ANSWER_S)

    async def _refuse(self) -> None:
        if self._server is not None:
            # Python 3.11 forgets to close a client that it is just accepting when its server is closed.
            for listening in self._server.sockets:
                self._loop.remove_reader(listening.fileno())
            await asyncio.sleep(_TURN_S)
            self._server.close()
            self._server = None
        await self._reset()

    async def _end(self) -> None:
        self._flowing.set()
        await self._refuse()
        # A client may have been accepted just now. Transports that are not closed warn in whichever test comes next.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await self._reset()
            await asyncio.wait(others, timeout=_TURN_S)
        await asyncio.sleep(_TURN_S)

    async def _reset(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _heal(self) -> None:
        self._swallowing, self._delay_s = False, 0.0
        self._flowing.set()
        for link in [link for link in self._links if link.swallowed]:
            link.reset()
        if self._server is not None:
            return
        if isinstance(self.listen, Path):
            self.listen.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._serve, str(self.listen))
        else:
            self._server = await asyncio.start_server(self._serve, *self.listen)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(writer)
        self._links.add(link)
        try:
            if self._swallowing:
                link.swallowed = True
                await self._swallow(reader)
            else:
                await self._connect(link, reader, writer)
        except OSError:
            link.reset()
        finally:
            self._links.discard(link)
            for end in link.writers:
                end.close()

    async def _connect(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        if isinstance(self.upstream, Path):
            answers, upstream = await asyncio.open_unix_connection(str(self.upstream))
        else:
            answers, upstream = await asyncio.open_connection(*self.upstream)
        link.writers.append(upstream)
        pumps = [asyncio.create_task(self._pump(link, *ends)) for ends in ((reader, upstream), (answers, writer))]
        done, open_ones = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in open_ones:
            pump.cancel()
        for pump in done:
            if pump.exception() is not None:
                link.reset()

    async def _pump(self, link: Link, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(_CHUNK_BYTES):
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            await self._flowing.wait()
            if self._swallowing:
                link.swallowed = True
                await self._swallow(source)
                return
            target.write(data)
            await target.drain()
        # Either half's end is the end of the whole: none of the protocols here uses half-closed connections. But nobody
        # who swallows tells of it.
        if self._swallowing:
            link.swallowed = True
            await link.gone.wait()

    @staticmethod
    async def _swallow(reader: asyncio.StreamReader) -> None:
        """Read and forget until this connection is reset."""
        while await reader.read(_CHUNK_BYTES):
            pass
