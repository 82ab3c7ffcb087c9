"""The object store: any S3 through boto3.

Uploads larger than `PART_BYTES` go as multipart; every upload states its SHA-256 as user metadata.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from common.errors import InfraError
from common.storage.connection import is_missing, translated
from common.storage.parts import Parts

PART_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**20


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


class Store(Parts):
    """One bucket of an S3 server. Safe to use from several threads."""

    def ensure_bucket(self) -> None:
        """Create the bucket unless it is there."""
        with translated(self.bucket):
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if not is_missing(error):
                    raise
                self._client.create_bucket(Bucket=self.bucket)

    def put_file(self, key: str, path: Path, *, content_type: str = "application/octet-stream") -> None:
        """Upload the file at `path` to `key`."""
        transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)
        with translated(key):
            self._client.upload_file(
                str(path), self.bucket, key, Config=transfer, ExtraArgs={"ContentType": content_type}
            )

    def put_bytes(self, key: str, body: bytes, *, content_type: str = "application/json") -> None:
        """Write `body` to `key`."""
        with translated(key):
            self._client.put_object(Bucket=self.bucket, Key=key, Body=body, ContentType=content_type)

    def put_stream(self, key: str, stream: BinaryIO) -> None:
        """Upload what `stream` holds to `key`. Its `read(n)` must return n bytes, except at the end."""
        transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)
        with translated(key):
            self._client.upload_fileobj(stream, self.bucket, key, Config=transfer)

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield the content of `key`, a mebibyte at a time."""
        with self.open(key) as stream, translated(key):
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk

    def get_bytes(self, key: str) -> bytes:
        """Return the content of `key`."""
        with translated(key):
            body: bytes = self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            return body

    def get_file(self, key: str, path: Path, *, bucket: str | None = None) -> None:
        """Download `key` to `path`; `bucket` may name another bucket that the same credentials read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with translated(key):
            self._client.download_file(bucket or self.bucket, key, str(path))

    def size(self, key: str, *, bucket: str | None = None) -> int:
        """Return the size of `key` in bytes.

        Raises:
            NotFound: there is no such object.
        """
        with translated(key):
            return int(self._client.head_object(Bucket=bucket or self.bucket, Key=key)["ContentLength"])

    def objects(self, prefix: str) -> Iterator[StoredObject]:
        """Yield every object under `prefix`."""
        with translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            for page in pages:
                for item in page.get("Contents", ()):
                    yield StoredObject(item["Key"], item["Size"], time.time() - item["LastModified"].timestamp())

    def delete(self, keys: list[str]) -> None:
        """Remove objects; one that is not there is no error."""
        with translated(keys[0] if keys else ""):
            for start in range(0, len(keys), 1000):
                batch = [{"Key": key} for key in keys[start : start + 1000]]
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True})
                if answer.get("Errors"):
                    raise InfraError(f"the object store did not remove {answer['Errors'][0].get('Key')}")

    def link(self, key: str, *, filename: str | None = None) -> str:
        """Return a signed link to `key` that a client can fetch without credentials for `link_s` seconds."""
        values = {"Bucket": self.bucket, "Key": key}
        if filename:
            values["ResponseContentDisposition"] = f'attachment; filename="{filename}"'
        url: str = self._signer.generate_presigned_url("get_object", Params=values, ExpiresIn=self.settings.link_s)
        return url

    def check(self) -> None:
        """Raise InfraError unless the bucket answers."""
        with translated(self.bucket):
            self._client.head_bucket(Bucket=self.bucket)

    def open(self, key: str) -> BinaryIO:
        """Return a stream over the content of `key`."""
        with translated(key):
            body: BinaryIO = self._client.get_object(Bucket=self.bucket, Key=key)["Body"]
            return body
