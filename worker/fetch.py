"""Datasets, from wherever their URI says into the working folder. Runs with the operator's credentials, never in the
process that runs model code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download
from sqlalchemy import select

from common import hub, uris
from common.context import Context
from common.db.rows import DatasetRow
from common.errors import InfraError, InvalidInput, NotFound, SourceAway, SourceRefused, SourceSlow, TooLarge, UserError
from common.settings import Settings
from common.storage.connection import REFUSED
from common.storage.store import sha256_of
from worker import bases, guard
from worker.data.source import ENDINGS

_PARAM = "dataset"


@dataclass(frozen=True)
class Fetched:
    """A dataset on disk: `file` is relative to the working folder."""

    file: str
    sha256: str
    bytes: int


def dataset(
    context: Context,
    tenant: str,
    uri: str,
    folder: Path,
    name: str,
    alive: Callable[[], None],
    param: str = _PARAM,
) -> Fetched:
    """Fetch `uri` into `folder`/dataset/ as `name` with the suffix of what was fetched; errors blame `param`.

    Raises:
        InvalidInput: the URI is not allowed, leads to nothing, or to more bytes than the operator allows.
        SourceAway, SourceRefused, SourceSlow: where it lies does not answer, says no, or takes for ever.
        InfraError: the store or the hub cannot be reached now.
    """
    partial = folder / "dataset" / f"{name}.partial"
    partial.parent.mkdir(exist_ok=True)
    try:
        uris.check(uri, context.settings)
        source = _SOURCES[uri.partition(":")[0]](context, tenant, uri, partial, alive)
    except NotFound as error:
        raise InvalidInput(f"{param}: there is nothing at {uri}", param=param, code="dataset_not_found") from error
    except (UserError, SourceAway, SourceRefused, SourceSlow) as error:
        # The sources below speak of `dataset`; the field to mend may be the other one.
        message = f"{param}: {error.message.removeprefix(f'{_PARAM}: ')}"
        kind = InvalidInput if isinstance(error, UserError) else type(error)
        raise kind(message, code=error.code, param=param, hint=error.hint) from error
    suffix = PurePosixPath(source).suffix.lower()
    path = partial.with_name(name + (suffix if suffix in ENDINGS else ""))
    partial.rename(path)
    return Fetched(str(path.relative_to(folder)), sha256_of(path), path.stat().st_size)


def _uploaded(context: Context, tenant: str, uri: str, path: Path, _alive: Callable[[], None]) -> str:
    with context.read() as session:
        query = select(DatasetRow).where(DatasetRow.tenant == tenant, DatasetRow.id == uri.removeprefix("dataset:"))
        row = session.scalar(query)
    if row is None:
        raise InvalidInput(
            f"{_PARAM}: {uri} does not exist any more",
            param=_PARAM,
            code="dataset_not_found",
            hint="GET /datasets lists the uploads.",
        )
    context.store.get_file(row.key, path)
    return row.name


def _from_s3(context: Context, _tenant: str, uri: str, path: Path, _alive: Callable[[], None]) -> str:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        _bound(context.store.size(key, bucket=bucket), context.settings)
        context.store.get_file(key, path, bucket=bucket)
    except InfraError as error:
        if error.code != REFUSED:
            raise
        # Credentials that are refused everywhere are the operator's affair, and the job waits for them.
        context.store.check()
        raise SourceRefused(
            f"{_PARAM}: this server may not read {uri}",
            param=_PARAM,
            code="dataset_forbidden",
            hint=f"Ask the operator to let it read the bucket {bucket}, or upload the file with POST /datasets.",
        ) from error
    return key


def _from_https(context: Context, _tenant: str, uri: str, path: Path, alive: Callable[[], None]) -> str:
    return guard.download(uri, path, context.settings, alive).partition("?")[0]


def _from_folder(context: Context, _tenant: str, uri: str, path: Path, _alive: Callable[[], None]) -> str:
    source = uris.local_path(uri, context.settings)
    if not source.is_file():
        raise InvalidInput(
            f"{_PARAM}: there is no file {source.name!r} in the operator's folder",
            param=_PARAM,
            code="dataset_not_found",
        )
    _bound(source.stat().st_size, context.settings)
    try:
        shutil.copyfile(source, path)
    except PermissionError as error:
        raise SourceRefused(
            f"{_PARAM}: this server may not read the file {source.name!r}",
            param=_PARAM,
            code="dataset_forbidden",
            hint="Ask the operator to let the server read it.",
        ) from error
    return source.name


def _from_hub(context: Context, _tenant: str, uri: str, path: Path, alive: Callable[[], None]) -> str:
    settings = context.settings
    repo, revision, file = uris.hub_parts(uri)
    with hub.hub_errors(uri, _PARAM):
        info = hub.hub(settings).dataset_info(repo, revision=revision, files_metadata=True)
        sizes = {item.rfilename: item.size or 0 for item in info.siblings or ()}
        chosen = file or _only_train_file(uri, sorted(sizes))
        if chosen not in sizes:
            raise InvalidInput(
                f"{_PARAM}: {repo} has no file {chosen!r}",
                param=_PARAM,
                code="dataset_not_found",
                hint=f"It has: {', '.join(sorted(sizes)[:20])}.",
            )
        _bound(sizes[chosen], settings)
        got = hf_hub_download(
            repo,
            chosen,
            repo_type="dataset",
            revision=info.sha,
            cache_dir=bases.cache(settings),
            endpoint=settings.hf_endpoint,
            token=hub.token(settings),
            tqdm_class=bases.interruptible(alive),
        )
    shutil.copyfile(str(got), path)
    return chosen


def _only_train_file(uri: str, files: list[str]) -> str:
    data = [file for file in files if PurePosixPath(file).suffix in ENDINGS]
    train = [file for file in data if "train" in file.lower()] or data
    if len(train) == 1:
        return train[0]
    raise InvalidInput(
        f"{_PARAM}: {uri} has {len(train)} files that could be meant",
        param=_PARAM,
        code="dataset_ambiguous",
        hint=f"Name one: hf://org/name/FILE. There are: {', '.join(train[:20]) or 'none'}.",
    )


def _bound(num_bytes: int, settings: Settings) -> None:
    if num_bytes > settings.max_dataset_bytes:
        raise TooLarge(
            f"{_PARAM}: {num_bytes} bytes, and {settings.max_dataset_bytes} are allowed",
            param=_PARAM,
            hint="Split it, or ask the operator about TUNERY_MAX_DATASET_BYTES.",
        )


_SOURCES: dict[str, Callable[[Context, str, str, Path, Callable[[], None]], str]] = {
    "dataset": _uploaded,
    "s3": _from_s3,
    "https": _from_https,
    "file": _from_folder,
    "hf": _from_hub,
}
