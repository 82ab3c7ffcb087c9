"""What a job's report says: its memory, where its adapter can be served, which merged models were made of it."""

from __future__ import annotations

from typing import Any

from common.cli import screen


def outcome(report: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return (name, sentence) for memory, each merged model and each inference engine that a job's report speaks of."""
    told = report or {}
    merged = [(form, _merged(facts)) for form, facts in told.get("merged", {}).items()]
    memory = [("memory", _memory(told["memory"]))] if told.get("memory") else []
    return memory + merged + [(f"on {engine}", _served(facts)) for engine, facts in told.get("servable", {}).items()]


def memory_parts(parts: dict[str, int]) -> str:
    """Return the parts of a memory estimate, the largest first; what is below a hundredth is left out."""
    least = sum(parts.values()) / 100
    sizes = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {screen.size(size)}" for name, size in sizes if size >= least)


def _memory(facts: dict[str, Any]) -> str:
    foreseen = f"{screen.size(facts.get('estimated_bytes'))} estimated"
    measured = facts.get("measured_bytes")
    told = f"{foreseen}, {screen.size(measured)} measured" if measured else foreseen
    return f"{told} ({memory_parts(facts.get('estimated', {}).get('parts', {}))})"


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
