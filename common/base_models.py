"""Base models that need no hub: folders under `TUNERY_MODEL_DIR`, each with a `config.json`.

A folder may carry `tunery.json` with the public `id` and `revision` that its adapters name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from common import workers
from common.errors import InvalidInput
from common.schemas.workers import BaseModelInfo
from common.settings import Settings


def names(settings: Settings) -> list[str]:
    """Return the names of the folders that hold a base model, sorted."""
    if settings.model_dir is None or not settings.model_dir.is_dir():
        return []
    return sorted(found.parent.name for found in settings.model_dir.glob("*/config.json"))


def check(model: str, settings: Settings) -> None:
    """Raise unless `model` is a hub id, which is looked up later, or the name of a folder that is there.

    Raises:
        InvalidInput: there is no such folder; the hint lists those that there are.
    """
    name = model.partition("@")[0]
    if "/" in name:
        return
    found = names(settings)
    if name not in found:
        there_are = f"There are: {', '.join(found[:20])}." if found else "The operator has put none there."
        raise InvalidInput(
            f"model: there is no base model {name!r} on this server",
            param="model",
            code="base_not_found",
            hint=f"Name a folder under TUNERY_MODEL_DIR, or a hub id as org/name. {there_are}",
        )


def listed(settings: Settings) -> list[BaseModelInfo]:
    """Return the base models of the folders, with the size of their weights in bytes."""
    return [_shown(settings.model_dir / name) for name in names(settings) if settings.model_dir]


def at_hand(session: Session, settings: Settings) -> list[BaseModelInfo]:
    """Return the base models of the folders, and those that workers hold besides."""
    folders = listed(settings)
    known = {name for folder in folders for name in (folder.id, folder.name)}
    held = sorted({worker.base_model for worker in workers.listed(session) if worker.base_model} - known)
    return [*folders, *(BaseModelInfo(id=name, name=name, source="worker") for name in held)]


def _shown(folder: Path) -> BaseModelInfo:
    card = _card(folder / "tunery.json")
    return BaseModelInfo(
        id=folder.name,
        name=_text(card.get("id")),
        revision=_text(card.get("revision")),
        source="folder",
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


def public_id(model: str, settings: Settings) -> str:
    """Return the id that jobs on `model` have: a hub id without its revision, or what the folder's card says."""
    name = model.partition("@")[0]
    if "/" in name or settings.model_dir is None:
        return name
    return _text(_card(settings.model_dir / name / "tunery.json").get("id")) or name


def config(name: str, settings: Settings) -> dict[str, Any]:
    """Return the `config.json` of the folder `name`; empty where it cannot be read."""
    return _card(settings.model_dir / name / "config.json") if settings.model_dir else {}


def _card(path: Path) -> dict[str, Any]:
    # An operator's file: what is broken in it must not take the list away.
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
