"""The preflight child: every row is read, every bad one is named, and no torch is needed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import JOB, Go
from worker.trainer import protocol
from worker.trainer.check import answer
from worker.trainer.protocol import Failed, Message, Result


def checked(folder: Path, base: Path, rows: list[Any] | None = None, **options: Any) -> tuple[int, Result | Failed]:
    """Lay out a job, check it in this process, and return exit code and last message."""
    layout = {name: options.pop(name) for name in (*JOB, "validation") if name in options}
    tiny.write_run(folder, base, rows, hyperparameters=options, **layout)
    said: list[Message] = []
    code = answer(folder, said.append)
    assert isinstance(said[-1], Result | Failed)
    return code, said[-1]


def test_the_report_counts_what_training_will_see(tmp_path: Path, base: Path, go: Go):
    options: dict[str, Any] = {"max_length": 24, "max_steps": -1, "validation": tiny.chat_rows(3)}
    code, result = checked(tmp_path, base, **dict(options))
    assert code == protocol.DONE and isinstance(result, Result)
    report, trained = result.report, go(**options).result
    assert {name: report[name] for name in trained["data"]} == trained["data"]
    assert report["validation"] == trained["validation_data"]
    assert report["steps"] == trained["steps"] == 3
    assert report["train_tokens"] == trained["tokens_trained"]
    assert report["rows"] + report["rows_dropped"] == 12 and 0 < report["cut_share"] < 1
    assert sum(report["length_histogram"].values()) == report["rows"]
    assert report["loss"] == {"assistant": report["rows"]} and report["context"] == 256


def test_every_bad_row_is_listed(tmp_path: Path, base: Path):
    good = tiny.chat_rows(1)[0]
    rows = [good, {"messages": [{"role": "wizard", "content": "a"}]}, good, *({"messages": []} for _ in range(25))]
    code, failed = checked(tmp_path, base, rows)
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed)
    lines = failed.message.splitlines()
    assert lines[0].startswith("dataset: row 2: messages[0] role 'wizard'") and len(lines) == 21
    assert lines[-1] == "… and 6 more bad rows" and failed.param == "dataset" and failed.hint


def test_every_bad_row_is_told_to_programs_too(tmp_path: Path, base: Path):
    good = tiny.chat_rows(1)[0]
    rows = [good, {"messages": [{"role": "wizard", "content": "a"}]}, *({"messages": []} for _ in range(150))]
    code, failed = checked(tmp_path, base, rows, validation=[good, {"messages": 1}])
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed)
    assert failed.num_problems == 152 and len(failed.problems) == 100
    first = {name: failed.problems[0][name] for name in ("param", "row", "field", "code")}
    assert first == {"param": "dataset", "row": 2, "field": "messages[0]", "code": "bad_role"}
    assert failed.problems[99]["row"] == 101 and failed.message.endswith("… and 132 more bad rows")


def test_bad_rows_of_both_files_are_told_together(tmp_path: Path, base: Path):
    good = tiny.chat_rows(1)[0]
    code, failed = checked(tmp_path, base, [good, {"messages": []}], validation=[good, good, {"messages": 1}])
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed) and failed.num_problems == 2
    found = [(each["param"], each["row"], each["code"]) for each in failed.problems]
    assert found == [("dataset", 2, "empty"), ("validation_dataset", 3, "wrong_type")]
    assert "validation_dataset: row 3: messages is a number" in failed.message


def test_a_bad_row_of_the_validation_file_is_named_as_such(tmp_path: Path, base: Path):
    code, failed = checked(tmp_path, base, validation=[{"messages": []}])
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed)
    assert failed.param == "validation_dataset" and failed.message.startswith("validation_dataset: row 1")


@pytest.mark.parametrize(
    ("options", "code"), [({"max_length": 512}, "max_length_beyond_context"), ({"max_length": 9}, "nothing_to_train")]
)
def test_lengths_that_cannot_be_trained(tmp_path: Path, base: Path, options: dict[str, Any], code: str):
    ended, failed = checked(tmp_path, base, **options)
    assert ended == protocol.BAD_INPUT and isinstance(failed, Failed) and failed.code == code


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "cannot be run: TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "cannot be run: SecurityError"),
        ("{% for i in range(9 ** 9) %}{% endfor %}", "cannot be run: OverflowError"),
        ("{{ 'a' * 2000000 }}", "makes 2,000,000 characters of two short turns"),
    ],
)
def test_a_chat_template_of_the_request_is_tried_out(tmp_path: Path, base: Path, template: str, words: str):
    code, failed = checked(tmp_path, base, chat_template=template)
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed)
    assert words in failed.message and failed.param == "chat_template" and failed.hint


def test_a_loss_that_the_rows_cannot_have_is_refused_by_row(tmp_path: Path, base: Path):
    code, failed = checked(tmp_path, base, [{"text": "the fox"}, {"text": "a sea"}], loss="assistant")
    assert code == protocol.BAD_INPUT and isinstance(failed, Failed)
    assert failed.message.startswith("dataset: row 1: is one text") and "row 2" in failed.message


def test_limits_come_with_the_spec(tmp_path: Path, base: Path):
    tiny.write_run(tmp_path, base)
    spec = json.loads((tmp_path / "spec.json").read_text()) | {"limits": {"max_rows": 5}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    said: list[Message] = []
    assert answer(tmp_path, said.append) == protocol.BAD_INPUT
    assert isinstance(said[-1], Failed) and "more than 5 rows" in said[-1].message


def test_the_child_runs_without_torch(tmp_path: Path, base: Path):
    tiny.write_run(tmp_path, base)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "worker.trainer.check", str(tmp_path)],
        capture_output=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)),
    )
    assert done.returncode == protocol.DONE, done.stderr[-2000:]
    said = [protocol.decode(line) for line in done.stdout.splitlines()]
    assert isinstance(said[-1], Result) and said[-1].report["rows"] == 12
    assert b"torch._C" not in done.stderr and b"| transformers" in done.stderr
