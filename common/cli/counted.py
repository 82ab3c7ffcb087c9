"""What the check counted of a job's rows, in the words of a terminal."""

from __future__ import annotations

from typing import Any

_BARS = "▁▂▃▄▅▆▇█"


def counted(report: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return (name, sentence) for the rows, turns, tokens and lengths that a job's report speaks of."""
    told = report or {}
    data = told.get("data") or told
    if "rows" not in data:
        return []
    pairs = [("rows", _rows(data)), ("turns", _listed(data.get("turns", {}))), ("tokens", _tokens(data))]
    return [*pairs, ("lengths", histogram(data.get("length_histogram", {})))]


def _rows(data: dict[str, Any]) -> str:
    odd = {
        "left out: nothing to learn within max_length": data.get("rows_dropped"),
        "duplicates": data.get("rows_duplicate"),
        "with an empty turn or prompt": data.get("rows_empty"),
    }
    return " · ".join([f"{data['rows']:,}", *(f"{count:,} {what}" for what, count in odd.items() if count)])


def _tokens(data: dict[str, Any]) -> str:
    trained = f"{data['tokens']:,}, {data['trained_tokens']:,} of them trained on"
    if not data.get("rows_cut"):
        return trained
    return f"{trained} · max_length {data['max_length']:,} cuts {data['cut_share']:.1%} of the rows"


def _listed(counts: dict[str, int]) -> str:
    return " · ".join(f"{count:,} {name}" for name, count in counts.items())


def histogram(lengths: dict[str, int]) -> str:
    """Return rows by their length as bars: each stands for lengths up to twice those of the one before."""
    if not lengths:
        return ""
    bounds = sorted(map(int, lengths))
    powers = [1 << power for power in range(bounds[0].bit_length() - 1, bounds[-1].bit_length())]
    most = max(lengths.values())
    bars = "".join(_bar(lengths.get(str(bound), 0), most) for bound in powers)
    return f"{bars} up to {powers[0]:,} … {powers[-1]:,} tokens a row"


def _bar(count: int, most: int) -> str:
    return _BARS[max(0, -(-count * len(_BARS) // most) - 1)] if count else " "
