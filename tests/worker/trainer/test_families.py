"""Other architectures than Llama: each trains, and its first loss is the one that its own forward gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go
from worker.ml.base import load_base
from worker.ml.base_check import base_check
from worker.trainer import protocol

PLAIN = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
HEADED = PLAIN | {"head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": {name: value for name, value in PLAIN.items() if "key_value" not in name},
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 128,
    },
    "mistral": HEADED,
    "qwen2": PLAIN,
    "qwen3": HEADED,
    "gemma2": HEADED,
    "gemma3_text": HEADED,
    "phi3": PLAIN,
    "olmo2": PLAIN,
    "granite": PLAIN | {"logits_scaling": 4.0},
    "cohere": PLAIN | {"logit_scale": 0.25},
    "smollm3": PLAIN,
}


def own_loss(made: Attempt, base: Path) -> float:
    """Return the loss per trained token of the bare quantised base over the rows of a run."""
    assert made.run
    loaded = load_base(base, made.run.job, base_check(base), made.run.precision, torch.device("cpu"))
    losses = []
    with torch.no_grad():
        for row in made.run.train_rows:
            logits = loaded.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            losses.append(cross_entropy(logits.float(), torch.tensor(row["labels"][1:]), reduction="none"))
    flat = torch.cat(losses)
    return float(flat.sum() / (flat != 0).sum())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_trains(go: Go, tmp_path: Path, model_type: str):
    base = tiny.build_family(tmp_path / model_type, model_type, **FAMILIES[model_type])
    made = go(
        base=base,
        max_steps=2,
        per_device_train_batch_size=12,
        gradient_accumulation_steps=1,
        quantization={"bnb_4bit_compute_dtype": "float32"},
        lora={"target_modules": "all-linear", "lora_dropout": 0.0},
    )
    assert made.code == protocol.DONE, made.messages[-1]
    assert made.losses[0] == pytest.approx(own_loss(made, base), abs=1e-3)
    assert made.losses[1] < made.losses[0]
    assert made.result["precision"]["parameters"]["nf4"] > 50_000


@pytest.mark.parametrize("model_type", ["falcon", "opt"])
def test_packing_is_refused_where_rows_would_see_each_other(go: Go, tmp_path: Path, model_type: str):
    shapes: dict[str, dict[str, Any]] = {
        "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "opt": {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    }
    base = tiny.build_family(tmp_path / model_type, model_type, **shapes[model_type])
    made = go(base=base, packing=True, max_length=64, lora={"target_modules": "all-linear"})
    assert made.code == protocol.BAD_INPUT and made.failure.param == "hyperparameters.packing"
    plain = go(base=base, max_length=64, lora={"target_modules": "all-linear"})
    assert plain.code == protocol.DONE


def test_a_base_that_is_stored_in_4_bit_is_taken_as_it_is(go: Go, base: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    stored = tmp_path / "stored"
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16).save_pretrained(stored)
    AutoTokenizer.from_pretrained(base).save_pretrained(stored)
    made = go(base=stored)
    assert made.code == protocol.DONE and "fp4" in made.result["precision"]["parameters"]
    refused = go(base=stored, method="lora")
    assert refused.code == protocol.BAD_INPUT and refused.failure.param == "method"
