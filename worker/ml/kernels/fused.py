"""The fast path of one run: micro-batches without padding, fused layers, and a loss that never holds all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from common.memory.fused import HEAD_TOKENS, working_values
from worker.ml.kernels.attention import Spans
from worker.ml.kernels.budget import Costs, StepPlan, Ways, plan_step
from worker.ml.kernels.cover import decoder_layers, parts_of
from worker.ml.kernels.layer import Call, Parts, Recompute, run_layer
from worker.ml.kernels.linear import Group
from worker.ml.kernels.loss import Loss, head_loss
from worker.ml.kernels.operations import Operations, operations
from worker.ml.kernels.rows import MicroBatch, cut

_LAYER_SEED = 0x2545F491


@dataclass(frozen=True)
class Pass:
    """What the layers have to know of the micro-batch that is under way."""

    spans: Spans
    ways: Ways
    seed: int


class Fused:
    """Runs a covered model. In evaluation and generation its layers do what they always did.

    Args:
        least: what each layer recomputes, whatever the room.
        room: the bytes that activations may take; None: as many as they like.
    """

    def __init__(self, model: PeftModel, *, least: Ways, room: int | None):
        base = cast(PreTrainedModel, model.get_base_model())
        config: Any = base.config
        self._decoder: Any = base.base_model
        self._head: torch.Tensor = cast(Any, base.get_output_embeddings()).weight
        self._ops: Operations = operations(self._head.device)
        # Granite divides its logits.
        self._hidden_scale = 1 / getattr(config, "logits_scaling", 1.0)
        self._pass: Pass | None = None
        self.layers = [parts_of(layer, eps=config.rms_norm_eps) for layer in decoder_layers(base)]
        self.least, self.room = least, room
        self.resident = self.narrow = False
        self.costs = costs(self.layers, self._head)
        self._patched = decoder_layers(base)
        for index, (layer, parts) in enumerate(zip(self._patched, self.layers, strict=True)):
            layer.forward = partial(self._forward, index, parts, layer.forward)

    def restore(self) -> None:
        """Give the layers their own forward pass back: for a base that the next job uses."""
        for layer in self._patched:
            layer.forward = layer.forward.args[2]

    @property
    def groups(self) -> Iterator[Group]:
        """The linear layers that read one input, of every layer."""
        return (group for parts in self.layers for group in parts.groups)

    def compute_narrow(self) -> None:
        """Multiply with the base in 8-bit floats from now on."""
        self.narrow = True
        self.costs = costs(self.layers, self._head, narrow=True)
        for group in self.groups:
            group.narrow(self._ops)

    def keep_weights(self) -> None:
        """Hold the base as its products read it from now on: dequantised."""
        self.resident = True
        for group in self.groups:
            group.keep()

    def plan(self, lengths: list[int]) -> StepPlan:
        """Return how rows of `lengths` tokens are cut, and what their layers recompute."""
        room = 1 << 62 if self.room is None else self.room
        return plan_step(lengths, self.costs, room, self.least)

    def micro_batches(self, batch: dict[str, Any]) -> Iterator[tuple[MicroBatch, Ways]]:
        """Yield the micro-batches of a step with what each layer is to recompute."""
        bounds = batch["bounds"]
        plan = self.plan([after - before for before, after in pairwise(bounds)])
        yield from zip(cut(batch, plan.sizes), plan.ways, strict=True)

    def loss(self, micro: MicroBatch, ways: Ways, seed: int) -> Loss:
        """Return the sums over the trained tokens of `micro`; `seed` decides what dropout drops."""
        with self._under_way(Pass(micro.spans, ways, seed)):
            # A mask of four dimensions is taken as it is: transformers builds none, and does not wait for the device.
            unused = torch.empty(1, 1, 1, 1, device=micro.tokens.device)
            hidden = self._decoder(
                input_ids=micro.tokens, position_ids=micro.positions, attention_mask=unused, use_cache=False
            ).last_hidden_state[0]
        chosen = hidden.index_select(0, micro.trained)
        return head_loss(chosen if self._hidden_scale == 1 else chosen * self._hidden_scale, self._head, micro.targets)

    @contextmanager
    def _under_way(self, current: Pass) -> Iterator[None]:
        self._pass = current
        try:
            yield
        finally:
            self._pass = None

    def _forward(
        self, index: int, parts: Parts, plain: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._pass is None:
            return plain(hidden, *args, **kwargs)
        cos, sin = kwargs["position_embeddings"]
        if not parts.turns:
            cos, sin = cos[..., :0], sin[..., :0]
        seed = (self._pass.seed + index * _LAYER_SEED) & 0x7FFFFFFF
        call = Call(parts, self._ops, self._pass.spans, cos[0], sin[0], seed, self._pass.ways[index])
        return run_layer(call, hidden[0])[None]


def costs(layers: list[Parts], head: torch.Tensor, *, narrow: bool = False) -> Costs:
    """Return what a token takes in each layer, and a micro-batch besides; `narrow`: with products in 8-bit floats."""
    parts, size = layers[0], head.element_size()
    hidden, inner = parts.first_norm.numel(), sum(parts.gate_up.sizes) // 2
    low = sum(group.rank * len(group.adapters) for group in parts.groups)
    queries, keys = parts.heads * parts.head_size, parts.kv_heads * parts.head_size
    everything = size * (2 * hidden + 2 * queries + 2 * keys + 2 * inner + low) + 4 * parts.heads + 8
    working = working_values(hidden, inner, queries, keys, head_norm=parts.head_norm is not None)
    return Costs(
        layers=len(layers),
        kept={Recompute.NOTHING: everything, Recompute.MLP: everything - size * 2 * inner,
              Recompute.ALL: size * hidden},
        # In 8 bit, a copy of the widest gradient.
        working=size * working + (2 * inner if narrow else 0),
        fixed=size * (max(group.num_weights for group in parts.groups) + HEAD_TOKENS * head.shape[0]),
    )  # fmt: skip
