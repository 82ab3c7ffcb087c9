"""Which tokens carry loss, exactly, for the ways in which chat templates differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidInput
from tests.worker.trainer.tiny import CHATML, build_tokenizer
from worker.data.rows import Message, Row
from worker.data.source import Problems, Source
from worker.ml.plan import Asked
from worker.ml.render import NO_LOSS, Example, Renderer
from worker.ml.tokenizer import ensure_chat_template, load_tokenizer
from worker.ml.words import common_prefix

SOURCE = Source(Path("rows.jsonl"))
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Gemma's: no system role.
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
# As Qwen3's and DeepSeek's: the reasoning of earlier turns is left out.
FORGETFUL = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Renders the last turn alone in another way, so that no prefix of a conversation is a prefix of its rendering.
BACKWARDS = "{% for message in messages | reverse %}{{ message['role'] + ':' + message['content'] + '\n' }}{% endfor %}"
MARKED_BACKWARDS = (
    "{% for message in messages | reverse %}{{ message['role'] + ':' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
SILENT = (
    "{% for message in messages if message['role'] in ('user', 'assistant') %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    build_tokenizer(tmp_path, getattr(request, "param", CHATML))
    loaded = load_tokenizer(tmp_path)
    ensure_chat_template(loaded)
    return loaded


def chat(*turns: tuple[str, str], trained: dict[int, bool] | None = None) -> Row:
    messages = (Message(role, text, trained=(trained or {}).get(i, True)) for i, (role, text) in enumerate(turns))
    return Row(1, "chat", messages=tuple(messages))


def render(tokenizer: Any, row: Row, max_length: int = 1000, loss: Asked = "auto") -> Example:
    return next(Renderer(tokenizer, max_length, loss).render(SOURCE, [row]))


def learnt(tokenizer: Any, example: Example) -> list[str]:
    """Return the stretches of text that carry loss."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, NO_LOSS)
        if label != NO_LOSS:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


TWO_TURNS = chat(("user", "the fox"), ("assistant", "jumps"), ("user", "and birds"), ("assistant", "sing to the sea"))


@pytest.mark.parametrize("tokenizer", [CHATML, DEFAULT_SYSTEM, STRICT], indirect=True)
def test_every_answer_and_its_end_token_are_learnt(tokenizer: Any):
    example = render(tokenizer, TWO_TURNS)
    assert example.loss == "assistant"
    assert learnt(tokenizer, example) == ["jumps<|im_end|>", "sing to the sea<|im_end|>"]
    whole = tokenizer.apply_chat_template([m.as_dict() for m in TWO_TURNS.messages], tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole


def test_the_tokens_are_those_of_the_prompt_at_inference(tokenizer: Any):
    example = render(tokenizer, TWO_TURNS)
    turns = [message.as_dict() for message in TWO_TURNS.messages[:3]]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt) - 1] == NO_LOSS and example.labels[len(prompt)] != NO_LOSS


def test_a_turn_of_weight_zero_is_read_and_not_learnt(tokenizer: Any):
    row = chat(*((m.role, m.content) for m in TWO_TURNS.messages), trained={1: False})
    assert learnt(tokenizer, render(tokenizer, row)) == ["sing to the sea<|im_end|>"]


@pytest.mark.parametrize("tokenizer", [FORGETFUL], indirect=True)
def test_where_earlier_turns_are_rewritten_the_last_one_is_learnt(tokenizer: Any):
    row = chat(("user", "a"), ("assistant", "quiet</think>jumps"), ("user", "b"), ("assistant", "quiet</think>sing"))
    example = render(tokenizer, row)
    assert example.loss == "last_turn"
    assert learnt(tokenizer, example) == ["quiet</think>sing<|im_end|>"]
    plain = render(tokenizer, chat(("user", "a"), ("assistant", "jumps"), ("user", "b"), ("assistant", "sing")))
    assert plain.loss == "assistant" and len(learnt(tokenizer, plain)) == 2


@pytest.mark.parametrize("tokenizer", [BACKWARDS], indirect=True)
def test_where_nothing_can_be_told_apart_the_whole_text_is_learnt(tokenizer: Any):
    example = render(tokenizer, TWO_TURNS)
    assert example.loss == "whole" and example.labels == example.input_ids


@pytest.mark.parametrize("tokenizer", [MARKED_BACKWARDS], indirect=True)
def test_the_markers_of_a_template_are_asked(tokenizer: Any):
    example = render(tokenizer, TWO_TURNS)
    assert example.loss == "assistant"
    assert learnt(tokenizer, example) == ["sing to the sea", "jumps"]


@pytest.mark.parametrize("tokenizer", [STRICT], indirect=True)
def test_what_the_template_refuses_names_the_row(tokenizer: Any):
    row = chat(("system", "be brief"), ("user", "a"), ("assistant", "b"))
    with pytest.raises(InvalidInput, match=r"row 1: the chat template refuses .*: System role not supported"):
        render(tokenizer, row)
    problems = Problems()
    assert len(list(Renderer(tokenizer, 99).render(SOURCE, [row, TWO_TURNS, row], problems))) == 1
    assert problems.count == 2


@pytest.mark.parametrize("tokenizer", [SILENT], indirect=True)
@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_a_role_that_the_template_drops_is_refused_by_name(tokenizer: Any, role: str):
    row = chat(("user", "a"), (role, "weather"), ("assistant", "b"))
    named = "system" if role == "developer" else role
    with pytest.raises(InvalidInput, match=rf"messages\[1\]: .*leaves out the role '({named}|{role})'"):
        render(tokenizer, row)


def test_a_developer_is_a_system_to_a_template_that_does_not_know_it(tokenizer: Any):
    example = render(tokenizer, chat(("developer", "be brief"), ("user", "a"), ("assistant", "b")))
    assert tokenizer.decode(example.input_ids).startswith("<|im_start|>system\nbe brief")


def test_prompt_and_completion(tokenizer: Any):
    example = render(tokenizer, Row(1, "completion", prompt="the fox:", completion="jumps"))
    assert example.loss == "completion"
    assert learnt(tokenizer, example) == ["jumps<|im_end|>"]
    # A token that reaches over the edge belongs to the completion.
    merged = render(tokenizer, Row(1, "completion", prompt="the quick bro", completion="wn"))
    assert learnt(tokenizer, merged)[0].endswith("wn<|im_end|>")


def test_prompt_and_completion_of_messages(tokenizer: Any):
    messages = TWO_TURNS.messages
    example = render(tokenizer, Row(1, "completion", messages=messages, num_prompt=3))
    assert example.loss == "completion" and learnt(tokenizer, example) == ["sing to the sea<|im_end|>"]


def test_text_is_learnt_whole_and_ended_once(tokenizer: Any):
    for text in ("the fox", "the fox<|im_end|>"):
        example = render(tokenizer, Row(1, "text", text=text))
        assert example.labels == example.input_ids
        assert tokenizer.decode(example.input_ids) == "the fox<|im_end|>"


def test_rows_are_cut_and_counted(tokenizer: Any):
    whole = render(tokenizer, TWO_TURNS)
    cut = render(tokenizer, TWO_TURNS, max_length=10)
    assert cut.input_ids == whole.input_ids[:10] and cut.labels == whole.labels[:10]
    assert cut.num_cut == len(whole.input_ids) - 10 and whole.num_cut == 0


@pytest.mark.parametrize("tokenizer", [None], indirect=True)
def test_a_base_without_a_template_gets_a_plain_one(tokenizer: Any):
    example = render(tokenizer, TWO_TURNS)
    assert example.loss == "assistant"
    assert learnt(tokenizer, example) == ["jumps<|im_end|>", "sing to the sea<|im_end|>"]
    assert tokenizer.decode(example.input_ids).startswith("### User:\nthe fox\n\n### Assistant:\njumps<|im_end|>")


def test_tools_are_rendered(tmp_path: Path):
    build_tokenizer(tmp_path, "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + CHATML)
    tokenizer = load_tokenizer(tmp_path)
    row = Row(1, "chat", messages=TWO_TURNS.messages, tools=({"name": "boats"},))
    example = render(tokenizer, row)
    assert tokenizer.decode(example.input_ids).startswith("boats<|im_start|>user")
    assert learnt(tokenizer, example) == ["jumps<|im_end|>", "sing to the sea<|im_end|>"]


def test_the_padding_token_is_one_that_exists(tokenizer: Any):
    assert tokenizer.pad_token == "<|pad|>" and len(tokenizer) == tokenizer.vocab_size
    assert render(tokenizer, TWO_TURNS).labels.count(tokenizer.pad_token_id) == 0


@pytest.mark.parametrize(
    ("prefix", "whole", "length"), [([1, 2], [1, 2, 3], 2), ([1, 9], [1, 2], 1), ([], [1], 0), ([1, 2, 3], [1, 2], 2)]
)
def test_common_prefix(prefix: list[int], whole: list[int], length: int):
    assert common_prefix(prefix, whole) == length


QUESTION = Row(1, "completion", prompt="the fox:", completion="jumps")
ANSWERED = Row(1, "completion", messages=TWO_TURNS.messages, num_prompt=3)
WHOLE = (
    "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\njumps<|im_end|>\n"
    "<|im_start|>user\nand birds<|im_end|>\n<|im_start|>assistant\nsing to the sea<|im_end|>\n"
)


@pytest.mark.parametrize(
    ("row", "loss", "expected"),
    [
        (TWO_TURNS, "assistant", ["jumps<|im_end|>", "sing to the sea<|im_end|>"]),
        (TWO_TURNS, "completion", ["sing to the sea<|im_end|>"]),
        (TWO_TURNS, "all", [WHOLE]),
        (ANSWERED, "assistant", ["jumps<|im_end|>", "sing to the sea<|im_end|>"]),
        (ANSWERED, "completion", ["sing to the sea<|im_end|>"]),
        (ANSWERED, "all", [WHOLE]),
        (QUESTION, "completion", ["jumps<|im_end|>"]),
        (QUESTION, "all", ["the fox:jumps<|im_end|>"]),
        (Row(1, "text", text="the fox"), "all", ["the fox<|im_end|>"]),
    ],
)
def test_the_loss_that_was_asked_for(tokenizer: Any, row: Row, loss: Asked, expected: list[str]):
    assert learnt(tokenizer, render(tokenizer, row, loss=loss)) == expected


@pytest.mark.parametrize(
    ("row", "loss", "words"),
    [
        (Row(1, "text", text="the fox"), "completion", "is one text, without a completion"),
        (Row(1, "text", text="the fox"), "assistant", "is one text"),
        (QUESTION, "assistant", "has no assistant turns"),
        (chat(("user", "a"), ("assistant", "b"), trained={1: False}), "completion", r"messages\[1\].* has weight 0"),
    ],
)
def test_a_loss_that_a_row_cannot_have_is_refused(tokenizer: Any, row: Row, loss: Asked, words: str):
    with pytest.raises(InvalidInput, match=rf"row 1: .*{words}") as caught:
        render(tokenizer, row, loss=loss)
    assert "hyperparameters.loss" in (caught.value.hint or "")


@pytest.mark.parametrize("tokenizer", [BACKWARDS], indirect=True)
@pytest.mark.parametrize("loss", ["completion", "assistant"])
def test_a_loss_asked_for_by_name_is_not_replaced_by_another(tokenizer: Any, loss: Asked):
    with pytest.raises(InvalidInput, match="row 1: the chat template does not tell"):
        render(tokenizer, TWO_TURNS, loss=loss)


@pytest.mark.parametrize("tokenizer", [FORGETFUL], indirect=True)
def test_rewritten_turns_are_no_assistant_turns(tokenizer: Any):
    row = chat(("user", "a"), ("assistant", "quiet</think>jumps"), ("user", "b"), ("assistant", "quiet</think>sing"))
    with pytest.raises(InvalidInput, match="does not tell the assistant's turns apart"):
        render(tokenizer, row, loss="assistant")
    assert learnt(tokenizer, render(tokenizer, row, loss="completion")) == ["quiet</think>sing<|im_end|>"]


def test_any_turn_may_be_muted_where_the_whole_is_learnt(tokenizer: Any):
    turns = [("system", "be quiet"), *((m.role, m.content) for m in TWO_TURNS.messages)]
    row = chat(*turns, trained={0: False, 2: False})
    assert learnt(tokenizer, render(tokenizer, row, loss="all")) == [
        "<|im_start|>user\nthe fox<|im_end|>\n",
        "<|im_start|>user\nand birds<|im_end|>\n<|im_start|>assistant\nsing to the sea<|im_end|>\n",
    ]


def test_weights_count_within_a_completion(tokenizer: Any):
    messages = chat(*((m.role, m.content) for m in TWO_TURNS.messages), trained={1: False}).messages
    example = render(tokenizer, Row(1, "completion", messages=messages, num_prompt=1))
    assert learnt(tokenizer, example) == [WHOLE[WHOLE.index("<|im_start|>user\nand birds") :].removesuffix("\n")]


@pytest.mark.parametrize("tokenizer", [BACKWARDS], indirect=True)
@pytest.mark.parametrize("loss", ["auto", "all"])
def test_a_weight_that_cannot_be_honoured_is_refused(tokenizer: Any, loss: Asked):
    row = chat(*((m.role, m.content) for m in TWO_TURNS.messages), trained={1: False})
    with pytest.raises(InvalidInput, match=r"row 1: the chat template does not tell messages\[1\], which has weight 0"):
        render(tokenizer, row, loss=loss)


def test_a_greeting_is_read_and_not_learnt(tokenizer: Any):
    row = chat(("assistant", "quiet birds"), ("user", "the fox"), ("assistant", "jumps"))
    for loss in ("auto", "assistant"):
        example = render(tokenizer, row, loss=loss)
        assert example.loss == "assistant" and learnt(tokenizer, example) == ["jumps<|im_end|>"]
