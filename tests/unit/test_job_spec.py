"""What a job may ask for: options that cannot work together are refused before anything is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.schemas.jobs import JobSpec


def spec(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "m", "dataset": "dataset:1", **fields})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "orthogonal"])
def test_a_4_bit_base_is_not_taken_apart(init: str):
    with pytest.raises(ValidationError, match="needs a 16-bit base"):
        spec(lora={"init_lora_weights": init})
    assert spec(method="lora", lora={"init_lora_weights": init}).lora.init_lora_weights == init


@pytest.mark.parametrize("init", ["eva", "loftq", "pissa_niter_0", "pissa_niter_x", 1])
def test_a_beginning_that_needs_more_than_the_weights_is_refused(init: Any):
    with pytest.raises(ValidationError, match=r"lora\.init_lora_weights"):
        spec(method="lora", lora={"init_lora_weights": init})


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"init_lora_weights": "pissa", "use_dora": True}, "use one of them"),
        ({"init_lora_weights": "orthogonal", "r": 7}, "even r"),
        ({"modules_to_save": []}, "at least 1"),
    ],
)
def test_options_of_an_adapter_that_exclude_each_other(lora: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=reason):
        spec(method="lora", lora=lora)


def test_each_method_has_its_parts():
    plain, sixteen, full = spec(), spec(method="lora"), spec(method="full")
    assert plain.lora and plain.quantization and plain.export == ["adapter"]
    assert sixteen.lora and sixteen.quantization is None
    assert full.lora is None and full.quantization is None and full.export == ["model"]
    assert (plain.hyperparameters.learning_rate, full.hyperparameters.learning_rate) == (2e-4, 2e-5)
    assert spec(method="full", hyperparameters={"learning_rate": 1e-3}).hyperparameters.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"method": "full", "lora": {}}, 'lora: method "full" has no adapter'),
        ({"method": "full", "quantization": {}}, "quantization.load_in_4bit"),
        ({"method": "full", "export": ["adapter"]}, "export: method"),
        ({"export": ["model"]}, "export: method"),
        ({"method": "lora", "quantization": {}}, "quantization.load_in_4bit"),
        ({"quantization": {"load_in_4bit": False}}, "quantization.load_in_4bit"),
        ({"lora": {"use_dora": True}, "quantization": {"device_map": "auto"}}, "lora.use_dora"),
        ({"method": "lora", "quantization": {"load_in_4bit": False, "device_map": "auto"}}, "base in 4 bit"),
        ({"method": "lora", "quantization": {"load_in_4bit": False, "prepare_kbit_training": True}}, "base in 4 bit"),
    ],
)
def test_parts_that_a_method_does_not_have_are_refused(fields: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=reason):
        spec(**fields)


def test_the_guide_shows_the_whole_body_with_its_defaults():
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    shown = json.loads(guide.partition("This is the whole body")[2].partition("```json\n")[2].partition("```")[0])
    given = {name: shown[name] for name in ("model", "dataset", "suffix")}
    assert shown == JobSpec.model_validate(given).model_dump(mode="json")
