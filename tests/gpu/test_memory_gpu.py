"""Memory on a CUDA device: spikes that paged optimizers survive, the ladder down from a real lack of it, its return.

The option `max_memory_gib`, which sets the fraction of the card that the process may take, stands in for a small card.
Managed memory stays far below what the card has free.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from common.cards import free_bytes
from tests.gpu.running import give_back, run
from tests.worker.trainer import tiny
from worker.trainer import protocol

if TYPE_CHECKING:
    from tests.worker.trainer.conftest import Attempt

pytestmark = pytest.mark.gpu

# Adapters of 84 million parameters: 340 MB of Adam's state, even in bf16.
WIDE = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12, "max_position_embeddings": 4096}
LARGE = {"r": 1024, "lora_dropout": 0.0}
# The fast path plans its micro-batches by what is free, and does not run out of it here.
PLAIN = {"kernels": "plain"}


def small_card(num_bytes: int) -> dict[str, float]:
    """Return the option that lets torch's allocator take at most `num_bytes` of the card."""
    return {"max_memory_gib": num_bytes / 2**30}


def peak(made: Attempt) -> int:
    return int(made.result["peak_memory_bytes"])


def spiky_rows() -> list[dict[str, Any]]:
    """Return short rows, and among them a few that need much more memory."""
    return [{"text": tiny.sentence(index, 1500 if index % 8 == 5 else 20)} for index in range(32)]


def test_a_paged_optimizer_survives_a_spike_that_a_resident_one_does_not(tmp_path: Path):
    base = tiny.build_base(tmp_path / "base", **WIDE)
    options = {"max_steps": 8, "max_length": 2048, "learning_rate": 1e-4, "lora": LARGE, "group_by_length": False}
    options |= PLAIN
    free = run(tmp_path / "free", base, spiky_rows(), optim="paged_adamw_32bit", **options)
    assert free.code == protocol.DONE
    options |= small_card(peak(free) + 96 * 2**20)
    paged = run(tmp_path / "paged", base, spiky_rows(), optim="paged_adamw_32bit", **options)
    resident = run(tmp_path / "resident", base, spiky_rows(), optim="adamw_torch_fused", **options)
    # The backward pass of attention adds in any order, so two equal runs drift apart.
    assert paged.code == protocol.DONE and paged.losses == pytest.approx(free.losses, rel=1e-3)
    assert resident.code == protocol.OUT_OF_MEMORY


def test_the_ladder_leads_out_of_a_real_lack_of_memory(tmp_path: Path):
    base = tiny.build_base(tmp_path / "base", **WIDE)
    rows = [{"text": tiny.sentence(index, 900)} for index in range(32)]
    options = {"max_steps": 3, "max_length": 2048, "gradient_checkpointing": False, "lora": {"lora_dropout": 0.0}}
    options |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1} | PLAIN
    whole = run(tmp_path / "whole", base, rows, **options)
    options |= small_card(peak(whole) // 2)
    tries = [run(tmp_path / f"shrink{shrink}", base, rows, shrink=shrink, **options) for shrink in range(4)]
    codes = [made.code for made in tries]
    assert codes[0] == protocol.OUT_OF_MEMORY and protocol.DONE in codes, codes
    made = tries[codes.index(protocol.DONE)]
    (told,) = made.notes("memory.shrunk")
    assert told.data["micro_batch"] * told.data["accumulation"] == 8
    assert made.losses == pytest.approx(whole.losses, abs=2e-2)


@pytest.mark.parametrize("ending", ["done", "killed"])
def test_memory_returns_to_the_driver_with_the_child(tmp_path: Path, ending: str):
    import torch

    base = tiny.build_base(tmp_path / "base", **WIDE)
    give_back()
    before, _ = torch.cuda.mem_get_info()
    folder = tmp_path / "run"
    folder.mkdir()
    steps = 4 if ending == "done" else 10_000
    options = {"max_steps": steps, "max_length": 2048, "num_train_epochs": 1000.0, "save_steps": 10_000}
    tiny.write_run(folder, base, spiky_rows(), hyperparameters=options, lora=LARGE)
    spec = json.loads((folder / "spec.json").read_text()) | {"device": "cuda:0"}
    (folder / "spec.json").write_text(json.dumps(spec))
    held, code = drive(folder, kill=ending != "done")
    assert (code == protocol.DONE) is (ending == "done")
    after, _ = torch.cuda.mem_get_info()
    assert before - held > 200 * 2**20, "the child never held memory"
    assert before - after < 32 * 2**20, (before, after)


def drive(folder: Path, *, kill: bool) -> tuple[int, int]:
    """Run the child; return the card's free bytes while it trained, and its exit code. `kill` ends it in mid-run."""
    import torch

    child = subprocess.Popen(
        [sys.executable, "-m", "worker.trainer", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin and child.stdout
    held = torch.cuda.mem_get_info()[0]
    for line in child.stdout:
        if isinstance(protocol.decode(line), protocol.Progress):
            held = min(held, torch.cuda.mem_get_info()[0])
            if kill:
                child.kill()
    child.stdin.close()
    child.stdout.close()
    return held, child.wait()


def test_what_a_worker_says_is_free_is_what_torch_finds():
    import torch

    free, total = torch.cuda.mem_get_info()
    told = free_bytes("cuda:0")
    assert told is not None and abs(told - free) < 2**30 and told < total
