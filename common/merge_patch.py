"""JSON Merge Patch (RFC 7396): a document with only what is to be different; null removes."""

from __future__ import annotations

from typing import Any

# Nothing that is patched here is deeper; what is will be refused for what it is.
_DEPTH_MAX = 16


def merged(target: Any, patch: Any, depth: int = 0) -> Any:
    """Return `target` with `patch` laid over it; neither is changed."""
    if not isinstance(patch, dict) or depth > _DEPTH_MAX:
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value, depth + 1)
    return result
