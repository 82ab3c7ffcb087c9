"""The README of an adapter or a model: what it is, how it was trained, how it is loaded."""

from __future__ import annotations

from typing import Any

from common.schemas.jobs import JobSpec
from common.schemas.lora import Lora

_USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base_id}"{pinned}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")"""
_USE_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")"""


def model_card(base_id: str, revision: str | None, job: JobSpec, report: dict[str, Any]) -> str:
    """Return the model card in Markdown, with the metadata that the hub reads. No time and no path in it."""
    pinned = f', revision="{revision}"' if revision else ""
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(job, report))
    has_adapter = job.lora is not None
    what, library = ("A LoRA adapter", "peft") if has_adapter else ("Every weight", "transformers")
    use = (_USE_ADAPTER if has_adapter else _USE_MODEL).format(base_id=base_id, pinned=pinned)
    if rows := report.get("vocabulary_rows"):
        use = use.replace(
            "\nmodel = PeftModel", f"\nbase.resize_token_embeddings({rows})  # tokens that it lacks\nmodel = PeftModel"
        )
    return f"""---
base_model: {base_id}
library_name: {library}
pipeline_tag: text-generation
tags:
- {"lora" if has_adapter else "full"}
- sft
- {job.method}
---

# {job.suffix or ("Adapter" if has_adapter else "Fine-tune")} for {base_id}

{what}, trained by [TRL's SFTTrainer](https://huggingface.co/docs/trl) under Tunery.

```python
{use}
```

| | |
|---|---|
| base model | {base_id}{f" at {revision}" if revision else ""} |
{facts}

The file `manifest.json` beside this folder has the hashes and the full specification of the run.
"""


def _facts(job: JobSpec, report: dict[str, Any]) -> list[tuple[str, Any]]:
    data = report["data"]
    facts = [
        ("method", job.method),
        *_adapter_facts(job.lora),
        ("trained parameters", f"{report['trainable_parameters']:,}"),
        ("rows, tokens", f"{data['rows']:,}, {data['tokens']:,}"),
        ("steps", f"{report['steps']:,}"),
        ("seed", job.seed),
        ("last training loss", f"{report['final_loss']:.4f}" if report["final_loss"] is not None else "unknown"),
    ]
    if "eval_loss" in report:
        facts.append(("validation loss", f"{report['eval_loss']:.4f}"))
    return facts


def _adapter_facts(lora: Lora | None) -> list[tuple[str, Any]]:
    if lora is None:
        return []
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    return [
        ("rank, alpha, dropout", f"{lora.r}, {lora.lora_alpha:g}, {lora.lora_dropout:g}"),
        ("target modules", f"`{targets}`"),
    ]
