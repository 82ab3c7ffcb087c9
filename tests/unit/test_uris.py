"""Which dataset URIs are taken, in every spelling that has fooled somebody."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from common import uris
from common.errors import InvalidInput
from common.schemas.jobs import JobSpec
from common.settings import Settings
from tests.hostile.uris import FORBIDDEN, PRIVATE

SETTINGS = Settings(dataset_buckets=["data", "artifacts"], s3_bucket="artifacts")


@pytest.mark.parametrize("uri", PRIVATE)
def test_private_addresses(uri: str):
    with pytest.raises(InvalidInput) as refusal:
        uris.check(uri, SETTINGS)
    assert refusal.value.param == "dataset" and refusal.value.message.startswith("dataset: ")


@pytest.mark.parametrize(
    ("uri", "code"),
    FORBIDDEN,
)
def test_refused(uri: str, code: str):
    with pytest.raises(InvalidInput) as refusal:
        uris.check(uri, SETTINGS)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    "uri",
    [
        "https://8.8.8.8/x", "https://example.org:8443/a?b=c", "https://[2606:4700::1111]/x", "s3://data/a/b.jsonl",
        "s3://data/a file%20.jsonl", "s3://data/..a/b..", "s3://data/" + "é" * 512,
        "dataset:ds_01h2", "hf://org/name", "hf://org/name@v1.0/data/train.jsonl", "hf://datasets/org/name",
    ],
)  # fmt: skip
def test_taken(uri: str):
    uris.check(uri, SETTINGS)


def test_the_operators_networks_are_taken():
    uris.check("https://10.1.2.3/x", Settings(fetch_networks=["10.0.0.0/8"]))
    uris.check("https://[::ffff:10.1.2.3]/x", Settings(fetch_networks=["10.0.0.0/8"]))
    with pytest.raises(InvalidInput):
        uris.check("https://192.168.1.1/x", Settings(fetch_networks=["10.0.0.0/8"]))


def test_a_password_in_a_refused_uri_is_not_repeated():
    with pytest.raises(InvalidInput) as refusal:
        uris.check("https://user:secret@host/x", SETTINGS)
    assert "secret" not in refusal.value.message + str(refusal.value.hint)


@pytest.mark.parametrize(
    ("uri", "written"),
    [
        ("https://h/a.jsonl?X-Amz-Signature=s#f", "https://h/a.jsonl"),
        ("https://h/a.jsonl#f", "https://h/a.jsonl"),
        ("s3://bucket/a?b#c", "s3://bucket/a?b#c"),
        ("dataset:ds_0", "dataset:ds_0"),
    ],
)
def test_what_signs_a_link_is_not_written_down(uri: str, written: str):
    assert uris.without_signature(uri) == written


def test_blanks_are_part_of_a_key_and_no_part_of_a_link():
    taken = JobSpec(model="a/b", dataset="s3://data/a file%20.jsonl").dataset
    assert uris.parse(taken, SETTINGS).path == "a file%20.jsonl"
    with pytest.raises(ValidationError, match="write each as %20"):
        JobSpec(model="a/b", dataset="https://example.org/a file.jsonl")
