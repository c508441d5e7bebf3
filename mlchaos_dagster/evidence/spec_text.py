"""A spec as YAML again, in the humane units it was written in, secrets masked.

The text loads to the same model (a test holds that), so a report is enough to run an experiment again.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from mlchaos_dagster.domain.spec import Quantity
from mlchaos_dagster.evidence.masking import mask_value


def spec_yaml(model: BaseModel, *, mask: bool = True) -> str:
    """YAML of an experiment or environment: what differs from the defaults, in the order of the model."""
    import yaml

    body = _humane(model.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude_none=True))
    if mask:
        body = mask_value(body)
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=100, default_flow_style=False)


def _humane(value: Any) -> Any:
    if isinstance(value, dict):
        parts: dict[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
        # A threshold is dumped as its parts; people write `99%`, `300ms` or a number.
        if "value" in parts and set(parts) <= {"value", "unit"}:
            return _threshold(Quantity.model_validate(parts))
        return {k: _humane(v) for k, v in parts.items()}
    if isinstance(value, list):
        items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return [_humane(v) for v in items]
    return value


def _threshold(quantity: Quantity) -> str | float:
    if quantity.unit == "ratio":
        return f"{quantity.value * 100:.12g}%"
    if quantity.unit == "s":
        return f"{quantity.value * 1000:.12g}ms" if quantity.value < 1 else f"{quantity.value:.12g}s"
    return int(quantity.value) if quantity.value.is_integer() else quantity.value
