"""Humane units in YAML (`10m`, `99%`, `300ms`, `500Mi`), SI floats inside.

Owns the grammar of values; knows nothing of the fields they stand in.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
_BYTES = {"B": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DURATION = r"^\d+(\.\d+)?(ms|s|m|h|d)(\d+(\.\d+)?(ms|s|m|h|d))*$"
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_PERCENT = re.compile(r"^(\d+(?:\.\d+)?)\s?%$")
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s?(Ki|Mi|Gi|Ti|k|M|G|T|B)B?$")


def parse_duration(value: Any) -> float:
    """Seconds of `300ms`, `10s`, `5m`, `1h30m`. Raises ValueError that says what is allowed."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{value!r} is not a duration. Allowed: a number with a unit, such as 300ms, 10s, 5m, 1h30m")
    if isinstance(value, (int, float)):
        example = f"{value}ms or {value}s" if value >= 100 else f"{value}s"
        raise ValueError(f"{value} has no unit. Allowed: ms, s, m, h, d, such as {example}")
    text = value.strip()
    if not re.fullmatch(_DURATION, text):
        raise ValueError(f'"{value}" is not a duration. Allowed: a number with a unit, such as 300ms, 10s, 5m, 1h30m')
    return float(sum(Decimal(number) * _SECONDS[unit] for number, unit in _PART.findall(text)))


def parse_positive_duration(value: Any) -> float:
    """Like `parse_duration`, and zero is not allowed."""
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError(f'"{value}" is not more than zero. Allowed: a positive duration, such as 10s')
    return seconds


def parse_fraction(value: Any) -> float:
    """0–1 of `99%` or `99.5 %`. A bare number is refused: 0.5 could mean half or half a percent."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{value!r} is not a percentage. Allowed: 0% to 100%")
    if isinstance(value, (int, float)):
        raise ValueError(
            f"{value} has no unit. Allowed: a percentage, such as {value * 100 if value <= 1 else value:g}%"
        )
    match = _PERCENT.fullmatch(value.strip())
    if not match:
        raise ValueError(f'"{value}" is not a percentage. Allowed: 0% to 100%')
    percent = Decimal(match[1])
    if percent > 100:
        raise ValueError(f'"{value}" is more than 100%. Allowed: 0% to 100%')
    return float(percent / 100)


def parse_size(value: Any) -> int:
    """Bytes of `500Mi`, `2Gi`, `500M`, `1024B`."""
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match:
        raise ValueError(f'"{value}" is not a size. Allowed: a number with a unit, such as 500Mi, 2Gi, 500M, 1024B')
    return int(float(match[1]) * _BYTES[match[2]])


def parse_quantity(value: Any) -> float:
    """A threshold of any kind: percentage → 0–1, duration → seconds, plain number → itself."""
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a limit. Allowed: a percentage (99%), a duration (300ms) or a number (2)")
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        return float(value)
    if isinstance(value, str):
        text = value.strip()
        if text.endswith("%"):
            return parse_fraction(text)
        if re.fullmatch(_DURATION, text):
            return parse_duration(text)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f'"{value}" is not a limit. Allowed: a percentage (99%), a duration (300ms) or a number (2)')


def unit_of(value: Any) -> str:
    """`ratio`, `s` or `` (a plain number): the unit in which a threshold was written."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return "ratio"
    if isinstance(value, str) and re.fullmatch(_DURATION, value.strip()):
        return "s"
    return ""


def show_duration(seconds: float | None) -> str:
    """`0.04` → `40 ms`, `2.1` → `2.1 s`, `90` → `1 m 30 s`; None → `–`."""
    if seconds is None:
        return "–"
    if seconds < 0:
        return "−" + show_duration(-seconds)
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f}".rstrip("0").rstrip(".") + " s"
    if seconds < 60:
        return f"{seconds:.1f}".rstrip("0").rstrip(".") + " s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "m"), (rest, "s")]
    return " ".join(f"{n} {u}" for n, u in parts if n) or "0 s"


def show_latency(seconds: float | None) -> str:
    """Latency in milliseconds below one second, else in seconds."""
    if seconds is None:
        return "–"
    if not math.isfinite(seconds):
        return "no answer"
    return f"{seconds * 1000:.0f} ms" if abs(seconds) < 1 else f"{seconds:.2f} s"


def show_percent(fraction: float | None, digits: int = 1) -> str:
    """`0.994` → `99.4 %`."""
    return "–" if fraction is None else f"{fraction * 100:.{digits}f} %"


def show_value(value: float | None, unit: str) -> str:
    """A value in its unit: `ratio` as a percentage, `s` as latency, else plain."""
    if value is None or math.isnan(value):
        return "–"
    if unit != "s" and math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if unit == "ratio":
        return show_percent(value)
    if unit == "s":
        return show_latency(value)
    return f"{value:g}" if abs(value - round(value)) < 1e-9 else f"{value:.2f}"


def _plain(number: Decimal) -> str:
    """All digits, no exponent: what was written must be read back as the very same number."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _duration_back(seconds: float) -> str:
    number = Decimal(repr(seconds))
    return f"{_plain(number * 1000)}ms" if 0 < number < 1 else f"{_plain(number)}s"


def _fraction_back(fraction: float) -> str:
    return f"{_plain(Decimal(repr(fraction)) * 100)}%"


_PERCENT_PATTERN = r"^(100(\.0+)?|\d{1,2}(\.\d+)?)\s?%$"

Duration = Annotated[
    float,
    BeforeValidator(parse_positive_duration),
    PlainSerializer(_duration_back, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _DURATION, "examples": ["10m", "300ms"]}),
]
"""Seconds, more than zero; written `300ms`, `10s`, `5m`, `1h30m`."""

DurationOrZero = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(_duration_back, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _DURATION, "examples": ["0s", "10s"]}),
]
"""Seconds, zero or more."""

Fraction = Annotated[
    float,
    BeforeValidator(parse_fraction),
    PlainSerializer(_fraction_back, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _PERCENT_PATTERN, "examples": ["30%"]}),
]
"""0–1; written as a percentage."""

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(lambda n: f"{n}B", return_type=str),
    WithJsonSchema({"type": "string", "examples": ["500Mi"]}),
]
"""Bytes; written `500Mi`."""
