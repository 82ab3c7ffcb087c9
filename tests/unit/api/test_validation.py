"""pydantic's lists of errors, folded into one message a field."""

from __future__ import annotations

import time
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.validation import field_problems
from common.schemas.hyperparameters import Hyperparameters
from common.schemas.jobs import JobSpec

GOOD = {"model": "org/name", "dataset": "hf://org/name"}


def problems(model: type[BaseModel], body: Any) -> list[tuple[str | None, str, str | None]]:
    with pytest.raises(ValidationError) as raised:
        model.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()]
    return [(found.param, found.message, found.hint) for found in field_problems(errors, body, model)]


def test_every_hyperparameter_has_one_readable_message() -> None:
    for name in Hyperparameters.model_fields:
        for value in ("nonsense", -5, [], {"a": 1}, None, 1e300):
            body = {**GOOD, "hyperparameters": {name: value}}
            try:
                JobSpec.model_validate(body)
            except ValidationError:
                [(param, message, _)] = problems(JobSpec, body)
                assert param == f"hyperparameters.{name}"
                assert "auto" in message and "constrained" not in message and "literal" not in message, message


def test_a_union_names_the_branch_that_was_meant() -> None:
    [(param, message, _)] = problems(JobSpec, {**GOOD, "lora": {"target_modules": ["a", ""]}})
    assert (param, message) == ("lora.target_modules.1", "must have at least 1 character")
    [(param, message, _)] = problems(JobSpec, {**GOOD, "lora": {"target_modules": "x" * 501}})
    assert (param, message) == ("lora.target_modules", "must have at most 500 characters")


def test_unknown_keys_in_a_list_of_models() -> None:
    class Inner(BaseModel):
        model_config = ConfigDict(extra="forbid")
        kind: Literal["a", "b"] = "a"

    class Outer(BaseModel):
        inner: list[Inner] = Field(max_length=2)

    assert problems(Outer, {"inner": [{}, {"kidn": 1}]}) == [("inner.1.kidn", "is not a known key", None)]


def test_a_body_that_is_no_object() -> None:
    assert problems(JobSpec, [1]) == [(None, "must be an object", None)]


def test_at_most_twenty_are_listed() -> None:
    assert len(problems(JobSpec, {**GOOD, **{f"k{number}": 1 for number in range(50)}})) == 20


def test_a_body_of_unknown_keys_takes_no_longer_than_it_is_long() -> None:
    body = {**GOOD, **{f"{number:x}": 1 for number in range(100_000)}}
    began = time.process_time()
    assert len(problems(JobSpec, body)) == 20
    # Each key against each other one took a quarter of an hour, in which the server answered nobody.
    assert time.process_time() - began < 30
