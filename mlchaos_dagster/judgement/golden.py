"""What golden predictions and shifts say of a run, in words. No arrays: whoever only prints does not pay for numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlchaos_dagster.domain.environment import RequestProbe
from mlchaos_dagster.domain.record import GoldenFacts

if TYPE_CHECKING:
    from mlchaos_dagster.judgement.shift import Shift

_SHOWN_ITEMS = 8


def wrong_words(facts: GoldenFacts, probe: RequestProbe) -> str:
    """`412 of 412 answers differ from the golden predictions (answered 200, wrong number); first at item 17: …`."""
    differ = facts.wrong - facts.without_number
    said: list[str] = []
    if differ or not facts.wrong:
        said.append(
            f"{differ} of {facts.compared} answers differ from the golden predictions (answered 200, wrong number)"
        )
    if facts.without_number:
        said.append(
            f"{facts.without_number} of {facts.compared} answers carry no number at {probe.value} (answered 200)"
        )
    if facts.first_item is not None:
        golden, value = facts.first_golden, facts.first_value
        shown = "no number" if value is None else numbers_apart(value, golden)[0]
        instead = "" if golden is None else f" instead of {numbers_apart(golden, value)[0]}"
        said.append(f"first at {item_name(facts.first_item, probe)}: {shown}{instead}")
    return "; ".join(said)


def table_words(facts: GoldenFacts, probe: RequestProbe) -> str:
    """Where the golden numbers come from, how many there are, what is left out, and their digest."""
    source = "declared" if facts.declared else "the baseline's medians"
    text = f"golden predictions: {facts.items} items ({source}, tolerance {facts.tolerance:g}), "
    text += f"digest {facts.digest[:12]}"
    if facts.unstable:
        names = [item_name(i, probe) for i in facts.unstable[:_SHOWN_ITEMS]]
        more = len(facts.unstable) - len(names)
        text += f"; {len(facts.unstable)} left out, because the baseline's own answers to them disagree: "
        text += ", ".join(names) + (f" and {more} more" if more else "")
    return text


def shift_words(shift: Shift) -> str:
    """`750 answers of 167 items, mean 0.73 instead of 0.24`; empty when nothing could be compared."""
    if shift.mean_now is None or shift.mean_before is None:
        return ""
    now, before = numbers_apart(shift.mean_now, shift.mean_before)
    return f"{shift.values} answers of {shift.items} items, mean {now} instead of {before}"


def item_name(item: int, probe: RequestProbe) -> str:
    """`item 17 (entity_id 51)`; `the request` for a probe without bodies."""
    if item < 0:
        return "the request"
    if probe.items is not None and item < len(probe.items.numbers):
        return f"item {item} ({probe.items.name} {probe.items.numbers[item]})"
    body = probe.bodies[item] if item < len(probe.bodies) else {}
    if len(body) == 1:
        ((name, value),) = body.items()
        if isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= 40):
            return f"item {item} ({name} {value})"
    return f"item {item}"


def numbers_apart(a: float, b: float | None) -> tuple[str, str]:
    """Both with four digits, or as many as it takes to tell them apart."""
    if b is None:
        return f"{a:.4g}", ""
    digits = next((d for d in range(4, 17) if f"{a:.{d}g}" != f"{b:.{d}g}"), 4)
    return f"{a:.{digits}g}", f"{b:.{digits}g}"
