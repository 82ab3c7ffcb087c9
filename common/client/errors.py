"""What can go wrong between a client and its server, as exceptions.

TuneryError
├── ApiError              the server answered with a problem document; status, code, param, hint and request_id are set
│   ├── RequestInvalid      400, 415, 422  also an InvalidInput
│   ├── NotAuthenticated    401            also an Unauthenticated
│   ├── NotPermitted        403            also a Forbidden
│   ├── Missing             404            also a NotFound
│   ├── StateConflict       wrong_state    also a WrongState
│   ├── BodyTooLarge        413            also a TooLarge
│   ├── RateLimited         429            also a UserError
│   └── ServerFault         5xx            also an InfraError
├── ServerNotFound        no address of a server is known
├── CannotConnect         nobody answers at the address, or the connection broke
├── UnexpectedAnswer      whoever answered is no Tunery server that this client understands
├── DownloadFailed        a file did not arrive whole, or its SHA-256 differs
└── UploadFailed          parts of a file did not arrive at the object store

Each is a `common.errors.TuneryError`, and the classes named by "also" can be caught by the name that the server uses.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from common import errors

if TYPE_CHECKING:
    import httpx2

__all__ = [
    "ApiError",
    "BodyTooLarge",
    "CannotConnect",
    "DownloadFailed",
    "Missing",
    "NotAuthenticated",
    "NotPermitted",
    "RateLimited",
    "RequestInvalid",
    "ServerFault",
    "ServerNotFound",
    "StateConflict",
    "UnexpectedAnswer",
    "UploadFailed",
    "answer_error",
    "connection_error",
]


class ApiError(errors.TuneryError):
    """The server refused, or failed. `status` is HTTP's, `request_id` finds the request in the server's log."""

    status = 0
    request_id: str | None = None
    errors: list[dict[str, Any]] = []
    """Everything that is wrong, where the server names more than one thing: {param, message, hint}."""


class RequestInvalid(ApiError, errors.InvalidInput):
    """A field of the request is wrong; `param` names it."""


class NotAuthenticated(ApiError, errors.Unauthenticated):
    """No API key, or one that the server does not know."""


class NotPermitted(ApiError, errors.Forbidden):
    """The key is known, but may not do this."""


class Missing(ApiError, errors.NotFound):
    """No such thing in this key's tenant."""


class StateConflict(ApiError, errors.WrongState):
    """The job cannot do that in its present state."""


class BodyTooLarge(ApiError, errors.TooLarge):
    """More bytes than the operator allows."""


class RateLimited(ApiError, errors.UserError):
    """Too many requests; the client has already waited and tried again."""


class ServerFault(ApiError, errors.InfraError):
    """The server failed, or a part of its installation is away."""


class ServerNotFound(errors.UserError):
    """Neither an argument nor the environment nor the data directory names a server."""

    code = "no_server"


class CannotConnect(errors.InfraError):
    """Nobody answers at the server's address, or the connection broke and could not be made again."""

    code = "cannot_connect"


class UnexpectedAnswer(errors.InfraError):
    """The answer is not one that a Tunery server of a version close to this client's gives."""

    code = "unexpected_answer"


class DownloadFailed(errors.InfraError):
    """A file did not arrive whole, or not as it was published. What arrived is kept for the next try, unless wrong."""

    code = "download_failed"


class UploadFailed(errors.InfraError):
    """Parts of a file did not arrive at the object store. What arrived is kept for the next try."""

    code = "upload_failed"


_BY_CODE: dict[str, type[ApiError]] = {"wrong_state": StateConflict}
_BY_STATUS: dict[int, type[ApiError]] = {
    401: NotAuthenticated,
    403: NotPermitted,
    404: Missing,
    409: StateConflict,
    413: BodyTooLarge,
    429: RateLimited,
}
_HINTS = {
    401: "set TUNERY_API_KEY to a key that this server knows; `tunery keys create` makes one",
    404: "check the id; a key sees its own tenant's jobs, datasets and workers only",
    429: "wait a little and try again",
    500: "look into the server's log for the request id, or run `tunery doctor` where the server runs",
    502: "the server is behind a proxy that cannot reach it; see whether it runs",
    503: "a part of the installation is away; `tunery doctor` says which",
}


def answer_error(response: httpx2.Response) -> ApiError:
    """Return the exception for an answer with a status of 400 or more; its body has been read."""
    problem = _problem(response)
    status = response.status_code
    kind = _BY_CODE.get(str(problem.get("code"))) or _BY_STATUS.get(status)
    kind = kind or (ServerFault if status >= 500 else RequestInvalid)
    message = problem.get("detail") or problem.get("title") or f"the server answered {status} {response.reason_phrase}"
    error = kind(
        message,
        code=problem.get("code"),
        param=problem.get("param"),
        hint=_hint(status, problem),
    )
    error.status = status
    error.request_id = problem.get("request_id") or response.headers.get("x-request-id")
    listed = problem.get("errors")
    error.errors = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    return error


def _hint(status: int, problem: dict[str, Any]) -> str | None:
    known = problem.get("hint") or _HINTS.get(status)
    # Proxies and other programs refuse without a problem document.
    return known if known or problem else "check that TUNERY_URL (or --url) is the address of a Tunery server"


def connection_error(url: str, error: Exception) -> CannotConnect:
    """Return the exception for a request to `url` that got no answer."""
    import httpx2

    reason = str(error) or type(error).__name__
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        message = f"no server answers at {url}: {reason}"
        hint = "`tunery up` starts one on this machine; TUNERY_URL points the client at another"
    elif isinstance(error, httpx2.TimeoutException):
        message = f"{url} did not answer in time ({type(error).__name__})"
        hint = "the server may be overloaded; `tunery doctor` looks at its parts"
    else:
        message = f"the connection to {url} broke: {reason}"
        hint = "try again; `tunery doctor` says whether the server can be reached"
    return CannotConnect(message, hint=hint)


def _problem(response: httpx2.Response) -> dict[str, Any]:
    """Return the problem document's texts and its list; proxies and gateways answer with pages that are none."""
    try:
        document = json.loads(response.content)
    except ValueError:
        return {}
    if not isinstance(document, dict):
        return {}
    return {name: value for name, value in document.items() if isinstance(value, str | list)}
