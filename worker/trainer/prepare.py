"""First stage: settle the options, tokenise the data, load the base, attach the adapter if there is one."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from common.memory.fitting import BatchPlan
from common.schemas.jobs import JobSpec
from common.schemas.lora import Lora
from worker.ml.adapters import attach, factors, missing_biases, set_adapter_dtype, trainable_count, widen_norms
from worker.ml.arguments import choose_optimizer
from worker.ml.base import Base, load_base
from worker.ml.base_check import BaseFacts, base_check
from worker.ml.best import Best
from worker.ml.budget import fused_estimated
from worker.ml.cache import Cache
from worker.ml.checkpoint import BadCheckpoint, verify
from worker.ml.data import sequence_lengths
from worker.ml.kernels.choice import choose
from worker.ml.memory import limit_memory
from worker.ml.meter import Counters
from worker.ml.module_report import precision_report
from worker.ml.offload import require_recomputing
from worker.ml.packing import require_isolation
from worker.ml.precision import choose_precision, pick_device
from worker.ml.quantized import Shelf
from worker.ml.trend import Trend
from worker.ml.vocabulary import grow, num_rows, rows_needed
from worker.trainer.protocol import Note, TrainSpec
from worker.trainer.rows import prepare_rows
from worker.trainer.run import Run

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
_GIB = 2**30
# Two texts that a model must not mix up when they are packed into one sequence.
_PROBES = ("The boats lie in the harbour.", "Snow fell over the hills all night.")


def prepare(run: Run) -> None:
    """Fill the run with everything that training needs.

    Raises:
        InvalidInput: data, base and options do not fit together.
        BadCheckpoint: the checkpoint to resume from is not complete, or not of this run.
    """
    facts = base_check(run.base_folder)
    fix_machine(run)
    _find_resume(run)
    begun = time.monotonic()
    prepare_rows(run, facts)
    run.report["data_preparation_s"] = round(time.monotonic() - begun, 3)
    run.wishes.leave_if_asked()
    _prepare_model(run, facts)
    run.wishes.leave_if_asked()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that shape the numbers."""
    return {name: version(name) for name in _PACKAGES}


def fix_machine(run: Run) -> None:
    """Take the device and the number of threads, which changes the order of sums, so that a run keeps its own."""
    run.device = pick_device(run.spec.device)
    run.threads = run.spec.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(run.threads)
    run.holder.measure(run.device)
    run.report |= {"device": _device_name(run.device), "threads": run.threads, "versions": versions()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _find_resume(run: Run) -> None:
    run.counters, run.best, run.trend = Counters(), Best(), Trend()
    if run.spec.resume_from is None:
        return
    run.resumed = verify(run.folder / run.spec.resume_from, run.spec.config_hash)
    try:
        _take_counters(run, dict(run.resumed.counters))
    except (KeyError, TypeError) as error:
        raise BadCheckpoint(f"it was made by a version of Tunery that counted otherwise ({error})") from error
    run.send(Note("run.resumed", f"going on from step {run.resumed.step}", data={"step": run.resumed.step}))
    if run.resumed.threads != run.threads or run.resumed.versions != versions():
        message = "the checkpoint was made with another number of threads or other library versions: the run goes on, "
        run.send(Note("resume.differs", message + "but not bit for bit", "warning"))


def _take_counters(run: Run, counters: dict[str, Any]) -> None:
    run.metrics, run.samples = counters.pop("metrics"), counters.pop("samples")
    run.best = Best(**counters.pop("best"))
    # Checkpoints of versions before have none.
    run.trend = Trend(**counters.pop("trend", {}))
    # Chosen once: another card may have other memory, and the run has to go on as it began.
    chosen = counters.pop("plan", None)
    run.plan = BatchPlan(**chosen) if chosen else None
    run.counters = Counters(**counters)


def _prepare_model(run: Run, facts: BaseFacts) -> None:
    limit = run.job.hyperparameters.max_memory_gib
    limit_memory(run.device, None if limit == "auto" else int(limit * _GIB))
    run.precision = choose_precision(run.job, run.device)
    run.optim, replaced = choose_optimizer(run.options.optim, run.device)
    run.tell(*run.precision.choices, *replaced)
    begun = time.monotonic()
    base = run.holder.base(run.spec, lambda: _load_base(run, facts))
    run.report["base_load"] = {"from": run.holder.origin, "seconds": round(time.monotonic() - begun, 3)}
    run.tell(*base.choices)
    if base.plan is not None:
        require_recomputing(run.options.checkpointing)
        run.report["offload"] = {"layers": len(base.plan.layers), "host_bytes": base.plan.host_bytes}
    if run.options.packing:
        first, second = (run.tokenizer(text).input_ids for text in _PROBES)
        require_isolation(base.model, first, second)
    set_seed(run.job.seed)
    grown = _grow_vocabulary(run, base.model)
    run.model = base.model if run.job.lora is None else _adapted(run, base.model, run.job.lora, grown=grown)
    run.holder.part(run.model)
    _choose_path(run, facts, offloaded=base.plan is not None)
    run.held = precision_report(
        run.model, run.precision, base.footprint, unquantized=base.unquantized, outside=base.outside
    )
    run.report |= {
        "trainable_parameters": trainable_count(run.model),
        "total_parameters": sum(run.held.parameters.values()),
        "precision": run.held.model_dump(exclude={"modules"}),
        "optim": run.optim,
    }


def _load_base(run: Run, facts: BaseFacts) -> Base:
    base = load_base(run.base_folder, run.job, facts, run.precision, run.device, _shelf(run.spec, run.job))
    if base.form is not None:
        run.tell(*base.form.choices)
    return base


def _shelf(spec: TrainSpec, job: JobSpec) -> Shelf | None:
    if spec.cache is None:
        return None
    # What is written is held to the end of the run. A process that does not stay gives the memory back before it merges
    # into the base in 16 bit.
    merges = job.export != ["adapter"]
    cache = Cache(Path(spec.cache.path), spec.cache.most_bytes, spec.cache.reserve_bytes)
    return Shelf(cache, spec.base_identity(), may_write=spec.keep or not merges)


def _choose_path(run: Run, facts: BaseFacts, *, offloaded: bool) -> None:
    lengths = sequence_lengths(run.train_rows)
    run.fused, choices = choose(
        run.model,
        run.job,
        run.options,
        run.precision,
        run.device,
        lengths,
        offloaded=offloaded,
        shrink=run.spec.shrink,
    )
    run.tell(*choices)
    if run.fused is not None and facts.shape is not None:
        foreseen = fused_estimated(run.job, facts.shape, run.options, lengths, run.fused, run.device)
        run.report["memory"] = foreseen
    run.report["kernels"] = choices[0].data | {"path": choices[0].name.removeprefix("kernels.")}


def _grow_vocabulary(run: Run, base: PreTrainedModel) -> bool:
    rows = num_rows(base)
    needed = rows_needed(run.tokenizer, run.highest_token, rows)
    if needed == rows:
        return False
    run.tell(grow(base, needed))
    base.get_input_embeddings().requires_grad_(run.job.method == "full")
    base.get_output_embeddings().requires_grad_(run.job.method == "full")
    run.report |= {"vocabulary_grown": needed - rows, "vocabulary_rows": needed}
    return True


def _adapted(run: Run, base: PreTrainedModel, lora: Lora, *, grown: bool) -> PeftModel:
    model = attach(base, lora, ends=grown)
    run.tell(*missing_biases(model, lora))
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft puts an adapter beside its layer, which may wait in host memory
            parameter.data = parameter.data.to(run.device)
    set_adapter_dtype(model, run.precision.adapter)
    if run.device.type == "cpu":
        widen_norms(model)
    run.initial = factors(model) if lora.changes_base else None
    return model
