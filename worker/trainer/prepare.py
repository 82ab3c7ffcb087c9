"""First stage: settle the options, tokenise the data, load the base, attach the adapter."""

from __future__ import annotations

import os
from importlib.metadata import version

import torch
from datasets import Dataset
from transformers import set_seed

from worker.data.source import Problems
from worker.ml.adapters import attach, set_adapter_dtype, trainable_count
from worker.ml.arguments import choose_optimizer
from worker.ml.base import load_base
from worker.ml.base_check import BaseFacts, base_check
from worker.ml.census import Census
from worker.ml.checkpoint import config_hash, verify
from worker.ml.data import load_tokens, tokenize_rows, write_tokens
from worker.ml.options import resolve_max_length, settle
from worker.ml.packing import require_isolation
from worker.ml.precision import choose_precision, pick_device, precision_report
from worker.ml.sft import Counters
from worker.ml.tokenizer import ensure_chat_template, load_tokenizer
from worker.trainer.protocol import Note
from worker.trainer.run import Run

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
# Two texts that a model must not mix up when they are packed into one sequence.
_PROBES = ("The boats lie in the harbour.", "Snow fell over the hills all night.")


def prepare(run: Run) -> None:
    """Fill the run with everything that training needs.

    Raises:
        InvalidInput: data, base and options do not fit together.
        BadCheckpoint: the checkpoint to resume from is not complete.
    """
    facts = base_check(run.base_folder)
    _fix_machine(run)
    _find_resume(run)
    _prepare_data(run, facts)
    run.wishes.leave_if_asked()
    _prepare_model(run, facts)
    run.wishes.leave_if_asked()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that shape the numbers."""
    return {name: version(name) for name in _PACKAGES}


def _fix_machine(run: Run) -> None:
    # The number of threads changes the order of sums, so a run keeps its own.
    run.device = pick_device(run.spec.device)
    run.threads = run.spec.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(run.threads)
    run.report |= {"device": _device_name(run.device), "threads": run.threads, "versions": versions()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _find_resume(run: Run) -> None:
    job = run.job
    shaping = job.model_dump(
        mode="json", include={"method", "hyperparameters", "lora", "quantization", "seed", "validation_dataset"}
    )
    run.config_hash = config_hash(shaping, run.spec.base.id, run.spec.base.revision, run.spec.train_sha256)
    run.counters = Counters()
    if run.spec.resume_from is None:
        return
    run.resumed = verify(run.folder / run.spec.resume_from, run.config_hash)
    counters = dict(run.resumed.counters)
    run.metrics = counters.pop("metrics")
    run.counters = Counters(**counters)
    run.send(Note("run.resumed", f"going on from step {run.resumed.step}", data={"step": run.resumed.step}))
    if run.resumed.threads != run.threads or run.resumed.versions != versions():
        message = "the checkpoint was made with another number of threads or other library versions: the run goes on, "
        run.send(Note("resume.differs", message + "but not bit for bit", "warning"))


def _prepare_data(run: Run, facts: BaseFacts) -> None:
    run.tokenizer = load_tokenizer(run.base_folder)
    if ensure_chat_template(run.tokenizer):
        message = (
            "the base model has no chat template: conversations are written in a plain one, saved with the adapter"
        )
        run.send(Note("template.defaulted", message))
    max_length = resolve_max_length(run.job.hyperparameters, facts.context)
    census, rows = _tokenized(run, run.spec.train_file, "dataset", max_length)
    options = settle(
        run.job, num_rows=census.rows, max_length=max_length, cuda=run.device.type == "cuda", shrink=run.spec.shrink
    )
    if options.packing:
        rows = load_tokens(run.folder / "tokens" / "dataset.arrow", pack_to=max_length)
        options = settle(
            run.job,
            num_rows=census.rows,
            num_packed=len(rows),
            max_length=max_length,
            cuda=run.device.type == "cuda",
            shrink=run.spec.shrink,
        )
    run.train_rows, run.options = rows, options
    run.tell(*options.choices)
    run.report["data"] = census.report()
    if run.spec.validation_file:
        validation, run.eval_rows = _tokenized(run, run.spec.validation_file, "validation_dataset", max_length)
        run.report["validation_data"] = validation.report()


def _tokenized(run: Run, name: str, param: str, max_length: int) -> tuple[Census, Dataset]:
    problems = Problems()
    census, examples = tokenize_rows(run.source(name, param), run.tokenizer, max_length, problems)
    path = run.folder / "tokens" / f"{param}.arrow"
    path.parent.mkdir(exist_ok=True)
    write_tokens(examples, path)
    problems.raise_any()
    census.require_something(param)
    run.send(Note("loss.chosen", f"{param}: {census.loss_sentence()}", data=dict(census.losses)))
    if census.cut_rows:
        message = f"{param}: {census.cut_share:.1%} of the rows are longer than max_length {max_length} and were cut"
        dropped = f"; {census.dropped:,} of them lost their whole answer and were left out" if census.dropped else ""
        run.send(Note("rows.truncated", message + dropped, "warning", census.report()))
    return census, load_tokens(path)


def _prepare_model(run: Run, facts: BaseFacts) -> None:
    run.precision = choose_precision(run.job, run.device)
    run.optim, replaced = choose_optimizer(run.options.optim, run.device)
    run.tell(*run.precision.choices, *replaced)
    base = load_base(run.base_folder, run.job, facts, run.precision, run.device)
    run.tell(*base.choices)
    if run.options.packing:
        first, second = (run.tokenizer(text).input_ids for text in _PROBES)
        require_isolation(base.model, first, second)
    set_seed(run.job.seed)
    run.model = attach(base.model, run.job.lora)
    set_adapter_dtype(run.model, run.precision.adapter)
    run.report |= {
        "trainable_parameters": trainable_count(run.model),
        "precision": precision_report(run.model, run.precision) | {"left_in_16_bit": base.unquantized},
        "optim": run.optim,
    }
    total = sum(run.report["precision"]["parameters"].values())
    run.report["total_parameters"] = total
