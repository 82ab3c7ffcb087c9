"""Lays out a job with hostile bytes and runs the preflight's own code on it, here or in the real child."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.settings import trainer_environment
from tests.processes import ROOT
from tests.worker.trainer import tiny
from worker.trainer import protocol
from worker.trainer.check import answer
from worker.trainer.protocol import Failed, Message

# What is in a dataset file, or what writes it.
Content = bytes | str | Callable[[Path], None]

MESSAGE_MAX = 16_000


@dataclass(frozen=True)
class Bad:
    """A dataset file that must be refused: `says` is part of the message, after the field's name."""

    name: str
    file: str
    content: Content
    says: str
    limits: dict[str, int] = field(default_factory=dict)


def lay_out(folder: Path, base: Path, file: str, content: Content, **options: Any) -> Path:
    """Lay out a job in `folder` whose dataset is `file` with `content`; job fields and `limits` by name."""
    limits = options.pop("limits", {})
    spec = tiny.write_run(folder, base, **options)
    path = folder / "dataset" / file
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    replace(spec, train_file=f"dataset/{file}", limits=limits).write(folder)
    return folder


def refusal(folder: Path, param: str = "dataset") -> Failed:
    """Check the job in `folder` in this process and return why it is refused."""
    said: list[Message] = []
    code = answer(folder, said.append)
    assert code == protocol.BAD_INPUT, (code, str(said[-1])[:2000])
    return told(said[-1], param)


def told(last: Message | None, param: str = "dataset") -> Failed:
    """Return `last` if it is a refusal that a user can act on: field, reason and hint, all of them short."""
    assert isinstance(last, Failed), str(last)[:2000]
    assert last.param == param, (last.param, last.message[:2000])
    assert last.hint, f"no hint: {last.message[:2000]}"
    for text in (last.message, last.hint):
        assert len(text) <= MESSAGE_MAX, f"{len(text):,} characters: {text[:500]}"
        assert "\x00" not in text and text.encode(), "a database could not store it"
    return last


# Linux counts what a process held before its exec as its own: a small process has to start the child, or the test's
# memory would be measured. Arguments: address space, seconds of CPU, files for output and log, and the command.
_SPAWN = """
import json, os, resource, sys
space, seconds, out, err, *command = sys.argv[1:]
child = os.fork()
if not child:
    for descriptor, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (int(space), int(space)))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    os.execv(command[0], command)
_, status, used = os.wait4(child, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024, used.ru_utime + used.ru_stime]))
"""


@dataclass(frozen=True)
class Ended:
    """How a real check child ended, and what it took."""

    code: int
    last: Message | None
    rss_bytes: int
    cpu_s: float
    log: str


def run_child(
    folder: Path, module: str = "worker.trainer.check", *arguments: str, address_space_bytes: int, cpu_s: int = 60
) -> Ended:
    """Run a check child on `folder` under a cap on its address space, as a preflight worker does."""
    environment = trainer_environment() | {"PYTHONPATH": str(ROOT)}
    out, err = folder / "out.log", folder / "err.log"
    bounds = [str(address_space_bytes), str(cpu_s), str(out), str(err)]
    check = [sys.executable, "-P", "-m", module, str(folder), *arguments]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _SPAWN, *bounds, *check],
        stdin=subprocess.DEVNULL, capture_output=True, cwd=folder, env=environment, check=True,
    )  # fmt: skip
    code, rss_bytes, used_s = json.loads(done.stdout)
    said = [protocol.decode(line) for line in out.read_bytes().splitlines()]
    return Ended(code, said[-1] if said else None, rss_bytes, used_s, err.read_text(errors="replace"))
