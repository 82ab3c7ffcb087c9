"""Reads what a run left behind: the audit, the rows by plain SQL, the store by boto3, the trainers' trail, the journal.

Imports nothing of the product: the checker must not share its mistakes.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psycopg
from botocore.config import Config
from botocore.exceptions import ClientError
from psycopg.rows import dict_row

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A line of the trail: at which time which attempt did what, at which step, with which value of the chain."""

    at: float
    job: str
    epoch: int
    what: str
    step: int
    value: str


class Database:
    """Plain SQL, read only. `url` is `sqlite:///FILE` or `postgresql+psycopg://USER@/NAME?host=FOLDER`."""

    def __init__(self, url: str):
        self._url = url

    def rows(self, query: str) -> list[Row]:
        """Return the rows of `query`; JSON columns come decoded."""
        if self._url.startswith("sqlite:///"):
            connection = sqlite3.connect(f"file:{self._url.removeprefix('sqlite:///')}?mode=ro", uri=True, timeout=30)
            connection.row_factory = sqlite3.Row
            try:
                return [dict(row) for row in connection.execute(query)]
            finally:
                connection.close()
        with psycopg.connect(self._url.replace("+psycopg", ""), row_factory=dict_row) as postgres:
            return postgres.execute(query).fetchall()


class Bucket:
    """The store, read only."""

    def __init__(self, endpoint_url: str, key: str, secret: str, bucket: str):
        self._bucket = bucket
        self._client = boto3.session.Session().client(
            "s3", endpoint_url=endpoint_url, aws_access_key_id=key, aws_secret_access_key=secret,
            region_name="us-east-1", config=Config(s3={"addressing_style": "path"}),
        )  # fmt: skip

    def keys(self, prefix: str) -> list[str]:
        """Return the keys under `prefix`."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def get(self, key: str) -> bytes | None:
        """Return an object, or None where there is none."""
        try:
            body: bytes = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                return None
            raise
        return body


def read_trail(path: Path) -> list[Step]:
    """Return the lines that the trainers wrote, in order of time."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        at, job, epoch, what, step, value = line.split(" ")
        found.append(Step(float(at), job, int(epoch), what, int(step), value))
    return sorted(found, key=lambda step: step.at)


def decoded(value: Any) -> Any:
    """Return a JSON column's value: SQLite hands out its text."""
    return json.loads(value) if isinstance(value, str) else value
