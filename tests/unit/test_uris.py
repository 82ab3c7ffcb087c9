"""Which dataset URIs are taken, in every spelling that has fooled somebody."""

from __future__ import annotations

import pytest

from common import uris
from common.errors import InvalidInput
from common.settings import Settings

SETTINGS = Settings(dataset_buckets=["data", "artifacts"], s3_bucket="artifacts")

PRIVATE = [
    "https://127.0.0.1/x", "https://127.1/x", "https://0x7f000001/x", "https://2130706433/x", "https://0177.0.0.1/x",
    "https://0/x", "https://0.0.0.0/x", "https://10.1.2.3/x", "https://172.16.0.1/x", "https://192.168.1.1/x",
    "https://169.254.169.254/latest/meta-data", "https://100.64.0.1/x", "https://224.0.0.1/x", "https://255.255.255.255/x",
    "https://[::1]/x", "https://[::]/x", "https://[::ffff:127.0.0.1]/x", "https://[::ffff:a9fe:a9fe]/x",
    "https://[fe80::1]/x", "https://[fe80::1%25eth0]/x", "https://[fc00::1]/x", "https://[fd00:ec2::254]/x",
    "https://[64:ff9b::7f00:1]/x", "https://[2002:7f00:1::]/x", "https://localhost/x", "https://LOCALHOST./x",
    "https://a.localhost/x", "https://192.0.2.1/x", "https://198.18.0.1/x", "https://240.0.0.1/x",
]  # fmt: skip


@pytest.mark.parametrize("uri", PRIVATE)
def test_private_addresses(uri: str):
    with pytest.raises(InvalidInput) as refusal:
        uris.check(uri, SETTINGS)
    assert refusal.value.param == "dataset" and refusal.value.message.startswith("dataset: ")


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("ftp://host/x", "dataset_scheme"), ("http://host/x", "dataset_scheme"), ("gopher://x", "dataset_scheme"),
        ("s3://artifacts/t/job/a1/adapter.tar.gz", "bucket_forbidden"), ("s3://other/x", "bucket_forbidden"),
        ("s3://data", "dataset_uri"), ("s3://data/", "dataset_uri"), ("dataset:", "dataset_not_found"),
        ("dataset:../x", "dataset_not_found"), ("dataset:ds_A", "dataset_not_found"), ("hf://one", "dataset_uri"),
        ("hf://a/../b", "dataset_uri"), ("hf://a/b/../../c", "dataset_uri"), ("https://", "dataset_uri"),
        ("https://user:secret@host/x", "dataset_credentials"), ("https://host:99999/x", "dataset_uri"),
        ("https://[::1/x", "dataset_uri"), ("https://999.1.1.1/x", "dataset_uri"),
        ("file:///etc/passwd", "file_forbidden"), ("file://host/etc/passwd", "file_forbidden"),
    ],
)  # fmt: skip
def test_refused(uri: str, code: str):
    with pytest.raises(InvalidInput) as refusal:
        uris.check(uri, SETTINGS)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    "uri",
    [
        "https://8.8.8.8/x", "https://example.org:8443/a?b=c", "https://[2606:4700::1111]/x", "s3://data/a/b.jsonl",
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
