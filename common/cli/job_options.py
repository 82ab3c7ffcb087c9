"""What is asked of a job on a command line: the options that `submit` and `estimate` share, and the body they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from common.client import Tunery
    from common.schemas.datasets import Dataset

File = Annotated[
    str | None, typer.Argument(help="A local file, which is uploaded, or a dataset URI.", metavar="FILE_OR_URI")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub id (org/name[@revision]) or a folder of the server's.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option: learning_rate=1e-4, lora.r=8, … Repeat it for more.", metavar="NAME=VALUE"),
]
Method = Annotated[str | None, typer.Option(help="qlora (4-bit base), lora (16 bit) or full (no adapter).")]
Suffix = Annotated[str | None, typer.Option(help="A name for the adapter.")]
Export = Annotated[
    list[str] | None,
    typer.Option(
        "--export",
        metavar="FORM",
        help="Besides the adapter: merged, merged_dequantized or merged_4bit. Repeat it for more.",
    ),
]
Validation = Annotated[str | None, typer.Option(help="A file or URI to evaluate on.", metavar="FILE_OR_URI")]
ValidationSplit = Annotated[
    float | None, typer.Option(help="Share of the rows to hold out and evaluate on, up to 0.5.", metavar="SHARE")
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(help="A file with a Jinja chat template.", metavar="FILE", exists=True, dir_okay=False),
]
Sample = Annotated[
    list[str] | None,
    typer.Option(
        help="A prompt to ask at each checkpoint, up to 8; `validation` asks validation rows.", metavar="PROMPT"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the run.")]
Priority = Annotated[int | None, typer.Option(help="-100 to 100; higher runs first.")]
NotBefore = Annotated[
    str | None, typer.Option(help="Start it at that moment or later: 2026-12-24T02:00, +2h.", metavar="WHEN")
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", help="A label of the job. Repeat it for more.", metavar="KEY=VALUE"),
]
# Those whose values go into the body as they are.
_PLAIN = ("model", "method", "suffix", "seed", "priority", "validation_split")


def fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return the body that the options in `given`, by the names of their parameters, ask for, without the datasets.

    Raises:
        InvalidInput: one of them is wrong.
    """
    from common.cli.moments import parse_moment
    from common.cli.overrides import parse_labels, parse_sets

    body: dict[str, Any] = {name: given[name] for name in _PLAIN if given[name] is not None}
    body |= parse_sets(given["settings"] or [])
    if given["not_before"] is not None:
        body["not_before"] = parse_moment(given["not_before"], "--not-before")
    if given["export"]:
        body["export"] = given["export"]
    if given["metadata"]:
        body["metadata"] = parse_labels(given["metadata"])
    if given["sample"]:
        body["sample_prompts"] = "validation" if given["sample"] == ["validation"] else given["sample"]
    if given["chat_template"] is not None:
        body["chat_template"] = given["chat_template"].read_text(encoding="utf-8")
    return body


def datasets(client: Tunery, given: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Return the datasets of the body; a local file is uploaded."""
    named = (("dataset", "dataset", "dataset"), ("validation_dataset", "validation", "--validation"))
    return {
        field: resolve(client, given[name], param, quiet) for field, name, param in named if given[name] is not None
    }


def resolve(client: Tunery, text: str, param: str, quiet: bool) -> str | Dataset:
    """Return the URI that `text` is, or upload the file that it names.

    Raises:
        InvalidInput: it is neither.
    """
    if "://" in text or text.startswith("dataset:"):
        return text
    from common.cli.sending import send_file
    from common.client.sending import check_file

    path = Path(text).expanduser()
    check_file(path, param)
    return send_file(client, path, quiet=quiet)
