"""The base that this process keeps in memory from one run to the next, and the conditions under which it may.

Torch is imported in the methods: a bad spec is refused before that takes its seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from worker.trainer.protocol import TrainSpec

if TYPE_CHECKING:
    import torch

    from worker.ml.base import Base
    from worker.ml.options import Choice
    from worker.trainer.slate import Slate


# Blocks that an allocator rounds up, and what libraries of a card keep once they were used.
_OVERHEAD, _CONTEXT_BYTES = 1.25, 2**30


@dataclass(frozen=True)
class _Held:
    # `key` is None where the base is held for this run only: so that it can be written down afterwards as it was.
    key: str | None
    base: Base
    print: torch.Tensor


class Holder:
    """Keeps at most one base, never altered: each run gets a shell around its weights."""

    def __init__(self) -> None:
        self._held: _Held | None = None
        self._slate: Slate | None = None
        self._kept = False
        self._unaltered = False
        self._room = 0
        self.held_bytes = 0
        self.origin = "files"

    def begin(self) -> None:
        """Remember, before the first run, what the process looks like."""
        from worker.trainer.slate import Slate

        self._kept = self._unaltered = False
        self._slate = self._slate or Slate()

    def measure(self, device: torch.device) -> None:
        """Find out how much of the device's memory is taken by what is held here: a run counts it as free.

        A run that chooses its micro-batch by what is free has to choose as it would in a process of its own.
        """
        from worker.ml.memory import free_bytes

        free = free_bytes(device)
        if self._held is None:
            self._room, self.held_bytes = free, 0
            return
        # Not more: somebody else may have taken memory since.
        most = int(_OVERHEAD * self._held.base.footprint.after_bytes) + _CONTEXT_BYTES
        self.held_bytes = min(max(0, self._room - free), most)

    def base(self, spec: TrainSpec, load: Callable[[], Base]) -> Base:
        """Return the base for a run: around the weights that are here if they are the same, or else from `load`."""
        from worker.ml.shell import fingerprint, shell_of
        from worker.trainer.slate import give_memory_back

        key = spec.base_key()
        if self._held is not None and self._held.key != key:
            self._held = None
            give_memory_back()
        self.origin = "memory"
        if self._held is None:
            base = load()
            self.origin = "cache" if base.form is not None and base.form.loaded else "files"
            missing = base.form is not None and base.form.missing
            if base.plan is not None or (key is None and not missing):
                return base
            self._held = _Held(key, base, fingerprint(base.model))
        self._kept = True
        return replace(self._held.base, model=shell_of(self._held.base.model))

    def part(self, model: torch.nn.Module) -> None:
        """Let nothing that is trained in `model` lie in the weights that are kept."""
        from worker.ml.shell import own_trained

        if self._held is not None:
            own_trained(model, self._held.base.model)

    def tidy(self) -> bool:
        """Clear away the run that has ended; return whether the process may take another one.

        Not if the run changed the weights that are kept, or left something behind that cannot be undone. Never raises:
        the run is over and its result is whole.
        """
        if not self._kept or self._held is None or self._slate is None:
            return False
        try:
            from worker.ml.shell import fingerprint
            from worker.trainer.pages import free_pages

            self._slate.wipe()
            self._unaltered = bool((fingerprint(self._held.base.model) == self._held.print).all())
            if not self._unaltered or self._held.key is None:
                return False
            free_pages()
            return True
        except Exception as error:
            print(f"the base is not kept: {error!r}")
            return False

    def store(self) -> Choice | None:
        """Write the base of the run that has ended into the cache, if it is to have it; return the event.

        Not before `tidy` has found it unaltered.
        """
        if self._held is None or self._held.base.form is None or not self._unaltered:
            return None
        return self._held.base.form.store(self._held.base.model)
