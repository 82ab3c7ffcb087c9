"""The data of a run: tokenised, labelled, counted and packed, in Arrow files that are mapped into memory."""

from __future__ import annotations

from datasets import Dataset

from worker.data.source import Problems
from worker.ml.base_check import BaseFacts
from worker.ml.census import Census
from worker.ml.data import load_tokens, pack_tokens, tokenize_rows, write_tokens
from worker.ml.options import Options, resolve_max_length, row_limit, settle
from worker.ml.render import Renderer
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
    census = Census(max_length)
    limit = row_limit(run.job.hyperparameters, max_length)
    run.train_rows = _tokenized(run, run.spec.train_file, "dataset", limit, census)
    run.options = _settled(run, census)
    if run.options.packing:
        run.train_rows = pack_tokens(run.train_rows, run.options.packing, max_length, run.job.seed)
        run.options = _settled(run, census, num_packed=len(run.train_rows))
    run.tell(*run.options.choices)
    run.report["data"] = census.report()
    run.highest_token = max(census.highest, int(run.tokenizer.pad_token_id or 0))
    if run.spec.validation_file:
        validation = Census(max_length)
        run.eval_rows = _tokenized(run, run.spec.validation_file, "validation_dataset", max_length, validation)
        run.report["validation_data"] = validation.report()
        run.highest_token = max(run.highest_token, validation.highest)


def _settled(run: Run, census: Census, num_packed: int | None = None) -> Options:
    return settle(
        run.job,
        num_rows=census.rows,
        num_packed=num_packed,
        max_length=census.max_length,
        cuda=run.device.type == "cuda",
        shrink=run.spec.shrink,
    )


def _tokenized(run: Run, name: str, param: str, limit: int, census: Census) -> Dataset:
    problems = Problems()
    renderer = Renderer(run.tokenizer, limit, run.job.hyperparameters.loss)
    examples = tokenize_rows(run.source(name, param), renderer, census, problems)
    path = run.folder / "tokens" / f"{param}.arrow"
    path.parent.mkdir(exist_ok=True)
    write_tokens(examples, path)
    problems.raise_any()
    census.require_something(param)
    run.send(Note("loss.chosen", f"{param}: {census.loss_sentence()}", data=dict(census.losses)))
    if census.cut_rows:
        message = f"{param}: {census.cut_share:.1%} of the rows are longer than max_length {limit:,} and were cut"
        dropped = f"; {census.dropped:,} of them lost their whole answer and were left out" if census.dropped else ""
        run.send(Note("rows.truncated", message + dropped, "warning", census.report()))
    return load_tokens(path)
