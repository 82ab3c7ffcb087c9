"""`python -m tests.faults.saving FOLDER METHOD KILLS SEED`: kill the real trainer while it saves; say what it left.

Torch takes seconds to import, so that one process trains up to the moment before a checkpoint is saved, and forks
there again and again. A fork returns into the training loop of the library and does what any trainer does next: it
saves, seals and announces the checkpoint. Kills are spread evenly over the save, half by the clock and half by system
calls; what lies in the folder afterwards is compared with an undisturbed run. Prints one JSON object: a `Tally`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from tests.faults import dying
from tests.worker.trainer import tiny
from worker.ml.checkpoint import MANIFEST, BadCheckpoint, verify
from worker.ml.sft import Trainer
from worker.trainer import protocol, train
from worker.trainer.__main__ import read_run, run_stages
from worker.trainer.lifeline import Wishes
from worker.trainer.protocol import Checkpoint, Message, Sender
from worker.trainer.run import Run

# Saved at every step: at this one the forks are made, and the step before is what may have to do.
STEP = 3
_SHAPE = {"max_steps": STEP + 1, "save_steps": 1, "learning_rate": 1e-2}
_METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"lora": {"r": 64, "target_modules": "all-linear", "lora_dropout": 0.1}},
    "full": {"method": "full"},
}
# Beyond the end, so that the last moments are met too; a busy machine may be slower than when it was measured.
_CALLS_BEYOND, _TIME_BEYOND = 1.05, 1.5


@dataclass
class Tally:
    """What the kills came to. `stages` counts how far the save was; `trusted_torn` how often the library's own choice
    of a checkpoint was one that was not whole; `wrong` has a sentence for each thing that must not be."""

    seed: int
    save_s: float
    calls: int
    stages: Counter[str] = field(default_factory=Counter)
    trusted_torn: int = 0
    wrong: list[str] = field(default_factory=list)


class Enough(Exception):
    """Every kill was made."""


class Killing(TrainerCallback):
    """Forks the trainer of `run` before the save of STEP, and lets each fork die in it."""

    def __init__(self, run: Run, whole: Path, kills: int, seed: int):
        self._run, self._whole, self._kills = run, whole, kills
        self._moments = random.Random(seed)
        self._seed = seed
        self._forked = False
        self.tally: Tally | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fork; a fork returns, and the library goes on to save."""
        if state.global_step != STEP:
            return
        for kill in self._all_kills():
            if kill is None:
                self._forked = True
                return
        raise Enough

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stand still once the checkpoint is sealed and announced."""
        if self._forked:
            dying.stop()

    def _all_kills(self) -> Iterator[dying.Fork | None]:
        """Make every kill, and yield None in a fork."""
        before = _announcements(self._run.folder)
        traced = dying.may_trace()
        took, calls = [], 0
        for counted in (False, False, False, *([True] if traced else [])):
            made = dying.fork(traced=counted)
            yield made
            assert made is not None
            if counted:
                calls = made.calls()
            else:
                took.append(made.seconds())
            self._clear(before)
        self.tally = Tally(self._seed, statistics.median(took), calls)
        for number in range(self._kills):
            counted = traced and number % 2 == 1
            made = dying.fork(traced=counted)
            yield made
            assert made is not None
            moment = (number + self._moments.random()) / self._kills
            if counted:
                made.dies_at_call(call := int(moment * _CALLS_BEYOND * calls))
                self._judge(self.tally, f"kill {number} at call {call}")
            else:
                made.dies_after(after_s := moment * _TIME_BEYOND * self.tally.save_s)
                self._judge(self.tally, f"kill {number} after {after_s:.4f} s")
            self._clear(before)

    def _clear(self, announced: bytes) -> None:
        shutil.rmtree(self._run.folder / "partial" / f"checkpoint-{STEP}", ignore_errors=True)
        shutil.rmtree(self._run.checkpoints / f"step-{STEP:08d}", ignore_errors=True)
        (self._run.folder / "announced").write_bytes(announced)

    # ---- judging -----------------------------------------------------------------------------------------------------

    def _judge(self, tally: Tally, kill: str) -> None:
        heard = [message for message in _heard(self._run.folder) if isinstance(message, Checkpoint)]
        tally.stages[self._stage(heard)] += 1
        trusted = get_last_checkpoint(str(self._run.folder / "partial"))
        tally.trusted_torn += trusted is not None and not self._is_written(Path(trusted))
        held = {path.name for path in self._run.checkpoints.iterdir()}
        tally.wrong += [f"{kill}: {fault}" for name in sorted(held) for fault in self._faults(name)]
        lacking = {Path(message.folder).name for message in heard} - held
        older = {f"step-{step:08d}" for step in range(1, STEP)} - held
        tally.wrong += [f"{kill}: {name} was announced and is not there" for name in sorted(lacking | older)]

    def _stage(self, heard: list[Checkpoint]) -> str:
        """Return how far the save had come, by what lies there."""
        written = self._run.folder / "partial" / f"checkpoint-{STEP}"
        if heard[-1].step == STEP:
            return "announced"
        if (self._run.checkpoints / f"step-{STEP:08d}").exists():
            return "sealed"
        if (written / MANIFEST).exists():
            return "described"
        if not written.exists():
            return "not begun"
        return "written" if self._is_written(written) else "half written"

    def _is_written(self, written: Path) -> bool:
        """Return whether the library's part of the checkpoint of STEP is complete."""
        reference = self._whole / f"step-{STEP:08d}"
        names = {path.name for path in reference.iterdir()} - {MANIFEST}
        return all(_same_file(written / name, reference / name) for name in names)

    def _faults(self, name: str) -> Iterator[str]:
        """Yield what is wrong with a checkpoint: refused, or not what the undisturbed run saved at its step."""
        folder, reference = self._run.checkpoints / name, self._whole / name
        try:
            verify(folder, self._run.spec.config_hash)
        except BadCheckpoint as error:
            yield error.message
        names = {path.name for path in folder.iterdir()}
        if names != {path.name for path in reference.iterdir()}:
            yield f"{name} holds {sorted(names)}"
        for file in sorted(names - {MANIFEST}):
            if not _same_file(folder / file, reference / file):
                yield f"{name}/{file} is not what an undisturbed run saves"
        if MANIFEST in names and _timeless(folder / MANIFEST) != _timeless(reference / MANIFEST):
            yield f"{name}/{MANIFEST} is not what an undisturbed run writes"


def _same_file(path: Path, reference: Path) -> bool:
    return path.is_file() and path.read_bytes() == reference.read_bytes()


def _timeless(path: Path) -> Any:
    """Return a manifest without the seconds that training took."""
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        return None
    return manifest | {"counters": manifest["counters"] | {"train_s": None}}


def _announcements(folder: Path) -> bytes:
    return (folder / "announced").read_bytes()


def _heard(folder: Path) -> list[Message]:
    """Return what the supervisor would have heard; a line that is torn is none, as on the pipe."""
    return [protocol.decode(line) for line in _announcements(folder).splitlines(keepends=True) if line.endswith(b"\n")]


# ---- the runs ------------------------------------------------------------------------------------------------------


def laid_out(folder: Path, base: Path, method: str) -> Run:
    """Return the run of a folder, which speaks into the file `announced` as it would into its pipe."""
    folder.mkdir()
    tiny.write_run(folder, base, hyperparameters=_SHAPE, **_METHODS[method])
    return read_run(folder, Sender((folder / "announced").open("ab")), Wishes())


def kill_savings(folder: Path, method: str, kills: int, seed: int) -> Tally:
    """Kill `kills` forks of a trainer while they save."""
    torch.set_num_threads(1)
    # tqdm's lock is one for all forks: whoever is killed while it draws a bar would keep it from the others for ever.
    disable_progress_bar()
    base = tiny.build_base(folder / "base")
    whole = laid_out(folder / "whole", base, method)
    run_stages(whole)
    run = laid_out(folder / "killed", base, method)
    killing = Killing(run, whole.checkpoints, kills, seed)
    build = train.build_trainer

    def build_and_kill(run: Run) -> Trainer:
        trainer = build(run)
        trainer.add_callback(killing)
        return trainer

    train.build_trainer = build_and_kill
    try:
        run_stages(run)
    except Enough:
        assert killing.tally is not None
        return killing.tally
    raise AssertionError(f"the run never came to step {STEP}")


if __name__ == "__main__":
    done = kill_savings(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps(vars(done)), flush=True)
    os._exit(0)
