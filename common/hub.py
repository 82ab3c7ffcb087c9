"""The model hub: the operator's client of it, its errors as ours, and the one file that an estimate needs.

Workers fetch whole models; the API reads a `config.json` at most. Model code never talks to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from common.errors import InfraError, InvalidInput, SourceRefused
from common.settings import Settings

_PARAM = "model"
_AT_HAND = "Name a base model of the server: `tunery models` (GET /base-models) lists them."
_CONFIG_TIMEOUT_S = 5.0
_CONFIG_BYTES = 1 << 20


def config(model: str, settings: Settings) -> dict[str, Any]:
    """Return the `config.json` of a hub model, `org/name[@revision]`, asked for with a bound on time and size.

    Raises:
        InvalidInput: there is none, or the operator's token may not read it.
        InfraError: the hub does not answer in time.
    """
    name, _, revision = model.partition("@")
    url = hf_hub_url(name, "config.json", revision=revision or None, endpoint=settings.hf_endpoint)
    headers = build_hf_headers(token=token(settings))
    with hub_errors(model), _no_such_file(model):
        options: dict[str, Any] = {"headers": headers, "timeout": _CONFIG_TIMEOUT_S, "follow_redirects": True}
        with get_session().stream("GET", url, **options) as response:
            hf_raise_for_status(response)
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _CONFIG_BYTES:
                    break
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


@contextmanager
def _no_such_file(model: str) -> Iterator[None]:
    try:
        yield
    except EntryNotFoundError as error:
        raise InvalidInput(f"{model} has no config.json", code="bad_base_model", param=_PARAM) from error


def hub(settings: Settings) -> HfApi:
    """Return the hub's client, with the operator's token."""
    return HfApi(endpoint=settings.hf_endpoint, token=token(settings))


def token(settings: Settings) -> str | bool:
    """Return the operator's hub token, or False for none."""
    # False and not None: None would read a token from the home folder of whoever runs the worker.
    return settings.hf_token.get_secret_value() if settings.hf_token else False


@contextmanager
def hub_errors(what: str, param: str = _PARAM) -> Iterator[None]:
    """Turn the hub's errors into ours; `what` is named in the message, `param` is the field to mend."""
    try:
        yield
    except GatedRepoError as error:
        raise InvalidInput(
            f"{what} is gated on the hub",
            code="base_gated",
            param=param,
            hint="Ask the operator to accept its licence and to set TUNERY_HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise InvalidInput(
            f"{what} has no such revision on the hub",
            code="base_not_found",
            param=param,
            hint="Use a branch, tag or commit that exists.",
        ) from error
    except RepositoryNotFoundError as error:
        raise InvalidInput(
            f"{what} is not on the hub, or this server may not see it",
            code="base_not_found",
            param=param,
            hint="Check the spelling; a private one needs the operator's token.",
        ) from error
    except OfflineModeIsEnabled as error:
        raise InvalidInput(
            f"{what}: this server does not use the hub",
            code="hub_offline",
            param=param,
            hint=_AT_HAND if param == _PARAM else "Upload the file instead, and use the URI that it then has.",
        ) from error
    except (HfHubHTTPError, HTTPError) as error:
        if _refuses(error):
            raise SourceRefused(
                f"{param}: the hub refuses {what}",
                code="hub_refused",
                param=param,
                hint="Ask the operator whether TUNERY_HF_TOKEN may read it.",
            ) from error
        raise InfraError(f"the hub does not answer for {what} ({type(error).__name__})", code="hub_away") from error


def _refuses(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in (408, 429)
