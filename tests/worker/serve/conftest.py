"""A tiny base and adapters of every kind over it, with random weights: what they say is nonsense, and differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.context import Context
from tests.processes import wait_until
from tests.servers import S3
from tests.worker.serve.server import Server, installation, publish_job, serving
from tests.worker.trainer.tiny import build_base

Folder = Callable[[str], Path]
KINDS: dict[str, dict[str, Any]] = {
    "a": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 4, "target_modules": "all-linear"},
    "rslora": {"r": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "expression": {"r": 4, "target_modules": r".*layers\.0\..*\.(q|o)_proj"},
    "dora": {"r": 4, "target_modules": ["q_proj"], "use_dora": True},
    "head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model folder with a ChatML template, in 32 bit, so that equal sums are equal numbers."""
    folder = build_base(tmp_path_factory.mktemp("serve-base"))
    load(folder).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(folder: Path, base: Path, seed: int, **config: Any) -> Path:
    """Write an adapter with random weights for the base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.randn(parameter.shape) * 0.2
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of an adapter of a kind, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_adapter(
                tmp_path_factory.mktemp("adapters") / kind, base, list(KINDS).index(kind), **KINDS[kind]
            )
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory, s3: S3, valkey_url: str) -> Iterator[Context]:
    """An installation."""
    made = installation(tmp_path_factory.mktemp("installation"), s3, valkey_url)
    yield made
    made.close()


@pytest.fixture(scope="session")
def jobs(context: Context, adapters: Folder) -> dict[str, str]:
    """Finished jobs of the tenant `t` by the kind of their adapter, and one of the tenant `other`."""
    made = {kind: publish_job(context, "t", adapters(kind)) for kind in ("a", "b", "rslora", "dora")}
    return made | {"other": publish_job(context, "other", adapters("a"))}


@pytest.fixture(scope="session")
def server(context: Context, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that holds two adapters at most."""
    with serving(context, base, tmp_path_factory.mktemp("serve") / "work", serve_max_adapters=2) as made:
        wait_until(lambda: made.process.ready is not None, 120, "the model")
        yield made


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
