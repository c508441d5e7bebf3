"""Reading nested parts of API objects, which may lack any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

Object = dict[str, Any]
"""One object as the API speaks it."""


def part(found: Mapping[str, Any] | None, *keys: str) -> Any:
    """What is at `keys`, or None where one of them is missing."""
    for key in keys:
        if found is None:
            return None
        found = cast("Mapping[str, Any] | None", found.get(key))
    return found


def mapping(found: Mapping[str, Any] | None, *keys: str) -> Object:
    """The mapping at `keys`; empty where there is none."""
    return cast(Object, part(found, *keys) or {})


def items(found: Mapping[str, Any] | None, *keys: str) -> list[Object]:
    """The list at `keys`; empty where there is none."""
    return cast("list[Object]", part(found, *keys) or [])


def text(found: Mapping[str, Any] | None, *keys: str) -> str:
    """The text at `keys`; empty where there is none."""
    value = part(found, *keys)
    return "" if value is None else str(value)


def words(found: Mapping[str, Any] | None, *keys: str) -> list[str]:
    """The list of texts at `keys`; empty where there is none."""
    return [str(value) for value in cast("list[Any]", part(found, *keys) or [])]
