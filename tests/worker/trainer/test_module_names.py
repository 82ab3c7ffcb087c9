"""The table of module names is what the library's own classes have, and the preflight finds wrong names in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.worker.trainer import tiny
from tests.worker.trainer.test_check import checked
from worker.ml.adapters import modules_of
from worker.ml.base_check import base_check
from worker.ml.base_config import MODEL_TYPES
from worker.ml.module_names import known_modules, measure
from worker.trainer import protocol
from worker.trainer.protocol import Failed

TABLE = json.loads((Path(known_modules.__code__.co_filename).with_suffix(".json")).read_text())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_table_is_what_the_library_has():
    assert set(TABLE) == set(MODEL_TYPES), "run python -m worker.ml.module_names"
    for architecture in MODEL_TYPES:
        assert measure(architecture) == TABLE[architecture], "run python -m worker.ml.module_names"


def test_every_module_of_a_base_is_known(base: Path):
    facts = base_check(base)
    known, real = (
        known_modules(facts.architecture, facts.num_layers),
        modules_of(AutoModelForCausalLM.from_pretrained(base)),
    )
    assert set(known.names) == set(real.names) and set(known.linear) == set(real.linear) and known.head == real.head
    assert set(known.embeddings) == set(real.embeddings) == {"model.embed_tokens"}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target_modules": ["q_proj", "wqkv"]}, "nothing for these: 'wqkv'"),
    "pattern": ({"target_modules": r".*layers\.7\..*"}, "no module"),
    "head": ({"target_modules": ["lm_head"]}, "cannot carry an adapter"),
    "whole": ({"modules_to_save": ["wte"]}, "no module: 'wte'"),
    "kind": ({"target_modules": ".*self_attn"}, "'model.layers.0.self_attn' is neither a linear layer"),
    "in_4_bit": ({"modules_to_save": ["model.layers.1.mlp"]}, "held in 4 bit"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_preflight_refuses_what_is_not_there(tmp_path: Path, base: Path, name: str):
    lora, message = WRONG[name]
    code, failed = checked(tmp_path, base, lora=lora)
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed) and message in failed.message


def test_the_preflight_lists_the_layers_of_another_family(tmp_path: Path):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    base = tiny.build_family(tmp_path / "phi3", "phi3", **shape)
    code, failed = checked(tmp_path / "run", base)
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed)
    assert "nothing for these: 'q_proj', 'k_proj', 'v_proj'" in failed.message
    assert "qkv_proj (3 times)" in (failed.hint or "")


def test_the_preflight_takes_what_is_there(tmp_path: Path, base: Path):
    lora = {"target_modules": r".*layers\.1\..*_proj", "modules_to_save": ["lm_head", "norm"]}
    assert checked(tmp_path, base, lora=lora)[0] == protocol.DONE


def test_the_preflight_knows_how_many_parts_a_weight_has(tmp_path: Path, base: Path):
    asked = {"method": "lora", "lora": {"init_lora_weights": "pissa", "r": 33}}
    code, failed = checked(tmp_path, base, **asked)
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed) and failed.param == "lora.r"
