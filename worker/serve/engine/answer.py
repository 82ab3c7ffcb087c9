"""One answer while it is written: tokens in, text out, until a token, a word or a number ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from worker.serve.protocol import Ask, Finished, Message, Piece


class Answer:
    """The answer to `ask`, whose prompt is `prompt`; `end_ids` are the tokens that end it."""

    def __init__(
        self,
        ask: Ask,
        prompt: list[int],
        max_tokens: int,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        say: Callable[[Message], None],
    ):
        self.ask = ask
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.finished = False
        self._tokens: Any = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._end_ids = end_ids
        self._say = say
        self._num_tokens = 0
        self._held = ""

    def take(self, token: int) -> None:
        """Go on with `token`."""
        self._num_tokens += 1
        if token in self._end_ids:
            self._finish("stop")
            return
        self._held += self._decode(token)
        found = [at for word in self.ask.stop if (at := self._held.find(word)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self._finish("stop")
        elif self._num_tokens >= self.max_tokens:
            self._finish("length")
        else:
            self._send(len(self._held) - self._possible_stop())

    def cancel(self) -> None:
        """End it here: nobody waits for it."""
        self._held = ""
        self._finish("cancelled")

    def _decode(self, token: int) -> str:
        """Return the text that `token` completes; none where it ends within a character."""
        self._undecoded.append(token)
        try:
            text = self._stream.step(self._tokens, token)
        except Exception:
            # Where bytes are tokens, one that belongs to no character makes nonsense of those before it too. tokenizers
            # 0.23 raises then ("Invalid prefix"), for they were told already: it begins anew behind them.
            self._stream = DecodeStream(skip_special_tokens=True)
            text = "".join(self._stream.step(self._tokens, number) or "" for number in self._undecoded)
        if text:
            self._undecoded.clear()
        return text or ""

    def _possible_stop(self) -> int:
        """Return how many of the last characters may be the beginning of a stop word."""
        lengths = (
            size
            for word in self.ask.stop
            for size in range(min(len(word) - 1, len(self._held)), 0, -1)
            if self._held.endswith(word[:size])
        )
        return max(lengths, default=0)

    def _send(self, num_chars: int) -> None:
        if num_chars:
            self._say(Piece(self.ask.id, self._held[:num_chars]))
            self._held = self._held[num_chars:]

    def _finish(self, reason: str) -> None:
        self._send(len(self._held))
        self.finished = True
        self._say(Finished(self.ask.id, reason, self._num_tokens))
