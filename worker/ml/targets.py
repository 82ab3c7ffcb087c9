"""Finds the modules that a job names, by name alone: the preflight has no model to look at.

A list matches as peft does, a name or the end of one at a dot; a regular expression has to match the whole name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import InvalidInput
from common.schemas.lora import Lora

ALL_LINEAR = "all-linear"
_TARGETS, _TO_SAVE = "lora.target_modules", "lora.modules_to_save"
_LISTED = 24


@dataclass(frozen=True)
class Modules:
    """The names of a base's modules. `linear` leaves out the output head.

    Only linear layers and `embeddings` can carry an adapter.
    """

    names: Sequence[str]
    linear: Sequence[str]
    embeddings: Sequence[str]
    head: str | None = None

    def hint(self, kind: str) -> str:
        """Return the last parts of the names, with how often each occurs: of `linear` layers, or of `named` modules."""
        names = self.linear if kind == "linear layers" else self.names
        counts = Counter(last for name in names if not (last := name.rpartition(".")[2]).isdigit())
        listed = ", ".join(f"{name} ({count} times)" for name, count in counts.most_common(_LISTED))
        return f"{kind} of this base: {listed}"


def check_lora(lora: Lora, modules: Modules) -> None:
    """Raise InvalidInput unless everything that `lora` names exists, and can be what it is named for."""
    targets = find_targets(lora.target_modules, modules)
    if modules.head in targets:
        raise InvalidInput(
            f"{_TARGETS}: the output head {modules.head!r} cannot carry an adapter: TRL's loss reads its weight only",
            code="bad_target_modules",
            param=_TARGETS,
            hint="name it in lora.modules_to_save to train it as a whole",
        )
    if bare := targets - set(modules.linear) - set(modules.embeddings):
        raise InvalidInput(
            f"{_TARGETS}: {min(bare)!r} is neither a linear layer nor an embedding, which alone can carry an adapter",
            code="bad_target_modules",
            param=_TARGETS,
            hint=modules.hint("linear layers"),
        )
    for whole in sorted(find_to_save(lora.modules_to_save or [], modules)):
        # peft passes over a target in such a module without a word.
        if both := [name for name in targets if name == whole or name.startswith(f"{whole}.")]:
            within = "is a target too" if whole in both else f"has the target {min(both)!r} in it"
            raise InvalidInput(
                f"{_TO_SAVE}: {whole!r} {within}; train it as a whole, or with an adapter",
                code="bad_modules_to_save",
                param=_TO_SAVE,
            )


def check_rank(lora: Lora, modules: Modules, side: Callable[[str], int | None]) -> None:
    """Raise InvalidInput if an adapter is to begin with more parts of a weight than the weight has.

    peft 0.21 takes as many as there are, and the adapter that is published fits its own configuration no more.

    Args:
        side: the shorter side of a linear layer's weight by the layer's name, None where it is not known.
    """
    if not lora.changes_base:
        return
    targets = find_targets(lora.target_modules, modules) & set(modules.linear)
    most, name = min(((known, name) for name in targets if (known := side(name)) is not None), default=(lora.r, ""))
    if lora.r > most:
        raise InvalidInput(
            f'lora.r: "{lora.init_lora_weights}" takes {lora.r} parts out of each weight, and {name!r} has {most}',
            param="lora.r",
            hint=f"use an r of at most {most}, or init_lora_weights true",
        )


def check_held_in_4_bit(lora: Lora, modules: Modules) -> None:
    """Raise InvalidInput if a module to be trained as a whole is, or has in it, a linear layer: those are in 4 bit."""
    for name in sorted(find_to_save(lora.modules_to_save or [], modules)):
        if any(linear == name or linear.startswith(f"{name}.") for linear in modules.linear):
            raise held_in_4_bit(name)


def held_in_4_bit(name: str) -> InvalidInput:
    """Return the error that a module cannot be trained as a whole."""
    return InvalidInput(
        f"{_TO_SAVE}: {name!r} is held in 4 bit and cannot be trained as a whole",
        code="bad_modules_to_save",
        param=_TO_SAVE,
        hint='name it in lora.target_modules, or use method "lora"',
    )


def find_targets(targets: list[str] | str, modules: Modules) -> set[str]:
    """Return the full names that `lora.target_modules` matches.

    Raises:
        InvalidInput: one of the targets matches nothing; the hint lists the linear layers that exist.
    """
    if targets == ALL_LINEAR:
        return set(modules.linear)
    if isinstance(targets, list):
        return _find(_TARGETS, "bad_target_modules", targets, modules, "linear layers")
    try:
        found = {name for name in modules.names if re.fullmatch(targets, name)}
    except re.error as error:
        raise InvalidInput(
            f"{_TARGETS}: {targets!r} is not a regular expression: {error}",
            param=_TARGETS,
            hint='use a list of names, a regular expression, or "all-linear"',
        ) from error
    if not found:
        raise _nothing(_TARGETS, "bad_target_modules", [targets], modules.hint("linear layers"), alone=True)
    return found


def find_to_save(wanted: list[str], modules: Modules) -> set[str]:
    """Return the full names that `lora.modules_to_save` matches; raises InvalidInput as `find_targets` does."""
    return _find(_TO_SAVE, "bad_modules_to_save", wanted, modules, "modules")


def _find(param: str, code: str, wanted: list[str], modules: Modules, kind: str) -> set[str]:
    matched = {target: {name for name in modules.names if _is_at_end(target, name)} for target in wanted}
    missing = [target for target, found in matched.items() if not found]
    if missing:
        raise _nothing(param, code, missing, modules.hint(kind), alone=len(missing) == len(matched))
    return set().union(*matched.values())


def _is_at_end(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)


def _nothing(param: str, code: str, missing: list[str], hint: str, *, alone: bool) -> InvalidInput:
    what = "no module" if alone else "nothing for these"
    message = f"{param}: the base model has {what}: {', '.join(map(repr, missing))}"
    return InvalidInput(message, code=code, param=param, hint=hint)
