"""`tunery chat`: ask a finished job, its base, or both side by side, in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import state
from common.cli.serve import FourBit, environment, method, require_worker
from common.errors import InvalidInput, TuneryError, WrongState

if TYPE_CHECKING:
    from common.cli.asking import Asker, Messages

_COLUMNS = ("prompt", "base", "adapter")
_TOO_LONG = "context_length_exceeded"


def chat(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(help="Id of a finished job, or the folder of an adapter.", metavar="JOB")],
    question: Annotated[
        str | None, typer.Argument(help="Asked once; otherwise standard input, or a prompt.", metavar="QUESTION")
    ] = None,
    bare: Annotated[bool, typer.Option("--base", help="Ask the base alone.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the base and the adapter, side by side.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the base is, if not where the job says.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Ask a running `tunery serve` instead of loading.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens; otherwise as long as it fits.", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0, max=2)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest of this share.", max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    load_in_4bit: FourBit = None,
    output: state.Output = None,
) -> None:
    """Ask a fine-tuned model.

    The adapter is downloaded and verified, and loaded over its base on this machine, which needs the extra `worker`;
    or a running `tunery serve` is asked, with --url and TUNERY_API_KEY. Ctrl-C ends an answer; Ctrl-D leaves.
    """
    from common.cli.asking import Asker

    options = state.of(ctx)
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    fields = {name: value for name, value in given.items() if value is not None}
    opened = _remote(options, url) if url else _local(options, job, model, method(load_in_4bit))
    with opened as (client, name):
        asker = Asker(client, fields)
        models = [asker.base(), name or job] if bare or compare else [name or job]
        talk = Talk(asker, models[:1] if bare and not compare else models, system, options.as_json)
        asked = question if question is not None else None if sys.stdin.isatty() else sys.stdin.read()
        if asked is None:
            talk.go_on()
        else:
            talk.ask(_not_empty(asked))


class Talk:
    """A conversation with one model, or with the base and the adapter, each of which hears its own answers only."""

    def __init__(self, asker: Asker, models: list[str], system: str | None, as_json: bool):
        self._asker = asker
        self._models = models
        self._as_json = as_json
        start: Messages = [] if system is None else [{"role": "system", "content": system}]
        self._start: list[Messages] = [start for _ in models]
        self._heard = self._start

    def go_on(self) -> None:
        """Ask what is typed, until the end of the input."""
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                typer.echo()
                return
            if question:
                try:
                    self._ask_or_tell(question)
                except KeyboardInterrupt:
                    typer.echo()

    def _ask_or_tell(self, question: str) -> None:
        """Ask. What fails ends neither the conversation nor a model that may have taken minutes to load."""
        from common.cli.failures import tell

        try:
            self.ask(question)
        except TuneryError as error:
            if error.code == _TOO_LONG and self._heard is not self._start:
                typer.echo("what was said so far no longer fits the model's context: it is forgotten", err=True)
                self._heard = self._start
                self._ask_or_tell(question)
            else:
                tell(error, as_json=self._as_json)

    def ask(self, question: str) -> None:
        """Ask, show the answer, and remember both."""
        turns = [[*heard, {"role": "user", "content": question}] for heard in self._heard]
        texts = self._compared(question, turns) if len(self._models) > 1 else [self._answered(question, turns[0])]
        self._heard = [[*turn, {"role": "assistant", "content": text}] for turn, text in zip(turns, texts, strict=True)]

    def _answered(self, question: str, turns: Messages) -> str:
        from common.cli import screen

        if self._as_json:
            answer = self._asker.ask(self._models[0], turns)
            told = {"model": self._models[0], "prompt": question, "answer": answer.text}
            screen.as_json(told | {"finish_reason": answer.finish_reason, "usage": answer.usage})
            return answer.text
        answer = self._asker.ask(
            self._models[0], turns, lambda piece: print(screen.paragraph(piece), end="", flush=True)
        )
        print()
        return answer.text

    def _compared(self, question: str, turns: list[Messages]) -> list[str]:
        from common.cli import screen

        texts = [answer.text for answer in self._asker.ask_all(self._models, turns)]
        told = dict(zip(_COLUMNS, (question, *texts), strict=True))
        if self._as_json:
            screen.as_json(told)
        else:
            show_compared([told])
        return texts


def show_compared(answers: list[dict[str, str]]) -> None:
    """Print answers of the base and of the adapter: side by side on a terminal, else one line each."""
    from rich.table import Table
    from rich.text import Text

    from common.cli import screen

    console = screen.stdout()
    if not console.is_terminal:
        for answer in answers:
            for name in _COLUMNS:
                console.print(f"{name + ':':<8} {screen.sentence(answer[name])}")
        return
    grid = Table(show_lines=True)
    for title in ("question", "base alone", "with the adapter"):
        grid.add_column(title, ratio=1)
    for answer in answers:
        grid.add_row(*(Text(screen.paragraph(answer[name])) for name in _COLUMNS))
    console.print(grid)


@contextmanager
def _remote(options: state.State, url: str) -> Iterator[tuple[Any, None]]:
    from common.cli import asking
    from common.client.address import find_key

    with asking.remote(url, find_key(url, options.data_dir)) as client:
        yield client, None


@contextmanager
def _local(options: state.State, job: str, model: str | None, arguments: list[str]) -> Iterator[tuple[Any, str]]:
    """Yield a client of a server that is started here, and the adapter's name there."""
    from common.cli import asking

    require_worker()
    folder = _adapter_folder(Path(job))
    if folder is None:
        folder, known = _downloaded(options, job)
    else:
        known = _base_of(folder)
    base = model or known
    if not options.as_json:
        typer.echo(f"loading {base}; Ctrl-C stops it", err=True)
    started = asking.local(
        base, {"adapter": folder}, arguments, environment(options.data_dir), lambda line: typer.echo(line, err=True)
    )
    with started as client:
        yield client, "adapter"


def _adapter_folder(folder: Path) -> Path | None:
    """Return the adapter in `folder` or in its folder `adapter`, as `tunery download` lays it out; else None."""
    return next((at for at in (folder, folder / "adapter") if (at / "adapter_config.json").is_file()), None)


def _base_of(folder: Path) -> str:
    config = json.loads((folder / "adapter_config.json").read_text())
    name, revision = str(config["base_model_name_or_path"]), config.get("revision")
    return f"{name}@{revision}" if "/" in name and revision else name


def _downloaded(options: state.State, job: str) -> tuple[Path, str]:
    """Download the adapter of a job, unless it is here already; return its folder and where its base is."""
    from common import settings
    from common.cli.transfers import transfer

    folder = (options.data_dir or settings.client_address()[2]) / "chat" / job
    with options.connect() as client, transfer("downloading", options.as_json) as on_progress:
        found = client.jobs.get(job)
        if found.status != "succeeded":
            raise WrongState(f"job {job} is {found.status}; only one that succeeded can answer")
        client.jobs.download(job, folder, adapter_only=True, on_progress=on_progress)
    name = found.model.partition("@")[0]
    pinned = f"{name}@{found.base_revision}" if "/" in name and found.base_revision else name
    return folder / "adapter", pinned


def _not_empty(question: str) -> str:
    if not question.strip():
        raise InvalidInput("the question is empty", param="QUESTION")
    return question.strip()
