"""The merged models that a job asks for: made after its training, or later from the adapter that it published.

After training nothing that goes wrong here may cost the adapter: it becomes an event and a line of the report. An
export of a finished job has nothing else to give and fails.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from common.errors import InvalidInput, TuneryError
from common.schedule import resolve_max_length
from worker.ml.base import four_bit_config
from worker.ml.base_check import BaseFacts, base_check, check_forms
from worker.ml.memory import free_bytes
from worker.ml.merge import Ingredients, Merger
from worker.ml.merged_card import merged_card
from worker.ml.precision import choose_precision
from worker.trainer.faults import classify
from worker.trainer.prepare import fix_machine
from worker.trainer.protocol import Note, Progress, Stage
from worker.trainer.rows import parts_of
from worker.trainer.run import Run

NUM_ROWS = 8
ROW_TOKENS = 128
# Asked where an export's dataset is gone: any text shows whether two models compute the same.
_TEXTS = (
    "The boats lie in the harbour, and snow fell over the hills all night.",
    "Question: how many days are there in a leap year?\nAnswer: 366.",
    "def area(width, height):\n    return width * height\n",
    "1. Open the box.\n2. Take out the cable.\n3. Plug it in and wait for the green light.",
)
_CARD_SPARE = 2 << 30
_SPARE = 256 << 20


def merge_after_training(run: Run) -> None:
    """Write the merged models that the job asks for beside its adapter; one that cannot be made is reported."""
    forms = merged_forms(run)
    if not forms:
        return
    rows = run.train_rows if run.eval_rows is None else run.eval_rows
    asked = [list(row["input_ids"])[:ROW_TOKENS] for row in islice(iter(rows), NUM_ROWS)]
    forget_training(run)
    merger = None
    for form in forms:
        run.wishes.leave_if_asked()
        try:
            merger = merger or _merger(run, run.out / "adapter", asked)
            _make(run, merger, form)
        except Exception as error:
            _report_failure(run, form, error)


def merge_later(run: Run) -> None:
    """Write the merged models of the published adapter that the supervisor has fetched.

    Raises:
        MergeRefused: one differs from base and adapter.
        InvalidInput: the base or this worker has not what it takes.
    """
    assert run.spec.adapter is not None
    fix_machine(run)
    run.precision = choose_precision(run.job, run.device)
    adapter = run.folder / run.spec.adapter
    forms = merged_forms(run)
    merger = _merger(run, adapter, _rows_of_the_data(run, adapter))
    for number, form in enumerate(forms):
        run.send(Progress(number, len(forms)))
        run.wishes.leave_if_asked()
        _make(run, merger, form)
    run.send(Progress(len(forms), len(forms)))


def merged_forms(run: Run) -> list[str]:
    """Return what the job asks for besides its adapter; the 16-bit form first, from which the 4-bit one is made."""
    return sorted((form for form in run.job.export if form.startswith("merged")), key=("merged_4bit").__eq__)


def forget_training(run: Run) -> None:
    """Give back the memory of model and trainer; both are gone from `run` afterwards."""
    del run.trainer, run.model
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def _merger(run: Run, adapter: Path, rows: list[list[int]]) -> Merger:
    facts = base_check(run.base_folder)
    check_forms(run.job.export, facts)
    parts = Ingredients(
        base=run.base_folder,
        adapter=adapter,
        device=_place(run, facts),
        rows=rows,
        four_bit=four_bit_config(run.base_folder, run.job.quantization, run.precision),
        trained_in_4bit=run.job.method == "qlora",
        stored_in_4bit=facts.quantized,
    )

    def pause() -> None:
        run.wishes.leave_if_asked()
        run.send(Stage("export"))  # a sign of life: a large model takes minutes between two steps

    return Merger(parts, run.folder / "merging", pause)


def _place(run: Run, facts: BaseFacts) -> torch.device:
    """Return the device that has room for the base in 16 bit: the card, or else the machine's memory.

    Raises:
        InvalidInput: there is no room in either; a kernel that runs out of memory would end the process.
    """
    if run.spec.adapter and run.spec.shrink:
        # An export whose last attempt ran out of memory, be it for what else runs on the card.
        return torch.device("cpu")
    stored = sum(path.stat().st_size for path in run.base_folder.glob("*.safetensors"))
    needed = stored * (4 if facts.quantized else 1)
    if run.device.type == "cuda" and free_bytes(run.device) > 1.2 * needed + _CARD_SPARE:
        return run.device
    free = free_bytes(torch.device("cpu"))
    if free < 1.1 * needed + _SPARE:
        raise InvalidInput(
            f"merging needs some {needed * 1.1 / 2**30:.1f} GiB of memory, and this worker has {free / 2**30:.1f} GiB",
            code="no_room_to_merge",
            param="export",
            hint="the adapter itself is fine; a worker with more memory can merge it",
        )
    return torch.device("cpu")


def _make(run: Run, merger: Merger, form: str) -> None:
    run.send(Note("merge.started", f"{form}: merging on the {merger.parts.device.type}"))
    target = run.out / form
    report = merger.make(form, target)
    (target / "README.md").write_text(merged_card(run.spec.base.id, run.spec.base.revision, run.job, form, report))
    report["bytes"] = sum(path.stat().st_size for path in target.iterdir())
    report["rows"], report["tokens"] = len(merger.parts.rows), sum(map(len, merger.parts.rows))
    _reports(run)[form] = {"made": True, "device": merger.parts.device.type} | report
    run.send(Note("merge.done", f"{form}: {_told(report)}", data=report))


def _told(report: dict[str, Any]) -> str:
    gaps = [f"{report[name]['relative']:.2g} from the {name[5:].replace('_', ' ')}" for name in _gaps(report)]
    return f"its logits differ by {', '.join(gaps)}; the adapter changes {report['adapter_changes']['relative']:.2g}"


def _gaps(report: dict[str, Any]) -> Iterator[str]:
    return (name for name in report if name.startswith("from_"))


def _report_failure(run: Run, form: str, error: Exception) -> None:
    _, failure = classify(error)
    if failure is None:
        raise error  # a drain is no failure
    message = f"{form} was not made: {failure.message}"
    _reports(run)[form] = {"made": False, "error": {"code": failure.code, "message": failure.message}}
    run.send(Note("merge.failed", message, "error", {"form": form, "code": failure.code, "hint": failure.hint}))


def _reports(run: Run) -> dict[str, Any]:
    reports: dict[str, Any] = run.report.setdefault("merged", {})
    return reports


def _rows_of_the_data(run: Run, adapter: Path) -> list[list[int]]:
    """Return the first rows that the run was validated on, else trained on; where they are gone, texts of our own."""
    tokenizer = AutoTokenizer.from_pretrained(adapter, local_files_only=True, trust_remote_code=False)
    if run.spec.validation_file or run.spec.train_file:
        max_length = resolve_max_length(run.job.hyperparameters, base_check(run.base_folder).context)
        try:
            trained, validated = parts_of(run, tokenizer, max_length)
            examples = islice((validated or trained).examples(), NUM_ROWS)
            if rows := [example.input_ids[:ROW_TOKENS] for example in examples]:
                return rows
        except TuneryError as error:
            run.send(Note("merge.rows", f"the rows cannot be read any more: {error.message}", "warning"))
    run.send(Note("merge.rows", "the models are compared on texts of Tunery's own, not on rows of the dataset"))
    return [tokenizer(text).input_ids[:ROW_TOKENS] for text in _TEXTS]
