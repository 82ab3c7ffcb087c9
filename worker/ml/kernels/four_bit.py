"""4-bit weights of several layers as one: a single pass over memory writes them out in 16 bit.

bitsandbytes takes four launches for each layer, and a third more time.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit

from worker.ml.kernels.operations import operations
from worker.ml.kernels.torch_eight_bit import narrow_matrix

# Of bitsandbytes: weights to a scale; scales to an outer scale, where they are quantised themselves.
_BLOCK, _OUTER = 64, 256


class FourBit:
    """The weights of `layers`, which read one input. On a card the layers keep views of joined storage."""

    def __init__(self, layers: list[Linear4bit]):
        self._layers = layers
        self._states = [state_of(layer) for layer in layers]
        self._shape = sum(layer.out_features for layer in layers), layers[0].in_features
        self._joined = all(map(_joinable, layers)) and len({state.nested for state in self._states}) == 1
        if self._joined:
            self._join()

    def dense(self) -> torch.Tensor:
        """Return the weights as one matrix [outputs, inputs]."""
        first = self._states[0]
        if self._joined:
            ops = operations(self._packed.device)
            return ops.dequantize(self._packed, self._scales, first.code, self._outer, self._shape, first.dtype)
        parts = [dequantize_4bit(layer.weight.data, state_of(layer)) for layer in self._layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def narrow(self, factor: torch.Tensor, *, turned: bool) -> torch.Tensor:
        """Return the weights times `factor` in 8 bit, `turned`: transposed."""
        if not self._joined:
            return narrow_matrix(self.dense(), factor, turned=turned)
        ops, code = operations(self._packed.device), self._states[0].code
        return ops.narrow_weights(self._packed, self._scales, code, self._outer, self._shape, factor, turned=turned)

    def _join(self) -> None:
        self._packed = torch.cat([layer.weight.data.reshape(-1) for layer in self._layers])
        self._scales = torch.cat([state.absmax.reshape(-1) for state in self._states])
        at = 0
        for layer, state in zip(self._layers, self._states, strict=True):
            size = layer.weight.data.numel()
            layer.weight.data = self._packed[at : at + size].view(layer.weight.data.shape)
            state.absmax = self._scales[at // (_BLOCK // 2) : (at + size) // (_BLOCK // 2)]
            at += size
        self._outer: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if self._states[0].nested:
            # One outer scale and one offset for each 256 scales, so that layers need not be told apart.
            scales = torch.cat([state.state2.absmax.float() for state in self._states])
            offsets = torch.cat([state.offset.float().expand(len(state.state2.absmax)) for state in self._states])
            self._outer = self._states[0].state2.code, scales, offsets


def state_of(layer: Linear4bit) -> QuantState:
    """Return what bitsandbytes needs to know of a layer's weights."""
    state: QuantState = layer.weight.quant_state  # type: ignore[attr-defined]
    return state


def _joinable(layer: Linear4bit) -> bool:
    state = state_of(layer)
    whole = layer.weight.data.numel() * 2 % (_BLOCK * _OUTER) == 0
    known = state.blocksize == _BLOCK and (not state.nested or state.state2.blocksize == _OUTER)
    return layer.weight.is_cuda and whole and known and state.dtype in (torch.bfloat16, torch.float16)
