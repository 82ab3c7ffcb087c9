"""Says of every module how its weights are held: in how many bits, trained, frozen, or left out of the quantisation."""

from __future__ import annotations

from collections import Counter

import torch

from common.schemas.precision import Holding, MemoryFootprint, ModulePrecision, PrecisionRead
from worker.ml.precision import Precision, dtype_name

# peft wraps the base twice; a reader knows the names of the base.
_WRAPPING = "base_model.model."


def precision_report(
    model: torch.nn.Module,
    precision: Precision,
    footprint: MemoryFootprint,
    *,
    unquantized: dict[str, int],
    outside: list[str],
) -> PrecisionRead:
    """Return how `model` is held: sums by format, and a line for each module that has parameters of its own.

    Args:
        unquantized: the weight matrices of a 4-bit base that stayed in 16 bit, with their parameters.
        outside: modules that were never to be quantised.
    """
    closed = tuple(f"{name}." for name in outside)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[_format(parameter)] += _num_weights(parameter)
        sizes[_format(parameter)] += parameter.numel() * parameter.element_size()
    four_bit = any(_is_4_bit(parameter) for parameter in model.parameters())
    named = [(name.removeprefix(_WRAPPING), module) for name, module in model.named_modules()]
    return PrecisionRead(
        compute_dtype=dtype_name(precision.compute),
        adapter_dtype=dtype_name(precision.adapter),
        parameters=dict(counts),
        bytes=dict(sizes),
        left_in_16_bit=unquantized,
        memory_footprint=footprint,
        modules=[
            _line(name, module, own, four_bit=four_bit and not f"{name}.".startswith(closed))
            for name, module in named
            if (own := list(module.parameters(recurse=False)))
        ],
    )


def _line(
    name: str, module: torch.nn.Module, parameters: list[torch.nn.Parameter], *, four_bit: bool
) -> ModulePrecision:
    largest = max(parameters, key=_num_weights)
    return ModulePrecision(
        name=name,
        kind=type(module).__name__,
        dtype=_format(largest),
        bits=4 if _is_4_bit(largest) else 8 * largest.element_size(),
        parameters=sum(map(_num_weights, parameters)),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        status=_status(largest, four_bit=four_bit),
    )


def _status(weight: torch.nn.Parameter, *, four_bit: bool) -> Holding:
    if _is_4_bit(weight):
        return "quantized"
    if weight.requires_grad:
        return "trained"
    return "not_quantizable" if four_bit and weight.ndim >= 2 else "frozen"


def _is_4_bit(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, "quant_state", None) is not None


def _num_weights(parameter: torch.nn.Parameter) -> int:
    # 4-bit weights lie two in a byte.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _format(parameter: torch.nn.Parameter) -> str:
    state = getattr(parameter, "quant_state", None)
    return dtype_name(parameter.dtype) if state is None else str(state.quant_type)
