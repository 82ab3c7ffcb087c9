"""The server, as a client sees it: alive, ready, its clock, and whether the key is good."""

from __future__ import annotations

import email.utils
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from common.cli.checks.finding import Finding, guarded
from common.errors import TuneryError

if TYPE_CHECKING:
    import httpx2

    from common.cli.state import State

_TIMEOUT_S = 10.0
# Signed links and leases are judged by other clocks than this one; S3 refuses 15 minutes.
_SKEW_WARN_S = 30.0
_SKEW_FAIL_S = 300.0
# The header has whole seconds, and servers write it anew once a second only.
_UNSURE_S = 3.0


def look_at_server(state: State) -> list[Finding]:
    """Return what there is to say about the server that commands would talk to."""
    try:
        client = state.connect()
    except TuneryError as error:
        return [Finding("server", "fail", error.message, error.hint)]
    import httpx2

    from common.client.transport import trusts_environment

    url = client.address.url
    options: dict[str, Any] = {"base_url": url, "timeout": _TIMEOUT_S, "trust_env": trusts_environment(url)}
    with client, httpx2.Client(**options) as http:
        try:
            alive = http.get("/livez")
        except httpx2.TransportError as error:
            from common.client.errors import connection_error

            broken = connection_error(url, error)
            return [Finding("server", "fail", broken.message, broken.hint)]
        if alive.status_code != 200:
            hint = "check that the URL is that of a Tunery server"
            return [Finding("server", "fail", f"{url}/livez answered {alive.status_code}", hint)]
        hint = "`tunery logs`, or the server's own log, says more"
        return [
            Finding("server", "ok", url),
            guarded("ready", hint, lambda: _ready(http)),
            _clock(alive),
            guarded("api key", hint, lambda: _key(client)),
        ]


def _ready(http: httpx2.Client) -> Finding:
    answer = http.get("/readyz")
    try:
        document = answer.json()
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("checks"), dict):
        hint = "look at what stands between here and the server, such as a proxy"
        return Finding("ready", "fail", f"/readyz answered {answer.status_code} and no report", hint)
    checks: dict[str, Any] = document["checks"]
    # A part that only delays jobs is not well either, but no reason to refuse them: that is for the status to say.
    broken = [f"{name}: {check.get('detail') or 'broken'}" for name, check in checks.items() if not check.get("ok")]
    if answer.status_code != 200:
        hint = "mend the part that is named; the checks below say more where its settings are here"
        return Finding("ready", "fail", "; ".join(broken) or f"/readyz answered {answer.status_code}", hint)
    if warnings := document.get("warnings"):
        return Finding("ready", "warn", "; ".join(map(str, warnings)), "jobs are taken, but something delays them")
    return Finding("ready", "ok", ", ".join(f"{name} ok" for name in checks))


def _clock(answer: httpx2.Response) -> Finding:
    """Compare this machine's clock with the Date header, which has whole seconds."""
    try:
        theirs = email.utils.parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError):
        return Finding("clock", "warn", "the server says no time", "nothing to do, unless links are refused as expired")
    ours = datetime.now(UTC) - answer.elapsed / 2
    skew_s = (ours - theirs).total_seconds()
    detail = f"this machine's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the server's"
    if abs(skew_s) >= _SKEW_WARN_S:
        verdict: Any = "fail" if abs(skew_s) >= _SKEW_FAIL_S else "warn"
        return Finding("clock", verdict, detail, "set both clocks by NTP: signed links and S3 requests carry times")
    return Finding("clock", "ok", "in step with the server's" if abs(skew_s) < _UNSURE_S else detail)


def _key(client: Any) -> Finding:
    client.jobs.list(limit=1)
    return Finding("api key", "ok", "the server takes it")
