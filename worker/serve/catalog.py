"""Which models there are, and for whom: the jobs of an installation, or folders on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common import fine_tuned
from common.context import Context
from common.db.rows import JobRow
from common.errors import InvalidInput, NotFound
from common.jobs import queries
from common.keyring import Keyring, bearer_key
from common.keys import Caller
from worker import publish
from worker.bases import Base

_WEIGHTS = "adapter/adapter_model.safetensors"
# What an engine reads; the tokenizer is the base's own.
_FILES = (_WEIGHTS, "adapter/adapter_config.json", "adapter/chat_template.jinja", "adapter/tokenizer_config.json")


@dataclass(frozen=True)
class Adapter:
    """A finished adapter over the base that is served: its size in bytes, and when it was made, in seconds.

    `name` is what lists call the model. `fetch` returns a folder that holds it; it may put it into the empty one that
    it is given.
    """

    job_id: str
    name: str
    bytes: int
    created: int
    owner: str
    fetch: Callable[[Path], Path]


class Catalog(Protocol):
    """Knows callers and their adapters."""

    def identify(self, authorization: str) -> Caller:
        """Return who sends this `Authorization` header; raises Unauthenticated."""

    def adapter(self, caller: Caller, job_id: str) -> Adapter:
        """Return an adapter of the caller's; raises NotFound, or InvalidInput where it is not one of this base."""

    def adapters(self, caller: Caller) -> list[Adapter]:
        """Return all adapters of the caller's over this base, newest first."""


class JobCatalog:
    """The jobs of an installation, each tenant's for that tenant alone."""

    def __init__(self, context: Context, base: Base):
        self._context = context
        self._base = base
        self._keyring = Keyring(context)

    def identify(self, authorization: str) -> Caller:
        """Return who sends this `Authorization` header; raises Unauthenticated."""
        return self._keyring.identify(bearer_key(authorization))

    def adapter(self, caller: Caller, job_id: str) -> Adapter:
        """Return the adapter of a job of the caller's tenant.

        Raises:
            NotFound: no such job in this tenant.
            InvalidInput: it has no adapter, or one of another base.
        """
        with self._context.read() as session:
            try:
                job = queries.row(session, caller.tenant, job_id)
            except NotFound:
                raise NotFound(
                    f"the model {job_id!r} does not exist",
                    code="model_not_found",
                    param="model",
                    hint="GET /v1/models lists those that this server can answer with.",
                ) from None
            sizes = {item.name: item.bytes for item in queries.artifacts(session, job_id)}
        self._check(job, sizes)
        return self._shown(job, sizes[_WEIGHTS])

    def adapters(self, caller: Caller) -> list[Adapter]:
        """Return the adapters of the caller's tenant over this base, newest first."""
        with self._context.read() as session:
            return [
                self._shown(job, 0)
                for job in queries.succeeded_over(session, caller.tenant, self._base.id, self._base.revision)
            ]

    def _check(self, job: JobRow, sizes: Mapping[str, int]) -> None:
        if job.source_job is not None:
            hint = f"Ask {job.source_job}, whose adapter it merges."
            raise _not_here(f"the job {job.id} is an export and has no adapter", "no_adapter", hint)
        if job.status != "succeeded":
            raise _not_here(f"the job {job.id} is {job.status}; only one that succeeded can answer", "job_not_finished")
        if (job.base_id, job.base_revision) != (self._base.id, self._base.revision):
            theirs, ours = (
                f"{name}@{revision}" if revision else str(name)
                for name, revision in ((job.base_id, job.base_revision), (self._base.id, self._base.revision))
            )
            hint = f"Ask a server of that base: `tunery serve --base {theirs}`."
            raise _not_here(f"the job {job.id} was trained on {theirs}; this server holds {ours}", "wrong_base", hint)
        if _WEIGHTS not in sizes:
            raise _not_here(f"the job {job.id} published no adapter", "no_adapter")

    def _shown(self, job: JobRow, num_bytes: int) -> Adapter:
        created = int(job.finished_at or job.created_at)
        return Adapter(
            job.id, fine_tuned.name(job), num_bytes, created, job.tenant, lambda folder: self._fetch(job, folder)
        )

    def _fetch(self, job: JobRow, folder: Path) -> Path:
        publish.adapter(self._context.store, job, folder, lambda name: name in _FILES)
        return folder


def _not_here(message: str, code: str, hint: str | None = None) -> InvalidInput:
    return InvalidInput(f"model: {message}", code=code, param="model", hint=hint)


class FolderCatalog:
    """Folders on this machine by name, for whoever can reach the server: it listens on a private socket."""

    def __init__(self, folders: Mapping[str, Path]):
        self._folders = folders

    def identify(self, authorization: str) -> Caller:
        """Return the one caller there is."""
        return Caller("local", "local", admin=False)

    def adapter(self, caller: Caller, job_id: str) -> Adapter:
        """Return the adapter of that name; raises NotFound."""
        if job_id not in self._folders:
            raise NotFound(f"the model {job_id!r} does not exist", code="model_not_found", param="model")
        folder = self._folders[job_id]
        weights = (folder / Path(_WEIGHTS).name).stat()
        return Adapter(job_id, job_id, weights.st_size, int(weights.st_mtime), caller.tenant, lambda _: folder)

    def adapters(self, caller: Caller) -> list[Adapter]:
        """Return all adapters."""
        return [self.adapter(caller, name) for name in self._folders]
