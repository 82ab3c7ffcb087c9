"""Looks up the keys that requests carry, and notes their use. Shared by every process that answers HTTP."""

from __future__ import annotations

import logging
import time

from sqlalchemy.exc import SQLAlchemyError

from common import keys
from common.context import Context
from common.errors import Unauthenticated
from common.keys import Caller

_TOUCH_S = 60.0
_KEY_MAX = 512
_log = logging.getLogger(__name__)


def bearer_key(authorization: str) -> str:
    """Return the key in the value of an `Authorization` header; raises Unauthenticated."""
    scheme, _, key = authorization.partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key or len(key) > _KEY_MAX:
        raise Unauthenticated(
            "no API key was sent",
            hint="Set TUNERY_API_KEY, or send `Authorization: Bearer <key>`; `tunery keys create` makes a key.",
        )
    return key


class Keyring:
    """Looks keys up, and notes their use once a minute."""

    def __init__(self, context: Context):
        self._context = context
        self._touched: dict[str, float] = {}

    def identify(self, key: str) -> Caller:
        """Return who holds `key`; raises Unauthenticated."""
        with self._context.read() as session:
            who = keys.identify(session, key)
        self._note_use(who.key_id)
        return who

    def _note_use(self, key_id: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(key_id, -_TOUCH_S) < _TOUCH_S:
            return
        self._touched[key_id] = now
        try:
            with self._context.sessions.write() as session:
                keys.touch(session, key_id)
        except SQLAlchemyError as error:
            _log.warning("the use of key %s was not noted: %s", key_id, error)
