"""Secrets and signatures of the Standard Webhooks specification, symmetric scheme `v1`."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence

_PREFIX = "whsec_"
_SECRET_BYTES = 32


def new_secret() -> str:
    """Return 256 random bits, as the specification writes them."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def headers(keys: Sequence[str], message_id: str, at_s: int, body: bytes) -> dict[str, str]:
    """Return the three headers of a message that is sent at `at_s`; each of `keys` signs it.

    Source: the specification's "Signature scheme": HMAC-SHA256 of `id.timestamp.body`.
    """
    signed = b".".join((message_id.encode(), str(at_s).encode(), body))
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": " ".join(f"v1,{_signature(key, signed)}" for key in keys),
    }


def _signature(key: str, signed: bytes) -> str:
    digest = hmac.digest(base64.b64decode(key.removeprefix(_PREFIX)), signed, hashlib.sha256)
    return base64.b64encode(digest).decode()
