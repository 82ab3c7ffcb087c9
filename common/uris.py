"""Dataset URIs: which ones this installation takes. Pure functions: what they name is fetched by the worker.

dataset:<id>                 an upload
s3://bucket/key              a bucket in TUNERY_DATASET_BUCKETS
https://host/path            a public address
hf://org/name[@rev][/file]   a dataset of the hub
file:///path                 a file under TUNERY_LOCAL_DATASETS
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from common.errors import InvalidInput
from common.settings import Settings

PARAM = "dataset"
_UPLOAD = re.compile(r"dataset:ds_[0-9a-z]{1,40}")
_HUB = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>.+))?",
    re.ASCII,
)
# Spellings of IPv4 addresses that some resolvers take: 127.1, 0x7f000001, 2130706433, 0177.0.0.1.
_NUMERIC_HOST = re.compile(r"(0x[0-9a-f]*|\d+)(\.(0x[0-9a-f]*|\d+)){0,3}\.?", re.IGNORECASE)


def check(uri: str, settings: Settings, param: str = PARAM) -> None:
    """Raise InvalidInput unless this installation may be asked to fetch `uri`. Resolves no name."""
    scheme = uri.partition(":")[0]
    checks = {"dataset": _check_upload, "s3": _check_s3, "https": _check_https, "hf": _check_hub, "file": local_path}
    if scheme not in checks:
        raise InvalidInput(
            f"{param}: {scheme}: is not fetched", param=param, code="dataset_scheme",
            hint="Use s3://, https://, hf://, dataset:<id> or, where the operator allows it, file://.",
        )  # fmt: skip
    try:
        checks[scheme](uri, settings)
    except InvalidInput as error:
        raise InvalidInput(f"{param}: {error.message}", code=error.code, param=param, hint=error.hint) from None


def local_path(uri: str, settings: Settings) -> Path:
    """Return the file that a `file://` URI names.

    Raises:
        InvalidInput: it is not under `TUNERY_LOCAL_DATASETS`, symbolic links followed.
    """
    parts = urlsplit(uri)
    if settings.local_datasets is None or parts.netloc not in ("", "localhost"):
        raise InvalidInput(
            "file:// is not allowed on this server", code="file_not_allowed",
            hint="Upload the file with POST /datasets, or ask the operator about TUNERY_LOCAL_DATASETS.",
        )  # fmt: skip
    root = settings.local_datasets.resolve()
    path = Path(unquote(parts.path)).resolve()
    if not path.is_relative_to(root) or path == root:
        raise InvalidInput(
            "the file is not in the operator's folder", code="file_not_allowed",
            hint="Only files under TUNERY_LOCAL_DATASETS may be named.",
        )  # fmt: skip
    return path


def hub_parts(uri: str) -> tuple[str, str | None, str | None]:
    """Return repository, revision and file of an `hf://` URI; the last two may be None."""
    match = _HUB.fullmatch(uri)
    if match is None or ".." in uri:
        raise InvalidInput("is no dataset of the hub", code="dataset_uri", hint="Use hf://org/name[@revision][/file].")
    return match["repo"], match["revision"], unquote(match["file"]) if match["file"] else None


def _check_upload(uri: str, _settings: Settings) -> None:
    if not _UPLOAD.fullmatch(uri):
        raise InvalidInput("is no id of an upload", code="dataset_uri", hint="POST /datasets answers the id to use.")


def _check_hub(uri: str, _settings: Settings) -> None:
    hub_parts(uri)


def _check_s3(uri: str, settings: Settings) -> None:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not key:
        raise InvalidInput("names no object", code="dataset_uri", hint="Use s3://bucket/key.")
    # The artifact bucket holds every tenant's adapters, and the operator's credentials read it.
    if bucket not in settings.dataset_buckets or bucket == settings.s3_bucket:
        raise InvalidInput(
            f"the bucket {bucket!r} may not be read", code="bucket_not_allowed",
            hint="Ask the operator to list it in TUNERY_DATASET_BUCKETS, or upload the file with POST /datasets.",
        )  # fmt: skip


def _check_https(uri: str, settings: Settings) -> None:
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidInput(f"is no address ({error})", code="dataset_uri") from None
    if not host:
        raise InvalidInput("names no host", code="dataset_uri")
    if parts.username or parts.password:
        raise InvalidInput(
            "carries a password", code="dataset_uri",
            hint="Use a signed link instead: a URI is shown to everybody who may read the job.",
        )  # fmt: skip
    address = _literal(host)
    if host.rstrip(".").lower().endswith("localhost") or (address and not is_allowed(address, settings)):
        raise InvalidInput(
            f"{host} is not a public address", code="private_address",
            hint="Upload the file with POST /datasets, or ask the operator about TUNERY_FETCH_NETWORKS.",
        )  # fmt: skip


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that `host` spells, in any spelling, or None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    if not _NUMERIC_HOST.fullmatch(host):
        return None
    try:
        return ipaddress.IPv4Address(_inet_aton(host.rstrip(".").split(".")))
    except ValueError:
        raise InvalidInput(f"{host} is no address", code="dataset_uri") from None


def _inet_aton(parts: list[str]) -> int:
    """Return the value of an IPv4 address in the loose spellings of inet_aton(3): 1 to 4 parts, octal, hexadecimal."""
    numbers = [_number(part) for part in parts]
    *leading, last = numbers
    if any(number > 255 for number in leading) or last >= 256 ** (5 - len(numbers)):
        raise ValueError("out of range")
    return sum(number << (24 - 8 * place) for place, number in enumerate(leading)) + last


def _number(part: str) -> int:
    if part.lower().startswith("0x"):
        return int(part[2:] or "0", 16)
    return int(part, 8 if part.startswith("0") and part.isdigit() and len(part) > 1 else 10)


def is_allowed(address: ipaddress.IPv4Address | ipaddress.IPv6Address, settings: Settings) -> bool:
    """Whether a dataset may be fetched from `address`: it is public, or in `TUNERY_FETCH_NETWORKS`."""
    if (embedded := _embedded_v4(address)) is not None:
        return is_allowed(embedded, settings)
    networks = (ipaddress.ip_network(network) for network in settings.fetch_networks)
    if any(address in network for network in networks if network.version == address.version):
        return True
    return address.is_global and not address.is_multicast


def _embedded_v4(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 one stands for: mapped, 6to4, Teredo or NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if address.teredo:
        return address.teredo[1]
    if address in ipaddress.ip_network("64:ff9b::/96"):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None
