"""`python -m benchmarks.stock classic|trl|unsloth BASE ROWS FIRST LAST TOKENS OUT`: what a user could pick instead.

The same rows of messages, rendered to text, and the same stopwatch. `classic` is the recipe of the tutorials as they
have it: k-bit preparation, checkpointing, paged 8-bit AdamW, 4 x 4 rows of similar length, cut to TOKENS and padded.
The others pack the rows into sequences of TOKENS tokens, one a step. Unsloth lives in an environment of its own; it is
given the fastest attention that it can load, without dropout, which it would pay for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def main(which: str, base: str, rows: Path, first: int, last: int, tokens: int, out: Path) -> None:
    """Train, and write what was measured."""
    loaded = {"classic": _classic, "trl": _trl, "unsloth": _unsloth}[which](base, tokens)
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from benchmarks.stopwatch import Stopwatch

    model, tokenizer, settings = loaded
    set_seed(42)
    texts = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        for line in rows.read_text().splitlines()
    ]
    seen: list[Any] = [0]

    class Counted(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            # A sum stays on the card until a mark is taken: to read it in each pass would make the host wait.
            seen[0] = seen[0] + (inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

    # Unsloth has another default for accumulation.
    packed = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "packing": True,
              "optim": "adamw_torch_fused"}  # fmt: skip
    arguments = SFTConfig(
        output_dir=str(out.with_suffix("")), max_steps=last, max_length=tokens, dataset_text_field="text",
        learning_rate=2e-4, bf16=True, logging_steps=last, save_strategy="no", report_to="none", disable_tqdm=True,
        seed=42, **packed | settings,
    )  # fmt: skip
    watch = Stopwatch(first, last, lambda: int(seen[0]))
    trainer = Counted(model=model, args=arguments, train_dataset=Dataset.from_dict({"text": texts}),
                      processing_class=tokenizer, callbacks=[watch])  # fmt: skip
    trainer.train()
    config = getattr(model, "config", None)
    found = watch.result() | {"exit_code": 0, "attention": getattr(config, "_attn_implementation", None)}
    out.write_text(json.dumps(found | {"versions": _versions(which)}))


def _classic(base: str, tokens: int) -> tuple[Any, Any, dict[str, Any]]:
    from peft import prepare_model_for_kbit_training

    model, tokenizer = _four_bit(base)
    settings = {"gradient_checkpointing": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
                "packing": False, "optim": "paged_adamw_8bit", "train_sampling_strategy": "group_by_length",
                "use_cpu": model.device.type == "cpu"}  # fmt: skip
    return _with_lora(prepare_model_for_kbit_training(model)), tokenizer, settings


def _trl(base: str, tokens: int) -> tuple[Any, Any, dict[str, Any]]:
    model, tokenizer = _four_bit(base)
    model.requires_grad_(False)
    settings = {"gradient_checkpointing": True, "use_cpu": model.device.type == "cpu"}
    return _with_lora(model), tokenizer, settings


def _four_bit(base: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=four_bit,
                                                 device_map={"": device}, attn_implementation="sdpa")  # fmt: skip
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(base)


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, adapter)


def _unsloth(base: str, tokens: int) -> tuple[Any, Any, dict[str, Any]]:
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(base, max_seq_length=tokens, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS, use_gradient_checkpointing="unsloth",
        random_state=42, max_seq_length=tokens,
    )  # fmt: skip
    return model, tokenizer, {}


def _versions(which: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "xformers", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


if __name__ == "__main__":
    name, folder, data, begin, end, width, target = sys.argv[1:]
    main(name, folder, Path(data), int(begin), int(end), int(width), Path(target))
