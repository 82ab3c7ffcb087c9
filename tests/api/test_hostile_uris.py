"""Hostile dataset URIs through `POST /jobs`: refused at once by the field's name, and nothing is left behind.

What only a resolver can tell (a name that leads to a private address, or somewhere else the second time, or a redirect)
is refused when the check fetches it, before a GPU is asked for: `tests/worker/test_fetch.py`.
"""

from __future__ import annotations

import httpx2
import pytest

from tests.api.conftest import SPEC, Api
from tests.hostile.uris import FORBIDDEN, PRIVATE, TRICKS


@pytest.mark.parametrize("param", ["dataset", "validation_dataset"])
def test_refused_at_submit(api: Api, client: httpx2.Client, param: str, subtests: pytest.Subtests):
    for uri in [*PRIVATE, *(uri for uri, _ in FORBIDDEN), *TRICKS]:
        with subtests.test(uri=uri[:60]):
            answer = client.post("/jobs", json=SPEC | {param: uri})
            assert answer.status_code == 400, (uri, answer.text[:300])
            problem = answer.json()
            assert problem["param"] == param and problem["detail"] and len(answer.content) < 5000, problem
            assert "secret" not in answer.text
    assert client.get("/jobs").json()["data"] == []
