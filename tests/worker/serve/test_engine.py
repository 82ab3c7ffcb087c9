"""The engine: what it answers does not depend on who else is answered, and ends where it was asked to."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.worker.serve.talking import Talk, asking
from tests.worker.trainer.tiny import build_family, sentence
from worker.serve.engine import prompts
from worker.serve.engine.answer import Answer
from worker.serve.protocol import Accepted, Cancel, Finished, Loaded, Piece, Ready, Refused, written

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def talk(base: Path, adapters: Folder) -> Talk:
    """An engine with three adapters, one of which shares no batch."""
    made = Talk(base)
    for kind in ("a", "b", "dora"):
        assert isinstance(made.load(kind, adapters(kind)), Loaded)
    return made


def test_it_says_what_it_holds(talk: Talk):
    ready = talk.said[0]
    assert isinstance(ready, Ready)
    assert (ready.context, ready.device, ready.precision) == (256, "cpu", "float32")
    assert ready.bytes > 100_000 * 4


def test_an_answer_in_a_batch_is_the_answer_alone(talk: Talk):
    asks = [
        asking(sentence(seed + 1, 3 + 5 * seed), adapter=kind) for seed, kind in enumerate(["a", None, "b", "dora"])
    ]
    alone = [talk.ask(ask)[0] for ask in (asking(a.messages[0]["content"], adapter=a.adapter) for a in asks)]
    assert talk.ask(*asks) == alone
    assert len(set(alone)) == 4 and all(alone)
    prompt_tokens = [item.prompt_tokens for item in talk.of(*asks) if isinstance(item, Accepted)]
    assert len(set(prompt_tokens)) == 4, "prompts of different lengths, so that some were padded"


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "gemma2"])
def test_padding_is_seen_by_no_kind_of_position(tmp_path: Path, model_type: str):
    sizes: dict[str, Any] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "seq_length": 128},
        "gemma2": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                   "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, "max_position_embeddings": 128},
    }  # fmt: skip
    loud = {"initializer_range": 0.5, "tie_word_embeddings": False}
    talk = Talk(build_family(tmp_path / model_type, model_type, **sizes[model_type], **loud))
    asks = [asking(sentence(seed, 2 + 6 * seed)) for seed in range(3)]
    alone = [talk.ask(asking(ask.messages[0]["content"]))[0] for ask in asks]
    assert talk.ask(*asks) == alone and len(set(alone)) == 3


def test_pieces_are_the_whole_answer_and_are_counted(talk: Talk):
    ask = asking(max_tokens=30)
    (text,) = talk.ask(ask)
    pieces = [item.text for item in talk.of(ask) if isinstance(item, Piece)]
    assert len(pieces) > 10 and text == "".join(pieces)
    assert (talk.end(ask).reason, talk.end(ask).completion_tokens) == ("length", 30)
    shorter = asking(max_tokens=7)
    assert text.startswith(talk.ask(shorter)[0]) and talk.end(shorter).completion_tokens == 7


def test_a_stop_word_ends_the_answer_before_it_and_no_part_of_it_is_sent(talk: Talk):
    ask = asking(max_tokens=30)
    (whole,) = talk.ask(ask)
    pieces = [item.text for item in talk.of(ask) if isinstance(item, Piece)]
    at = len("".join(pieces[:8])) - 1
    word = whole[at : at + len(pieces[8]) + 2]
    assert whole.index(word) == at, "a word across three pieces that occurs nowhere before"
    stopped = asking(max_tokens=30, stop=["never said", word])
    assert talk.ask(stopped) == [whole[:at]]
    assert talk.end(stopped).reason == "stop"
    nearly = asking(max_tokens=30, stop=[word + "☃"])
    assert talk.ask(nearly) == [whole], "what was held back as a possible stop word is sent in the end"


def test_sampling_is_each_rows_own(talk: Talk):
    def sampled(seed: int | None, **options: Any) -> Any:
        return asking(seed=seed, temperature=1.5, **options)

    greedy, one, two, again = asking(), sampled(1), sampled(2), sampled(1)
    texts = talk.ask(greedy, one, two, again)
    assert texts[0] == talk.ask(asking())[0], "a row that is not sampled is the same beside those that are"
    assert texts[1] == texts[3] and len(set(texts)) == 3
    assert talk.ask(sampled(1, top_p=1e-6)) == [texts[0]], "only the likeliest token is left"
    assert talk.ask(asking(seed=1, temperature=1e-4)) == [texts[0]]
    assert len(set(talk.ask(*(sampled(None) for _ in range(4))))) == 4


def test_an_answer_has_room_in_the_context(talk: Talk):
    long = sentence(1, 300)
    refused, too_much, fits = asking(long), asking(max_tokens=250), asking(sentence(1, 40), max_tokens=None)
    talk.ask(refused, too_much, fits)
    for ask in (refused, too_much):
        assert isinstance(talk.end(ask), Refused) and talk.end(ask).code == "context_length_exceeded"
        assert "256 tokens" in talk.end(ask).message and talk.end(ask).param == "messages"
    assert "and 250 for the answer" in talk.end(too_much).message
    accepted = next(item for item in talk.of(fits) if isinstance(item, Accepted))
    assert talk.end(fits).reason == "stop" or talk.end(fits).completion_tokens == 256 - accepted.prompt_tokens


def test_what_the_bases_author_recommends_changes_no_answer(tmp_path: Path, base: Path):
    shutil.copytree(base, tmp_path / "tasteful")
    tastes = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "max_length": 20, "eos_token_id": [7]}
    (tmp_path / "tasteful" / "generation_config.json").write_text(json.dumps(tastes))
    plain, tasteful = Talk(base), Talk(tmp_path / "tasteful")
    assert tasteful.ask(asking(max_tokens=30)) == plain.ask(asking(max_tokens=30))
    assert 7 in tasteful.engine._end_ids, "but for the tokens that end an answer"


def test_who_has_gone_is_not_answered(talk: Talk):
    waiting, running, other = asking(), asking(max_tokens=100), asking(max_tokens=20)
    talk.inbox.obey(written(Cancel(waiting.id)))

    def leave(message: object) -> None:
        if isinstance(message, Piece) and message.id == running.id:
            talk.inbox.obey(written(Cancel(running.id)))

    talk.on_message = leave
    texts = talk.ask(waiting, running, other)
    talk.on_message = lambda message: None
    assert [talk.end(ask).reason for ask in (waiting, running)] == ["cancelled", "cancelled"]
    assert talk.end(running).completion_tokens < 5 and not texts[0]
    assert texts[2] == talk.ask(asking(max_tokens=20))[0], "the other goes on to its end"


def test_an_adapters_own_template_is_used(tmp_path: Path, base: Path, adapters: Folder):
    talk = Talk(base)
    shutil.copytree(adapters("a"), tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    talk.load("own", tmp_path / "own")
    talk.load("plain", adapters("a"))
    own, plain = asking(adapter="own"), asking(adapter="plain")
    assert len(set(talk.ask(own, plain))) == 2
    length = len(talk.engine._prompts.tokenizer("the quick brown fox").input_ids)
    assert [item.prompt_tokens for item in talk.of(own) if isinstance(item, Accepted)] == [length]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 'a' * 4000000000 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        r"{{ '\ud800' }}",
        r"{{ raise_exception('\ud800') }}",
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused_in_time(
    tmp_path: Path, base: Path, adapters: Folder, template: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prompts, "_RENDER_CPU_S", 0.2)
    talk = Talk(base)
    shutil.copytree(adapters("a"), tmp_path / "bad")
    (tmp_path / "bad" / "chat_template.jinja").write_text(template)
    talk.load("bad", tmp_path / "bad")
    ask, begun = asking(adapter="bad"), time.monotonic()
    talk.ask(ask)
    assert isinstance(talk.end(ask), Refused) and "chat template refuses" in talk.end(ask).message
    assert talk.end(ask).message.encode(), "it can be sent"
    assert time.monotonic() - begun < 20
    assert talk.ask(asking())[0], "the others are answered as before"


def test_those_who_wait_go_together_within_bounds(base: Path, adapters: Folder):
    talk = Talk(base, max_rows=3, max_batch_tokens=100)
    talk.load("a", adapters("a"))
    talk.load("dora", adapters("dora"))
    short = [asking("the", adapter=kind, max_tokens=3) for kind in ("a", None, "dora", "a", None)]
    talk.ask(*short)
    ends = [item.id for item in talk.said if isinstance(item, Finished)]
    assert ends == [short[index].id for index in (0, 1, 3, 2, 4)], "three together, then those that share no batch"
    long = [asking(sentence(1, 20), max_tokens=30), asking(max_tokens=30)]
    talk.ask(*long)
    begins = [item.id for item in talk.of(*long) if isinstance(item, Piece | Finished)]
    assert begins.index(long[1].id) > begins.index(long[0].id) + 5, "one after the other: together they are too many"


def test_tenants_take_turns(base: Path):
    talk = Talk(base, max_rows=1, max_batch_tokens=100)
    greedy = [asking("the", max_tokens=2, tenant="greedy") for _ in range(3)]
    other = [asking("the", max_tokens=2, tenant="other") for _ in range(2)]
    talk.ask(*greedy, *other)
    ends = [item.id for item in talk.said if isinstance(item, Finished)]
    assert ends == [ask.id for ask in (greedy[0], other[0], greedy[1], other[1], greedy[2])]


def test_megabytes_are_refused_before_they_are_counted(talk: Talk):
    ask, begun = asking("the " * 1_000_000), time.process_time()
    talk.ask(ask)
    assert talk.end(ask).code == "context_length_exceeded" and "far more than" in talk.end(ask).message
    assert time.process_time() - begun < 5


def test_messages_of_which_nothing_is_left_are_refused(base: Path, adapters: Folder, tmp_path: Path):
    shutil.copytree(adapters("a"), tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    talk = Talk(base)
    assert isinstance(talk.load("bare", tmp_path / "bare"), Loaded)
    empty, full = asking("", adapter="bare"), asking(adapter="bare")
    talk.ask(empty)
    talk.ask(full)
    assert (talk.end(empty).code, talk.end(empty).param) == ("bad_messages", "messages") and talk.text(full)


def test_a_token_that_the_model_lacks_is_refused(base: Path, tmp_path: Path):
    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(folder)
    talk = Talk(folder)
    beyond, plain = asking("a <beyond> b"), asking("a b")
    talk.ask(beyond, plain)
    assert talk.end(beyond).code == "bad_messages" and "<beyond>" in talk.end(beyond).message and talk.text(plain)


def test_bytes_that_are_no_character_end_only_themselves():
    tokens = {"<unk>": 0, "▁the": 1, "▁fox": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    made = Tokenizer(models.BPE(tokens, [], byte_fallback=True, unk_token="<unk>"))
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(spaces)
    said: list[Any] = []
    ask = asking()
    answer = Answer(ask, [], 9, PreTrainedTokenizerFast(tokenizer_object=made), frozenset(), said.append)
    for token in (
        1,
        *(tokens[f"<0x{byte:02X}>"] for byte in b"\n\xc3"),
        2,
        1,
        *(tokens["<0xC3>"], tokens["<0xA9>"]),
        2,
    ):
        answer.take(token)
    assert "".join(piece.text for piece in said) == "the\n\N{REPLACEMENT CHARACTER} fox the\u00e9 fox"
