"""`python -m api`: serve the HTTP API with the settings of the environment."""

from __future__ import annotations

import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from common import context, log, settings
from common.errors import TuneryError

_GRACE_S = 10


class Server(uvicorn.Server):
    """uvicorn's server, which ends event streams, long polls and verifications before it waits for open requests."""

    def __init__(self, app: FastAPI, config: uvicorn.Config):
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening and let the open requests end."""
        self._app.state.watcher.close()
        self._app.state.finishing.close()
        await super().shutdown(sockets)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    # uvicorn raises the signal once more when it has stopped: without this the process would die before it has rung
    # the last bells.
    raise SystemExit(0)


def main() -> int:
    """Serve until a signal comes; return an exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    values = settings.load()
    log.configure(values)
    try:
        parts = context.build(values)
    except TuneryError as error:
        print(f"{error.message}{f' {error.hint}' if error.hint else ''}", file=sys.stderr)
        return 1
    app = create_app(parts)
    # log_config=None: our own format; the access log is api.edge's, which writes no query and so no secret.
    config = uvicorn.Config(
        app,
        host=values.host,
        port=values.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    try:
        Server(app, config).run()
    finally:
        parts.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
