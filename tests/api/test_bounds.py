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
# What a bound taken alone cannot be: it needs, or forbids, another field.
TOGETHER: dict[tuple[str, Any], dict[str, Any] | None] = {
    ("hyperparameters.max_steps", 0): None,
    ("method", "lora"): {"quantization": None},
    ("quantization.load_in_4bit", False): {"method": "lora"},
}
LITERALS = ["NaN", "-Infinity", "1e999", "9" * 5000, "01", '"a\\u0000b"', '["\\ud800"]', '{"\\udfff": "x"}']


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {key: value | first.get(key, {}) if isinstance(value, dict) else value for key, value in second.items()} | {
        key: value for key, value in first.items() if key not in second
    }


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
                needs = TOGETHER.get((field.name, value), {})
                if needs is not None:
                    answer = client.post("/jobs", json=SPEC | merged(field.body(value), needs))
                    assert answer.status_code == 201, (value, answer.text[:500])
                    assert shown(answer.json(), field) == value


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
