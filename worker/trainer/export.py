"""Last stage: the adapter as stock peft loads it anywhere, and the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from worker.ml.adapters import save_adapter
from worker.ml.model_card import model_card
from worker.trainer.run import Run


def export(run: Run) -> None:
    """Write `out/adapter` and `out/reports`. The same run writes the same bytes: no id, no time, no path."""
    adapter = run.out / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    save_adapter(run.model, adapter, run.initial)
    _name_base(adapter / "adapter_config.json", run)
    run.tokenizer.save_pretrained(adapter)
    _forget_paths(adapter / "tokenizer_config.json")
    (adapter / "README.md").write_text(model_card(run.spec.base.id, run.spec.base.revision, run.job, run.report))
    reports = run.out / "reports"
    reports.mkdir(exist_ok=True)
    _write(reports / "metrics.json", run.metrics)
    _write(reports / "precision.json", run.report["precision"])
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
