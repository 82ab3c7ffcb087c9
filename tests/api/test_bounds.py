"""Every field of `POST /jobs` at each of its bounds, and beyond: taken, or refused by name, and never a 5xx."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from tests.api.conftest import SPEC
from tests.hostile import bounds
from tests.hostile.bounds import Field

FIELDS = bounds.fields()
# A value may need another field: each has to be taken beside one of these.
BESIDE: list[dict[str, Any]] = [
    {},
    {"method": "lora", "quantization": None},
    {"method": "lora"},
    {"validation_dataset": SPEC["dataset"]},
]
NEVER = [("hyperparameters.max_steps", 0)]
LITERALS = ["NaN", "-Infinity", "1e999", "9" * 5000, "01", '"a\\u0000b"', '["\\ud800"]', '{"\\udfff": "x"}']


def refused(answer: httpx2.Response, name: str) -> None:
    assert answer.status_code == 400, (answer.status_code, answer.text[:300])
    problem = answer.json()
    named = [problem.get("param"), *(each["param"] for each in problem.get("errors", []))]
    # A wrong item of a list or a map is named by its place inside.
    assert any(each == name or str(each).startswith(name + ".") for each in named), problem
    assert len(answer.content) < 20_000


def test_at_each_bound(client: httpx2.Client, subtests: pytest.Subtests):
    for field in FIELDS:
        with subtests.test(field=field.name):
            for value in bounds.at_the_bounds(field):
                if (field.name, value) not in NEVER:
                    assert shown(taken(client, field.body(value)), field) == value


def taken(client: httpx2.Client, part: dict[str, Any]) -> dict[str, Any]:
    """Return the job that the API makes of `part`, beside whatever else it needs."""
    for beside in BESIDE:
        answer = client.post("/jobs", json=SPEC | beside | part)
        if answer.status_code == 201:
            job: dict[str, Any] = answer.json()
            return job
        assert answer.status_code == 400, answer.text
    raise AssertionError((part, answer.text[:500]))


def shown(job: dict[str, Any], field: Field) -> Any:
    """Return what a job says of `field`."""
    value: Any = job
    for key in field.path:
        value = value[key]
    return value


def test_beyond_each_bound(client: httpx2.Client, subtests: pytest.Subtests):
    for field in FIELDS:
        cases = bounds.beyond(field)
        assert len(cases) > 5
        with subtests.test(field=field.name):
            for value in cases:
                refused(client.post("/jobs", json=SPEC | field.body(value)), field.name)
    assert client.get("/jobs").json()["data"] == []


def test_what_is_no_number_and_no_text(client: httpx2.Client, subtests: pytest.Subtests):
    for field in FIELDS:
        with subtests.test(field=field.name):
            for literal in LITERALS:
                body = json.dumps(SPEC)[:-1].encode() + b", " + bounds.raw(field, literal)[1:]
                answer = client.post("/jobs", content=body, headers={"content-type": "application/json"})
                assert answer.status_code == 400, (literal[:20], answer.text[:300])


def test_the_fields_are_read_from_the_schema():
    names = {field.name for field in FIELDS}
    assert {"hyperparameters.learning_rate", "lora.r", "quantization.bnb_4bit_quant_type", "seed", "suffix"} <= names
