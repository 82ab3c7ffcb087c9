"""The two parts of a job's data, for training and for validation: the check counts the very rows that training sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from common.schemas.jobs import JobSpec
from worker.data.formats import parse_rows
from worker.data.rows import Row
from worker.data.source import Problems, Source
from worker.data.split import split_off
from worker.ml.census import Census
from worker.ml.options import row_limit
from worker.ml.render import Example, Renderer


@dataclass(frozen=True)
class Part:
    """Rows for one purpose. `name` is the field of the job that asks for them, `keep` picks them from their file."""

    name: str
    source: Source
    renderer: Renderer
    census: Census
    keep: Callable[[Row], bool] | None = None

    def examples(self) -> Iterator[Example]:
        """Yield the rows as examples, counted by the census; rows without a token to learn are left out.

        Raises:
            InvalidInput: at the end, with every bad row in its message, or because nothing is left.
        """
        problems = Problems()
        yield from self.counted(self.source, problems)
        self.settle(problems)

    def counted(self, source: Source, problems: Problems) -> Iterator[Example]:
        """Yield the rows that `source`, a share of the part's own, has of it; what is wrong goes to `problems`."""
        rows = parse_rows(source, problems)
        kept = rows if self.keep is None else filter(self.keep, rows)
        for example in self.renderer.render(source, kept, problems):
            if self.census.add(example):
                yield example

    def settle(self, problems: Problems) -> None:
        """Raise InvalidInput if rows are bad, or none is left."""
        problems.raise_any()
        self.census.require_something(self.name)


def parts(
    job: JobSpec, train: Source, validation: Source | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Part, Part | None]:
    """Return the rows of `job` for training and for validation.

    Raises:
        InvalidInput: the training file has too few rows to split some off.
    """
    asked = job.hyperparameters
    split = split_off(train, job.validation_split, job.seed) if job.validation_split else None
    trained = Part(
        "dataset",
        train,
        Renderer(tokenizer, row_limit(asked, max_length), asked.loss),
        Census(max_length),
        split.trains_on if split else None,
    )
    held_out = train if split else validation
    if held_out is None:
        return trained, None
    name, keep = ("validation_split", split.holds_out) if split else ("validation_dataset", None)
    return trained, Part(name, held_out, Renderer(tokenizer, max_length, asked.loss), Census(max_length), keep)
