"""Find the server: arguments, then the environment, then what `tunery up` left in its data directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from common.client.errors import ServerNotFound

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
UP_FILE = "up.json"
KEY_FILE = "api-key"
ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True)
class Address:
    """Where the server is and which key it is asked with. The key is not in the representation."""

    url: str
    api_key: str | None

    def __repr__(self) -> str:
        return f"Address(url={self.url!r}, api_key={'set' if self.api_key else 'unset'})"


def find_server(url: str | None = None, api_key: str | None = None, data_dir: Path | None = None) -> Address:
    """Return the server's address.

    Args:
        url: the server's URL; otherwise `TUNERY_URL`, otherwise the one in `DIR/up.json`.
        api_key: the key; otherwise `TUNERY_API_KEY`, otherwise `DIR/api-key` if that server is the one asked.
        data_dir: the DIR of `tunery up --data-dir`; otherwise `TUNERY_DATA_DIR`, otherwise `.tunery`.

    Raises:
        ServerNotFound: none of them names a server, or one is not a URL.
    """
    from common.settings import client_address

    env_url, env_key, env_dir = client_address()
    folder = data_dir or env_dir
    local_url = _up_url(folder)
    chosen = url or env_url or local_url
    if chosen is None:
        raise ServerNotFound(
            f"no Tunery server is known: TUNERY_URL is not set and {folder / UP_FILE} does not exist",
            hint="start one with `tunery up`, and wait until it listens; or set TUNERY_URL and TUNERY_API_KEY",
        )
    chosen = _checked_url(chosen)
    key = api_key or env_key
    if key is None and local_url is not None and chosen == _checked_url(local_url):
        key = _read(folder / KEY_FILE)
    return Address(chosen, _checked_key(key))


def find_key(url: str, data_dir: Path | None = None) -> str | None:
    """Return the key for a `tunery serve`: `TUNERY_API_KEY`; otherwise, if it is on this machine, `tunery up`'s."""
    from common.settings import client_address

    _, env_key, env_dir = client_address()
    here = urlsplit(url).hostname in _LOOPBACK
    return _checked_key(env_key or (_read((data_dir or env_dir) / KEY_FILE) if here else None))


def environment_of_up(data_dir: Path) -> dict[str, str]:
    """Return the settings of a running `tunery up`, as environment variables; none where none runs."""
    try:
        document: dict[str, str] = json.loads((data_dir / ENVIRONMENT_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return document


def _up_url(folder: Path) -> str | None:
    try:
        text = _read(folder / UP_FILE)
        value = json.loads(text) if text else None
    except ValueError:
        return None
    url = value.get("url") if isinstance(value, dict) else None
    return url if isinstance(url, str) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ServerNotFound(
            f"cannot read {path}: {error.strerror}",
            hint="it belongs to whoever started `tunery up`; set TUNERY_URL and TUNERY_API_KEY instead",
        ) from error


def _checked_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ServerNotFound(
            f"{url!r} is not the URL of a server",
            param="TUNERY_URL",
            hint="write it with its scheme, for example http://127.0.0.1:8000",
        )
    return url.rstrip("/")


def _checked_key(key: str | None) -> str | None:
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ServerNotFound(
            "the API key contains blanks or characters that no key has",
            param="TUNERY_API_KEY",
            hint="copy the key again, as one word",
        )
    return key
