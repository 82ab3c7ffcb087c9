"""One base in memory, and the adapters over it: loaded, summed, mixed within a batch, and taken off without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from common.errors import InvalidInput
from worker.serve.engine.adapter_check import MERGED, adapter_check

# peft's word for a row of a mixed batch that no adapter touches.
_BARE = "__base__"


class SharedBase:
    """A base and its adapters by name; None stands for the bare base."""

    def __init__(self, base: PreTrainedModel):
        self._base = base.eval()
        self._peft: PeftModelForCausalLM | None = None
        self._solo: set[str] = set()
        ends = (base.get_input_embeddings(), base.get_output_embeddings())
        self._ends = [name for name, module in base.named_modules() if any(module is end for end in ends)]

    def load(self, name: str, parts: Sequence[tuple[Path, float]]) -> int:
        """Load the weighted sum of the adapters in some folders, or the one there is; return its bytes in memory.

        Raises:
            InvalidInput: an adapter does not fit this base, or cannot be weighted; nothing of it stays.
        """
        configs = [
            adapter_check(folder, self._ends, weighted=len(parts) > 1 or weight != 1) for folder, weight in parts
        ]
        names = [name] if len(parts) == 1 else [f"{name}-{index}" for index in range(len(parts))]
        try:
            for part, config, (folder, _) in zip(names, configs, parts, strict=True):
                self._attach(part, config, folder)
            self._weigh(name, names, [weight for _, weight in parts])
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            self._drop([*names, name])
            if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
                raise
            # One whose vocabulary grew, for instance; or one that replaces a module on which others have their LoRA.
            beside = " beside the adapters that lie on it now" if self._peft else ""
            message = f"the adapter does not fit the base{beside}: {error}"
            raise InvalidInput(message, code="bad_adapter", param="model", hint=MERGED) from error
        self._drop([part for part in names if part != name])
        if len(parts) == 1 and _needs_own_batch(configs[0]):
            self._solo.add(name)
        return self._bytes(name)

    def unload(self, name: str) -> None:
        """Forget an adapter. With the last one the base is what it was before the first, bit for bit."""
        self._drop([name])

    def shares_batches(self, name: str | None) -> bool:
        """Whether rows with this adapter may stand in a batch beside rows with others."""
        return name not in self._solo

    @contextmanager
    def wearing(self, rows: Sequence[str | None]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield the model and the arguments with which its forward gives each row of a batch the adapter named for it.

        An error inside leaves peft's hooks of this batch on the layers (0.21: `_enable_peft_forward_hooks` has no
        `finally`), which could serve the next batch with these adapters: the process must end then.
        """
        names = {name for name in rows if name is not None}
        if self._peft is None:
            yield self._base, {}
        elif not names:
            with self._peft.disable_adapter():
                yield self._peft, {}
        elif names & self._solo:
            if len(set(rows)) > 1:
                raise ValueError(f"adapters that share no batch in one batch: {rows}")
            self._peft.set_adapter(names.pop(), inference_mode=True)
            yield self._peft, {}
        else:
            self._peft.set_adapter(min(names), inference_mode=True)
            self._use_saved_modules(False)
            yield self._peft, {"adapter_names": [_BARE if name is None else name for name in rows]}
            self._use_saved_modules(True)

    def _attach(self, name: str, config: LoraConfig, folder: Path) -> None:
        # As trained: peft would turn bf16 adapters to fp32, which is for training.
        exactly: dict[str, Any] = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
        if self._peft is None:
            # What `unload` leaves on the base; peft takes it for adapters that are still there.
            self._base.__dict__.pop("peft_config", None)
            self._peft = PeftModelForCausalLM(self._base, config, adapter_name=name, **exactly)
        found = self._peft.load_adapter(str(folder), adapter_name=name, **exactly)
        self._peft.eval()
        # peft 0.21 also names keys of other adapters whose paths have this name somewhere within.
        missing = [key for key in found.missing_keys if name in key.split(".")]
        if missing:
            raise ValueError(f"its file lacks {', '.join(missing[:3])}")

    def _weigh(self, name: str, names: list[str], weights: list[float]) -> None:
        assert self._peft is not None
        if names == [name]:
            for layer in self._layers():
                if name in layer.scaling:
                    layer.scaling[name] *= weights[0]
            return
        for part in names:
            # By full names: peft unites two lists or two expressions, but not one of each.
            matched = {path for path, layer in self._peft.named_modules() if _has(layer, part)}
            config: Any = self._peft.peft_config[part]
            config.target_modules = {path.removeprefix("base_model.model.") for path in matched}
        # "cat" stacks the factors, so the sum of the products is exact: its rank is the sum of the ranks.
        tuner: Any = self._peft.base_model
        tuner.add_weighted_adapter(names, weights, name, combination_type="cat")
        for layer in self._layers():
            # peft 0.21 copies `use_rslora` of the first part, and so scales the sum by the square root of its rank,
            # although each part's own scale is in its factors already.
            if name in layer.scaling:
                layer.scaling[name] = 1.0
        self._peft.eval()

    def _drop(self, names: Sequence[str]) -> None:
        if self._peft is None:
            return
        with warnings.catch_warnings():
            # That another adapter is active now: `wearing` chooses anew for each batch.
            warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
            for name in names:
                self._solo.discard(name)
                if name in self._peft.peft_config:
                    self._peft.delete_adapter(name)
        if not self._peft.peft_config:
            self._base = self._peft.unload()
            self._peft = None

    def _use_saved_modules(self, used: bool) -> None:
        # In a mixed batch peft 0.21 asks every whole module of `modules_to_save` for adapters that do not have it.
        assert self._peft is not None
        for module in self._peft.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.enable_adapters(used)

    def _layers(self) -> Iterator[LoraLayer]:
        assert self._peft is not None
        return (module for module in self._peft.modules() if isinstance(module, LoraLayer))

    def _bytes(self, name: str) -> int:
        assert self._peft is not None
        own = (tensor for path, tensor in self._peft.named_parameters() if name in path.split("."))
        return sum(tensor.numel() * tensor.element_size() for tensor in own)


def _needs_own_batch(config: LoraConfig) -> bool:
    # peft refuses DoRA in mixed batches, and whole modules cannot be chosen by row beside adapters without them.
    return bool(config.use_dora or config.modules_to_save)


def _has(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)
