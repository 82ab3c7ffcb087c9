"""Turns the texts of plans into token ids, and the characters that carry loss into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from worker.ml.plan import Plan, Span
from worker.ml.words import WordTokenizer, common_prefix, word_tokenizer

# Texts are tokenised together, up to so many characters: tokens take some forty times the memory.
BATCH_CHARS = 1 << 20

Encoded = tuple[list[int], tuple[Span, ...]]  # all ids of a text, and those that carry loss as (start, end)


class Encoder:
    """Tokenises plans. What a span of characters is in tokens is asked up to `max_length` tokens only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._words = word_tokenizer(tokenizer)

    def encode(self, plans: list[Plan]) -> Iterator[Encoded]:
        """Yield the ids of each plan and its spans in tokens, in order."""
        words = self._words
        slow = [plan for plan in plans if not plan.mask and (words is None or (plan.special and words.before is None))]
        by_library = iter(self._by_library(slow))
        slow_ids = set(map(id, slow))
        for plan in plans:
            if plan.mask:
                yield list(plan.ids), _marked(plan.mask)
            elif id(plan) in slow_ids or words is None:
                yield next(by_library)
            else:
                yield self._by_words(words, plan)

    def _by_words(self, words: WordTokenizer, plan: Plan) -> Encoded:
        tokens = words.encode(plan.text, words.before if plan.special else None)
        ends: dict[int, int] = {}
        full = False
        for cut in sorted({cut for span in plan.spans for cut in span}):
            ends[cut] = len(tokens.ids) if full else words.count(tokens, cut)
            full = ends[cut] >= self._max_length
        return tokens.ids, tuple((ends[before], ends[upto]) for before, upto in plan.spans)

    def _by_library(self, plans: list[Plan]) -> Iterator[Encoded]:
        wholes = list(self._tokenize((plan.text, plan.special) for plan in plans))
        ends = self._token_ends(plans, wholes)
        for index, plan in enumerate(plans):
            length = len(wholes[index])
            spans = (
                (ends.get((index, before), length), ends.get((index, upto), length)) for before, upto in plan.spans
            )
            yield wholes[index], tuple(spans)

    def _token_ends(self, plans: list[Plan], wholes: list[list[int]]) -> dict[tuple[int, int], int]:
        # (index of the plan, characters of its text) -> how many of its tokens these characters are. Left out is what
        # lies beyond `max_length` tokens, and is cut off: a conversation of a thousand turns would cost its square.
        ends = {(index, 0): 0 for index in range(len(plans))}
        ends |= {(index, len(plan.text)): len(wholes[index]) for index, plan in enumerate(plans)}
        cuts = sorted({(index, cut) for index, plan in enumerate(plans) for span in plan.spans for cut in span})
        full: set[int] = set()
        asked: list[tuple[int, int]] = []

        def texts() -> Iterator[tuple[str, bool]]:
            for index, cut in cuts:
                if (index, cut) not in ends and index not in full:
                    asked.append((index, cut))
                    yield plans[index].text[:cut], plans[index].special

        for number, ids in enumerate(self._tokenize(texts())):
            index, cut = asked[number]
            ends[index, cut] = common_prefix(ids, wholes[index])
            if ends[index, cut] >= self._max_length:
                full.add(index)
        return ends

    def _tokenize(self, texts: Iterable[tuple[str, bool]]) -> Iterator[list[int]]:
        # In order, many at once. Chat templates write the special tokens themselves; plain text gets those that the
        # tokenizer adds.
        chunk: list[str] = []
        chars, kind = 0, False
        for text, special in texts:
            if chunk and (special != kind or chars + len(text) > BATCH_CHARS):
                yield from self._ids(chunk, kind)
                chunk, chars = [], 0
            chunk.append(text)
            chars, kind = chars + len(text), special
        if chunk:
            yield from self._ids(chunk, kind)

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return found


def _marked(mask: tuple[int, ...]) -> tuple[Span, ...]:
    # The stretches of ones.
    edges = [place for place in range(len(mask) + 1) if _bit(mask, place) != _bit(mask, place - 1)]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _bit(mask: tuple[int, ...], place: int) -> bool:
    return 0 <= place < len(mask) and bool(mask[place])
