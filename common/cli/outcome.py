"""What a finished job says of its adapter: where it can be served, and which merged models were made of it."""

from __future__ import annotations

from typing import Any


def outcome(report: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return (name, sentence) for each merged model and each inference engine that a job's report speaks of."""
    told = report or {}
    merged = [(form, _merged(facts)) for form, facts in told.get("merged", {}).items()]
    return merged + [(f"on {engine}", _served(facts)) for engine, facts in told.get("servable", {}).items()]


def _merged(facts: dict[str, Any]) -> str:
    if not facts.get("made"):
        return f"not made: {facts.get('error', {}).get('message', 'unknown')}"
    gaps = [
        f"{gap['relative']:.2g} from the {name.removeprefix('from_').replace('_', ' ')}"
        for name, gap in facts.items()
        if name.startswith("from_")
    ]
    return f"{facts.get('dtype')}; its logits differ by {', '.join(gaps)}"


def _served(facts: dict[str, Any]) -> str:
    return (
        "; ".join(facts.get("commands", ())) if facts.get("servable") else f"no: {'; '.join(facts.get('reasons', ()))}"
    )
