"""Objects that clients put into the store part by part, by signed links: none of their bytes passes through Tunery."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from boto3.s3.transfer import TransferConfig

from common.errors import NotFound
from common.storage.connection import Connection, translated

# S3's own bounds: every part but the last one has at least so many bytes, and an object at most so many parts.
PART_BYTES_MIN = 5 * 2**20
PARTS_MAX = 10_000
# S3 copies up to 5 GiB at once; smaller pieces keep each answer within the time that is waited for it.
_COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StoredPart:
    """One part that has arrived: its number from 1, its size in bytes, and the store's word for its content."""

    number: int
    bytes: int
    etag: str


class Parts(Connection):
    """The multipart uploads of a bucket; `upload` is the store's id of one."""

    def begin_parts(self, key: str) -> str:
        """Begin to put `key` together; return the store's id of the upload."""
        with translated(key):
            answer = self._client.create_multipart_upload(
                Bucket=self.bucket, Key=key, ContentType="application/octet-stream"
            )
            return str(answer["UploadId"])

    def part_link(self, key: str, upload: str, number: int, num_bytes: int) -> str:
        """Return a signed link that takes the part by PUT, of exactly so many bytes, for `link_s` seconds."""
        values = {
            "Bucket": self.bucket,
            "Key": key,
            "UploadId": upload,
            "PartNumber": number,
            # Signed, so that nobody puts more into the bucket than was announced.
            "ContentLength": num_bytes,
        }
        url: str = self._signer.generate_presigned_url("upload_part", Params=values, ExpiresIn=self.settings.link_s)
        return url

    def parts(self, key: str, upload: str) -> list[StoredPart]:
        """Return the parts that have arrived, by their numbers.

        Raises:
            NotFound: the upload was completed or aborted.
        """
        newest: dict[int, tuple[datetime, StoredPart]] = {}
        with translated(key):
            pages = self._client.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=key, UploadId=upload)
            for item in (item for page in pages for item in page.get("Parts", ())):
                number, at = int(item["PartNumber"]), item["LastModified"]
                # SeaweedFS 4.48 lists a part that was sent twice twice; the later one counts.
                if number not in newest or newest[number][0] <= at:
                    newest[number] = (at, StoredPart(number, int(item["Size"]), item["ETag"]))
        return [newest[number][1] for number in sorted(newest)]

    def join_parts(self, key: str, upload: str, parts: Iterable[StoredPart]) -> None:
        """Make `parts` one object.

        Raises:
            NotFound: the upload was completed or aborted.
        """
        listed = [{"PartNumber": part.number, "ETag": part.etag} for part in parts]
        with translated(key):
            self._client.complete_multipart_upload(
                Bucket=self.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": listed}
            )

    def abort_parts(self, key: str, upload: str) -> None:
        """End an upload and remove its parts; one that is not there is no error."""
        with suppress(NotFound), translated(key):
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the bucket, which the store does itself."""
        transfer = TransferConfig(multipart_threshold=_COPY_BYTES, multipart_chunksize=_COPY_BYTES, max_concurrency=4)
        with translated(source):
            self._client.copy({"Bucket": self.bucket, "Key": source}, self.bucket, target, Config=transfer)

    def abort_uploads(self, older_than_s: float, named: Collection[str] = ()) -> int:
        """End the multipart uploads that were begun so long ago and not completed, but for those that are `named` by
        their ids; return how many."""
        ended = 0
        with translated(self.bucket):
            for page in self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket):
                for upload in page.get("Uploads", ()):
                    is_old = time.time() - upload["Initiated"].timestamp() > older_than_s
                    if is_old and upload["UploadId"] not in named:
                        self._client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        ended += 1
        return ended
