"""The data of a run: tokenised, labelled, counted and packed, in Arrow files that are mapped into memory."""

from __future__ import annotations

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common.memory.fitting import Rows, read_rows
from common.schedule import resolve_max_length
from common.schemas.jobs import JobSpec
from worker.ml.base_check import BaseFacts
from worker.ml.budget import estimated, fit_to, tightness
from worker.ml.census import Census
from worker.ml.data import load_tokens, pack_tokens, write_tokens
from worker.ml.options import Options, settle
from worker.ml.parts import Part, parts
from worker.ml.prompts import Prompt, held_out_prompts, read_prompts
from worker.ml.template import choose_template
from worker.ml.tokenizer import load_tokenizer
from worker.trainer.protocol import Note
from worker.trainer.run import Run


def prepare_rows(run: Run, facts: BaseFacts) -> None:
    """Load the tokenizer, tokenise the files, and settle the options: their number of steps depends on the rows.

    Raises:
        InvalidInput: a row is wrong, or none has a token to learn.
    """
    run.tokenizer = load_tokenizer(run.base_folder, facts.vocab_size)
    run.tell(*choose_template(run.tokenizer, run.job.chat_template))
    max_length = resolve_max_length(run.job.hyperparameters, facts.context)
    train, validation = parts_of(run, run.tokenizer, max_length)
    run.train_rows = _tokenized(run, train)
    _plan_memory(run, facts, train.census)
    run.options = _settled(run, train.census)
    if run.options.packing:
        run.train_rows = pack_tokens(run.train_rows, run.options.packing, max_length, run.job.seed)
        run.options = _settled(run, train.census, num_packed=len(run.train_rows))
    run.tell(*run.options.choices)
    if facts.shape is not None:
        rows = rows_of(run.job, train.census)
        run.report["memory"] = estimated(run.job, facts.shape, rows, run.options, run.device, run.holder.held_bytes)
    run.report["data"] = train.census.report()
    run.highest_token = max(train.census.highest, int(run.tokenizer.pad_token_id or 0))
    if validation:
        run.eval_rows = _tokenized(run, validation)
        run.report["validation_data"] = validation.census.report()
        run.highest_token = max(run.highest_token, validation.census.highest)
    run.prompts = _prompts(run, facts, plain=train.census.plain)


def parts_of(run: Run, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Part, Part | None]:
    """Return the rows of the run's files for training and for validation.

    Raises:
        InvalidInput: the training file has too few rows to split some off.
    """
    train, held_out = run.source(run.spec.train_file, "dataset"), run.spec.validation_file
    validation = run.source(held_out, "validation_dataset") if held_out else None
    return parts(run.job, train, validation, tokenizer, max_length)


def rows_of(job: JobSpec, census: Census) -> Rows:
    """Return what the rows of a file come to in a micro-batch."""
    mean = census.tokens / max(1, census.rows)
    return read_rows(job.hyperparameters, longest=census.longest, mean=mean, max_length=census.max_length)


def _plan_memory(run: Run, facts: BaseFacts, census: Census) -> None:
    """Choose what the job leaves open, unless the run that goes on has chosen already."""
    if run.plan is None and facts.shape is not None:
        fit = fit_to(run.job, facts.shape, rows_of(run.job, census), run.device, run.holder.held_bytes)
        run.plan = fit.plan
        run.tell(*tightness(run.job, fit, run.device, run.holder.held_bytes))


def _prompts(run: Run, facts: BaseFacts, *, plain: bool) -> list[Prompt]:
    asked = run.job.sample_prompts
    if asked == "validation":
        return held_out_prompts(run.tokenizer, run.eval_rows or (), facts)
    return read_prompts(run.tokenizer, list(asked or ()), facts, plain=plain)


def _settled(run: Run, census: Census, num_packed: int | None = None) -> Options:
    return settle(
        run.job,
        num_rows=census.rows,
        num_packed=num_packed,
        max_length=census.max_length,
        cuda=run.device.type == "cuda",
        shrink=run.spec.shrink,
        plan=run.plan,
    )


def _tokenized(run: Run, part: Part) -> Dataset:
    path = run.folder / "tokens" / f"{part.name}.arrow"
    path.parent.mkdir(exist_ok=True)
    write_tokens(part.examples(), path)
    name, census = part.name, part.census
    run.send(Note("loss.chosen", f"{name}: {census.loss_sentence()}", data=dict(census.losses)))
    if census.cut_rows:
        message = (
            f"{name}: {census.cut_share:.1%} of the rows are longer than max_length {census.max_length} and were cut"
        )
        dropped = f"; {census.dropped:,} of them lost their whole answer and were left out" if census.dropped else ""
        run.send(Note("rows.truncated", message + dropped, "warning", census.report()))
    return load_tokens(path)
