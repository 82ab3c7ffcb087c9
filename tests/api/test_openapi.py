"""The description of the API is true: what is generated from it gets documented answers, and never a 5xx."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.api.conftest import SPEC, Api
from tests.processes import ROOT

# Not `unsupported_method`, `negative_data_rejection` and the like: strict about what OpenAPI cannot say, such as that
# a dataset's URI must name something that is there.
CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def test_documentation_needs_no_other_host(client: httpx2.Client) -> None:
    page = client.get("/docs", headers={"authorization": ""})
    assert page.status_code == 200 and not re.search(r"(src|href)=\"(https?:)?//", page.text)
    for path in re.findall(r"(?:src|href)=\"(/[^\"]+)\"", page.text):
        assert client.get(path).status_code == 200, path
    assert client.get("/docs/files/../../../pyproject.toml").status_code == 404
    assert client.get("/docs/files/%2e%2e/%2e%2e/app.py").status_code == 404


def test_the_description_names_what_is_answered(client: httpx2.Client) -> None:
    described = client.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    assert "HTTPValidationError" not in described["components"]["schemas"]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], (path, method)
            if path not in ("/livez", "/readyz"):
                assert operation["security"], (path, method)
                assert {"400", "401", "503"} <= set(operation["responses"]), (path, method)


def test_the_committed_description_is_the_one_that_is_served(client: httpx2.Client) -> None:
    committed = json.loads((ROOT / "docs" / "openapi.json").read_text())
    assert client.get("/openapi.json").json() == committed, "python -m api.description > docs/openapi.json"


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_generated_requests_get_documented_answers(api: Api, client: httpx2.Client, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    schema.config.update(base_url=api.url)
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        with contextlib.suppress(Unsatisfiable):
            # An operation without parameters cannot be called wrongly.
            generated(api, client, operation, mode)
    assert len(operations) >= 20


def generated(api: Api, client: httpx2.Client, operation: Any, mode: GenerationMode) -> None:
    """Send requests that the description allows, or just not, half of them about a job that is there."""
    turns = itertools.count()

    @given(operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=8,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case) -> None:
        if "job_id" in case.path_parameters and next(turns) % 2:
            case.path_parameters["job_id"] = client.post("/jobs", json=SPEC).json()["id"]
        if isinstance(case.query, dict) and str(case.query.get("wait", 0)).isdigit():
            case.query.pop("wait", None)
        case.call_and_validate(headers={"Authorization": f"Bearer {api.key}"}, checks=CHECKED)

    send()
