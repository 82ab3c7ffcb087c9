"""Adds up what a job takes on its card, part by part.

Activations are what autograd keeps between the passes: for each operation of a layer, the inputs that its backward
formula reads (counted as in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022,
section 4, for the operations of today's layers and with adapters on a frozen base). What a test counts with torch's
hooks on a small model is the same to a few percent; `tests` have that, and the peaks measured on cards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.memory.setup import Setup
from common.memory.shape import Linear

# TRL 1.16 projects so many tokens onto so many words at a time; the logits of a batch are never whole.
_TILE_TOKENS, _TILE_WORDS = 4096, 32_768
# What a process holds on a card before it has a tensor (measured on an H200), and on a CPU (libraries).
CONTEXT_BYTES = {"cuda": 600_000_000, "cpu": 900_000_000}
# Where lengths vary from batch to batch, what torch's allocator has reserved fits the next one badly: two fifths of a
# layer's share on top (measured: 8.0 GiB where equal lengths would take 7.6); hardly any where they do not (measured
# with every layer recomputed: 747 MB on an H100, of which 23 are that).
_SLACK_VARYING, _SLACK_EQUAL = 0.4, 0.05
# Of layers that wait in host memory, those on the card at once: the one that computes, and the one before it, whose
# work may still be under way.
VISITORS = 2


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `rows` of `length` tokens each, padding included, or packed into one row where `packed`.

    `checkpointed`: how many layers recompute their activations. `equal`: every batch has this size.
    `varlen`: attention knows the rows' bounds by itself, and needs no mask and no repeated keys.
    `fused`: norms and gated MLPs keep their inputs only (Liger).
    """

    rows: int
    length: int
    checkpointed: int
    packed: bool = False
    equal: bool = False
    varlen: bool = False
    fused: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the whole micro-batch."""
        return self.rows * self.length


@dataclass(frozen=True)
class Estimate:
    """Bytes by part. `allocated_bytes` is what torch's allocator reserves at the peak: what a run measures.

    `total_bytes` has the device's context besides. `paged_bytes` of optimizer state leave the card where room is short,
    and are in neither.
    """

    parts: dict[str, int]
    paged_bytes: int

    @cached_property
    def allocated_bytes(self) -> int:
        """Bytes without the context."""
        return sum(size for name, size in self.parts.items() if name != "context")

    @cached_property
    def total_bytes(self) -> int:
        """All bytes."""
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON."""
        sums = {"allocated_bytes": self.allocated_bytes, "total_bytes": self.total_bytes}
        return {"parts": self.parts, "paged_bytes": self.paged_bytes} | sums


def estimate(setup: Setup, batch: Batch, *, device: str = "cuda", room: int | None = None) -> Estimate:
    """Return the memory at the peak of a step.

    Args:
        device: cuda or cpu.
        room: bytes that the weights may take where layers may wait in host memory; None for all that they want.
    """
    shape, tokens = setup.shape, batch.tokens
    saved = layer_bytes_per_token(setup, batch)
    kept = shape.layers - batch.checkpointed
    # A checkpointed layer keeps its input alone; one at a time has its activations back.
    inputs = batch.checkpointed * shape.hidden * _stream_bytes(setup) * tokens
    recomputed = int(saved * tokens) if batch.checkpointed else 0
    passing = _gradients_per_token(setup) * tokens
    slack = _SLACK_EQUAL if batch.equal else _SLACK_VARYING
    parts = {
        "weights": _on_card(setup, room),
        "adapter": setup.adapter_bytes,
        "gradients": setup.gradient_bytes,
        "optimizer": setup.optimizer_bytes,
        "activations": int(kept * saved * tokens) + inputs + recomputed,
        "loss": _final_bytes(setup, tokens),
        # At the loss every layer's activations are there, and no gradient yet; after it, no logits any more.
        "backward": max(passing, _loss_bytes(setup, tokens)),
        "workspace": _workspace(setup),
        "allocator": int(slack * (saved * tokens + passing)),
        "context": CONTEXT_BYTES[device],
    }
    return Estimate(parts, setup.paged_bytes)


def layer_bytes_per_token(setup: Setup, batch: Batch) -> float:
    """Return the bytes that one layer keeps of each token for its backward pass, averaged over the layers."""
    shape, size = setup.shape, setup.element
    full = setup.method == "full"
    # A norm is computed in 32 bit: what it keeps is a 32-bit copy of its input; with a weight of its own to train,
    # the normed values too.
    norm = shape.hidden * (size if batch.fused else 8 if full else 4)
    heads = 4.0 * (shape.queries + shape.keys) if shape.qk_norm else 0.0
    return shape.norms * norm + heads + _attention(setup, batch) + _mlp(setup, batch) + _inputs(setup)


def _attention(setup: Setup, batch: Batch) -> float:
    """Return attention's bytes per token: query, key, value and result, the softmax's sums, and the mask's share.

    With a mask transformers repeats keys and values to the number of heads, and torch keeps the mask of each layer.
    Eager attention keeps the scores of each head: before and after the softmax, which is in 32 bit.
    """
    shape, size = setup.shape, setup.element
    masked = not batch.varlen
    keys = shape.queries if masked else shape.keys
    seen = (batch.tokens if batch.packed else batch.length) if masked else 0
    scores = shape.heads * seen * (4 + 2 * size) if shape.eager else 0
    return size * (2 * shape.queries + 2 * keys) + 4 * shape.heads + size * seen + scores


def _mlp(setup: Setup, batch: Batch) -> float:
    shape = setup.shape
    if not shape.gated:
        return setup.element * shape.intermediate * (4 if shape.long_gelu else 1)
    # The activation's input, its result, and the other branch; a fused one computes the result again.
    return setup.element * shape.intermediate * (2 if batch.fused else 3)


def _inputs(setup: Setup) -> float:
    """Return what is kept of a layer's inputs for the gradients of trained weights; a frozen weight keeps none."""
    shape, size = setup.shape, setup.element
    if setup.method == "full":
        # Autocast narrows the input for each layer anew; the heads' output is narrow already.
        return float(sum(size * linear.inputs for linear in shape.linears if linear.reads != "heads"))
    total = 0.0
    shared: dict[str, float] = {}
    for linear, layers in setup.adapted:
        share = layers / shape.layers
        total += share * size * setup.rank
        kept = _adapter_input(setup, linear)
        if setup.dropout or setup.trained_bytes != size:
            total += share * kept
        else:
            shared[linear.reads] = max(shared.get(linear.reads, 0.0), share * kept)
    return total + sum(size for reads, size in shared.items() if reads != "heads")


def _adapter_input(setup: Setup, linear: Linear) -> float:
    # With dropout: what it left over, and one byte each for what it left out.
    return linear.inputs * (setup.element + (1 if setup.dropout else 0))


def _gradients_per_token(setup: Setup) -> int:
    """Return the bytes of a token's gradients in the layer that runs backward: the MLP's branches, a norm in 32 bit."""
    shape = setup.shape
    return setup.element * shape.intermediate * (3 if shape.gated else 2) + 8 * shape.hidden


def _final_bytes(setup: Setup, tokens: int) -> int:
    """Return the bytes that the last norm keeps, with its result, which the loss keeps."""
    return tokens * setup.shape.hidden * (4 + setup.element)


def _loss_bytes(setup: Setup, tokens: int) -> int:
    """Return the bytes of a tile of logits, and of the gradient of the last hidden states in 32 bit."""
    tile = min(tokens, _TILE_TOKENS) * min(setup.shape.vocab, _TILE_WORDS) * setup.element
    return tile + tokens * setup.shape.hidden * 4


def _stream_bytes(setup: Setup) -> int:
    return 4 if setup.method == "full" or setup.kbit_preparation else setup.element


def _workspace(setup: Setup) -> int:
    """Return the bytes of weights that are converted for a product.

    With `qlora` the largest one, dequantised for the forward and for the backward product; with `full` every weight in
    16 bit, which autocast keeps until the step has ended.
    """
    if setup.method == "full":
        return setup.shape.linear_weights * setup.element if setup.element < 4 else 0
    largest = max(linear.weights for linear in setup.shape.linears)
    return 2 * largest * setup.element if setup.method == "qlora" else 0


def _on_card(setup: Setup, room: int | None) -> int:
    if not setup.offloads or room is None:
        return setup.weight_bytes
    waiting = max(0, setup.shape.layers - VISITORS) * setup.layer_weight_bytes
    return max(min(setup.weight_bytes, room), setup.weight_bytes - waiting)
