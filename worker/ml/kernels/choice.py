"""Decides, once and before training, whether a run takes the fast path, what it may take of the card, and says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from common.memory.fused import LARGE_STEP, SLACK, TRAINED_BYTES
from common.schemas.jobs import JobSpec
from worker.ml.kernels.attention import has_kernel, takes
from worker.ml.kernels.budget import Ways, bytes_of
from worker.ml.kernels.cover import NotCovered, decoder_layers, require_covered
from worker.ml.kernels.eight_bit import why_not
from worker.ml.kernels.fused import Fused
from worker.ml.kernels.layer import Recompute
from worker.ml.kernels.operations import has_triton
from worker.ml.memory import free_bytes
from worker.ml.options import Choice, Options
from worker.ml.precision import Precision

_GIB = 2**30
# What an out-of-memory error leaves of the room that was planned with.
_SHRUNK = 0.7


def choose(
    model: PeftModel | PreTrainedModel,
    job: JobSpec,
    options: Options,
    precision: Precision,
    device: torch.device,
    lengths: Sequence[int],
    *,
    offloaded: bool,
    shrink: int,
) -> tuple[Fused | None, tuple[Choice, ...]]:
    """Return the fast path for `model`, None for the plain one, and the event that says which and why.

    Args:
        lengths: tokens of each row.
        offloaded: some layers wait in host memory.
        shrink: steps down the out-of-memory ladder.
    """
    asked = job.hyperparameters.kernels
    wide = (_no_fp8("training runs on the plain path"),) if job.hyperparameters.fp8 is True else ()
    if asked == "plain":
        return None, (_plain("it was asked for", asked), *wide)
    try:
        _require_device(device, asked)
        if offloaded:
            raise NotCovered("layers wait in host memory")
        if options.neftune_noise_alpha:
            raise NotCovered("NEFTune scales its noise by the padded length")
        require_covered(model, precision.compute, max(lengths, default=0))
        if device.type == "cuda":
            _require_attention(model, precision.compute)
    except NotCovered as reason:
        return None, (_plain(str(reason), asked), *wide)
    assert isinstance(model, PeftModel)
    return _fused(model, job, options, precision, device, lengths, shrink)


def _require_device(device: torch.device, asked: str) -> None:
    if device.type != "cuda":
        if asked != "fused":
            raise NotCovered("there is no CUDA device, and on a CPU it gains nothing")
        return
    if not has_kernel() or not has_triton():
        raise NotCovered("this torch has no attention kernel for such rows, or no Triton")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise NotCovered("the card is older than its attention kernel")


def _require_attention(model: PeftModel | PreTrainedModel, dtype: torch.dtype) -> None:
    assert isinstance(model, PeftModel)
    base: Any = model.get_base_model()
    size = decoder_layers(base)[0].self_attn.head_dim
    if not takes(dtype, size):
        raise NotCovered(f"the card's attention kernel does not take heads of {size} numbers in {dtype}")


def _plain(reason: str, asked: str) -> Choice:
    level = "warning" if asked == "fused" else "info"
    return Choice("kernels.plain", f"training runs on the plain path: {reason}", {"reason": reason}, level)


def _fused(
    model: PeftModel,
    job: JobSpec,
    options: Options,
    precision: Precision,
    device: torch.device,
    lengths: Sequence[int],
    shrink: int,
) -> tuple[Fused, tuple[Choice, ...]]:
    base: Any = model.get_base_model()
    count = len(decoder_layers(base))
    least = _least(options, count, automatic=job.hyperparameters.gradient_checkpointing == "auto" and not shrink)
    path = Fused(model, least=least, room=_room(model, job, device, shrink))
    wide = _compute_narrow(path, precision.compute, device) if job.hyperparameters.fp8 is True else ()
    step = int(sum(lengths) / max(1, len(lengths)) * options.micro_batch * options.accumulation * LARGE_STEP)
    if path.room is not None and (job.method == "qlora" or path.narrow):
        # In 16 bit, or in 8 bit both ways round.
        dense = sum(group.num_weights for group in path.groups) * 2
        left = path.room - dense
        # Such a copy pays only where it costs no recomputing.
        if bytes_of(step, (Recompute.NOTHING,) * count, path.costs) <= left:
            path.keep_weights()
            path.room = left
    return path, (_told(path, step), *wide)


def _compute_narrow(path: Fused, dtype: torch.dtype, device: torch.device) -> tuple[Choice, ...]:
    """Turn to products in 8-bit floats where that can be done, or return the event that says why not."""
    reason = why_not([group.shape for group in path.groups], dtype, device)
    if reason is not None:
        return (_no_fp8(reason),)
    path.compute_narrow()
    return ()


def _no_fp8(reason: str) -> Choice:
    message = f"fp8 was asked for, and products are not in 8 bit: {reason}"
    return Choice("fp8.off", message, {"reason": reason}, "warning")


def _least(options: Options, count: int, *, automatic: bool) -> Ways:
    every = 0 if automatic else options.checkpointing
    return tuple(Recompute.ALL if every and index % every == 0 else Recompute.NOTHING for index in range(count))


def _room(model: torch.nn.Module, job: JobSpec, device: torch.device, shrink: int) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    most = held + free_bytes(device)
    if job.hyperparameters.max_memory_gib != "auto":
        most = min(most, int(job.hyperparameters.max_memory_gib * _GIB))
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad) * TRAINED_BYTES
    room = most * (1 - SLACK) - held - trained
    return max(0, int(room * _SHRUNK**shrink))


def _told(path: Fused, step: int) -> Choice:
    ways = path.plan([step]).ways[0]
    counts = {way.name.lower(): ways.count(way) for way in Recompute}
    room = "as they like" if path.room is None else f"{path.room / _GIB:.1f} GiB"
    data = {"parts": list(PARTS), "resident": path.resident, "fp8": path.narrow, "room_bytes": path.room,
            "step_tokens": step, "layers": counts}  # fmt: skip
    message = (
        f"training runs on fused layers, without padding; activations may take {room}; a step of {step:,} tokens "
        f"recomputes everything in {counts['all']} layers, the MLP in {counts['mlp']}"
        f"{'; the base is multiplied in 8-bit floats' if path.narrow else ''}"
        f"{'; it is held dequantised too' if path.resident else ''}"
    )
    return Choice("kernels.fused", message, data)


PARTS = ("attention", "layers", "loss", "rows")
