"""Whether the base has a row for every token that training uses, and how it gets those that are missing.

Some tokenizers carry tokens that the base's embedding was never given rows for. A new row means nothing until it is
trained, so embedding and head are then trained as a whole and stored with the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.ml.base_files import bad
from worker.ml.options import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# More are no forgotten tokens but the tokenizer of another model.
_MOST_NEW = 256


def rows_needed(tokenizer: PreTrainedTokenizerBase, highest: int, rows: int) -> int:
    """Return how many rows an embedding of `rows` has to have: the same, unless the token `highest` has none.

    Args:
        highest: the highest token of the data and of what pads it.

    Raises:
        InvalidInput: tokenizer and base do not belong together.
    """
    if highest < rows:
        return rows
    needed = 1 + max(highest, *tokenizer.get_vocab().values())
    if needed - rows > _MOST_NEW:
        # On a card this is a fault of the device, which would be blamed.
        raise bad(f"its tokenizer makes the token {highest:,}, but its embedding has {rows:,} rows")
    return needed


def num_rows(model: PreTrainedModel) -> int:
    """Return the number of tokens that the embedding of `model` has a row for."""
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]


def grow(model: PreTrainedModel, rows: int) -> Choice:
    """Give `model` an embedding and a head of `rows` rows, the new ones near the mean of the old; returns the event.

    Draws random numbers: seed them first, so that a resumed run has the same base.
    """
    before = num_rows(model)
    model.resize_token_embeddings(rows)
    message = (
        f"the data has tokens that the base has no embedding for: {before:,} rows grow to {rows:,}. Embedding and head "
        "are trained as a whole and stored with what is trained; engines that share a base among adapters refuse it"
    )
    return Choice("vocabulary.grown", message, {"rows": rows, "new": rows - before}, "warning")
