"""Answers in OpenAI's shape, whole or in chunks."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from common.ids import new_id

DONE = b"data: [DONE]\n\n"


@dataclass
class Completion:
    """One answer as it grows."""

    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{new_id('x')[2:]}")
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        """Return the answer in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self._document("chat.completion", [choice]) | {"usage": self.usage()}

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        """Return a part of a stream: what the message gains, or why it ends."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event(self._document("chat.completion.chunk", [choice]))

    def last_chunk(self) -> bytes:
        """Return the part of a stream that counts the tokens."""
        return event(self._document("chat.completion.chunk", []) | {"usage": self.usage()})

    def usage(self) -> dict[str, int]:
        """Return the counts."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def event(document: dict[str, Any]) -> bytes:
    """Return a document as a server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def model(name: str, created: int, owner: str) -> dict[str, Any]:
    """Return an entry of the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": owner}
