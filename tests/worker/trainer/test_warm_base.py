"""A job over a base that was in memory already gives the bytes of the same job in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, attempt
from tests.worker.trainer.test_budget import OPEN
from tests.worker.trainer.test_child import Child
from tests.worker.trainer.test_vocabulary import NEW, altered
from worker.ml import budget, memory
from worker.ml.memory import peak_bytes, reset_peak
from worker.ml.shell import fingerprint, shell_of
from worker.trainer import lifeline, protocol
from worker.trainer.holding import Holder
from worker.trainer.lifeline import Wishes
from worker.trainer.protocol import Idle, Progress, Result, TrainSpec

WORDS = [{"prompt": f"{NEW[0]}boats", "completion": f"sea{NEW[1]}"}] * 4
REFERENCE: dict[str, Any] = {
    "lora": {"r": 4, "lora_dropout": 0.3, "bias": "lora_only"},
    "validation": tiny.chat_rows(3),
    "hyperparameters": {"eval_steps": 2, "gradient_checkpointing": True},
}
ONE: dict[str, Any] = {"max_steps": 1}
# What each leaves behind in a base that is handed on as it is: adapters, whole modules, hooks, patches, registries.
OTHERS: dict[str, dict[str, Any]] = {
    "rslora": {"lora": {"r": 8, "use_rslora": True, "target_modules": "all-linear", "lora_dropout": 0.0}},
    "biases": {"lora": {"bias": "all"}},
    "whole_modules": {"lora": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}},
    "dora": {"lora": {"use_dora": True}},
    "embedding": {"lora": {"target_modules": ["embed_tokens", "v_proj"]}},
    "template": {"chat_template": "chatml", "seed": 7},
    "packed": {"hyperparameters": {"packing": True, "max_length": 32, "neftune_noise_alpha": 5.0}},
    "eight_bit": {"hyperparameters": {"optim": "adamw_8bit"}, "lora": {"r": 64, "modules_to_save": ["embed_tokens"]}},
    "vocabulary": {"rows": WORDS},
    "samples": {"sample_prompts": ["the quick"], "hyperparameters": {"gradient_checkpointing": True}},
}
CHANGES_BASE: dict[str, dict[str, Any]] = {
    "pissa": {"lora": {"init_lora_weights": "pissa", "bias": "all"}},
    "olora": {"lora": {"init_lora_weights": "olora"}},
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with biases, whose tokenizer has tokens beyond its embedding."""
    folder = tiny.build_base(tmp_path_factory.mktemp("biased"), attention_bias=True, mlp_bias=True)
    return altered(folder, folder, added=NEW)


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """A slate puts back what it found when its holder began; nothing of that may reach other tests."""
    kept = warnings.filters[:]
    yield
    warnings.filters[:] = kept  # type: ignore[index]


def lay_out(folder: Path, base: Path, *, keep: bool = True, **options: Any) -> Path:
    folder.mkdir()
    rows, hyperparameters = options.pop("rows", None), options.pop("hyperparameters", {})
    spec = tiny.write_run(folder, base, rows, hyperparameters=hyperparameters, **options)
    replace(spec, keep=keep).write(folder)
    return folder


def results(made: Attempt) -> tuple[bytes, Any, Any]:
    reports = made.folder / "out" / "reports"
    return made.adapter_bytes(), made.metrics(), json.loads((reports / "metrics.json").read_text())


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_job_after_all_kinds_of_jobs_equals_the_same_job_alone(tmp_path: Path, biased: Path, method: str):
    reference = REFERENCE | {"method": method}
    alone = attempt(lay_out(tmp_path / "alone", biased, keep=False, **reference))
    holder = Holder()
    others = OTHERS | (CHANGES_BASE if method == "lora" else {})
    for count, (name, options) in enumerate(others.items()):
        changed = options | {"hyperparameters": ONE | options.get("hyperparameters", {}), "method": method}
        made = attempt(lay_out(tmp_path / name, biased, **changed), holder=holder)
        assert made.result["base_load"]["from"] == ("memory" if count else "files")
        made.run = None
        assert holder.tidy(), name
    after = attempt(lay_out(tmp_path / "after", biased, **reference), holder=holder)
    assert after.result["base_load"]["from"] == "memory" and results(after) == results(alone)
    assert {note.name for note in after.messages if hasattr(note, "name")} == {
        note.name for note in alone.messages if hasattr(note, "name")
    }


def test_a_resumed_job_on_a_warm_base_is_the_same(tmp_path: Path, base: Path):
    options: dict[str, Any] = {"hyperparameters": {"max_steps": 4, "save_steps": 2}, "lora": {"lora_dropout": 0.3}}
    holder = Holder()
    whole = attempt(lay_out(tmp_path / "whole", base, **options), holder=holder)
    whole.run = None
    assert holder.tidy()
    folder = lay_out(tmp_path / "resumed", base, resume_from="resume", **options)
    shutil.copytree(whole.folder / "checkpoints" / "step-00000002", folder / "resume")
    again = attempt(folder, holder=holder)
    assert again.result["base_load"]["from"] == "memory" and again.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.parametrize("change", ["quantization", "files", "revision"])
def test_another_base_is_loaded_anew(tmp_path: Path, change: str):
    base = tiny.build_base(tmp_path / "base")
    holder = Holder()
    attempt(lay_out(tmp_path / "first", base), holder=holder)
    assert holder.tidy()
    options: dict[str, Any] = {}
    if change == "quantization":
        options["quantization"] = {"bnb_4bit_use_double_quant": False}
    elif change == "files":
        shutil.rmtree(base)
        tiny.build_base(base, seed=5)
    folder = lay_out(tmp_path / "second", base, **options)
    if change == "revision":
        spec = TrainSpec.read(folder)
        replace(spec, base=replace(spec.base, revision="fedcba9")).write(folder)
    alone = attempt(lay_out(tmp_path / "alone", base, keep=False, **options))
    made = attempt(folder, holder=holder)
    assert made.result["base_load"]["from"] == "files" and made.adapter_bytes() == alone.adapter_bytes()


def test_what_was_never_to_be_kept_is_not(tmp_path: Path, base: Path):
    for name, options in {"full": {"method": "full", "lora": None, "quantization": None}, "unasked": {}}.items():
        holder = Holder()
        made = attempt(lay_out(tmp_path / name, base, keep=name == "full", **options), holder=holder)
        assert made.code == protocol.DONE and not holder.tidy()


def test_a_process_whose_base_was_altered_leaves(tmp_path: Path, base: Path):
    holder = Holder()
    made = attempt(lay_out(tmp_path / "run", base), holder=holder)
    assert made.run and holder.tidy()
    weight = made.run.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight
    weight.data[0] ^= 1
    assert not holder.tidy()


def test_a_shell_shares_the_weights_and_nothing_else(tmp_path: Path, base: Path):
    made = attempt(lay_out(tmp_path / "run", base, keep=False))
    assert made.run
    model = made.run.model.base_model.model
    before, shell = fingerprint(model), shell_of(model)
    pairs = list(zip(model.parameters(), shell.parameters(), strict=True))
    assert all(one is not other and one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert shell.config is not model.config and shell.lm_head.weight is not model.lm_head.weight
    shell.lm_head.requires_grad_(True)
    shell.lm_head.weight.data = torch.zeros_like(shell.lm_head.weight)
    assert (fingerprint(model) == before).all() and not model.lm_head.weight.requires_grad


def test_what_a_run_changes_of_the_process_is_put_back(tmp_path: Path, base: Path):
    holder = Holder()
    made = attempt(lay_out(tmp_path / "run", base), holder=holder)
    assert made.code == protocol.DONE
    folder, threads = Path.cwd(), torch.get_num_threads()
    assert holder.tidy()
    rng = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads + 1)
    torch.manual_seed(1), random.seed(1)
    warnings.simplefilter("ignore")
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir(tmp_path)
    assert holder.tidy()
    assert torch.get_default_dtype() == torch.float32 and not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads and Path.cwd() == folder and "LEFT_BEHIND" not in os.environ
    assert torch.equal(torch.get_rng_state(), rng)
    assert ("ignore", None, Warning, None, 0) not in warnings.filters


def test_wishes_for_one_run_never_reach_the_next(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(lifeline, "time", SimpleNamespace(monotonic=lambda: now))
    wishes = Wishes("job-a1")
    soon = {"do": "deadline", "monotonic": 1010.0}
    wishes.obey(soon | {"run": "another-a1"})
    wishes.obey({"do": "stop", "run": "another-a1"})
    now = 2000.0
    assert wishes.reason() is None and not wishes.overdue()
    now = 1000.0
    wishes.obey(soon | {"run": "job-a1"})
    now = 2000.0
    assert wishes.reason() and wishes.overdue()
    wishes.rest()
    for late in (soon, soon | {"run": "job-a1"}, {"do": "stop"}, {"do": "stop", "run": "job-a1"}):
        wishes.obey(late)
    assert wishes.reason() is None and not wishes.overdue()
    wishes.obey({"do": "run", "folder": "/work/next-a2", "monotonic": 2010.0})
    assert wishes.next_run() == Path("/work/next-a2")
    wishes.obey({"do": "deadline", "monotonic": 9000.0, "run": "job-a1"})
    assert wishes.reason() is None and not wishes.overdue()
    now = 3000.0
    assert wishes.reason() and wishes.overdue(), "a run begins with its own deadline"


def run_on(child: Child, folder: Path) -> Result:
    """Hand the child another run and return its result."""
    child.say(do="run", folder=str(folder), monotonic=time.monotonic() + 600)
    return until_idle(child)


def until_idle(child: Child) -> Result:
    result: Result | None = None
    for message in child.messages():
        if isinstance(message, Result):
            result = message
        if isinstance(message, Idle):
            assert result
            return result
    raise AssertionError((child.folder / "log").read_text()[-2000:])


def test_fifty_jobs_in_one_process(tmp_path: Path, base: Path):
    kinds: list[dict[str, Any]] = [
        {"lora": {"r": 8, "target_modules": "all-linear"}, "hyperparameters": ONE},
        {"lora": {"modules_to_save": ["embed_tokens"]}, "hyperparameters": ONE | {"optim": "adamw_8bit"}},
    ]
    alone = attempt(lay_out(tmp_path / "alone", base, keep=False, **REFERENCE))
    child = Child(lay_out(tmp_path / "first", base, hyperparameters=ONE))
    process, resident = psutil.Process(child.process.pid), []
    until_idle(child)
    for count in range(50):
        folder = lay_out(tmp_path / f"run{count}", base, **kinds[count % 2])
        assert run_on(child, folder).report["base_load"]["from"] == "memory"
        shutil.rmtree(folder)
        resident.append(process.memory_info().rss)
    # From where every kind of job has been met.
    assert resident[-1] - resident[9] < 24 * 2**20, resident
    assert not [file.path for file in process.open_files() if "deleted" in file.path or "run" in Path(file.path).parts]
    last = lay_out(tmp_path / "last", base, **REFERENCE)
    assert run_on(child, last).report["base_load"]["from"] == "memory"
    assert (last / "out/adapter/adapter_model.safetensors").read_bytes() == alone.adapter_bytes()
    assert json.loads((last / "out/reports/metrics.json").read_text()) == alone.run.metrics
    child.process.kill()
    child.end()


def test_a_child_that_waits_goes_with_its_supervisor_and_a_bad_run_ends_it(tmp_path: Path, base: Path):
    child = Child(lay_out(tmp_path / "first", base, hyperparameters=ONE))
    until_idle(child)
    child.say(do="run", folder=str(lay_out(tmp_path / "bad", base, hyperparameters={"max_steps": 0})))
    assert child.end() == protocol.BAD_INPUT


def test_a_deadline_ends_the_run_that_it_was_meant_for(tmp_path: Path, base: Path):
    child = Child(lay_out(tmp_path / "first", base, hyperparameters=ONE))
    child.say(do="deadline", monotonic=time.monotonic() + 60, run="first")
    until_idle(child)
    long = lay_out(tmp_path / "long", base, hyperparameters={"max_steps": 100_000, "save_steps": 100_000})
    child.say(do="run", folder=str(long), monotonic=time.monotonic() + 60)
    child.say(do="deadline", monotonic=time.monotonic() - 60, run="first")
    child.until(Progress, 3)
    child.say(do="deadline", monotonic=time.monotonic(), run="long")
    assert child.end() == protocol.DRAINED
    assert list((long / "checkpoints").iterdir())


def test_a_run_leaves_no_tensor_behind(tmp_path: Path, base: Path):
    holder, counts = Holder(), []
    for count in range(3):
        folder = lay_out(tmp_path / f"run{count}", base, hyperparameters=ONE | {"optim": "adamw_8bit"})
        attempt(folder, holder=holder)
        assert holder.tidy()
        gc.collect()
        counts.append(sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects()))
    assert counts[1] == counts[2], counts


def test_the_peak_of_memory_is_the_jobs_own():
    device = torch.device("cpu")
    reset_peak(device)
    before = peak_bytes(device)
    ballast = torch.ones(64 * 2**20)
    assert peak_bytes(device) - before > ballast.nbytes * 0.9
    del ballast
    reset_peak(device)
    assert peak_bytes(device) - before < 64 * 2**20


def test_the_memory_of_the_base_counts_as_free_for_the_next_job(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
):
    free = 1 << 34

    def set_free(num_bytes: int) -> None:
        for module in (budget, memory):
            monkeypatch.setattr(module, "free_bytes", lambda device: num_bytes)

    def plan(name: str, holder: Holder) -> tuple[int, int]:
        made = attempt(lay_out(tmp_path / name, base, hyperparameters=ONE | OPEN), holder=holder)
        assert made.run
        options, made.run = made.run.options, None
        assert holder.tidy()
        return options.micro_batch, options.checkpointing

    set_free(free)
    roomy = plan("roomy", Holder())
    needed = json.loads((tmp_path / "roomy/out/reports/report.json").read_text())["memory"]["estimated"]
    set_free(free := int(needed["allocated_bytes"] * 0.7))
    holder = Holder()
    tight = plan("cold", holder)
    set_free(free // 2)
    assert plan("warm", holder) == tight != roomy
    set_free(free // 2)
    assert plan("really tight", Holder()) != tight
