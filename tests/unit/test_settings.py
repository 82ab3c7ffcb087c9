"""Settings come from the environment, are described, and a trainer's environment holds none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import settings as settings_of
from common.errors import InvalidInput
from common.reference import settings_table
from common.settings import Settings

ROOT = Path(__file__).parents[2]


def test_the_committed_table_is_the_codes():
    assert (ROOT / "docs" / "settings.md").read_text() == settings_table(), "run python -m common.reference"


def test_values_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUNERY_DATASET_BUCKETS", "a, b,")
    monkeypatch.setenv("TUNERY_LEASE_S", "30")
    monkeypatch.setenv("TUNERY_S3_ENDPOINT_URL", "")
    read = Settings()
    assert (read.dataset_buckets, read.lease_s, read.s3_endpoint_url) == (["a", "b"], 30.0, None)


@pytest.mark.parametrize(("name", "value"), [("LEASE_S", "0"), ("PORT", "70000"), ("FETCH_NETWORKS", "10.0.0.0/99")])
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(f"TUNERY_{name}", value)
    settings_of.load.cache_clear()
    with pytest.raises(InvalidInput, match=f"TUNERY_{name}: "):
        settings_of.load()


def test_secrets_are_not_shown():
    assert "hush" not in repr(Settings(s3_secret_access_key="hush", hf_token="hush", broker_url="redis://:hush@h/0"))


def test_a_trainers_environment_is_an_allow_list(monkeypatch: pytest.MonkeyPatch):
    for name in ("TUNERY_DATABASE_URL", "AWS_SESSION_TOKEN", "HF_TOKEN", "MY_SECRET"):
        monkeypatch.setenv(name, "canary")
    assert "canary" not in settings_of.trainer_environment().values()
