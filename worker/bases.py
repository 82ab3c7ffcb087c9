"""Base models: a folder under `TUNERY_MODEL_DIR`, or a hub id that is pinned to a revision.

Only this process talks to the hub, with the operator's token; the trainer gets a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tqdm import tqdm

from common import base_models
from common.errors import InvalidInput
from common.hub import hub, hub_errors, token
from common.settings import Settings
from worker.trainer.protocol import CacheRef

# Never *.bin, *.pt or *.py: a pickle runs code when it is loaded.
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHT_FILES = (*_TOKENIZER_FILES, "*.safetensors")
_PARAM = "model"


@dataclass(frozen=True)
class Base:
    """A base model: the public id and revision that an adapter names, and its folder where it has a fixed one."""

    id: str
    revision: str | None
    folder: Path | None = None


def resolve(model: str, settings: Settings) -> Base:
    """Return the base that `model` names, with a hub id pinned to the commit that its revision means now.

    Raises:
        InvalidInput: there is no such base, or the operator's token may not read it.
        InfraError: the hub does not answer.
    """
    name, _, revision = model.partition("@")
    if "/" not in name:
        return local(name, settings)
    with hub_errors(model):
        found = hub(settings).model_info(name, revision=revision or None)
    _refuse_pickles(name, [item.rfilename for item in found.siblings or ()])
    return Base(name, found.sha)


def local(name: str, settings: Settings) -> Base:
    """Return the base in the folder `name` under `TUNERY_MODEL_DIR`.

    Raises:
        InvalidInput: there is no such folder; the hint lists those that there are.
    """
    base_models.check(name, settings)
    assert settings.model_dir is not None
    return in_folder((settings.model_dir / name).resolve(), name)


def in_folder(folder: Path, name: str) -> Base:
    """Return the base in `folder`, by the public id and revision in its `tunery.json`, or else by `name`.

    Raises:
        InvalidInput: its weights are no safetensors.
    """
    _refuse_pickles(name, [path.name for path in folder.iterdir()])
    card = folder / "tunery.json"
    public: dict[str, Any] = json.loads(card.read_text()) if card.is_file() else {}
    return Base(public.get("id") or name, public.get("revision"), folder)


def _refuse_pickles(name: str, files: Sequence[str]) -> None:
    if not any(file.endswith(".safetensors") for file in files):
        raise InvalidInput(
            f"model: {name} has no safetensors weights",
            param=_PARAM,
            code="base_not_safetensors",
            hint="Pickle weights run code when they are loaded. Choose one with *.safetensors, or convert it.",
        )


def fetch(base: Base, settings: Settings, alive: Callable[[], None], *, weights: bool) -> Path:
    """Return a folder with the base's files, from the cache or the hub; without `weights`, what a tokenizer needs."""
    if base.folder is not None:
        return base.folder
    patterns = list(_WEIGHT_FILES if weights else _TOKENIZER_FILES)
    with hub_errors(base.id):
        return Path(
            str(
                snapshot_download(
                    base.id,
                    revision=base.revision,
                    cache_dir=cache(settings),
                    endpoint=settings.hf_endpoint,
                    token=token(settings),
                    allow_patterns=patterns,
                    tqdm_class=interruptible(alive),
                    max_workers=4,
                )
            )
        )


def cache(settings: Settings) -> Path:
    """Return the folder that downloads from the hub are kept in, shared by the workers of a machine."""
    return settings.hf_cache or settings.work_dir / "hub"


def quantized_cache(settings: Settings) -> CacheRef | None:
    """Return where the workers of a machine keep bases in 4 bit; None where that is switched off."""
    if not settings.quantized_cache_gib:
        return None
    folder = settings.work_dir.resolve() / "quantized"
    return CacheRef(str(folder), int(settings.quantized_cache_gib * 2**30), settings.disk_reserve_bytes)


def interruptible(alive: Callable[[], None]) -> Any:
    """Return a silent progress bar that calls `alive` at each chunk: the library offers no other way to stop it."""

    class Watched(tqdm):
        def __init__(self, *arguments: Any, **options: Any):
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            alive()
            return super().update(n)

    return Watched
