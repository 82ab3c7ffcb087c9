"""4-bit weights of several layers as one: a single pass over memory writes them out in 16 bit.

bitsandbytes takes four launches for each layer, and a third more time.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit

from worker.ml.kernels.operations import operations
from worker.ml.kernels.packed import BLOCK, OUTER, Packed
from worker.ml.kernels.torch_eight_bit import narrow_matrix


class FourBit:
    """The weights of `layers`, which read one input. On a card the layers keep views of joined storage."""

    def __init__(self, layers: list[Linear4bit]):
        self._layers = layers
        self._states = [state_of(layer) for layer in layers]
        self._shape = sum(layer.out_features for layer in layers), layers[0].in_features
        joinable = all(map(_joinable, layers)) and len({state.nested for state in self._states}) == 1
        self._packed = self._join() if joinable else None

    def dense(self) -> torch.Tensor:
        """Return the weights as one matrix [outputs, inputs]."""
        if self._packed is not None:
            return operations(self._packed.values.device).dequantize(self._packed, self._states[0].dtype)
        parts = [dequantize_4bit(layer.weight.data, state_of(layer)) for layer in self._layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def narrow(self, factor: torch.Tensor, *, turned: bool) -> torch.Tensor:
        """Return the weights times `factor` in 8 bit, `turned`: transposed."""
        if self._packed is None:
            return narrow_matrix(self.dense(), factor, turned=turned)
        return operations(self._packed.values.device).narrow_weights(self._packed, factor, turned=turned)

    def _join(self) -> Packed:
        values = torch.cat([layer.weight.data.reshape(-1) for layer in self._layers])
        scales = torch.cat([state.absmax.reshape(-1) for state in self._states])
        at = 0
        for layer, state in zip(self._layers, self._states, strict=True):
            size = layer.weight.data.numel()
            layer.weight.data = values[at : at + size].view(layer.weight.data.shape)
            state.absmax = scales[at // (BLOCK // 2) : (at + size) // (BLOCK // 2)]
            at += size
        first, outer = self._states[0], None
        if first.nested:
            # One outer scale and one offset for each 256 scales, so that layers need not be told apart.
            factors = torch.cat([state.state2.absmax.float() for state in self._states])
            offsets = torch.cat([state.offset.float().expand(len(state.state2.absmax)) for state in self._states])
            outer = first.state2.code, factors, offsets
        return Packed(values, scales, first.code, outer, self._shape)


def state_of(layer: Linear4bit) -> QuantState:
    """Return what bitsandbytes needs to know of a layer's weights."""
    state: QuantState = layer.weight.quant_state  # type: ignore[attr-defined]
    return state


def _joinable(layer: Linear4bit) -> bool:
    state = state_of(layer)
    whole = layer.weight.data.numel() * 2 % (BLOCK * OUTER) == 0
    known = state.blocksize == BLOCK and (not state.nested or state.state2.blocksize == OUTER)
    return layer.weight.is_cuda and whole and known and state.dtype in (torch.bfloat16, torch.float16)
