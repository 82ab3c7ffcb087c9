"""A model made anew around weights that are in memory already, so that a base can be used by one run after the other.

Adapters, hooks and patched methods of a run go into the shell and leave with it. `peft`'s own `unload()` takes out the
adapters only: TRL 1.16 leaves a patched `forward` and hooks behind, and `modules_to_save`, biases and a grown
vocabulary change the modules of the base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from bitsandbytes.nn import Linear4bit, Params4bit

Model = TypeVar("Model", bound=torch.nn.Module)
_WIDTHS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def shell_of(model: Model) -> Model:
    """Return a copy of `model` that shares the storage of its parameters and nothing else."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _alias(parameter)
        if isinstance(module, Linear4bit):
            memo[id(module.quant_state)] = module.quant_state
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if isinstance(module, Linear4bit):
            cast(Any, module.weight).module = module
    return copied


def _alias(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    made: Any = torch.Tensor._make_subclass(type(parameter), parameter.data, parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    if isinstance(made, Params4bit):
        made.module = None
    alias: torch.nn.Parameter = made
    return alias


def own_trained(model: torch.nn.Module, base: torch.nn.Module) -> None:
    """Give every trained parameter of `model` that lies in the storage of `base` a storage of its own."""
    shared = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.untyped_storage().data_ptr() in shared:
            parameter.data = parameter.data.clone()


def own_all(model: torch.nn.Module) -> None:
    """Give every tensor of `model` memory of its own: on a CPU, safetensors maps those that it reads into a file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        state: Any = getattr(parameter, "quant_state", None)
        for part in (state, state.state2 if state is not None and state.nested else None):
            if part is not None:
                part.absmax, part.code = part.absmax.clone(), part.code.clone()
        if state is not None and state.nested:
            state.offset = state.offset.clone()
    for buffer in model.buffers():
        buffer.data = buffer.data.clone()


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> torch.Tensor:
    """Return one sum over the bits of each tensor of `model`, in order, on the CPU: training changes them."""
    return torch.stack([_sum_of_bits(tensor) for tensor in tensors_of(model)]).cpu()


def tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield everything that `model` computes with: parameters, buffers, and the scales of 4-bit weights."""
    for parameter in model.parameters():
        yield parameter.data.as_subclass(torch.Tensor)
    yield from model.buffers()
    for module in model.modules():
        state = getattr(module.weight, "quant_state", None) if isinstance(module, Linear4bit) else None
        if state is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    width = next(size for size in _WIDTHS if flat.numel() % size == 0 and flat.storage_offset() % size == 0)
    return flat.view(_WIDTHS[width]).sum(dtype=torch.int64)
