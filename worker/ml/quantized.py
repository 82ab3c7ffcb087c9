"""A base in 4 bit, kept on the machine's disk: read back it is the same, bit for bit, and a third of what is quantised.

transformers writes and reads it (`save_pretrained` of a 4-bit model keeps packed weights and their scales as they are).
Only weights are taken from there: configuration and generation settings are those of the base's own folder.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from worker.ml.cache import BadEntry, Cache, NoRoom
from worker.ml.memory import is_fault_of_device
from worker.ml.options import Choice
from worker.ml.shell import fingerprint, own_all, shell_of, tensors_of

# Another layout of an entry gets another number.
_FORMAT = 1
_PACKAGES = ("torch", "transformers", "bitsandbytes")
_SHARD_BYTES = 10**9
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Shelf:
    """Where the 4-bit forms of one base lie: a cache, and what tells this base from others. `may_write`: add to it."""

    cache: Cache
    identity: Any
    may_write: bool = True

    def form(self, config: BitsAndBytesConfig, dtype: torch.dtype, device: torch.device) -> Form:
        """Return the form of the base that `config` gives, with the rest of its weights in `dtype`."""
        asked = {"quantization": config.to_dict(), "dtype": str(dtype), "device": _kind(device)}
        made_by = {name: version(name) for name in _PACKAGES}
        parts = {"format": _FORMAT, "base": self.identity, "asked": asked, "versions": made_by}
        return Form(self, hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), parts)


@dataclass
class Form:
    """One base in one 4-bit form. `loaded`: it came from the cache; `choices`: what there is to say about that."""

    shelf: Shelf
    key: str
    parts: dict[str, Any]
    loaded: bool = False
    choices: list[Choice] = field(default_factory=list)
    _seal: str | None = None
    _dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def load(self, read: Callable[[Path], PreTrainedModel], quantize: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Return the model that `read` makes of the files in the cache, or else the one that `quantize` makes."""
        begun = time.monotonic()
        try:
            model = self._read(read)
        except Exception as error:
            if is_fault_of_device(error):
                raise
            self._drop(error)
            model = None
        if model is None:
            gc.collect()
            model = quantize()
            if self.shelf.may_write:
                self._seal = seal(model)
                self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            return model
        self.loaded = True
        size, seconds = _num_bytes(model), time.monotonic() - begun
        message = f"{size / 1e9:,.2f} GB in 4 bit read from this worker's disk in {seconds:.1f} s"
        data = {"bytes": size, "seconds": round(seconds, 3)}
        self.choices.append(Choice("base.from_cache", message, data))
        return model

    def _read(self, read: Callable[[Path], PreTrainedModel]) -> PreTrainedModel | None:
        with self.shelf.cache.reading(self.key) as entry:
            if entry is None:
                return None
            with entry.verified():
                model = read(entry.path)
                if model.device.type == "cpu":
                    # What happens to the file later must not reach the run.
                    own_all(model)
            if seal(model) != entry.facts.get("seal"):
                raise BadEntry("the library read something else than was written")
            return model

    def _drop(self, error: Exception) -> None:
        # Whatever a reader makes of broken files: quantising anew needs none of them.
        reason = str(error) if isinstance(error, BadEntry) else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            self.shelf.cache.drop(self.key)
        message = f"the 4-bit form of the base on this worker's disk was not used, and removed: {reason[:300]}"
        self.choices.append(Choice("base.cache_dropped", message, {"reason": reason[:300]}, "warning"))

    @property
    def missing(self) -> bool:
        """Whether the base was quantised, and ought to be written into the cache."""
        return self._seal is not None

    def store(self, model: PreTrainedModel) -> Choice | None:
        """Write `model`, which nothing has altered since it was quantised, into the cache; return the event. Once.

        Never raises: what the entry costs is at most the entry.
        """
        written, self._seal = self._seal, None
        if written is None or self.shelf.cache.has(self.key):
            return None
        begun = time.monotonic()
        facts = {"seal": written} | self.parts

        def fill(folder: Path) -> dict[str, Any]:
            self._as_read(model).save_pretrained(folder, max_shard_size=_SHARD_BYTES)
            (folder / "config.json").unlink()
            (folder / _GENERATION).unlink(missing_ok=True)
            own = Path(self.parts["base"][0]["path"]) / _GENERATION
            if own.is_file():
                shutil.copyfile(own, folder / _GENERATION)
            return facts

        try:
            size = self.shelf.cache.add(self.key, _num_bytes(model), fill)
        except Exception as error:
            reason = str(error) if isinstance(error, NoRoom) else f"{type(error).__name__}: {error}"
            message = f"the base in 4 bit was not kept on this worker's disk: {reason[:300]}"
            return Choice("base.not_cached", message, {"reason": reason[:300]}, "warning")
        seconds = time.monotonic() - begun
        message = f"the base in 4 bit is kept on this worker's disk: {size / 1e9:,.2f} GB in {seconds:.1f} s"
        return Choice("base.cached", message, {"bytes": size, "seconds": round(seconds, 3)}) if size else None

    def _as_read(self, model: PreTrainedModel) -> PreTrainedModel:
        # A shell, because saving changes the configuration; without what a preparation for k-bit training has widened.
        made = shell_of(model)
        for name, parameter in made.named_parameters():
            if parameter.dtype != self._dtypes[name]:
                parameter.data = parameter.data.to(self._dtypes[name])
        return made


def seal(model: PreTrainedModel) -> str:
    """Return a hash over every tensor of `model`: its name, form and bits, and how a 4-bit one is to be read."""
    facts = [[name, *_facts(parameter)] for name, parameter in model.named_parameters()]
    facts += [[name, str(buffer.dtype), *buffer.shape] for name, buffer in model.named_buffers()]
    return hashlib.sha256(json.dumps(facts).encode() + fingerprint(model).numpy().tobytes()).hexdigest()


def _facts(parameter: torch.nn.Parameter) -> list[Any]:
    state: Any = getattr(parameter, "quant_state", None)
    own = [type(parameter).__name__, str(parameter.dtype), *parameter.shape]
    if state is None:
        return own
    nested = [str(state.state2.dtype), state.state2.blocksize] if state.nested else None
    return [*own, state.quant_type, str(state.dtype), state.blocksize, list(state.shape), nested]


def _num_bytes(model: PreTrainedModel) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(model)}.values())


def _kind(device: torch.device) -> str:
    # The same weights need not round to the same 4 bits elsewhere.
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
