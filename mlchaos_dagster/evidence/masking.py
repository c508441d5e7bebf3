"""Secrets never reach a report, even when somebody wrote one into a YAML file.

Settings reference secrets (`env:NAME`), so a value under a secret's key is already a mistake; it is masked by key,
and then wherever else the same text turns up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mlchaos_dagster.domain.secrets import REFERENCE, SECRET_KEY

MASK = "•••"

_IN_TEXT = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), rf"\1 {MASK}"),
    (re.compile(r"(://)[^/\s:@]+:[^/\s@]+@"), rf"\1{MASK}@"),
    (
        re.compile(
            r"(?i)\b([\w-]*(?:token|password|passwd|secret|api[-_]?key))(\s*[=:]\s*)(?!env:|file:|•)[^\s&,;\"'}]+"
        ),
        rf"\1\2{MASK}",
    ),
)


def mask_value(value: Any, key: str = "") -> Any:
    """A copy of JSON-able `value` in which everything under a secret's key is masked; references stay."""
    if isinstance(value, dict):
        return {k: mask_value(v, str(k)) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, (list, tuple)):
        return [mask_value(v, key) for v in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, str):
        if SECRET_KEY.search(key) and value and not REFERENCE.match(value):
            return MASK
        return mask_text(value)
    return value


def mask_text(text: str, known: frozenset[str] = frozenset()) -> str:
    """`text` without what looks like a credential, and without the `known` ones."""
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def secrets_in(*values: Any) -> frozenset[str]:
    """Every text that stands under a secret's key, to be masked wherever it turns up."""
    return frozenset(s for value in values for s in _secrets(value, ""))


def _secrets(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        for k, v in value.items():  # pyright: ignore[reportUnknownVariableType]
            yield from _secrets(v, str(k))  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, (list, tuple)):
        for v in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _secrets(v, key)
    elif isinstance(value, str) and SECRET_KEY.search(key) and len(value) >= 4 and not REFERENCE.match(value):
        yield value
        # `Authorization: Bearer abc`: the part after the scheme turns up alone in error messages.
        if len(parts := value.split()) > 1 and len(parts[-1]) >= 4:
            yield parts[-1]
