"""A checkpoint and an evaluation at the end of each epoch, where the job leaves their steps to the worker."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.schemas.hyperparameters import Hyperparameters

# A small file that is read a thousand times would leave a thousand checkpoints.
_EPOCHS_MAX = 50


class EpochEnds(TrainerCallback):
    """Asks at the last step of an epoch, whose number is whole there. `evaluated`: there are validation rows.

    Not after that step: its checkpoint may be saved by then, without an evaluation that no resumed run would repeat.
    """

    def __init__(self, asked: Hyperparameters, evaluated: bool):
        self._save = asked.save_steps == "auto"
        self._evaluate = asked.eval_steps == "auto" and evaluated

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and an evaluation of an epoch's last step, one that is about to stop included."""
        if state.num_train_epochs <= _EPOCHS_MAX and state.epoch is not None and float(state.epoch).is_integer():
            control.should_save |= self._save
            control.should_evaluate |= self._evaluate
