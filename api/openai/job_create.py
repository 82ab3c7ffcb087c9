"""The body of `POST /v1/fine_tuning/jobs`, and the job that it asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BeforeValidator, Field, ValidationError

from api.openai.hyperparameters import AnyHyperparameters, SupervisedHyperparameters, translated
from common import fine_tuned
from common.datasets import SCHEME
from common.errors import InvalidInput, UserError
from common.schemas.exports import Exports
from common.schemas.jobs import (
    ChatTemplate,
    JobSpec,
    Metadata,
    ModelName,
    NotBefore,
    Priority,
    SamplePrompts,
    Suffix,
)
from common.schemas.lora import Lora, Quantization
from common.schemas.methods import Method
from common.schemas.values import Strict, Text

# What a job calls its files, and what OpenAI's clients do.
_FILES = {"validation_dataset": "validation_file", "dataset": "training_file"}
_FILE_WORD = re.compile(r"^(validation_dataset|dataset)\b|\bvalidation_dataset\b")
_OTHER_METHODS = {
    "dpo": "preference optimisation (DPO)",
    "reinforcement": "reinforcement fine-tuning",
}


def _base(value: Any) -> Any:
    if isinstance(value, str) and fine_tuned.is_fine_tuned(value):
        raise ValueError("is a fine-tuned model, and training goes on from base models only; name its base")
    return value


def _file(value: Any) -> Any:
    """Return the URI of a file: an id names an upload, and any other URI that a dataset may have is taken too."""
    return f"{SCHEME}{value}" if isinstance(value, str) and ":" not in value else value


FileName = Annotated[Text, Field(min_length=1, max_length=2048), BeforeValidator(_file)]


class Supervised(Strict):
    """`method.supervised`."""

    hyperparameters: SupervisedHyperparameters | None = None


class MethodObject(Strict):
    """OpenAI's `method`. Only `supervised` is trained here."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class Integration(Strict):
    """A service that is told of a job. None is supported; an empty list or null is taken."""

    type: Text
    wandb: dict[str, Any] | None = None


class JobCreate(Strict):
    """What OpenAI's clients send, and by `extra_body` whatever else a job of Tunery takes.

    `method` is OpenAI's object, or one of Tunery's words.
    """

    model: Annotated[ModelName, BeforeValidator(_base)]
    training_file: FileName
    validation_file: FileName | None = None
    method: MethodObject | Method | None = None
    hyperparameters: AnyHyperparameters | None = None
    integrations: Annotated[list[Integration], Field(max_length=16)] | None = None
    metadata: Metadata | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    suffix: Suffix | None = None

    validation_split: Annotated[float, Field(gt=0, le=0.5)] | None = None
    chat_template: ChatTemplate | None = None
    sample_prompts: SamplePrompts | None = None
    lora: Lora | None = None
    quantization: Quantization | None = None
    priority: Priority | None = None
    not_before: NotBefore | None = None
    export: Exports | None = None


def asked(body: JobCreate) -> JobSpec:
    """Return the job that `body` asks for.

    Raises:
        InvalidInput: it asks for what is not done here, or for one thing twice.
        RequestValidationError: its parts do not fit together.
    """
    _check_supported(body)
    given = body.model_dump(exclude_unset=True, exclude_none=True)
    method = body.method if isinstance(body.method, str) else _method(body.quantization)
    supervised = body.method.supervised if isinstance(body.method, MethodObject) else None
    theirs = supervised.hyperparameters if supervised else None
    values = given | {
        "method": method,
        "dataset": body.training_file,
        "hyperparameters": translated(
            method,
            theirs.model_dump(exclude_none=True) if theirs else {},
            given.get("hyperparameters", {}),
        ),
    }
    if body.validation_file is not None:
        values["validation_dataset"] = body.validation_file
    for name in ("training_file", "validation_file", "integrations"):
        values.pop(name, None)
    try:
        return JobSpec.model_validate(values)
    except ValidationError as error:
        problems = [{**each, "loc": ("body", *map(_renamed, each["loc"])), "msg": in_openai_words(each["msg"])}
                    for each in error.errors()]  # fmt: skip
        raise RequestValidationError(problems, body=body.model_dump(mode="json", exclude_unset=True)) from error


def _check_supported(body: JobCreate) -> None:
    for name, words in _OTHER_METHODS.items():
        if isinstance(body.method, MethodObject) and (body.method.type == name or getattr(body.method, name)):
            raise InvalidInput(
                f"method: this server does no {words}, only supervised fine-tuning",
                param="method",
                code="method_unsupported",
                hint='Use {"type": "supervised"} with rows of messages or of prompt and completion.',
            )
    if body.integrations:
        raise InvalidInput(
            f"integrations: this server reports to no {body.integrations[0].type[:32]}",
            param="integrations",
            code="integration_unsupported",
            hint="Leave it out; events, checkpoints and the result file hold every metric.",
        )


def _method(quantization: Quantization | None) -> Method:
    # OpenAI's `method` may stand where Tunery's word would: a base that is not held in 4 bit is LoRA, by its settings.
    return "lora" if quantization is not None and not quantization.load_in_4bit else "qlora"


def _renamed(part: str | int) -> str | int:
    return _FILES.get(part, part) if isinstance(part, str) else part


def in_openai_words(message: str) -> str:
    """Return `message` with a job's files called as OpenAI's clients call them."""
    return _FILE_WORD.sub(lambda found: _FILES[found[0]], message)


def in_openai_param(param: str | None) -> str | None:
    """Return `param` as OpenAI's clients call it."""
    return None if param is None else _FILES.get(param, param)


@contextmanager
def openai_words() -> Iterator[None]:
    """Let errors name the files of a job as OpenAI's clients do."""
    try:
        yield
    except UserError as error:
        error.message, error.param = in_openai_words(error.message), in_openai_param(error.param)
        raise
