"""How an S3 server is reached: its clients, and its errors in our words.

Errors of the store come out as `InfraError`, a missing object as `NotFound`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from common.errors import InfraError, NotFound
from common.settings import Settings

_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NoSuchUpload", "NotFound"}
# The code of errors that say no, and not that something is broken or busy.
REFUSED = "store_refused"


# Clients may be shared between threads, the making of one may not.
_one_at_a_time = threading.Lock()


@cache
def _session() -> boto3.session.Session:
    # One for all: a new session reads the description of S3 again, a tenth of a second for each client.
    return boto3.session.Session()


class Connection:
    """One bucket of an S3 server. Safe to use from several threads."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.bucket = settings.s3_bucket

    @cached_property
    def _client(self) -> Any:
        return self._connect(self.settings.s3_endpoint_url)

    @cached_property
    def _signer(self) -> Any:
        return self._connect(self.settings.s3_public_url or self.settings.s3_endpoint_url)

    def _connect(self, endpoint: str | None) -> Any:
        secret = self.settings.s3_secret_access_key
        # Servers other than AWS refuse the trailing checksums that boto3 adds by default.
        checksum = "when_required" if endpoint else "when_supported"
        config = Config(
            signature_version="s3v4",
            connect_timeout=5,
            read_timeout=60,
            retries={"max_attempts": 4, "mode": "standard"},
            request_checksum_calculation=checksum,
            response_checksum_validation=checksum,
            max_pool_connections=16,
            s3={"addressing_style": "path" if endpoint else "auto"},
        )
        with _one_at_a_time:
            return _session().client(
                "s3",
                endpoint_url=endpoint,
                region_name=self.settings.s3_region,
                config=config,
                aws_access_key_id=self.settings.s3_access_key_id,
                aws_secret_access_key=secret.get_secret_value() if secret else None,
            )

    def close(self) -> None:
        """Close the connections; using the store again opens new ones."""
        for name in ("_client", "_signer"):
            client = self.__dict__.pop(name, None)
            if client is not None:
                client.close()


def is_missing(error: ClientError) -> bool:
    """Return whether what was asked for is not there."""
    return _code(error) in _MISSING


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _refuses(error: ClientError) -> bool:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return 400 <= status < 500 and status not in (408, 429)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise what the S3 client raises about `what` as errors of Tunery."""
    try:
        yield
    except ClientError as error:
        if is_missing(error):
            raise NotFound(f"the object store has no {what!r}", code="object_missing") from error
        code = REFUSED if _refuses(error) else "store_error"
        raise InfraError(f"the object store refused {what!r}: {_code(error)}", code=code) from error
    # OSError is left alone: it speaks of the local file, a full disk for instance.
    except BotoCoreError as error:
        raise InfraError(f"the object store does not answer ({type(error).__name__})", code="store_away") from error
    except boto3.exceptions.Boto3Error as error:
        raise InfraError(f"the transfer of {what!r} failed ({type(error).__name__})", code="store_error") from error
