"""Where the client looks for its server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.client import ServerNotFound
from common.client.address import find_key, find_server


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("TUNERY_URL", "TUNERY_API_KEY", "TUNERY_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def up_left(folder: Path, url: str = "http://127.0.0.1:8123") -> None:
    folder.mkdir(parents=True)
    (folder / "up.json").write_text(json.dumps({"url": url}))
    (folder / "api-key").write_text("tnr_local\n")


def test_nothing_is_known():
    with pytest.raises(ServerNotFound) as caught:
        find_server()
    assert "up.json" in caught.value.message and "tunery up" in caught.value.hint


def test_what_tunery_up_left_is_found_by_itself(tmp_path: Path):
    up_left(tmp_path / ".tunery")
    address = find_server()
    assert (address.url, address.api_key) == ("http://127.0.0.1:8123", "tnr_local")
    assert "tnr_local" not in repr(address)


def test_in_the_folder_that_the_environment_or_an_argument_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    up_left(tmp_path / "a", "http://127.0.0.1:1")
    up_left(tmp_path / "b", "http://127.0.0.1:2")
    monkeypatch.setenv("TUNERY_DATA_DIR", str(tmp_path / "a"))
    assert find_server().url.endswith(":1")
    assert find_server(data_dir=tmp_path / "b").url.endswith(":2")


def test_the_environment_comes_first_and_gets_no_key_of_another_server(tmp_path: Path, monkeypatch):
    up_left(tmp_path / ".tunery")
    monkeypatch.setenv("TUNERY_URL", "https://tunery.example/")
    address = find_server()
    assert (address.url, address.api_key) == ("https://tunery.example", None)
    monkeypatch.setenv("TUNERY_API_KEY", "tnr_env")
    assert find_server().api_key == "tnr_env"
    assert find_server("http://other:1", "given").api_key == "given"
    monkeypatch.delenv("TUNERY_API_KEY")
    monkeypatch.setenv("TUNERY_URL", "http://127.0.0.1:8123/")
    assert find_server().api_key == "tnr_local"


def test_what_is_no_url_and_what_is_no_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUNERY_URL", "localhost:8000")
    with pytest.raises(ServerNotFound, match="not the URL"):
        find_server()
    with pytest.raises(ServerNotFound, match="API key"):
        find_server("http://x", "a key\nwith lines")


def test_a_broken_file_is_as_good_as_none(tmp_path: Path):
    up_left(tmp_path / ".tunery")
    (tmp_path / ".tunery" / "up.json").write_text("{")
    with pytest.raises(ServerNotFound):
        find_server()


def test_the_key_of_up_goes_to_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TUNERY_API_KEY", raising=False)
    (tmp_path / "api-key").write_text("tnr_here\n")
    for url in ("http://127.0.0.1:8001", "http://localhost:8001/", "http://[::1]:8001"):
        assert find_key(url, tmp_path) == "tnr_here"
    assert find_key("http://serve.example.org:8001", tmp_path) is None
    monkeypatch.setenv("TUNERY_API_KEY", "tnr_env")
    assert [find_key(f"http://{host}:8001", tmp_path) for host in ("127.0.0.1", "serve.example.org")] == ["tnr_env"] * 2
