"""The README of a merged model: what was merged into what, how it is loaded, and how far it is from the adapter."""

from __future__ import annotations

from typing import Any

from common.schemas.jobs import JobSpec

_WHAT = {
    "merged": "The adapter is merged into the base as it is published.",
    "merged_dequantized": "The adapter is merged into the base as 4-bit training saw it, dequantised to 16 bit.",
    "merged_4bit": "The adapter is merged into the base as it is published, and the whole is quantised to 4 bit "
    "(bitsandbytes).",
}


def merged_card(base_id: str, revision: str | None, job: JobSpec, form: str, report: dict[str, Any]) -> str:
    """Return the model card in Markdown, with the metadata that the hub reads. No time and no path in it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(report))
    return f"""---
base_model: {base_id}
base_model_relation: {"quantized" if form == "merged_4bit" else "finetune"}
library_name: transformers
pipeline_tag: text-generation
tags:
- sft
- {job.method}
---

# {job.suffix or "Merged model"} from {base_id}

{_WHAT[form]} Base: {base_id}{f" at {revision}" if revision else ""}. Trained by
[TRL's SFTTrainer](https://huggingface.co/docs/trl) under Tunery.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

How far its logits are from those of base and adapter, computed in fp32 on the same rows, as a share of their size (root
mean square), beside what the adapter changes at all:

| | |
|---|---|
{rows}
"""


def _facts(report: dict[str, Any]) -> list[tuple[str, Any]]:
    facts = [
        (f"from the {name[len('from_') :].replace('_', ' ')}", _shown(value))
        for name, value in report.items()
        if name.startswith("from_")
    ]
    facts.append(("what the adapter changes", _shown(report["adapter_changes"])))
    if "tolerance" in report:
        facts.append(("what the rounding of the weights explains", f"{report['tolerance']:.3g}"))
    return [("weights", report["dtype"]), *facts]


def _shown(gap: dict[str, Any]) -> str:
    return f"{gap['relative']:.3g} (divergence {gap['kl']:.2g} nats, same likeliest token {gap['top1']:.1%})"
