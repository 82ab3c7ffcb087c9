"""What a trainer quotes from a dataset may hold what no database stores; that must not cost the job."""

from __future__ import annotations

import pytest

from common.jobs import queries
from tests.worker.conftest import Bench


@pytest.fixture
def bench_database_url(database_url: str) -> str:
    """Each kind in turn: they refuse different characters."""
    return database_url


def test_an_event_with_characters_that_no_database_stores(bench: Bench):
    job_id = bench.submit(fault="odd_words", fault_at=3)
    bench.check()
    _, thread = bench.start()
    thread.join(30)
    assert bench.row(job_id).status == "succeeded" and bench.row(job_id).attempts == 1
    with bench.context.read() as session:
        said = [event for event in queries.events(session, job_id).data if event.name == "trainer.said"]
    assert [(event.message, event.data) for event in said] == [
        ("a NUL \ufffd and half a character \ufffd", {"row": "\ufffd \ufffd"})
    ]
