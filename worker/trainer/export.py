"""Last stage: what was trained, as the stock libraries load it; the merged models that were asked for; the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel

from worker.ml.adapters import save_adapter
from worker.ml.model_card import model_card
from worker.ml.servable import read_adapter, servable
from worker.ml.whole import save_model, stored_dtype
from worker.trainer.merging import merge_after_training, merge_later
from worker.trainer.results import write_results
from worker.trainer.run import Run
from worker.trainer.sampling import sample_report


def export(run: Run) -> None:
    """Write what was trained, merged models and reports into `out`: the same bytes for the same run, no path."""
    _write_trained(run)
    reports = run.out / "reports"
    reports.mkdir(exist_ok=True)
    if isinstance(run.model, PeftModel):
        run.report["servable"] = _servable(run)
        _write(reports / "servable.json", run.report["servable"])
    merge_after_training(run)
    _write(reports / "metrics.json", run.metrics)
    write_results(reports / "metrics.csv", run.metrics)
    if run.samples:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in sample_report(run))
        (reports / "samples.jsonl").write_text("".join(lines))
    _write(reports / "precision.json", run.held.model_dump(by_alias=True))
    _write(reports / "report.json", run.report)


def export_later(run: Run) -> None:
    """Write merged models of an adapter that is published already, and `out/reports`."""
    merge_later(run)
    reports = run.out / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    _write(reports / "report.json", run.report)


def _write_trained(run: Run) -> None:
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


def _servable(run: Run) -> dict[str, Any]:
    config = json.loads((run.out / "adapter" / "adapter_config.json").read_text())
    base = json.loads((run.base_folder / "config.json").read_text())
    adapter = read_adapter(
        config,
        base["architectures"][0],
        vocabulary_grown="vocabulary_grown" in run.report,
        tied=run.model.config.tie_word_embeddings,
    )
    return servable(adapter)


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
