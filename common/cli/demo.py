"""`tunery demo`: the whole service on this machine, from a file of examples to an adapter that changes the answers.

It speaks to the service as any client does: over HTTP, with a key, from an upload to a download.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import InfraError, InvalidInput

if TYPE_CHECKING:
    from common.client import Job, Tunery
    from common.embedded.children import Children

_READY_S = 120.0
_ANSWER_TOKENS = 48
# `tunery up` gives its workers time for a checkpoint; the demo's job is over by then, or not wanted any more.
_STOP_S = 30.0


def demo(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Option("--folder", help="Where the demo keeps what it makes.")] = Path(
        ".tunery/demo"
    ),
) -> None:
    """Fine-tune a small model here, and see what it learned."""
    from common.embedded.base_model import ensure_base

    examples = _examples()
    stack = folder / "stack"
    with _ended_by_signals():
        typer.echo("base model: SmolLM2-135M-Instruct (converted once, about half a minute)")
        base = ensure_base(stack)
        with _running(stack) as client:
            job = _train(client, examples)
            shutil.rmtree(folder / "adapter", ignore_errors=True)
            client.jobs.download(job.id, folder, adapter_only=True)
        _compare(base, folder, examples)
    typer.echo(f"adapter: {folder / 'adapter'}")


def _examples() -> Path:
    """Return the folder of the repository's examples."""
    folder = Path(__file__).resolve().parents[2] / "examples"
    if not (folder / "demo.json").is_file():
        raise InvalidInput(
            f"the demo's examples are not at {folder}",
            code="no_examples",
            hint="run the demo from a checkout of the repository, with `make demo`",
        )
    return folder


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM into the exception that Ctrl-C is, so that everything is stopped on the way out."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _running(stack: Path) -> Iterator[Tunery]:
    """Run `tunery up` with its data in `stack`, yield a client for it, and stop it."""
    from common.client import Tunery
    from common.client.address import KEY_FILE, UP_FILE
    from common.embedded.children import Children

    children = Children(lambda line: typer.echo(line, err=True))
    # What an earlier run left would name a server that is gone.
    (stack / UP_FILE).unlink(missing_ok=True)
    try:
        typer.echo(f"starting the service; its logs are in {stack / 'logs'}")
        _start(children, stack)
        url = json.loads((stack / UP_FILE).read_text())["url"]
        key = (stack / KEY_FILE).read_text().strip()
        typer.echo(f"ready: {url} (interactive documentation: {url}/docs)")
        with Tunery(url, key) as client:
            yield client
    finally:
        children.stop()


def _start(children: Children, stack: Path) -> None:
    from common import settings
    from common.client.address import UP_FILE
    from common.embedded.children import Child

    argv = (sys.executable, "-m", "common.cli", "up", "--port", "0", "--data-dir", str(stack))
    environment = settings.child_environment({})
    child = Child("tunery up", argv, environment, stack / "logs" / "up.log", grace_s=_STOP_S)
    children.start(child, lambda: _is_ready(stack / UP_FILE), _READY_S)


def _is_ready(up_file: Path) -> bool:
    import httpx2

    try:
        url = json.loads(up_file.read_text())["url"]
        return httpx2.get(f"{url}/readyz", trust_env=False, timeout=5).status_code == 200
    except (FileNotFoundError, ValueError, KeyError, httpx2.TransportError):
        return False


def _train(client: Tunery, examples: Path) -> Job:
    """Upload the examples, submit the job and show it to its end."""
    from common.cli.watch import shown_to_the_end

    dataset = client.datasets.upload(examples / "support-bot.jsonl")
    body: dict[str, Any] = json.loads((examples / "demo.json").read_text())
    job = client.jobs.create(**(body | {"dataset": dataset}))
    typer.echo(f"submitted: {job.id}")
    ended = shown_to_the_end(client, job.id, False)
    if ended.status != "succeeded":
        error = ended.error
        raise InfraError(
            f"the job {ended.status}{f': {error.message}' if error else ''}",
            code="demo_failed",
            hint=error.hint if error else None,
        )
    return ended


def _compare(base: Path, folder: Path, examples: Path) -> None:
    """Let the bare base and the adapter answer the same questions, and show both."""
    from common import settings
    from common.cli import asking
    from common.cli.chat import show_compared

    prompts: list[str] = json.loads((examples / "prompts.json").read_text())
    typer.echo("asking the base and the adapter the same questions")
    # In 16 bit, which a CPU does not have to make first.
    arguments, environment = ("--method", "lora"), settings.child_environment({})
    adapters = {"adapter": folder / "adapter"}
    answers = []
    with asking.local(str(base), adapters, arguments, environment, lambda line: typer.echo(line, err=True)) as client:
        asker = asking.Asker(client, {"max_tokens": _ANSWER_TOKENS, "temperature": 0})
        models = [asker.base(), "adapter"]
        for prompt in prompts:
            turns: asking.Messages = [{"role": "user", "content": prompt}]
            before, after = asker.ask_all(models, [turns, turns])
            answers.append({"prompt": prompt, "base": before.text.strip(), "adapter": after.text.strip()})
    (folder / "answers.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    show_compared(answers)
