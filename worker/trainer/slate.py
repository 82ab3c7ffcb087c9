"""What a run may change of its process besides its own objects, put back before the next run in the same process."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.state import AcceleratorState, GradientState
from bitsandbytes.optim import GlobalOptimManager
from transformers.utils import logging as transformers_logging


class Slate:
    """The state of the process at the moment when this was made."""

    def __init__(self) -> None:
        self._folder = Path.cwd()
        self._environment = dict(os.environ)
        self._filters = list(warnings.filters)
        self._values = [(put, take()) for take, put in _SWITCHES]
        self._random = (random.getstate(), numpy.random.get_state(), torch.get_rng_state())

    def wipe(self) -> None:
        """Put everything back, and give memory back that no object uses."""
        os.chdir(self._folder)
        os.environ.clear()
        os.environ.update(self._environment)
        warnings.filters[:] = self._filters  # type: ignore[index]
        for put, value in self._values:
            put(value)
        random.setstate(self._random[0])
        numpy.random.set_state(self._random[1])
        torch.set_rng_state(self._random[2])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        # transformers 5 registers each embedding there, so that every model of an 8-bit optimizer would stay for ever.
        GlobalOptimManager.get_instance().initialize()
        give_memory_back()


def give_memory_back() -> None:
    """Collect what only refers to itself, as trainers do, and give freed memory back to card and system."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


_SWITCHES: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.backends.cudnn, "deterministic"),
    _attribute(torch.backends.cudnn, "allow_tf32"),
    (transformers_logging.get_verbosity, transformers_logging.set_verbosity),
]
