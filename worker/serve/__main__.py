"""`python -m worker.serve --base MODEL`: answer chat completions with the base and the finished jobs over it.

With `--adapter NAME=DIR` it answers with those folders and asks no installation; it then listens on a private socket.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn

from common import context as contexts
from common import settings as settings_of
from common.context import Context
from common.errors import InvalidInput, TuneryError
from common.log import configure
from common.settings import Settings
from worker import bases
from worker.bases import Base
from worker.serve.app import create_app
from worker.serve.catalog import Catalog, FolderCatalog, JobCatalog
from worker.serve.model_process import ModelProcess
from worker.serve.protocol import ServeSpec
from worker.serve.service import Service
from worker.serve.shelf import Shelf
from worker.trainer.protocol import BaseRef
from worker.workplace import Workplace, find_device

_GRACE_S = 10
_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes; return an exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    chosen = _parser().parse_args(arguments)
    try:
        settings = settings_of.load()
        configure(settings)
        base = find_base(chosen.base, settings)
        if chosen.uds:
            folders = dict(adapter.partition("=")[::2] for adapter in chosen.adapter)
            catalog = FolderCatalog({name: Path(folder).absolute() for name, folder in folders.items()})
            return serve(settings, base, catalog, chosen)
        context = contexts.build(settings)
        return _serve_jobs(context, base, chosen)
    except TuneryError as error:
        print(f"{error.message}{f' {error.hint}' if error.hint else ''}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.serve", description=__doc__)
    parser.add_argument("--base", required=True, help="a folder, a name under TUNERY_MODEL_DIR, or org/name[@revision]")
    parser.add_argument("--method", choices=("auto", "qlora", "lora"), default="auto", help="4 bit or 16 bit")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--uds", type=Path, help="listen on this socket, without keys, for --adapter folders")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR")
    return parser


def _serve_jobs(context: Context, base: Base, chosen: argparse.Namespace) -> int:
    try:
        return serve(context.settings, base, JobCatalog(context, base), chosen)
    finally:
        context.close()


def find_base(name: str, settings: Settings) -> Base:
    """Return the base that `name` means: a folder, or what `model` of a job may say.

    Raises:
        InvalidInput: there is no such base.
        InfraError: the hub does not answer.
    """
    if (Path(name) / "config.json").is_file():
        return bases.in_folder(Path(name).resolve(), Path(name).resolve().name)
    repository, _, revision = name.partition("@")
    if "/" in repository and _COMMIT.fullmatch(revision):
        # Pinned already: a machine that has it need not ask the hub.
        return Base(repository, revision)
    return bases.resolve(name, settings)


def serve(settings: Settings, base: Base, catalog: Catalog, chosen: argparse.Namespace) -> int:
    """Hold `base` in a child and answer requests for it and the adapters of `catalog`; return an exit code."""
    workplace = Workplace(settings)
    try:
        process = ModelProcess(_spec(settings, base, chosen.method), workplace.folder, settings.serve_stall_s)
        shelf = Shelf(process, workplace.folder, settings.serve_max_adapters, settings.serve_max_adapter_bytes)
        app = create_app(Service(base, catalog, process, shelf, settings))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                host=chosen.host or settings.serve_host,
                port=settings.serve_port if chosen.port is None else chosen.port,
                uds=str(chosen.uds) if chosen.uds else None,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        process.on_hopeless = lambda: setattr(server, "should_exit", True)
        server.run()
        if process.failure is not None:
            raise InvalidInput(process.failure.message, hint=process.failure.hint)
        return 0
    finally:
        workplace.close()


def _spec(settings: Settings, base: Base, method: str) -> ServeSpec:
    device = find_device(settings.device).device
    path = bases.fetch(base, settings, lambda: None, weights=True)
    if method == "auto":
        # As most adapters were trained. A CPU takes minutes to quantise a large base, and gains little.
        method = "qlora" if device.startswith("cuda") else "lora"
    _log.info("serving %s%s", base.id, f"@{base.revision}" if base.revision else "")
    return ServeSpec(
        base=BaseRef(str(path.resolve()), base.id, base.revision),
        method=method,
        device=device,
        threads=settings.trainer_threads,
        max_rows=settings.serve_max_rows,
        max_batch_tokens=settings.serve_max_batch_tokens,
        max_tokens=settings.serve_max_tokens,
    )


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    # uvicorn raises the signal once more when it has stopped: without this the process would die before it has removed
    # its folder.
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
