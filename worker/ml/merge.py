"""Folds a finished adapter into its base: one model that needs no peft, checked against the adapter before it is kept.

    merged              into the base as it is stored, 16-bit mostly: what most people want
    merged_dequantized  into the base as 4-bit training saw it, its weights dequantised to 16 bit
    merged_4bit         the former, quantised to 4 bit again: small, and no longer what was trained

The name is also that of the folder. The first two compute what base and adapter compute, up to one rounding of each
merged weight, so they are compared with these and kept only if they agree; the third rounds every weight to one of
sixteen values, and what that costs is stated.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import UserError
from worker.ml.agreement import Difference, answers, difference
from worker.ml.base import keep_training_layout, load_weights
from worker.ml.towers import empty_model
from worker.ml.vocabulary import num_rows

SHARD_SIZE = "5GB"
# In rounding steps of the stored format: 0.012 for bf16. Rounding the merged weights to bf16 moved the logits of
# SmolLM2-135M, computed in fp32, by 0.001 to 0.004 of their size, whatever the adapter's strength; the noise grows with
# the square root of the depth (30 layers there, 126 in the largest Llama).
TOLERATED_STEPS = 1.5
# fp32 arithmetic itself differs by some 1e-6 after thirty layers.
_LEAST_TOLERANCE = 1e-4
# Of an adapter's folder, what is not the tokenizer's.
_ADAPTERS_OWN = ("adapter_model.safetensors", "adapter_config.json", "README.md")


class MergeRefused(UserError):
    """The merged model does not say what base and adapter say."""

    code = "merge_differs"


@dataclass(frozen=True)
class Ingredients:
    """What is merged. `four_bit` is how the base was quantised in training, or would be; `rows` are token ids."""

    base: Path
    adapter: Path
    device: torch.device
    rows: Sequence[Sequence[int]]
    four_bit: BitsAndBytesConfig
    trained_in_4bit: bool
    stored_in_4bit: bool


@dataclass
class Merger:
    """Makes the forms of one adapter. `pause` is called between the steps and may end them with an exception."""

    parts: Ingredients
    scratch: Path
    pause: Callable[[], None] = lambda: None
    _said: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _effects: dict[str, Difference] = field(default_factory=dict)
    _whole: Path | None = None

    def make(self, form: str, target: Path) -> dict[str, Any]:
        """Write the model in `form` to the folder `target` and return how it compares; `target` is whole or absent.

        Raises:
            MergeRefused: it differs from base and adapter by more than rounding explains.
        """
        try:
            return self._quantized(target) if form == "merged_4bit" else self._merged(form, target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise

    # ---- the two that must agree -------------------------------------------------------------------------------------

    def _merged(self, form: str, target: Path) -> dict[str, Any]:
        base = "4_bit" if form == "merged_dequantized" else "16_bit"
        others = [] if base == "16_bit" or self.parts.stored_in_4bit else ["16_bit"]
        for other in others:
            self._ask(other)
        model = self._ask(base, keep=True)
        self.pause()
        if base == "4_bit":
            model = self._dressed(_dequantized(model.unload()))
        dtype = model.get_input_embeddings().weight.dtype
        _untie(model)
        self._save(model.merge_and_unload(), target)
        del model
        self.pause()
        # What will be published is what was written, so that is what is asked.
        said = self._said_by(target)
        gap = difference(self._said[base], said)
        tolerance = max(TOLERATED_STEPS * torch.finfo(dtype).eps, _LEAST_TOLERANCE)
        report = {"dtype": str(dtype).removeprefix("torch."), "tolerance": tolerance} | self._compared(said)
        if not gap.relative <= tolerance:
            raise MergeRefused(
                f"{form}: its logits differ from those of base and adapter by {gap.relative:.3g} of their size, and "
                f"{tolerance:.3g} is what rounding explains",
                hint="the adapter itself is fine: serve it over its base",
            )
        self._whole = self._whole or target
        return report

    # ---- the one that is only measured -------------------------------------------------------------------------------

    def _quantized(self, target: Path) -> dict[str, Any]:
        if self._whole is None:
            self.make("merged_dequantized" if self.parts.stored_in_4bit else "merged", self.scratch / "whole")
        for base in self._bases():
            self._ask(base)
        assert self._whole is not None
        model = load_weights(self._whole, "auto", self.parts.device, self.parts.four_bit)
        keep_training_layout(model)
        self._save(model, target)
        del model
        self.pause()
        return {"dtype": self.parts.four_bit.bnb_4bit_quant_type} | self._compared(self._said_by(target))

    def _bases(self) -> list[str]:
        return [
            *([] if self.parts.stored_in_4bit else ["16_bit"]),
            *(["4_bit"] if self.parts.trained_in_4bit or self.parts.stored_in_4bit else []),
        ]

    # ---- base and adapter on the fly ---------------------------------------------------------------------------------

    def _ask(self, base: str, *, keep: bool = False) -> Any:
        """Let the base in a form, with the adapter on the fly, answer; return the model if it is to be kept."""
        if base in self._said and not keep:
            return None
        self.pause()
        config = self.parts.four_bit if base == "4_bit" and not self.parts.stored_in_4bit else None
        loaded = load_weights(self.parts.base, "auto", self.parts.device, config)
        keep_training_layout(loaded)
        _grow_to(loaded, self.parts.adapter)
        # Before the adapter is put on: its biases, and modules that it replaces, stay when it is disabled.
        bare = answers(loaded, self.parts.rows) if base not in self._said else []
        model = self._dressed(loaded)
        if base not in self._said:
            self._said[base] = answers(model, self.parts.rows)
            self._effects[base] = difference(self._said[base], bare)
        return model if keep else None

    def _dressed(self, model: PreTrainedModel) -> PeftModel:
        # peft takes adapters in fp32, so that a merged weight is rounded once, at the end.
        return PeftModel.from_pretrained(model, str(self.parts.adapter)).eval()

    def _said_by(self, folder: Path) -> list[torch.Tensor]:
        _collect()
        model = load_weights(folder, "auto", self.parts.device)
        keep_training_layout(model)
        return answers(model, self.parts.rows)

    def _compared(self, said: list[torch.Tensor]) -> dict[str, Any]:
        """Return how a model's answers differ from those on the fly, and what the adapter changes at all."""
        return {
            f"from_adapter_on_{base}_base": difference(known, said).rounded() for base, known in self._said.items()
        } | {"adapter_changes": next(iter(self._effects.values())).rounded()}

    def _save(self, model: PreTrainedModel, target: Path) -> None:
        """Write a model in the layout of the hub: shards, configuration, the base's generation settings, tokenizer."""
        settings = self.parts.base / "generation_config.json"
        if settings.is_file():
            # Some published ones are not valid any more, and the library refuses to write these.
            model.generation_config = GenerationConfig()
        model.save_pretrained(target, max_shard_size=SHARD_SIZE)
        if settings.is_file():
            shutil.copyfile(settings, target / settings.name)
        for path in sorted(self.parts.adapter.iterdir()):
            if path.name not in _ADAPTERS_OWN:
                shutil.copyfile(path, target / path.name)


def _grow_to(model: PreTrainedModel, adapter: Path) -> None:
    """Give the embedding as many rows as an adapter of a grown vocabulary brings; their values are in the adapter."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        key = f"base_model.model.{name}.weight"
        rows = file.get_slice(key).get_shape()[0] if key in file.keys() else num_rows(model)  # noqa: SIM118
    if rows > num_rows(model):
        model.resize_token_embeddings(rows, mean_resizing=False)


def _untie(model: PeftModel) -> None:
    """Give the output head a weight of its own where a LoRA sits on embeddings that it shares.

    On the fly that LoRA changes what goes in alone; merged into a shared weight it would change what comes out too.
    """
    base: Any = model.get_base_model()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(embeddings, BaseTunerLayer) and head is not None and head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
        base.all_tied_weights_keys = {}


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    plain: PreTrainedModel = model.dequantize()
    # transformers 5.23 remembers how the weights were read, to write them back that way; from 4 bit it cannot.
    known = getattr(plain, "_weight_conversions", None) or []
    steps = [step for step in known if not _reads_4_bit(step)]
    if len(steps) < len(known):
        plain._weight_conversions = steps  # type: ignore[assignment]
    _restore_conv1d(plain)
    return plain


def _restore_conv1d(model: PreTrainedModel) -> None:
    # bitsandbytes makes plain linear layers of GPT-2's Conv1D, and they stay that when they are dequantised. What is
    # saved would be transposed for everybody else.
    for name, module in empty_model(model.config).named_modules():
        if isinstance(module, Conv1D):
            plain: Any = model.get_submodule(name)
            module.weight = torch.nn.Parameter(plain.weight.detach().T.contiguous(), requires_grad=False)
            module.bias = plain.bias
            model.set_submodule(name, module)


def _reads_4_bit(step: Any) -> bool:
    return any(type(operation).__name__ == "Bnb4bitDeserialize" for operation in getattr(step, "operations", ()))


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
