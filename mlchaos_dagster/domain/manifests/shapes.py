"""What another tool's YAML may hold, and reading it: plain values out, everything odd said with its place.

A table of a format says for each field what it is. What is common and wrong in a way that leaves no doubt (a number
without quotes where text is wanted, `"3"` where a number is) is put right with a note; all else is a problem.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from mlchaos_dagster.domain.nodes import Document, Node, Path
from mlchaos_dagster.domain.parsing import nearest, one_line, show_path
from mlchaos_dagster.errors import Problem


@dataclass(frozen=True)
class Words:
    """One of a few words."""

    allowed: tuple[str, ...]
    fold: bool = False
    """In any case: `Deployment` is taken for `deployment`, with a note."""
    blank: bool = False
    """May be empty, as in a template."""


@dataclass(frozen=True)
class Each:
    """A list of one rule."""

    of: Rule


@dataclass(frozen=True)
class Every:
    """Fields with any name, of one rule."""

    of: Rule


@dataclass(frozen=True)
class Fields:
    """Named fields."""

    of: Mapping[str, Rule]
    required: tuple[str, ...] = ()
    extra: bool = False
    """Keep fields that are not in the table; else they are problems."""
    ignored: bool = False
    """The tool's API takes fields that are not in the table and does nothing with them: so do we, and say it."""
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    """What people write → what it is."""
    dropped: Mapping[str, str] = field(default_factory=dict[str, str])
    """Fields that do nothing (any more) → why."""


Scalar = Literal["text", "int", "number", "bool", "any", "duration", "seconds"]
Rule = Scalar | Words | Each | Every | Fields
TEXTS = Each("text")
TEXT_MAP = Every("text")

_GO_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_GO_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")
_GO = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h))+|[-+]?0")


def go_seconds(text: str) -> float | None:
    """Seconds of a duration as Go writes it (`1m30s`, `-10m100ns`); None: it is none."""
    text = text.strip()
    if len(text) > 64 or not _GO.fullmatch(text):
        return None
    seconds = sum(float(number) * _GO_UNITS[unit] for number, unit in _GO_PART.findall(text))
    return -seconds if text.startswith("-") else seconds


def at(node: Node, *path: str | int) -> Node | None:
    """What stands at a path below a node; None: nothing, or null."""
    found: Node | None = node
    for token in path:
        pair = found.pair(token) if found is not None else None
        found = pair[1] if pair else None
    return None if found is None or (found.kind == "scalar" and found.value is None) else found


def text_at(node: Node, *path: str | int) -> str:
    """A scalar at a path as text; empty where there is none."""
    found = at(node, *path)
    return "" if found is None or found.kind != "scalar" else plain_text(found.value)


def plain_text(value: Any) -> str:
    """A scalar as it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


@dataclass
class Looker:
    """Reads the values of one document by rules, and keeps what is to be said."""

    document: Document
    notes: list[Problem] = field(default_factory=list[Problem])
    """What was put right, left out, or should be known."""
    problems: list[Problem] = field(default_factory=list[Problem])
    """What keeps the document from being run."""

    def note(self, path: Path, what: str, *, key: bool = False) -> None:
        """Say something that does not keep it from running."""
        self.notes.append(self._said(path, what, key))

    def problem(self, path: Path, what: str, *, key: bool = False) -> None:
        """Say something that does."""
        self.problems.append(self._said(path, what, key))

    def refused(self, path: Path) -> bool:
        """Whether what stands at a path, or below, was said to be wrong: it is there then, and not to be missed."""
        shown = show_path(path)
        return any(p.what.startswith((f"{shown}:", f"{shown}.", f"{shown}[")) for p in self.problems)

    def _said(self, path: Path, what: str, key: bool) -> Problem:
        shown = show_path(path)
        return Problem(self.document.where(path, key), one_line(f"{shown}: {what}" if shown else what))

    def look(self, node: Node, path: Path, rule: Rule) -> Any:
        """The value at `path` by its rule; None where it is not, or is wrong (which was said)."""
        if node.kind == "scalar" and node.value is None:
            return None
        if isinstance(rule, Fields):
            return self._fields(node, path, rule)
        if isinstance(rule, Every):
            if self._is(node, path, "mapping"):
                found = {name: self.look(child, (*path, name), rule.of) for name, (_, child) in node.value.items()}
                return {name: value for name, value in found.items() if value is not None}
            return None
        if isinstance(rule, Each):
            if self._is(node, path, "list"):
                found = [self.look(child, (*path, i), rule.of) for i, child in enumerate(node.value)]
                return [value for value in found if value is not None]
            return None
        if rule == "any":
            return node.plain()
        return self._scalar(node, path, rule) if self._is(node, path, "scalar") else None

    def _is(self, node: Node, path: Path, kind: str) -> bool:
        if node.kind == kind:
            return True
        words = {"scalar": "one value", "list": "a list, such as [a, b]", "mapping": "fields, such as name: value"}
        self.problem(path, f"a {node.kind}. Allowed: {words[kind]}.")
        return False

    def _fields(self, node: Node, path: Path, rule: Fields) -> dict[str, Any] | None:
        if not self._is(node, path, "mapping"):
            return None
        found: dict[str, Any] = {}
        missing = [n for n in rule.required if at(node, n) is None]
        for name, (_, child) in node.value.items():
            right = rule.renamed.get(name, name)
            if right in rule.of:
                missing = [m for m in missing if m != right]
                if right != name:
                    self.note((*path, name), f'it is called "{right}": taken so.', key=True)
                value = self.look(child, (*path, name), rule.of[right])
                if value is not None:
                    found[right] = value
            elif name in rule.dropped:
                self.note((*path, name), f"left out: {rule.dropped[name]}.", key=True)
            elif rule.extra:
                found[name] = child.plain()
            else:
                missing = self._unknown(name, path, rule, missing)
        if missing:
            self.problem(path, f"missing field{'s' * (len(missing) > 1)} {', '.join(missing)}.")
        return found

    def _unknown(self, name: str, path: Path, rule: Fields, missing: list[str]) -> list[str]:
        """Says it; returns what is missing besides the field that was meant."""
        deeper = (f for f, inside in rule.of.items() if isinstance(inside, Fields) and name in inside.of)
        near = nearest(name, rule.of) or next((f"{f}.{name}" for f in deeper), None)
        if rule.ignored and near is None:
            self.note((*path, name), "no such field: left out, as the tool itself does nothing with it.", key=True)
            return missing
        hint = f' Did you mean "{near}"?' if near else ""
        self.problem((*path, name), f"no such field.{hint} Allowed: {', '.join(rule.of)}.", key=True)
        return [m for m in missing if m != near]

    def _scalar(self, node: Node, path: Path, rule: Scalar | Words) -> Any:
        value, shown = node.value, plain_text(node.value)
        if isinstance(rule, Words):
            if shown in rule.allowed or (rule.blank and not shown):
                return shown
            folded = next((a for a in rule.allowed if a.lower() == shown.lower()), None) if rule.fold else None
            if folded is not None:
                self.note(path, f'"{shown}" is written "{folded}": taken so.')
                return folded
            near = nearest(shown, rule.allowed)
            hint = f' Did you mean "{near}"?' if near else ""
            self.problem(path, f'"{shown[:60]}" is not known.{hint} Allowed: {", ".join(rule.allowed)}.')
            return None
        if rule == "text":
            if not isinstance(value, str):
                self.note(path, f'{shown} is not text, and text is wanted: "{shown}" is taken.')
            return shown
        if rule == "seconds":
            return self._seconds(value, shown, path)
        if rule == "duration":
            if isinstance(value, str) and go_seconds(value) is not None:
                return value.strip()
            self.problem(
                path, f'"{shown[:60]}" is not a duration. Allowed: a number with a unit, such as 300ms, 30s, 5m.'
            )
            return None
        return self._typed(value, shown, path, rule)

    def _seconds(self, value: Any, shown: str, path: Path) -> str | None:
        """A duration as text; a bare number is seconds, as it was in older versions."""
        if isinstance(value, str) and (
            not shown.strip() or (go_seconds(value) or 0) >= 0 and go_seconds(value) is not None
        ):
            return value.strip()
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", shown) and not isinstance(value, bool):
            self.note(path, f'{shown} has no unit: "{shown}s" is taken.')
            return f"{shown}s"
        self.problem(path, f'"{shown[:60]}" is not a duration. Allowed: a number with a unit, such as 500ms, 5s, 1m.')
        return None

    def _typed(self, value: Any, shown: str, path: Path, rule: Scalar) -> Any:
        if rule == "bool":
            if isinstance(value, bool):
                return value
            if shown.lower() in ("true", "false"):
                self.note(path, f'"{shown}" is text, and true or false is wanted: {shown.lower()} is taken.')
                return shown.lower() == "true"
            self.problem(path, f'"{shown[:60]}" is not true or false. Allowed: true, false.')
            return None
        kinds = (int,) if rule == "int" else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,15}", value.strip()):
            self.note(path, f'"{shown}" is text, and a number is wanted: {value.strip()} is taken.')
            return int(value)
        self.problem(path, f'"{shown[:60]}" is not a {"whole " * (rule == "int")}number. Allowed: such as 3.')
        return None


def entries(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list; empty where it is none."""
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [cast("dict[str, Any]", item) for item in items if isinstance(item, dict)]


def part(value: Any) -> dict[str, Any]:
    """A mapping, or an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def texts(value: Any) -> list[str]:
    """The texts of a list; empty where it is none."""
    return [v for v in cast("list[Any]", value) if isinstance(v, str)] if isinstance(value, list) else []
