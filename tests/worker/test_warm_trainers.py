"""A trainer that stays between jobs, as its worker drives it: the hash trainer, told to stay."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time

import psutil
import pytest

from common.context import Context
from tests.worker.conftest import Bench
from tests.worker.test_supervision import trainers


@pytest.fixture
def short_lease(context: Context) -> Context:
    """Leases so short that the first job's deadline passes while the second one runs."""
    object.__setattr__(context.settings, "lease_s", 5.0)
    return context


def pid_of(bench: Bench, job_id: str) -> int:
    row = bench.row(job_id)
    assert row.status == "succeeded", row.error
    return row.report["pid"]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    return not psutil.pid_exists(pid)


def test_the_next_job_of_the_same_base_gets_the_same_process(bench: Bench):
    data, worker = bench.dataset(), bench.supervisor()
    cold = bench.submit(data)
    bench.check(), worker.work_off()
    assert gone(pid_of(bench, cold)), "a trainer that does not say that it stays is waited for"
    first, second = bench.submit(data, stays=True), bench.submit(data, stays=True)
    bench.check(), worker.work_off()
    assert pid_of(bench, first) == pid_of(bench, second) != pid_of(bench, cold)
    assert bench.adapter(first) == bench.adapter(second) == bench.adapter(cold)
    assert not any(name.startswith("TUNERY") for name in bench.row(second).report["environment"])
    worker.close()
    assert gone(pid_of(bench, second))


@pytest.mark.usefixtures("short_lease")
def test_the_deadline_of_a_run_ends_with_it(bench: Bench):
    worker = bench.supervisor()
    first = bench.submit(stays=True)
    bench.check(), worker.work_off()
    # Longer than a lease: it goes on only if its own renewals reach it.
    second = bench.submit(stays=True, steps=16, step_s=0.4)
    bench.check(), worker.work_off()
    assert pid_of(bench, first) == pid_of(bench, second) and bench.row(second).attempts == 1


@pytest.mark.parametrize("other", ["base", "weights", "quantization", "method"])
def test_a_job_that_needs_another_base_ends_the_process(bench: Bench, other: str):
    worker, models = bench.supervisor(), bench.context.settings.model_dir
    assert models
    first = bench.submit(stays=True)
    bench.check(), worker.work_off()
    model, options = "tiny", {}
    if other == "base":
        shutil.copytree(models / "tiny", models / "second")
        model = "second"
    elif other == "weights":
        (models / "tiny" / "model.safetensors").write_text("others")
    elif other == "quantization":
        options["quantization"] = {"bnb_4bit_quant_type": "fp4"}
    second = bench.submit(stays=True, model=model, method="lora" if other == "method" else "qlora", spec=options)
    bench.check(), worker.work_off()
    assert pid_of(bench, first) != pid_of(bench, second) and gone(pid_of(bench, first))


def test_a_process_that_was_killed_while_it_waited_costs_no_attempt(bench: Bench):
    worker = bench.supervisor()
    first, second = bench.submit(stays=True), bench.submit(stays=True)
    bench.check(), worker.work_off(most=1)
    (held,) = trainers(bench)
    os.kill(held.pid, signal.SIGKILL)
    worker.work_off()
    assert pid_of(bench, first) == held.pid != pid_of(bench, second)
    assert bench.row(second).attempts == 1 and "job.interrupted" not in bench.events(second)


def test_a_process_that_is_killed_as_it_is_handed_a_run_costs_no_attempt(bench: Bench):
    worker = bench.supervisor()
    first, second = bench.submit(stays=True), bench.submit(stays=True)
    bench.check(), worker.work_off(most=1)
    (held,) = trainers(bench)
    # Frozen, it is alive when it is taken, and hears nothing.
    held.suspend()
    _, thread = bench.start(worker)
    bench.wait(second, lambda row: row.status == "running")
    threading.Event().wait(0.5)
    held.kill()
    thread.join(timeout=30)
    assert pid_of(bench, second) not in (held.pid, pid_of(bench, first)) and bench.row(second).attempts == 1


@pytest.mark.parametrize("fault", ["crash", "oom", "device", "full", "orphan"])
def test_a_fault_ends_the_process_and_leaves_no_trace(bench: Bench, fault: str):
    data, worker = bench.dataset(), bench.supervisor()
    first = bench.submit(data, stays=True)
    second = bench.submit(data, stays=True, fault=fault, fault_at=4, fault_attempts=1)
    bench.check(), worker.work_off()
    assert pid_of(bench, first) != pid_of(bench, second) and gone(pid_of(bench, first))
    assert bench.row(second).attempts == 2 and bench.adapter(first) == bench.adapter(second)


def test_a_cancelled_job_ends_the_process(bench: Bench):
    from common.jobs import lifecycle
    from tests.worker.conftest import TENANT

    worker = bench.supervisor()
    first, second = bench.submit(stays=True), bench.submit(stays=True, steps=10_000, step_s=0.05)
    bench.check()
    _, thread = bench.start(worker)
    bench.wait(second, lambda row: row.step > 2)
    with bench.context.write() as session:
        lifecycle.request_cancel(session, TENANT, second)
    thread.join(timeout=30)
    assert bench.row(second).status == "cancelled" and gone(pid_of(bench, first))


def test_a_base_that_nobody_wants_leaves_in_time(bench: Bench, caplog: pytest.LogCaptureFixture):
    object.__setattr__(bench.context.settings, "warm_base_s", 0.5)
    caplog.set_level("INFO")
    worker = bench.supervisor()
    job_id = bench.submit(stays=True)
    bench.check(), worker.work_off()
    assert gone(pid_of(bench, job_id)) and not trainers(bench)
    assert "the base in memory was not wanted" in caplog.text


def test_no_base_is_kept_where_that_is_switched_off(bench: Bench):
    object.__setattr__(bench.context.settings, "warm_base_s", 0.0)
    job_id = bench.submit(stays=True)
    bench.check(), bench.train()
    assert gone(pid_of(bench, job_id))


def test_the_log_of_a_failure_is_the_runs_own(bench: Bench, caplog: pytest.LogCaptureFixture):
    worker = bench.supervisor()
    first, second = bench.submit(stays=True, mutters="first"), bench.submit(fault="diverge", mutters="second")
    bench.check(), worker.work_off()
    assert pid_of(bench, first) and bench.row(second).status == "failed"
    tail = next(record.message for record in caplog.records if "the trainer ended with" in record.message)
    assert "second" in tail and "first" not in tail, json.dumps(tail)
