"""What a job holds besides its activations: the base's weights, what is trained, gradients, optimizer state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from common.memory.shape import Linear, Shape
from common.schemas.jobs import JobSpec
from common.schemas.lora import Lora

# Half a byte a weight, and a scale for each 64 of them: four bytes; or, quantised again, one byte, and four for each
# 256 scales. 4.127 bits a weight (Dettmers et al., QLoRA, section 3: 0.127 bits for the scales).
BYTES_4_BIT = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
_ALL_LINEAR = "all-linear"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head")
# bitsandbytes 0.50: smaller tensors keep their state in 32 bit, and are not paged.
_MIN_8_BIT, _MIN_PAGED = 4096, 100_000
# State values a weight, and bytes of each; torch's AdamW keeps its two in the dtype of the weights.
_STATES = {"adamw": 2, "ademamix": 3, "lion": 1}


@dataclass(frozen=True)
class Trained:
    """`count` trained tensors of so many `elements` each."""

    elements: int
    count: int


@dataclass(frozen=True)
class Setup:
    """A job as its memory sees it.

    `element`: bytes of a value in products; `trained_bytes`: of a trained weight. `adapted`: the linear layers with an
    adapter, and on how many decoder layers. `offloads`: layers may wait in host memory. `fused`: a card would take the
    fast path; `fp8`: with products in 8-bit floats.
    """

    shape: Shape
    method: str
    element: int
    trained_bytes: int
    optim: str
    double_quant: bool
    kbit_preparation: bool
    offloads: bool
    rank: int
    dropout: float
    adapted: tuple[tuple[Linear, int], ...]
    trained: tuple[Trained, ...]
    fused: bool = False
    fp8: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of the base's weights as they are held: 4 bit, 16 bit, or 32 bit for a full fine-tune."""
        shape = self.shape
        if self.method == "qlora":
            rest = 4 if self.kbit_preparation else self.element
            return int(shape.linear_weights * BYTES_4_BIT[self.double_quant] + shape.other_weights * rest)
        return shape.weights * (4 if self.method == "full" else self.element)

    @property
    def layer_weight_bytes(self) -> int:
        """Bytes of one decoder layer's linear weights as they are held."""
        weights = self.shape.linear_weights // self.shape.layers
        return int(weights * BYTES_4_BIT[self.double_quant]) if self.method == "qlora" else weights * self.element

    @property
    def trained_parameters(self) -> int:
        """The number of trained weights."""
        return sum(each.elements * each.count for each in self.trained)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the trained weights beside the base."""
        return 0 if self.method == "full" else self.trained_parameters * self.trained_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients, which are in the dtype of their weights."""
        return self.trained_parameters * self.trained_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state that stays on the card."""
        return sum(size for size, pages in self._states() if not pages)

    @property
    def paged_bytes(self) -> int:
        """Bytes of state in managed memory, which leaves the card where there is no room."""
        return sum(size for size, pages in self._states() if pages)

    def _states(self) -> Iterator[tuple[int, bool]]:
        values = next(count for name, count in _STATES.items() if name in self.optim)
        for each in self.trained:
            if "torch" in self.optim:
                size = self.trained_bytes
            else:
                size = 1 if "8bit" in self.optim and each.elements >= _MIN_8_BIT else 4
            pages = self.optim.startswith("paged") and each.elements >= _MIN_PAGED
            yield each.elements * each.count * values * size, pages


def read_setup(job: JobSpec, shape: Shape, *, optim: str | None = None, element: int | None = None) -> Setup:
    """Return how `job` would be held over a base of `shape`.

    Args:
        optim: the optimizer that is taken, where it is not the one asked for.
        element: bytes of a value in products, where the device cannot do what was asked for.
    """
    quantization, lora = job.quantization, job.lora
    asked = quantization.bnb_4bit_compute_dtype if quantization else "bfloat16"
    size = element or (4 if asked == "float32" else 2)
    # As `worker.ml.precision` decides: QLoRA trains in bf16, everything else in 32 bit.
    narrow = job.method == "qlora" and size == 2 and asked == "bfloat16"
    adapted = _adapted(lora, shape) if lora else ()
    chosen = optim or job.hyperparameters.optim
    return Setup(
        shape=shape,
        method=job.method,
        element=size,
        trained_bytes=2 if narrow else 4,
        optim="adamw_torch_fused" if chosen == "auto" else chosen,
        double_quant=quantization.bnb_4bit_use_double_quant if quantization else True,
        kbit_preparation=bool(quantization and quantization.prepare_kbit_training),
        offloads=bool(quantization and quantization.device_map == "auto"),
        rank=lora.r if lora else 0,
        dropout=lora.lora_dropout if lora else 0.0,
        adapted=adapted,
        trained=tuple(_trained(lora, shape, adapted) if lora else _whole(shape)),
        fused=shape.fusable and _is_covered(job),
        fp8=job.hyperparameters.fp8 is True,
    )


def _is_covered(job: JobSpec) -> bool:
    """Return whether the fast path covers what a job asks for, as `worker.ml.kernels.choice` decides with the model."""
    asked, lora, quantization = job.hyperparameters, job.lora, job.quantization
    if lora is None or asked.kernels == "plain" or asked.neftune_noise_alpha:
        return False
    if quantization and (quantization.prepare_kbit_training or quantization.bnb_4bit_compute_dtype != "bfloat16"):
        return False
    return not (lora.use_dora or lora.modules_to_save or lora.bias != "none" or lora.changes_base)


def _adapted(lora: Lora, shape: Shape) -> tuple[tuple[Linear, int], ...]:
    found = ((linear, _layers_hit(lora.target_modules, linear, shape)) for linear in shape.linears)
    return tuple((linear, layers) for linear, layers in found if layers)


def _layers_hit(targets: list[str] | str, linear: Linear, shape: Shape) -> int:
    """Return in how many layers `linear` is a target. A pattern is tried on Llama's names, then on the last part."""
    last = linear.name.rpartition(".")[2]
    if targets == _ALL_LINEAR:
        return shape.layers
    if isinstance(targets, list):
        named = any(f".{linear.name}".endswith(f".{target}") or target == last for target in targets)
        return shape.layers if named else 0
    names = (f"model.layers.{layer}.{linear.name}" for layer in range(shape.layers))
    hit = sum(re.fullmatch(targets, name) is not None for name in names)
    return hit or (shape.layers if last in targets else 0)


def _trained(lora: Lora, shape: Shape, adapted: tuple[tuple[Linear, int], ...]) -> Iterator[Trained]:
    for linear, layers in adapted:
        yield Trained(lora.r * linear.inputs, layers)
        yield Trained(lora.r * linear.outputs, layers)
        if lora.use_dora:
            yield Trained(linear.outputs, layers)
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    for name in targets:
        if name.rpartition(".")[2] in _EMBEDDINGS:
            yield Trained(lora.r * (shape.vocab + shape.hidden), 1)
    for name in lora.modules_to_save or ():
        last = name.rpartition(".")[2]
        if last in _EMBEDDINGS:
            yield Trained(shape.vocab * shape.hidden, 1)
        elif "norm" in last:
            yield Trained(shape.hidden, shape.layers)
        else:
            for linear in shape.linears:
                if linear.name.endswith(last):
                    yield Trained(linear.weights, shape.layers)


def _whole(shape: Shape) -> Iterator[Trained]:
    for linear in shape.linears:
        yield Trained(linear.weights, shape.layers)
    yield Trained(shape.vocab * shape.hidden, 1 if shape.tied else 2)
    yield Trained(shape.hidden, shape.layers * shape.norms + 1)
