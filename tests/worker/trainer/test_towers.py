"""Vision-language bases: the text is trained, the tower stays as it was, and stock peft loads the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from common.errors import InvalidInput
from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Go
from tests.worker.trainer.test_check import checked
from worker.ml.base_check import base_check
from worker.ml.base_config import MODEL_TYPES
from worker.trainer import protocol

FAMILIES = [kind for name, kind in MODEL_TYPES.items() if name.endswith("ForConditionalGeneration")]
FLOAT32 = {"bnb_4bit_compute_dtype": "float32"}
TOWERS = ("model.vision_tower.", "model.visual.", "model.multi_modal_projector.")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_text_is_trained_and_the_tower_is_not(go: Go, tmp_path: Path, model_type: str):
    base = tiny.build_vision(tmp_path / model_type, model_type)
    facts = base_check(base)
    assert (facts.context, facts.num_layers) == (256, 2)
    made = go(base=base, quantization=FLOAT32, lora={"target_modules": "all-linear", "lora_dropout": 0.0})
    assert made.code == protocol.DONE, made.messages[-1]
    assert made.run and made.losses[-1] < made.losses[0]
    lines = {line.name: line for line in made.run.held.modules}
    tower = [line for name, line in lines.items() if name.startswith(TOWERS)]
    assert tower and {line.status for line in tower} == {"frozen"}
    text = [line for name, line in lines.items() if name.endswith("_proj.base_layer")]
    assert len(text) == 2 * 7 and {line.status for line in text} == {"quantized"}
    assert set(made.result["precision"]["left_in_16_bit"]) <= {
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    }
    adapted = {name for name in made.weights() if "lora_B" in name}
    assert len(adapted) == 2 * 7 and all(".language_model.layers." in name for name in adapted)
    plain = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, quantization_config=made.run.model.config.quantization_config
    )
    theirs = PeftModel.from_pretrained(plain, made.folder / "out" / "adapter").eval()
    ids = torch.tensor([made.run.train_rows[0]["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(made.run.model.eval()(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=5e-3)


def test_a_list_of_targets_leaves_the_tower_alone(go: Go, tmp_path: Path):
    base = tiny.build_vision(tmp_path / "llava", "llava")
    made = go(base=base, max_steps=1, method="lora", lora={"target_modules": ["q_proj"]})
    assert made.code == protocol.DONE, made.messages[-1]
    # The tower's attention has a q_proj too.
    assert len([name for name in made.weights() if "lora_B" in name]) == 2
    assert checked(tmp_path / "run", base, lora={"target_modules": ["q_proj"]})[0] == protocol.DONE
    assert checked(tmp_path / "run2", base, lora={"target_modules": ["linear_1"]})[0] == protocol.BAD_INPUT


def test_a_full_fine_tune_trains_the_text_alone(go: Go, tmp_path: Path):
    base = tiny.build_vision(tmp_path / "gemma", "gemma3")
    made = go(base=base, method="full", learning_rate=1e-3)
    assert made.code == protocol.DONE, made.messages[-1]
    before, after = (
        load_file(base / "model.safetensors"),
        load_file(made.folder / "out" / "model" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(TOWERS) or "vision_tower" in name for name in changed)
    assert any("embed_tokens" in name for name in changed) and any("q_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("part", "kind"), [("vision_config", "evil"), ("text_config", "gpt2"), ("audio_config", "whisper")]
)
def test_parts_of_an_unknown_kind_are_refused(tmp_path: Path, part: str, kind: str):
    base = tiny.build_vision(tmp_path, "llava")
    config = json.loads((base / "config.json").read_text())
    config[part] = config.get(part, {}) | {"model_type": kind}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=part):
        base_check(base)
