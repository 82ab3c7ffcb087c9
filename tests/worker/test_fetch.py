"""Datasets and bases come from where their names say, and from nowhere else."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.context import Context
from common.errors import InfraError, InvalidInput, TooLarge
from common.schemas.jobs import JobSpec
from common.settings import Settings
from tests.worker.peers import REVISION, Answer, Hub, certificate, serve
from worker import bases, fetch, guard

ROWS = b'{"text": "a"}\n'
LOOPBACK = "127.0.0.0/8"


def alive() -> None:
    """The attempt goes on."""


def changed(context: Context, **changes: object) -> Context:
    """Return `context` with other settings."""
    return Context(context.settings.model_copy(update=changes), context.sessions, context.store, context.doorbell)


def got(context: Context, uri: str, folder: Path) -> tuple[str, bytes]:
    """Fetch `uri` and return the file's name and content."""
    fetched = fetch.dataset(context, "t", uri, folder, "train", alive)
    return fetched.file, (folder / fetched.file).read_bytes()


# ---- https -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def https(tmp_path: Path) -> Iterator[Callable]:
    """Serve answers by path at https://localhost:port; returns (server, settings that may reach it)."""
    context, authority = certificate(tmp_path, "localhost", "data.example")
    pages: dict[str, Answer] = {"/train.jsonl": Answer(ROWS)}
    with serve(lambda path, _: pages.get(path, Answer(b"", 404)), context) as server:

        def open_to(settings: Settings, networks: list[str]) -> Settings:
            return settings.model_copy(update={"ca_bundle": authority, "fetch_networks": networks})

        yield server, pages, open_to


def download(https, settings: Settings, path: str, to: Path, host: str = "localhost", networks=(LOOPBACK,)) -> bytes:
    server, _, open_to = https
    guard.download(f"https://{host}:{server.server_port}{path}", to, open_to(settings, list(networks)), alive)
    return to.read_bytes()


def test_https_from_a_listed_network(https, tmp_path: Path):
    assert download(https, Settings(), "/train.jsonl", tmp_path / "x") == ROWS


def test_a_private_address_is_refused_without_a_connection(https, tmp_path: Path):
    with pytest.raises(InvalidInput, match=r"127\.0\.0\.1, which is not a public address") as refusal:
        download(https, Settings(), "/train.jsonl", tmp_path / "x", networks=())
    assert refusal.value.param == "dataset" and https[0].requests == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_to_a_private_address_is_refused(https, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch):
    https[1]["/hop"] = Answer(b"", 302, {"Location": f"https://{host}:{https[0].server_port}/train.jsonl"})
    real = guard.public_address
    seen: list[str] = []

    def first_is_allowed(name: str, port: int, settings: Settings):
        seen.append(name)
        return real(name, port, settings if len(seen) == 1 else Settings())

    monkeypatch.setattr(guard, "public_address", first_is_allowed)
    with pytest.raises(InvalidInput, match="not a public address"):
        download(https, Settings(), "/hop", tmp_path / "x")
    assert https[0].requests == ["/hop"]


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let names have addresses, one after the other; returns the list of the names that were asked for."""
    real = socket.getaddrinfo

    def install(**addresses: list[str]) -> list[str]:
        asked: list[str] = []

        def resolve(host: str, port: int, *rest: object, **options: object):
            known = addresses.get(host.replace(".", "_"))
            if known is None:
                return real(host, port, *rest, **options)
            asked.append(host)
            return real(known[min(len(asked), len(known)) - 1], port, *rest, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return asked

    return install


def test_a_name_is_resolved_once(https, tmp_path: Path, name_server: Callable[..., list[str]]):
    """A name that leads elsewhere the second time (DNS rebinding) is never asked a second time."""
    asked = name_server(data_example=["127.0.0.1", "169.254.169.254"])
    assert download(https, Settings(), "/train.jsonl", tmp_path / "x", host="data.example") == ROWS
    assert asked == ["data.example"]


def test_the_certificate_must_name_the_host(https, tmp_path: Path, name_server: Callable[..., list[str]]):
    name_server(evil_example=["127.0.0.1"])
    with pytest.raises(InvalidInput, match=r"certificate of 'evil\.example'"):
        download(https, Settings(), "/train.jsonl", tmp_path / "x", host="evil.example")


def test_a_redirect_to_plain_http_is_refused(https, tmp_path: Path):
    https[1]["/hop"] = Answer(b"", 302, {"Location": "http://localhost/train.jsonl"})
    with pytest.raises(InvalidInput, match="http is not fetched"):
        download(https, Settings(), "/hop", tmp_path / "x")


def test_redirects_end(https, tmp_path: Path):
    https[1]["/loop"] = Answer(b"", 302, {"Location": "/loop"})
    with pytest.raises(InvalidInput, match="redirects"):
        download(https, Settings(), "/loop", tmp_path / "x")
    assert len(https[0].requests) == 6


def test_an_answer_that_is_too_large_is_cut_off(https, tmp_path: Path):
    https[1]["/big"] = Answer(b"x" * 3_000_000)
    with pytest.raises(TooLarge, match="more than 1000000 bytes"):
        download(https, Settings(max_dataset_bytes=1_000_000), "/big", tmp_path / "x")
    assert (tmp_path / "x").stat().st_size <= 1_000_000


@pytest.mark.parametrize(
    ("status", "error"), [(404, InvalidInput), (403, InvalidInput), (500, InfraError), (429, InfraError)]
)
def test_refusals_and_failures_are_told_apart(https, tmp_path: Path, status: int, error: type[Exception]):
    https[1]["/x"] = Answer(b"", status)
    with pytest.raises(error, match=str(status)):
        download(https, Settings(), "/x", tmp_path / "x")


def test_a_cancel_ends_a_download(https, tmp_path: Path):
    def stop() -> None:
        raise RuntimeError("cancelled")

    server, _, open_to = https
    with pytest.raises(RuntimeError, match="cancelled"):
        guard.download(f"https://localhost:{server.server_port}/train.jsonl", tmp_path / "x",
                       open_to(Settings(), [LOOPBACK]), stop)  # fmt: skip


# ---- files and buckets -----------------------------------------------------------------------------------------------


def test_file_under_the_operators_folder(installation: Context, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my rows.csv").write_bytes(b"text\na\n")
    context = changed(installation, local_datasets=tmp_path / "data")
    assert got(context, f"file://{tmp_path}/data/my%20rows.csv", tmp_path) == ("dataset/train.csv", b"text\na\n")
    # Only its ending tells a file with tabs from one with commas.
    (tmp_path / "data" / "rows.tsv").write_bytes(b"prompt\tcompletion\na\tb\n")
    assert got(context, f"file://{tmp_path}/data/rows.tsv", tmp_path)[0] == "dataset/train.tsv"


@pytest.mark.parametrize("path", ["../secret.jsonl", "%2e%2e/secret.jsonl", "link.jsonl", "", "/etc/passwd"])
def test_nothing_outside_that_folder(installation: Context, tmp_path: Path, path: str):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jsonl").write_bytes(ROWS)
    (tmp_path / "data" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    context = changed(installation, local_datasets=tmp_path / "data")
    with pytest.raises(InvalidInput, match="outside of the folder"):
        got(context, f"file://{path}" if path.startswith("/") else f"file://{tmp_path}/data/{path}", tmp_path)


def test_no_file_where_the_operator_names_no_folder(installation: Context, tmp_path: Path):
    with pytest.raises(InvalidInput, match="reads no file:// datasets"):
        got(installation, "file:///etc/passwd", tmp_path)


def test_s3_from_a_listed_bucket(installation: Context, s3, tmp_path: Path):
    bucket = s3.new_bucket()
    other = Context(installation.settings, installation.sessions, installation.store, installation.doorbell)
    other.store._client.put_object(Bucket=bucket, Key="a/b.jsonl", Body=ROWS)
    context = changed(installation, dataset_buckets=[bucket])
    assert got(context, f"s3://{bucket}/a/b.jsonl", tmp_path) == ("dataset/train.jsonl", ROWS)
    with pytest.raises(InvalidInput, match="nothing at"):
        got(context, f"s3://{bucket}/missing.jsonl", tmp_path)


@pytest.mark.parametrize(
    "key", ["my rows.jsonl", "a%20b+c.jsonl", "é?x=1#y.jsonl", "..a/%2e%2e/b...jsonl", "a//b.jsonl"]
)
def test_an_s3_key_is_taken_as_it_stands(installation: Context, s3, tmp_path: Path, key: str):
    bucket = s3.new_bucket()
    s3.client().put_object(Bucket=bucket, Key=key, Body=ROWS)
    context = changed(installation, dataset_buckets=[bucket])
    uri = JobSpec(model="org/name", dataset=f"s3://{bucket}/{key}").dataset
    assert got(context, uri, tmp_path) == ("dataset/train.jsonl", ROWS)


@pytest.mark.parametrize("way", ["..", "a/../..", r"..\..", "a/%2e%2e/../.."])
def test_no_s3_key_leads_into_the_artifact_bucket(installation: Context, s3, tmp_path: Path, way: str):
    bucket, own = s3.new_bucket(), installation.settings.s3_bucket
    s3.client().put_object(Bucket=own, Key="other/adapter.jsonl", Body=ROWS)
    context = changed(installation, dataset_buckets=[bucket])
    with pytest.raises(InvalidInput, match=r"part of the key is \. or \.\.") as refusal:
        got(context, f"s3://{bucket}/{way}/{own}/other/adapter.jsonl", tmp_path)
    assert refusal.value.param == "dataset"


def test_never_the_artifact_bucket(installation: Context, tmp_path: Path):
    own = installation.settings.s3_bucket
    context = changed(installation, dataset_buckets=[own])
    with pytest.raises(InvalidInput, match="reads no datasets from the bucket"):
        got(context, f"s3://{own}/other-tenant/job/adapter.tar.gz", tmp_path)


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings that point at a hub with a few repositories; it wants the operator's token."""
    # The library reads this once, when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    models = {
        "org/base": {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "x.py": b"evil"},
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    }
    datasets = {
        "org/one": {"README.md": b"#", "data/train.jsonl": ROWS, "data/test.jsonl": b"{}"},
        "org/two": {"train-1.jsonl": ROWS, "train-2.jsonl": ROWS},
    }
    with serve(Hub(models, datasets, "hub-token")) as server:
        yield Settings(
            hf_endpoint=f"http://127.0.0.1:{server.server_port}", hf_token="hub-token", hf_cache=tmp_path / "cache"
        )


def test_a_base_is_pinned_and_fetched_without_code(hub: Settings):
    base = bases.resolve("org/base@main", hub)
    assert (base.id, base.revision) == ("org/base", REVISION)
    light = {path.name for path in bases.fetch(base, hub, alive, weights=False).iterdir()}
    assert light == {"config.json", "tokenizer.json"}
    whole = {path.name for path in bases.fetch(base, hub, alive, weights=True).iterdir()}
    assert whole == {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/absent", "is not on the hub"),
        ("org/base@nowhere", "no such revision"),
        ("org/pickled", "no safetensors weights"),
        ("absent", "no base model 'absent'"),
    ],
)
def test_a_base_that_is_not_there(hub: Settings, model: str, message: str):
    with pytest.raises(InvalidInput, match=message) as refusal:
        bases.resolve(model, hub)
    assert refusal.value.param == "model" and refusal.value.hint


def test_a_hub_that_is_away(hub: Settings):
    with pytest.raises(InfraError, match="the hub does not answer"):
        bases.resolve("org/base", hub.model_copy(update={"hf_endpoint": "http://127.0.0.1:9"}))


def test_the_token_is_needed_and_never_taken_from_home(hub: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hub-token")
    with pytest.raises(InvalidInput, match="not on the hub"):
        bases.resolve("org/base", hub.model_copy(update={"hf_token": None}))


def test_a_cancel_ends_a_fetch_from_the_hub(hub: Settings):
    def stop() -> None:
        raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        bases.fetch(bases.Base("org/base", REVISION), hub, stop, weights=True)


@pytest.mark.parametrize("uri", ["hf://org/one", "hf://datasets/org/one", "hf://org/one@main/data/train.jsonl"])
def test_a_dataset_of_the_hub(installation: Context, hub: Settings, tmp_path: Path, uri: str):
    context = changed(installation, hf_endpoint=hub.hf_endpoint, hf_token=hub.hf_token, hf_cache=hub.hf_cache)
    assert got(context, uri, tmp_path) == ("dataset/train.jsonl", ROWS)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://org/two", "2 files that could be meant"),
        ("hf://org/one/no.jsonl", "has no file"),
        ("hf://org/x", "is not on"),
    ],
)
def test_a_dataset_that_is_not_clear(installation: Context, hub: Settings, tmp_path: Path, uri: str, message: str):
    context = changed(installation, hf_endpoint=hub.hf_endpoint, hf_token=hub.hf_token, hf_cache=hub.hf_cache)
    with pytest.raises(InvalidInput, match=message) as refusal:
        got(context, uri, tmp_path)
    assert refusal.value.param == "dataset"


def test_a_server_without_the_hub_speaks_of_the_dataset(
    installation: Context, hub: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    context = changed(installation, hf_endpoint=hub.hf_endpoint, hf_cache=hub.hf_cache)
    with pytest.raises(InvalidInput, match=r"^dataset: hf://org/one: this server does not use the hub$") as refusal:
        got(context, "hf://org/one", tmp_path)
    assert "Upload the file" in (refusal.value.hint or "") and "model" not in (refusal.value.hint or "")
