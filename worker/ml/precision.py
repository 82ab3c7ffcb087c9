"""Which number formats a run computes in, by what was asked and what the device can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.schemas.jobs import JobSpec
from worker.ml.options import Choice


@dataclass(frozen=True)
class Precision:
    """`compute` is the dtype of products, `base` that of the loaded weights, `adapter` that of the LoRA matrices."""

    compute: torch.dtype
    base: torch.dtype
    adapter: torch.dtype
    choices: tuple[Choice, ...] = ()


def choose_precision(job: JobSpec, device: torch.device) -> Precision:
    """Return the precision for `job` on `device`, with a choice noted where it is not what was asked for."""
    asked = getattr(torch, job.quantization.bnb_4bit_compute_dtype if job.quantization else "bfloat16")
    taken, reason = _supported(asked, device)
    choices: tuple[Choice, ...] = ()
    if taken != asked:
        message = f"compute dtype {dtype_name(asked)} → {dtype_name(taken)}: {reason}"
        choices = (Choice("option.replaced", message, {"asked": dtype_name(asked), "taken": dtype_name(taken)}),)
    # QLoRA trains its adapters in bf16, as the paper does. fp16 gradients need fp32 weights under the loss scaler, and
    # a 16-bit base leaves room for fp32 adapters.
    narrow = job.method == "qlora" and taken == torch.bfloat16
    # Steps of a full fine-tune are smaller than bf16 can add to a weight, so the weights are held in fp32.
    base = torch.float32 if job.method == "full" else taken
    return Precision(taken, base, torch.bfloat16 if narrow else torch.float32, choices)


def _supported(asked: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    if asked == torch.float32:
        return asked, ""
    if device.type == "cuda":
        if asked == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16, f"{torch.cuda.get_device_name(device)} has no bf16"
        return asked, ""
    if asked == torch.float16:
        return _supported(torch.bfloat16, device)[0], "the CPU trains no fp16"
    if not cpu_has_bf16():
        return torch.float32, "this CPU has no bf16 instructions, and emulates them slowly"
    return asked, ""


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 matrices in hardware."""
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2", "NO AVX"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported()) if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as a job has it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def pick_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda:N`."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
