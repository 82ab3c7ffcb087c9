"""The object store: any S3 through boto3.

Uploads larger than `PART_BYTES` go as multipart; every upload states its SHA-256 as user metadata. Errors of the store
come out as `InfraError`, a missing object as `NotFound`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from common.errors import InfraError, NotFound
from common.settings import Settings

PART_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**20
_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
# The code of errors that say no, and not that something is broken or busy.
REFUSED = "store_refused"


@dataclass(frozen=True)
class StoredObject:
    """An object's key, size in bytes, and age in seconds by the clocks of the store and of this machine."""

    key: str
    bytes: int
    age_s: float


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
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
        # A session of its own: boto3's default session is not safe to share between threads.
        return boto3.session.Session().client(
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

    def ensure_bucket(self) -> None:
        """Create the bucket unless it is there."""
        with _translated(self.bucket):
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _code(error) not in _MISSING:
                    raise
                self._client.create_bucket(Bucket=self.bucket)

    def put_file(self, key: str, path: Path, *, content_type: str = "application/octet-stream") -> None:
        """Upload the file at `path` to `key`."""
        transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)
        with _translated(key):
            self._client.upload_file(
                str(path), self.bucket, key, Config=transfer, ExtraArgs={"ContentType": content_type}
            )

    def put_bytes(self, key: str, body: bytes, *, content_type: str = "application/json") -> None:
        """Write `body` to `key`."""
        with _translated(key):
            self._client.put_object(Bucket=self.bucket, Key=key, Body=body, ContentType=content_type)

    def put_stream(self, key: str, stream: BinaryIO) -> None:
        """Upload what `stream` holds to `key`. Its `read(n)` must return n bytes, except at the end."""
        transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)
        with _translated(key):
            self._client.upload_fileobj(stream, self.bucket, key, Config=transfer)

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield the content of `key`, a mebibyte at a time."""
        with self.open(key) as stream, _translated(key):
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk

    def get_bytes(self, key: str) -> bytes:
        """Return the content of `key`."""
        with _translated(key):
            body: bytes = self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            return body

    def get_file(self, key: str, path: Path, *, bucket: str | None = None) -> None:
        """Download `key` to `path`; `bucket` may name another bucket that the same credentials read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _translated(key):
            self._client.download_file(bucket or self.bucket, key, str(path))

    def size(self, key: str, *, bucket: str | None = None) -> int:
        """Return the size of `key` in bytes.

        Raises:
            NotFound: there is no such object.
        """
        with _translated(key):
            return int(self._client.head_object(Bucket=bucket or self.bucket, Key=key)["ContentLength"])

    def objects(self, prefix: str) -> Iterator[StoredObject]:
        """Yield every object under `prefix`."""
        with _translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            for page in pages:
                for item in page.get("Contents", ()):
                    yield StoredObject(item["Key"], item["Size"], time.time() - item["LastModified"].timestamp())

    def delete(self, keys: list[str]) -> None:
        """Remove objects; one that is not there is no error."""
        with _translated(keys[0] if keys else ""):
            for start in range(0, len(keys), 1000):
                batch = [{"Key": key} for key in keys[start : start + 1000]]
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True})
                if answer.get("Errors"):
                    raise InfraError(f"the object store did not remove {answer['Errors'][0].get('Key')}")

    def abort_uploads(self, older_than_s: float) -> int:
        """End the multipart uploads that were begun so long ago and never completed; return how many."""
        ended = 0
        with _translated(self.bucket):
            for page in self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket):
                for upload in page.get("Uploads", ()):
                    if time.time() - upload["Initiated"].timestamp() > older_than_s:
                        self._client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        ended += 1
        return ended

    def link(self, key: str, *, filename: str | None = None) -> str:
        """Return a signed link to `key` that a client can fetch without credentials for `link_s` seconds."""
        values = {"Bucket": self.bucket, "Key": key}
        if filename:
            values["ResponseContentDisposition"] = f'attachment; filename="{filename}"'
        url: str = self._signer.generate_presigned_url("get_object", Params=values, ExpiresIn=self.settings.link_s)
        return url

    def check(self) -> None:
        """Raise InfraError unless the bucket answers."""
        with _translated(self.bucket):
            self._client.head_bucket(Bucket=self.bucket)

    def open(self, key: str) -> BinaryIO:
        """Return a stream over the content of `key`."""
        with _translated(key):
            body: BinaryIO = self._client.get_object(Bucket=self.bucket, Key=key)["Body"]
            return body


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _refuses(error: ClientError) -> bool:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return 400 <= status < 500 and status not in (408, 429)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if _code(error) in _MISSING:
            raise NotFound(f"the object store has no {what!r}", code="object_missing") from error
        code = REFUSED if _refuses(error) else "store_error"
        raise InfraError(f"the object store refused {what!r}: {_code(error)}", code=code) from error
    # OSError is left alone: it speaks of the local file, a full disk for instance.
    except BotoCoreError as error:
        raise InfraError(f"the object store does not answer ({type(error).__name__})", code="store_away") from error
    except boto3.exceptions.Boto3Error as error:
        raise InfraError(f"the transfer of {what!r} failed ({type(error).__name__})", code="store_error") from error
