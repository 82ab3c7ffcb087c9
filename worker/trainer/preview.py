"""The preview child: `python -m worker.trainer.preview FOLDER ROWS OFFSET`. Renders a few rows as training would."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.schedule import resolve_max_length
from common.schemas.previews import TOKENS_MAX
from worker.data.formats import parse_rows
from worker.data.limits import Limits
from worker.data.source import Problems, Source
from worker.ml.base_check import base_check
from worker.trainer.entry import leave_with, parse_job
from worker.trainer.protocol import TrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from worker.ml.render import Example


def preview(folder: Path, spec: TrainSpec, num_rows: int, offset: int) -> dict[str, Any]:
    """Return `num_rows` rows of the dataset in `folder` behind the first `offset`, token by token.

    Rows that are wrong are passed over, and told.

    Raises:
        InvalidInput: base, template or the file as a whole are wrong.
    """
    from worker.ml.probe import probe_config, probe_template
    from worker.ml.render import Renderer
    from worker.ml.template import choose_template
    from worker.ml.tokenizer import load_tokenizer

    job = parse_job(spec)
    facts = base_check(Path(spec.base.path), weights=False)
    max_length = resolve_max_length(job.hyperparameters, facts.context)
    probe_config(Path(spec.base.path))
    tokenizer = load_tokenizer(Path(spec.base.path), facts.vocab_size)
    plain = any(choice.name == "template.defaulted" for choice in choose_template(tokenizer, job.chat_template))
    given = job.chat_template is not None
    probe_template(tokenizer, asked=given)
    source, problems = Source(folder / spec.train_file, Limits(**spec.limits)), Problems()
    wanted = islice(parse_rows(source, problems), offset, offset + num_rows + 1)
    renderer = Renderer(tokenizer, max_length, job.hyperparameters.loss)
    examples = list(renderer.render(source, wanted, problems))
    shown: list[dict[str, Any]] = []
    room = TOKENS_MAX
    for example in examples[:num_rows]:
        if shown and room <= 0:
            break
        shown.append(_shown(tokenizer, example, max(room, 0)))
        room -= len(example.input_ids)
    return {
        "base_revision": spec.base.revision,
        "max_length": max_length,
        "template": "request" if given else "plain" if plain else "base",
        "rows": shown,
        "problems": problems.lines,
        "has_more": len(examples) > len(shown),
    }


def _shown(tokenizer: PreTrainedTokenizerBase, example: Example, room: int) -> dict[str, Any]:
    from worker.ml.render import NO_LOSS
    from worker.ml.shown import token_texts

    ids, labels = example.input_ids[:room], example.labels
    texts = token_texts(tokenizer, ids)
    return {
        "row": example.row.number,
        "loss": example.loss,
        "num_tokens": len(example.input_ids),
        "num_trained": example.num_trained,
        "num_cut": example.num_cut,
        # The first token is predicted from nothing.
        "tokens": [
            {"id": token, "text": text, "trained": place > 0 and labels[place] != NO_LOSS}
            for place, (token, text) in enumerate(zip(ids, texts, strict=True))
        ],
    }


if __name__ == "__main__":
    given, count, behind = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    leave_with("preview", lambda _: preview(given, TrainSpec.read(given), count, behind))
