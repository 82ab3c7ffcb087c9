"""Bring a job's published files into a folder: every name checked before the first byte is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx2

from common.client.calls import CONNECT_TIMEOUT_S
from common.client.errors import DownloadFailed
from common.client.fetching import Source, fetch_file
from common.client.retries import Retries
from common.client.sending import Progress
from common.client.transport import trusts_environment
from common.schemas.jobs import Artifact

_ADAPTER = "adapter/"
_READ_TIMEOUT_S = 60
# Control characters, and what some file system or shell takes for something else than a name.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')


def safe_target(folder: Path, name: str) -> Path:
    """Return where the artifact `name` goes under `folder`.

    Raises:
        DownloadFailed: the name would lead out of the folder, or is none that every file system takes.
    """
    parts = name.split("/")
    if _UNSAFE.search(name) or any(part == "" or part.endswith((".", " ")) for part in parts):
        raise DownloadFailed(f"the server lists a file with an unsafe name: {name!r}", code="unsafe_name")
    target = folder.joinpath(*PurePosixPath(name).parts)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise DownloadFailed(f"{target} leads out of {folder} through a link", code="unsafe_name")
    return target


@dataclass(frozen=True)
class Downloader:
    """Fetches the artifacts that `artifacts` lists; relative links are relative to `base_url`."""

    base_url: str
    artifacts: Callable[[], list[Artifact]]
    retries: Retries
    sleep: Callable[[float], None]
    on_progress: Progress | None = None

    def fetch(self, folder: Path, *, adapter_only: bool = False) -> list[Path]:
        """Fetch every artifact, or those under `adapter/` only, and return their paths.

        Files that are there already with the right hash are not fetched again.

        Raises:
            DownloadFailed: nothing is published, a file does not arrive whole, or its hash differs.
        """
        published = self.artifacts()
        wanted = [item for item in published if not adapter_only or item.name.startswith(_ADAPTER)]
        if published and not wanted:
            raise DownloadFailed(
                "the job has published no adapter",
                code="no_adapter",
                hint="an export merges that of the job that `tunery show` names; a full fine-tune publishes a model",
            )
        if not wanted:
            raise DownloadFailed(
                "the job has published no files",
                code="nothing_published",
                hint="only a job that succeeded has artifacts; `tunery show JOB` says its state",
            )
        targets = [safe_target(folder, item.name) for item in wanted]
        timeout = httpx2.Timeout(_READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        trust = trusts_environment(self.base_url)
        # The links lead to the object store, so this client carries no API key.
        with httpx2.Client(timeout=timeout, follow_redirects=True, trust_env=trust) as http:
            source = Source(http, self.base_url, self._fresh_link, self.retries, self.sleep, self.on_progress)
            for item, target in zip(wanted, targets, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                fetch_file(source, item, target)
        return targets

    def _fresh_link(self, artifact: Artifact) -> str:
        for item in self.artifacts():
            if item.name == artifact.name and item.sha256 == artifact.sha256:
                return item.url
        raise DownloadFailed(f"{artifact.name} is no longer published", code="nothing_published")
