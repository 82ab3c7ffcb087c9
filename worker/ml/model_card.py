"""The README of an adapter: what it is, how it was trained, how it is loaded."""

from __future__ import annotations

from typing import Any

from common.schemas.jobs import JobSpec


def model_card(base_id: str, revision: str | None, job: JobSpec, report: dict[str, Any]) -> str:
    """Return the model card in Markdown, with the metadata that the hub reads. No time and no path in it."""
    pinned = f', revision="{revision}"' if revision else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(job, report))
    return f"""---
base_model: {base_id}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- sft
- {job.method}
---

# {job.suffix or "Adapter"} for {base_id}

A LoRA adapter, trained by [TRL's SFTTrainer](https://huggingface.co/docs/trl) under Tunery.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base_id}"{pinned}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

| | |
|---|---|
| base model | {base_id}{f" at {revision}" if revision else ""} |
{rows}

The file `manifest.json` beside this folder has the hashes and the full specification of the run.
"""


def _facts(job: JobSpec, report: dict[str, Any]) -> list[tuple[str, Any]]:
    data, lora = report["data"], job.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    facts = [
        ("method", job.method),
        ("rank, alpha, dropout", f"{lora.r}, {lora.lora_alpha:g}, {lora.lora_dropout:g}"),
        ("target modules", f"`{targets}`"),
        ("trained parameters", f"{report['trainable_parameters']:,}"),
        ("rows, tokens", f"{data['rows']:,}, {data['tokens']:,}"),
        ("steps", f"{report['steps']:,}"),
        ("seed", job.seed),
        ("last training loss", f"{report['final_loss']:.4f}" if report["final_loss"] is not None else "unknown"),
    ]
    if "eval_loss" in report:
        facts.append(("validation loss", f"{report['eval_loss']:.4f}"))
    return facts
