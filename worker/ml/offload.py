"""Trains over a 4-bit base that the card does not hold: some of its layers wait in host memory and visit the card.

transformers' own way (`device_map="auto"` with `llm_int8_enable_fp32_cpu_offload`) leaves such layers unquantised, and
moves their 16 bit to the card for each pass. Here they stay in 4 bit, a quarter of that. A layer is copied to the card
before its forward pass, and again before its backward pass. Every layer has to be recomputed: a card that is too small
for the weights is not to hold the activations of all layers either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import InvalidInput
from common.memory.estimate import VISITORS
from common.memory.fitting import WEIGHTS_SHARE
from common.memory.setup import BYTES_4_BIT
from common.schemas.lora import Quantization
from worker.ml.options import Choice

_PARAM = "quantization.device_map"


@dataclass(frozen=True)
class Plan:
    """Which layers wait in host memory, by name, and the bytes of the base there and on the card."""

    layers: tuple[str, ...]
    host_bytes: int
    card_bytes: int

    def choice(self, num_layers: int) -> Choice:
        """Return the event that says so."""
        message = (
            f"{len(self.layers)} of {num_layers} layers ({self.host_bytes / 1e9:.2f} GB) wait in host memory and are "
            "copied to the card for each forward and backward pass: training is slower, by how much depends on the bus"
        )
        data = {"layers": len(self.layers), "host_bytes": self.host_bytes, "card_bytes": self.card_bytes}
        return Choice("base.offloaded", message, data, "warning")


def require_recomputing(every: int) -> None:
    """Raise InvalidInput unless the activations of `every` single layer are recomputed."""
    if every != 1:
        raise InvalidInput(
            f'{_PARAM}: "auto" moved layers away, which needs gradient_checkpointing of every layer',
            param="hyperparameters.gradient_checkpointing",
            hint="set gradient_checkpointing to true",
        )


def room_for_weights(device: torch.device) -> int | None:
    """Return the bytes that a base may take on `device`; None where nothing has to be spared."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * WEIGHTS_SHARE)


def plan_offload(
    empty: PreTrainedModel, quantization: Quantization, left_out: list[str] | None, room: int
) -> Plan | None:
    """Return which layers have to wait in host memory for the rest to fit into `room` bytes; None if all fit.

    Args:
        empty: the base on the meta device, in 16 bit.
        left_out: modules that are not quantised, besides the head.

    Raises:
        InvalidInput: what has to stay on the card does not fit either.
    """
    layers = decoder_layers(empty)
    kept = [*(left_out or []), *(name for name, module in empty.named_modules() if module is _head(empty))]
    sizes = {name: _bytes_in_4_bit(empty, name, kept, quantization) for name in layers}
    total = _bytes_in_4_bit(empty, "", kept, quantization)
    if total <= room:
        return None
    on_card = total - sum(sizes.values()) + VISITORS * max(sizes.values())
    if on_card > room:
        raise InvalidInput(
            f"{_PARAM}: embeddings, head and {VISITORS} layers take {on_card / 1e9:.2f} GB, and the card has "
            f"{room / 1e9:.2f} GB for weights",
            code="base_too_large",
            param=_PARAM,
            hint="use a smaller base, or a card with more memory",
        )
    waiting = list(layers)
    while waiting and on_card + sizes[waiting[0]] <= room:
        on_card += sizes[waiting.pop(0)]
    return Plan(tuple(waiting), sum(sizes[name] for name in waiting), on_card)


def decoder_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the language model's layers, in order."""
    decoder = model.get_decoder()
    stacks = [module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList)]
    longest = max(stacks, key=len)
    return [name for name, module in model.named_modules() if any(module is layer for layer in longest)]


def _head(model: PreTrainedModel) -> torch.nn.Module | None:
    head: torch.nn.Module | None = model.get_output_embeddings()
    return head


def _bytes_in_4_bit(model: PreTrainedModel, within: str, kept: list[str], quantization: Quantization) -> int:
    quantized = BYTES_4_BIT[quantization.bnb_4bit_use_double_quant]
    # By parameter: embedding and head may share one.
    sizes: dict[torch.nn.Parameter, float] = {}
    for name, module in model.get_submodule(within).named_modules():
        full = f"{within}.{name}".strip(".")
        for part, parameter in module.named_parameters(recurse=False):
            in_4_bit = part == "weight" and _is_quantizable(full, module, kept)
            sizes[parameter] = parameter.numel() * (quantized if in_4_bit else 2)
    return int(sum(sizes.values()))


def _is_quantizable(name: str, module: torch.nn.Module, kept: list[str]) -> bool:
    if not isinstance(module, torch.nn.Linear | Conv1D):
        return False
    return not any(name == other or name.startswith(f"{other}.") for other in kept)


def quantize_onto(
    model: PreTrainedModel, config: BitsAndBytesConfig, left_out: list[str] | None, device: torch.device, plan: Plan
) -> None:
    """Quantise a 16-bit `model` in host memory, layer by layer on `device`, and leave the plan's layers behind.

    Gives the weights that `from_pretrained` gives. Nothing in 16 bit is on the card but one linear layer at a time.
    """
    kept = [*(left_out or []), *(name for name, module in model.named_modules() if module is _head(model))]
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit) and _is_quantizable(name, module, kept):
            assert isinstance(module, torch.nn.Linear | Conv1D)
            module = _quantized(module, config)
            model.set_submodule(name, module)
        if not isinstance(module, Linear4bit):
            _move(module, device)
            continue
        module.to(device)
        if any(name.startswith(f"{layer}.") for layer in plan.layers):
            module.weight.data = _to_host(module.weight.data)
    Visits([model.get_submodule(name) for name in plan.layers], device)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    model.config.quantization_config = config
    model.hf_device_map = {"": device}  # type: ignore[assignment]


def _quantized(module: torch.nn.Linear | Conv1D, config: BitsAndBytesConfig) -> Linear4bit:
    """Return a layer that is quantised where it is moved to."""
    weight = module.weight.data.T.contiguous() if isinstance(module, Conv1D) else module.weight.data
    rows, columns = weight.shape
    settings = {"compress_statistics": config.bnb_4bit_use_double_quant, "quant_type": config.bnb_4bit_quant_type}
    made = Linear4bit(columns, rows, bias=False, compute_dtype=config.bnb_4bit_compute_dtype, device="meta", **settings)
    made.weight = Params4bit(weight, requires_grad=False, module=made, **settings)
    made.bias = module.bias
    return made.requires_grad_(False)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.cpu()
    # From pinned memory the card fetches by itself, twice as fast.
    return copy.pin_memory() if tensor.is_cuda else copy


def _move(module: torch.nn.Module, device: torch.device) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


@dataclass(frozen=True)
class _Visitor:
    """A weight that waits in host memory, and its place on the card, which has memory only during a visit.

    bitsandbytes 0.50 keeps the weight of a forward pass as an attribute of the graph's node, where no hook of
    checkpointing drops it. All visits share one storage, so that what the graph keeps is empty after the visit, and has
    the weight again in the next.
    """

    parameter: torch.Tensor
    host: torch.Tensor
    card: torch.Tensor

    def come(self) -> None:
        self.card.untyped_storage().resize_(self.host.nbytes)
        self.card.copy_(self.host, non_blocking=True)
        self.parameter.data = self.card

    def leave(self) -> None:
        self.parameter.data = self.host
        self.card.untyped_storage().resize_(0)


class Visits:
    """Brings a layer's 4-bit weights to the card before the layer computes, and drops those of the one before last."""

    def __init__(self, layers: Iterable[torch.nn.Module], device: torch.device):
        self._present: list[list[_Visitor]] = []
        for layer in layers:
            weights = [_visitor(module, device) for module in layer.modules() if isinstance(module, Linear4bit)]
            layer.register_forward_pre_hook(lambda _module, _inputs, weights=weights: self._fetch(weights))
            layer.register_forward_hook(lambda _module, _inputs, made, weights=weights: self._await(made, weights))

    def _fetch(self, weights: list[_Visitor]) -> None:
        if any(weights is present for present in self._present):
            return
        while len(self._present) >= VISITORS:
            for visitor in self._present.pop(0):
                visitor.leave()
        for visitor in weights:
            visitor.come()
        self._present.append(weights)

    def _await(self, made: object, weights: list[_Visitor]) -> None:
        """Fetch the weights when the gradient of the layer's result is there.

        Recomputing does not always come first: nothing that it gives is read for the gradient of a linear layer without
        an adapter, such as a layer's last.
        """
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _gradient: self._fetch(weights))


def _visitor(module: Linear4bit, device: torch.device) -> _Visitor:
    host = module.weight.data
    card = torch.empty_like(host, device=device)
    card.untyped_storage().resize_(0)
    return _Visitor(module.weight, host, card)
