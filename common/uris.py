"""Dataset URIs: what each scheme may name. Pure checks, made at submit by the API and again at fetch by the worker.

A name that resolves to a private address can only be found out when it is fetched: `worker/guard.py` does that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from common import addresses
from common.errors import InvalidInput
from common.settings import Settings

_PARAM = "dataset"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_KEY_BYTES = 1024
_DATASET_ID = re.compile(r"[a-z]{1,8}_[0-9a-z]{1,32}")
_HUB = re.compile(
    r"(?:datasets/)?([\w.-]{1,96}/[\w.-]{1,96}?)(?:@([\w.-]{1,128}))?(?:/([^\x00-\x1f]{1,512}))?", re.ASCII
)
_UPLOAD = "Upload the file with POST /datasets and use the URI that it answers"


@dataclass(frozen=True)
class DatasetUri:
    """A dataset URI in parts: `place` is the bucket, host, repository, id or folder; `path` what it names there."""

    scheme: str
    place: str
    path: str = ""
    revision: str | None = None


def check(uri: str, settings: Settings, param: str = _PARAM) -> None:
    """Raise unless `uri` names what this installation may read.

    Raises:
        InvalidInput: it may not, or is malformed; `param` is the field that is blamed.
    """
    parse(uri, settings, param)


def parse(uri: str, settings: Settings, param: str = _PARAM) -> DatasetUri:
    """Return `uri` in parts; raises as `check` does."""
    scheme = uri.partition(":")[0]
    reader = _SCHEMES.get(scheme)
    if reader is None:
        known = ", ".join(f"{name}:" for name in _SCHEMES)
        raise _refusal(param, f"the scheme {scheme[:32]!r} is not known", f"Use one of {known}.", "dataset_scheme")
    try:
        return reader(uri, settings, param)
    except ValueError as error:
        raise _refusal(param, f"the URI is malformed ({error})", "Check its spelling.", "dataset_uri") from error


def local_path(uri: str, settings: Settings, param: str = _PARAM) -> Path:
    """Return the file that a `file://` URI names, its links resolved.

    Raises:
        InvalidInput: the operator allows no folder, or the file does not lie in it.
    """
    return Path(_file(uri, settings, param).path)


def hub_parts(uri: str) -> tuple[str, str | None, str | None]:
    """Return repository, revision and file of `hf://[datasets/]org/name[@revision][/file]`.

    Raises:
        InvalidInput: the URI has another shape.
    """
    match = _HUB.fullmatch(uri.removeprefix("hf://"))
    if match is None or ".." in uri:
        raise _refusal(
            _PARAM, f"{uri} is no dataset of the hub", "Write hf://org/name[@revision][/file].", "dataset_uri"
        )
    return match[1], match[2], match[3]


def _uploaded(uri: str, _settings: Settings, param: str) -> DatasetUri:
    name = uri.removeprefix("dataset:")
    if not _DATASET_ID.fullmatch(name):
        raise _refusal(param, f"{name[:64]!r} is no dataset's id", "GET /datasets lists them.", "dataset_not_found")
    return DatasetUri("dataset", name)


def _s3(uri: str, settings: Settings, param: str) -> DatasetUri:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket) or not key:
        raise _refusal(param, "the URI names no object", "Write s3://bucket/key.", "dataset_uri")
    if len(key.encode()) > _KEY_BYTES:
        raise _refusal(param, f"the key has more than {_KEY_BYTES:,} bytes", "S3 has no such keys.", "dataset_uri")
    # Signed as it stands, but whoever tidies paths on the way would look in another bucket; stores answer it with 400.
    if {".", ".."} & set(re.split(r"[/\\]", key)):
        raise _refusal(param, "a part of the key is . or ..", "Write the key without such parts.", "dataset_uri")
    # The artifact bucket holds every tenant's adapters, so it is refused even where an operator lists it by mistake.
    if bucket == settings.s3_bucket or bucket not in settings.dataset_buckets:
        readable = [name for name in settings.dataset_buckets if name != settings.s3_bucket]
        choices = f"Readable: {', '.join(readable)}." if readable else f"{_UPLOAD}."
        raise _refusal(param, f"this server reads no datasets from the bucket {bucket!r}", choices, "bucket_forbidden")
    return DatasetUri("s3", bucket, key)


def without_signature(uri: str) -> str:
    """Return `uri` as it may be written down: the query of a link, which is what signs it, is left out."""
    return uri.partition("?")[0].partition("#")[0] if uri.startswith("https://") else uri


def _https(uri: str, settings: Settings, param: str) -> DatasetUri:
    parts = urlsplit(uri)
    host = (parts.hostname or "").rstrip(".")
    if not host or parts.port == 0:
        raise _refusal(param, "the URL names no host", "Write https://host/path.", "dataset_uri")
    if not host.isascii():
        # Resolvers fold such names, and ①②⑦ becomes 127.
        raise _refusal(param, "the URL's host is not ASCII", "Write it in punycode (xn--…).", "dataset_uri")
    if parts.username is not None or parts.password is not None:
        raise _refusal(
            param,
            "the URL holds a user name or password, which would be shown with the job",
            f"{_UPLOAD}, or use a signed link.",
            "dataset_credentials",
        )
    if not addresses.spelled_allowed(host, settings):
        raise _refusal(
            param,
            f"{host} is not a public address",
            f"{_UPLOAD}, or ask the operator to list the network in TUNERY_FETCH_NETWORKS.",
            "private_address",
        )
    return DatasetUri("https", host, parts.path)


def _hub(uri: str, _settings: Settings, param: str) -> DatasetUri:
    try:
        repo, revision, file = hub_parts(uri)
    except InvalidInput as error:
        error.param = param
        raise
    return DatasetUri("hf", repo, file or "", revision)


def _file(uri: str, settings: Settings, param: str) -> DatasetUri:
    if settings.local_datasets is None:
        raise _refusal(param, "this server reads no file:// datasets", f"{_UPLOAD}.", "file_forbidden")
    path = _absolute(urlsplit(uri), param)
    folder = settings.local_datasets.resolve()
    target = path.resolve()
    if target == folder or not target.is_relative_to(folder):
        raise _refusal(
            param, "the file lies outside of the folder that the operator allows", f"{_UPLOAD}.", "file_forbidden"
        )
    return DatasetUri("file", str(folder), str(target))


def _absolute(parts: SplitResult, param: str) -> Path:
    path = unquote(parts.path, errors="strict")
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\x00" in path:
        raise _refusal(param, "the URI names no absolute path", "Write file:///folder/file.", "dataset_uri")
    return Path(path)


def _refusal(param: str, message: str, hint: str, code: str) -> InvalidInput:
    return InvalidInput(f"{param}: {message}", param=param, hint=hint, code=code)


_SCHEMES: dict[str, Callable[[str, Settings, str], DatasetUri]] = {
    "s3": _s3,
    "https": _https,
    "hf": _hub,
    "dataset": _uploaded,
    "file": _file,
}
