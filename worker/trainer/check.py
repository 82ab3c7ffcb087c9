"""The preflight child: `python -m worker.trainer.check FOLDER`. Reads every row as training would, without a model.

Everything that can be known on a CPU is checked here, before a GPU is asked for: all bad rows are found, not the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadRows, UserError
from common.memory.fitting import NOMINAL_BYTES, BatchPlan, choose, read_rows, read_wish
from common.memory.setup import read_setup
from common.schedule import resolve_max_length
from common.schemas.jobs import JobSpec
from worker.data.limits import Limits
from worker.data.source import Problems, Source
from worker.ml.base_check import BaseFacts, base_check, check_forms
from worker.ml.module_names import known_modules
from worker.ml.options import settle
from worker.ml.targets import check_held_in_4_bit, check_lora, check_rank
from worker.ml.vocabulary import rows_needed
from worker.trainer import entry
from worker.trainer.entry import parse_job
from worker.trainer.forks import allowed_processes
from worker.trainer.gauge import Gauge
from worker.trainer.protocol import Message, TrainSpec

if TYPE_CHECKING:
    from worker.ml.parts import Part


def check(folder: Path, spec: TrainSpec, send: Callable[[Message], None], processes: int = 1) -> dict[str, Any]:
    """Return the report on the job in `folder`; a large file is read by so many `processes`, and `send` hears how far.

    Raises:
        InvalidInput: what is wrong, with every bad row in its message (the first in full, the rest counted).
    """
    from worker.ml.parts import parts
    from worker.ml.probe import probe_config, probe_template
    from worker.ml.prompts import read_prompts
    from worker.ml.template import choose_template
    from worker.ml.tokenizer import load_tokenizer

    job = parse_job(spec)
    facts = base_check(Path(spec.base.path), weights=False)
    check_forms(job.export, facts)
    max_length = resolve_max_length(job.hyperparameters, facts.context)
    _check_adapter(job, facts)
    probe_config(Path(spec.base.path))
    tokenizer = load_tokenizer(Path(spec.base.path), facts.vocab_size)
    templates = [choice.name for choice in choose_template(tokenizer, job.chat_template)]
    probe_template(tokenizer, asked=job.chat_template is not None)
    limits = Limits(**spec.limits)
    held_out = Source(folder / spec.validation_file, limits, "validation_dataset") if spec.validation_file else None
    train, validation = parts(job, Source(folder / spec.train_file, limits), held_out, tokenizer, max_length)
    gauge = Gauge(send, [part for part in (train, validation) if part])
    report = _count(train, validation, gauge, processes)
    highest = max(train.census.highest, int(tokenizer.pad_token_id or 0))
    if validation:
        highest = max(highest, validation.census.highest)
    if isinstance(job.sample_prompts, list):
        read_prompts(tokenizer, job.sample_prompts, facts, plain=train.census.plain)
    if facts.vocab_size is not None:
        grown = rows_needed(tokenizer, highest, facts.vocab_size) - facts.vocab_size
        report |= {"vocabulary_grown": grown} if grown else {}
    plain = "template.defaulted" in templates
    report |= {"architecture": facts.architecture, "context": facts.context, "plain_chat_template": plain}
    report |= {"shape": facts.shape.as_dict()} if facts.shape else {}
    return report | _estimate(job, report, _plan(job, facts, report))


def _count(train: Part, validation: Part | None, gauge: Gauge, processes: int) -> dict[str, Any]:
    """Return the report on both parts; the bad rows of two files are told together."""
    from worker.trainer.counting import count

    try:
        report = count(train, gauge, processes)
    except BadRows as first:
        # A split's two parts are one file, whose rows have been read.
        if validation is not None and validation.source.path != train.source.path:
            _add_problems(first, validation, gauge, processes)
        raise
    if validation is not None:
        report["validation"] = count(validation, gauge, processes)
    return report


def _add_problems(first: BadRows, validation: Part, gauge: Gauge, processes: int) -> None:
    """Raise what is wrong with the rows of both files, if any of the second is."""
    from worker.trainer.counting import count

    found = Problems()
    found.add(first)
    try:
        count(validation, gauge, processes)
    except BadRows as second:
        found.add(second)
        found.raise_any()
    except UserError:
        return  # told once the rows are mended


def _check_adapter(job: JobSpec, facts: BaseFacts) -> None:
    """Find what the job names in the table of its architecture, so that a wrong name costs no GPU."""
    from worker.ml.probe import probe_targets

    if job.lora is None:
        return
    probe_targets(job.lora.target_modules)
    if facts.num_layers is None:
        return
    modules = known_modules(facts.architecture, facts.num_layers)
    check_lora(job.lora, modules)
    if facts.shape is not None:
        sides: dict[str, int] = {}
        for linear in facts.shape.linears:
            last = linear.name.rpartition(".")[2]
            sides[last] = max(sides.get(last, 0), min(linear.inputs, linear.outputs))
        check_rank(job.lora, modules, lambda name: sides.get(name.rpartition(".")[2]))
    if job.method == "qlora" and not facts.quantized:
        check_held_in_4_bit(job.lora, modules)


def _plan(job: JobSpec, facts: BaseFacts, report: dict[str, Any]) -> BatchPlan | None:
    """Return a plan for some card: how many rows a step has does not depend on which, unless one number is given."""
    if facts.shape is None:
        return None
    lengths = {"longest": report["longest_row_tokens"], "mean": report["tokens"] / max(1, report["rows"])}
    rows = read_rows(job.hyperparameters, **lengths, max_length=report["max_length"])
    return choose(read_wish(job.hyperparameters), read_setup(job, facts.shape), rows, NOMINAL_BYTES).plan


def _estimate(job: JobSpec, report: dict[str, Any], plan: BatchPlan | None) -> dict[str, Any]:
    # Packing fills sequences nearly to the brim.
    packed = max(1, -(-report["tokens"] // report["max_length"]))
    options = settle(
        job, num_rows=report["rows"], num_packed=packed, max_length=report["max_length"], cuda=True, plan=plan
    )
    sequences = packed if options.packing else report["rows"]
    by_steps = options.total_steps * options.micro_batch * options.accumulation / sequences
    epochs = by_steps if options.max_steps > 0 else options.num_train_epochs
    return {
        "steps": options.total_steps,
        "train_tokens": round(report["tokens"] * epochs),
        "epochs": options.num_train_epochs,
        "rows_per_step": options.micro_batch * options.accumulation,
        "packing": options.packing,
    }


def answer(folder: Path, send: Callable[[Message], None], processes: int = 1) -> int:
    """Check the job in `folder`, say the result, and return the exit code."""
    return entry.answer(send, "preflight", lambda: check(folder, TrainSpec.read(folder), send, processes))


if __name__ == "__main__":
    given = Path(sys.argv[1])
    entry.leave_with("preflight", lambda send: check(given, TrainSpec.read(given), send, allowed_processes()))
