"""An engine in the test's own process. Apart from the fixtures, whose servers a machine with a card does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.ids import new_id
from worker.ml.base_check import base_check
from worker.serve.engine.inbox import Inbox
from worker.serve.protocol import Ask, Finished, Load, Message, Piece, Refused, ServeSpec, written
from worker.trainer.protocol import BaseRef


class Talk:
    """An engine in this process, and what it said."""

    def __init__(self, base: Path, compute: str = "float32", device: str = "cpu", **bounds: Any):
        from worker.serve.engine.engine import Engine

        self.said: list[Message] = []
        self.on_message: Callable[[Message], None] = lambda message: None
        self.inbox = Inbox()
        spec = ServeSpec(BaseRef(str(base), "tiny"), "lora", {"bnb_4bit_compute_dtype": compute}, device, 1, **bounds)
        self.engine = Engine(spec, base_check(base), self.inbox, self._hear)

    def _hear(self, message: Message) -> None:
        self.said.append(message)
        self.on_message(message)

    def load(self, name: str, folder: Path) -> Message:
        """Load an adapter and return the answer."""
        self.inbox.obey(written(Load(name, [(str(folder), 1.0)])))
        self.engine.step()
        return self.said[-1]

    def ask(self, *asks: Ask) -> list[str]:
        """Let all be answered and return the texts."""
        for ask in asks:
            self.inbox.obey(written(ask))
        while sum(isinstance(item, Finished | Refused) for item in self.of(*asks)) < len(asks):
            self.engine.step()
        return [self.text(ask) for ask in asks]

    def of(self, *asks: Ask) -> list[Message]:
        """Return what was said to these asks, in order."""
        names = {ask.id for ask in asks}
        return [item for item in self.said if getattr(item, "id", getattr(item, "of", None)) in names]

    def text(self, ask: Ask) -> str:
        """Return the pieces of an answer, joined."""
        return "".join(item.text for item in self.of(ask) if isinstance(item, Piece))

    def end(self, ask: Ask) -> Any:
        """Return the last word about an ask."""
        return self.of(ask)[-1]


def asking(words: str = "the quick brown fox", **options: Any) -> Ask:
    """Return a question."""
    options = {"adapter": None, "max_tokens": 12} | options
    return Ask(id=new_id("ask"), messages=[{"role": "user", "content": words}], **options)
