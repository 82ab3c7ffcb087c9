"""Where everything lies in the bucket. Nothing is ever overwritten: each attempt writes under its own epoch.

{tenant}/datasets/{sha256}                       an upload, once per content
{tenant}/uploads/{upload}/{part}                 a part of an upload, until the whole is there
{tenant}/uploads/{upload}/whole                  what clients put here part by part, until its content is verified
{tenant}/{job}/a{epoch}/adapter/…  reports/…     what an attempt made; model/… of a full fine-tune
{tenant}/{job}/a{epoch}/adapter.tar.gz           the adapter folder as one file, if there is one
{tenant}/{job}/a{epoch}/manifest.json            written last: without it the attempt published nothing
{tenant}/{job}/a{epoch}/checkpoints/step-…/…     with a manifest.json of their own
"""

from __future__ import annotations

MANIFEST = "manifest.json"
ADAPTER_ARCHIVE = "adapter.tar.gz"
PRECISION_REPORT = "reports/precision.json"


def dataset(tenant: str, sha256: str) -> str:
    """Return the key of an uploaded dataset."""
    return f"{tenant}/datasets/{sha256}"


def upload_part(tenant: str, upload_id: str, part_id: str) -> str:
    """Return the key of one part of an upload."""
    return f"{tenant}/uploads/{upload_id}/{part_id}"


def whole_upload(tenant: str, upload_id: str) -> str:
    """Return the key of an upload whose parts go straight to the store."""
    return upload_part(tenant, upload_id, "whole")


def job(tenant: str, job_id: str) -> str:
    """Return the prefix of everything that belongs to a job, with a closing slash."""
    return f"{tenant}/{job_id}/"


def attempt(tenant: str, job_id: str, epoch: int) -> str:
    """Return the prefix of one attempt, with a closing slash."""
    return f"{job(tenant, job_id)}a{epoch}/"


def checkpoint(tenant: str, job_id: str, epoch: int, folder: str) -> str:
    """Return the prefix of one checkpoint of an attempt, with a closing slash; `folder` is the folder's name."""
    return f"{attempt(tenant, job_id, epoch)}checkpoints/{folder}/"
