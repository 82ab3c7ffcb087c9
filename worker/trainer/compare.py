"""Answers of the bare base and of base plus adapter, side by side: `python -m worker.trainer.compare --base DIR …`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def compare(base: Path, adapter: Path, prompts: list[Any], *, max_new_tokens: int = 48) -> list[dict[str, str]]:
    """Return prompt, base and adapter's answer for each prompt, decoded greedily.

    Args:
        prompts: a string (one user turn) or a list of messages each.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from worker.ml.precision import cpu_has_bf16, pick_device
    from worker.ml.tokenizer import ensure_chat_template, load_tokenizer

    device = pick_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" or cpu_has_bf16() else torch.float32
    tokenizer = load_tokenizer(adapter)
    ensure_chat_template(tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, device_map={"": str(device)}, use_safetensors=True, local_files_only=True
    )
    model = PeftModel.from_pretrained(plain, str(adapter)).eval()
    answers = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        with model.disable_adapter():
            before = _answer(model, tokenizer, messages, max_new_tokens)
        after = _answer(model, tokenizer, messages, max_new_tokens)
        answers.append({"prompt": str(messages[-1]["content"]), "base": before, "adapter": after})
    return answers


def _answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(
        **inputs.to(model.device),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    """Read the prompts, a JSON array, and write the answers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "adapter", "prompts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    prompts = json.loads(arguments.prompts.read_text())
    answers = compare(arguments.base, arguments.adapter, prompts, max_new_tokens=arguments.max_new_tokens)
    arguments.out.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
