"""`tunery up`: the whole service on one machine, as supervised children of one process."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from common import settings as settings_of
from common.cards import cards
from common.embedded.base_model import ensure_base, is_installed
from common.embedded.children import Child, Children, run_to_end
from common.embedded.ports import free_ports, is_free
from common.embedded.stack import Stack, write_private
from common.errors import InfraError, InvalidInput
from common.settings import PREFIX, Settings

_POLL_S = 0.1
_API_GRACE_S = 15.0
# What a worker needs beyond its trainer's time for a checkpoint to give its job back.
_LEAVE_S = 30.0
_SERVICE_RANK = 1


def run_up(port: int | None = None, workers: int | None = None, data_dir: Path | None = None) -> int:
    """Run the service until SIGINT, SIGTERM or SIGHUP; return the exit code. Must be called in the main thread.

    Args:
        port: of the API; 0 takes a free one, None the one of the settings.
        workers: how many to start; None starts one per visible GPU, and one where there is none.
        data_dir: where everything is kept; None takes the one of the settings.

    Raises:
        TuneryError: it runs here already, the port is taken, or a part did not start; the message says why.
    """
    settings = settings_of.load()
    folder = (data_dir or settings.data_dir).absolute()
    with _private_files(), _only_one(folder), _Signals() as signals:
        chosen_port = _chosen_port(settings.host, settings.port if port is None else port)
        stack = Stack(folder, settings)
        children = Children(say=_say)
        try:
            _start(children, stack, settings, chosen_port, workers)
            while True:
                children.revive()
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            _say("stopping: a running job makes a checkpoint; a second Ctrl-C waits for none")
        finally:
            signals.stopping = True
            for name in ("up.json", "environment.json"):
                (folder / name).unlink(missing_ok=True)
            children.stop(hurry=lambda: signals.again)
            stack.remove_sockets()
    _say("stopped")
    return 0


def _start(children: Children, stack: Stack, settings: Settings, port: int, workers: int | None) -> None:
    url = f"http://{_reachable(settings.host)}:{port}"
    environment = settings_of.child_environment(
        stack.environment()
        | {
            f"{PREFIX}PORT": str(port),
            # A folder named `api` or `worker` where the user happens to stand must not be imported for ours.
            "PYTHONSAFEPATH": "1",
        }
    )
    for server in stack.servers():
        children.start(server.child, server.is_ready)
    key_file = stack.data_dir / "api-key"
    run_to_end(_python("migrations", environment, stack))
    run_to_end(_python("common.embedded.first_key", environment, stack, str(key_file)))
    if stack.embeds_models:
        _prepare_base_model(stack.data_dir)
    api = _python("api", environment, stack, rank=_SERVICE_RANK, grace_s=_API_GRACE_S)
    children.start(api, lambda: _is_alive(settings.host, port))
    # The doctor looks at the same parts.
    write_private(stack.data_dir / "environment.json", json.dumps(stack.environment(), indent=1) + "\n")
    write_private(stack.data_dir / "up.json", json.dumps({"url": url, "pid": os.getpid()}) + "\n")
    placed = _worker_children(environment, stack, settings, workers)
    for child in placed:
        children.start(child)
    # A line each: addresses and paths that a terminal breaks cannot be clicked or copied.
    _say(f"Tunery listens on {url}")
    _say(f"documentation: {url}/docs")
    _say(f"API key: {key_file}")
    _say(f"logs: {stack.data_dir / 'logs'}")
    _say(f"running: {', '.join(children.pids())}")
    _say("Ctrl-C stops all of it")


def _prepare_base_model(data_dir: Path) -> None:
    if not is_installed():
        return
    if not (data_dir / "models").joinpath("SmolLM2-135M-Instruct").exists():
        _say("converting the embedded base model, once (20-30 s)")
    ensure_base(data_dir)


def _worker_children(
    environment: Mapping[str, str], stack: Stack, settings: Settings, workers: int | None
) -> list[Child]:
    pinned = cards() if settings.device == "auto" else []
    count = workers if workers is not None else max(1, len(pinned))
    grace_s = settings.stop_grace_s + _LEAVE_S
    children = [_python("worker", environment, stack, "preflight", name="preflight", rank=_SERVICE_RANK)]
    for number in range(count):
        values = dict(environment)
        if pinned:
            values["CUDA_VISIBLE_DEVICES"] = pinned[number % len(pinned)]
        elif count > 1 and "trainer_threads" not in settings.model_fields_set:
            values[f"{PREFIX}TRAINER_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // count))
        name = f"worker-{number}"
        children.append(_python("worker", values, stack, "train", name=name, rank=_SERVICE_RANK, grace_s=grace_s))
    return [*children, _python("worker", environment, stack, "sweeper", name="sweeper", rank=_SERVICE_RANK)]


def _python(
    module: str,
    environment: Mapping[str, str],
    stack: Stack,
    *arguments: str,
    name: str | None = None,
    rank: int = 0,
    grace_s: float = 10.0,
) -> Child:
    title = name or module.rpartition(".")[2]
    argv = (sys.executable, "-m", module, *arguments)
    return Child(title, argv, environment, stack.log(title), rank=rank, grace_s=grace_s)


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """Let this process and its children make files for their user alone: the data directory holds others' work."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the data directory's lock, which ends with the process whatever happens to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "up.lock").open("a")
    except OSError as error:
        raise InfraError(
            f"cannot use the data directory {folder}: {error.strerror}", hint="choose another one with --data-dir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InfraError(
                f"`tunery up` runs already with the data directory {folder}{_who(folder)}",
                code="already_running",
                hint="use that one, stop it with Ctrl-C, or choose another --data-dir",
            ) from None
        yield


def _who(folder: Path) -> str:
    try:
        running = json.loads((folder / "up.json").read_text())
        return f" (process {running['pid']}, {running['url']})"
    except (OSError, ValueError, KeyError):
        return ""  # it is still starting


def _chosen_port(host: str, port: int) -> int:
    if port == 0:
        return free_ports(1)[0]
    if not is_free(host, port):
        raise InvalidInput(
            f"port {port} on {host} is in use by another program",
            code="port_taken",
            param="port",
            hint="choose another one with --port; --port 0 takes a free one",
        )
    return port


def _reachable(host: str) -> str:
    """Return the host by which this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def _is_alive(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(_reachable(host).strip("[]"), port, timeout=2)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Signals:
    """Turns the first signal into KeyboardInterrupt; while stopping, further ones set `again` instead."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.stopping = False
        self.again = False
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._heard) for number in self._NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, _number: int, _frame: FrameType | None) -> None:
        if self.stopping:
            self.again = True
        else:
            self.stopping = True
            raise KeyboardInterrupt
