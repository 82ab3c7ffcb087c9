"""Last stage: the adapter as stock peft loads it anywhere, or the model as stock transformers does, and the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel

from worker.ml.adapters import save_adapter
from worker.ml.model_card import model_card
from worker.ml.whole import save_model, stored_dtype
from worker.trainer.run import Run


def export(run: Run) -> None:
    """Write what was trained and `out/reports`. The same run writes the same bytes: no id, no time, no path."""
    folder = run.out / ("adapter" if isinstance(run.model, PeftModel) else "model")
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(run.model, PeftModel):
        save_adapter(run.model, folder, run.initial)
        _name_base(folder / "adapter_config.json", run)
    else:
        save_model(run.model, folder, stored_dtype(run.base_folder))
    run.tokenizer.save_pretrained(folder)
    _forget_paths(folder / "tokenizer_config.json")
    (folder / "README.md").write_text(model_card(run.spec.base.id, run.spec.base.revision, run.job, run.report))
    reports = run.out / "reports"
    reports.mkdir(exist_ok=True)
    _write(reports / "metrics.json", run.metrics)
    _write(reports / "precision.json", run.held.model_dump(by_alias=True))
    _write(reports / "report.json", run.report)


def _name_base(path: Path, run: Run) -> None:
    # The public id, never the folder of this worker; lists in order, because peft writes sets.
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": run.spec.base.id, "revision": run.spec.base.revision}
    _write(path, {name: sorted(value) if _is_words(value) else value for name, value in sorted(config.items())})


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _forget_paths(path: Path) -> None:
    config = json.loads(path.read_text())
    for name in ("name_or_path", "local_files_only", "is_local", "trust_remote_code"):
        config.pop(name, None)
    _write(path, config)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
