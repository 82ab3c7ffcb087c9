"""The files of a base model, before any library opens them: plain ones of sane sizes, true JSON, whole weights.

A base may come from a hub, where anybody can publish one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from common.errors import InvalidInput
from worker.data import strict_json

_UNALTERED = "use an unaltered copy of the model"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Readers hold these in memory, several times over. Real ones: 35 MB of tokenizer.json, 20 kB of template.
_MAX_BYTES = {".json": 32 << 20, ".jinja": 1 << 20, ".txt": 64 << 20, ".model": 64 << 20}
_VOCABULARY_BYTES = 128 << 20
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_HEADER_BYTES = 32 << 20
_ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
              "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4}  # fmt: skip


def bad(message: str, hint: str = _UNALTERED) -> InvalidInput:
    """Return the error that a base model cannot be used."""
    return InvalidInput(f"base model: {message[:600]}", code="bad_base_model", param="model", hint=hint)


def check_files(folder: Path) -> None:
    """Raise InvalidInput if a file of `folder` is a link out of it, is no plain file, or is absurdly large."""
    # The hub's cache keeps files as links into `blobs`; operators share files between the folders of one model.
    roots = (folder.resolve(), folder.resolve().parent, folder.resolve().parent.parent / "blobs")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise bad(f"{path.name} is a link that leads out of the folder", "put the file itself there")
        if not path.is_file():
            if not path.is_dir():
                raise bad(f"{path.name} is no plain file", "remove it")
            continue
        most = _VOCABULARY_BYTES if path.name in _VOCABULARIES else _MAX_BYTES.get(path.suffix, math.inf)
        if path.stat().st_size > most:
            raise bad(f"{path.name} is larger than {most:,} bytes")
    if (folder / "adapter_config.json").exists():
        # transformers would load that adapter, and the base that it names, instead of what is asked for.
        raise bad("it has an adapter_config.json: it is an adapter, or has one inside", "name the base model itself")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of the base.

    Raises:
        InvalidInput: it is none, is nested absurdly, or says a key twice; the message names the file.
    """
    try:
        values = strict_json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise bad(f"{path.name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise bad(f"{path.name} is not a JSON object")
    if strict_json.depth(values, 32) > 32:
        raise bad(f"{path.name} is nested deeper than 32 levels")
    return values


def check_weights(folder: Path, *, required: bool) -> None:
    """Raise InvalidInput if the weights are pickles, or not whole; or, if `required`, are not all there."""
    index = folder / "model.safetensors.index.json"
    names = _shards(index) if index.is_file() else ["model.safetensors"]
    if not index.is_file() and not (folder / names[0]).is_file():
        _refuse_pickles(folder)
        if required:
            raise bad("it has no model.safetensors", "add the weights as safetensors")
    for name in names:
        if (folder / name).is_file():
            _check_safetensors(folder / name)
        elif required:
            raise bad(f"the weight file {name} is missing", "fetch the model again")


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise bad(
            f"its weights are pickle files ({', '.join(pickles[:3])}), which can run code when they are opened",
            "convert them to safetensors, or name a revision that has model.safetensors",
        )


def _shards(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise bad(f"{index.name} lists no weights")
    names = sorted({str(value) for value in shards.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise bad(f"{index.name} names {name!r}, which is not a safetensors file beside it")
    return names


def _check_safetensors(path: Path) -> None:
    # Eight bytes of length, a header of JSON, the tensors without gaps.
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_BYTES):
            raise bad(f"{path.name} is not safetensors: its header would be {length:,} bytes of {size:,}")
        head = file.read(length)
    try:
        tensors = json.loads(head)
        del head
        tensors.pop("__metadata__", None)
        stretches = sorted(_stretch(tensor) for tensor in tensors.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise bad(f"{path.name} is not safetensors: its header is broken ({type(error).__name__})") from error
    at = 0
    for start, end in stretches:
        if start != at:
            raise bad(f"{path.name} is not safetensors: its tensors overlap or leave gaps")
        at = end
    if at != size - 8 - length:
        raise bad(f"{path.name} is cut off: {size - 8 - length:,} bytes of tensors where its header says {at:,}")


def _stretch(tensor: dict[str, Any]) -> tuple[int, int]:
    start, end = tensor["data_offsets"]
    shape = tensor["shape"]
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError("a size is no natural number")
    if (end - start) * 8 != math.prod(shape) * _ITEM_BITS[tensor["dtype"]]:
        raise ValueError("a tensor's size does not follow from its shape")
    return start, end
