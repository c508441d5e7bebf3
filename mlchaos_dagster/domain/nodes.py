"""YAML text → a bounded tree of nodes that know their line and column.

Owns everything that can be wrong with a file before its fields mean anything: encoding, size, syntax, depth, aliases,
duplicate keys. The tree is built from parser events, never by a YAML constructor: nothing in a file can run code, and
aliases are counted as if expanded before they are (a "billion laughs" file is refused while it is still small).
Plain scalars follow the YAML 1.2 core schema: `no`, `on` and `12:30` stay text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from mlchaos_dagster.errors import Problem, SpecError

MAX_BYTES = 1 << 20
"""A spec is a few kilobytes; a megabyte is somebody's data by mistake."""
MAX_NODES = 50_000
"""Nodes of a file with its aliases expanded."""
MAX_DEPTH = 40
"""Levels of nesting; the deepest spec needs eight."""

Path = tuple[str | int, ...]

_BAD_CHARACTER = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_TAG = "tag:yaml.org,2002:"


@dataclass(slots=True)
class Node:
    """A scalar, list or mapping and where it stands (line and column from 1)."""

    value: Any
    """Python scalar · list of nodes · dict of name → (key node, value node)."""
    line: int
    column: int
    kind: str = "scalar"
    size: int = 1
    """Nodes below and including this one, aliases counted in full."""
    open: bool = False
    """Still being read: an alias to it would be a circle."""

    def plain(self) -> Any:
        """The same as Python scalars, lists and dicts."""
        if self.kind == "list":
            return [child.plain() for child in self.value]
        if self.kind == "mapping":
            return {name: child.plain() for name, (_, child) in self.value.items()}
        return self.value

    def pair(self, token: str | int) -> tuple[Node, Node] | None:
        """(key node, value node) of a field, or the item twice for a list; None when there is none."""
        if self.kind == "mapping":
            return self.value.get(token)
        if self.kind == "list" and isinstance(token, int) and 0 <= token < len(self.value):
            return self.value[token], self.value[token]
        return None


@dataclass(slots=True)
class Document:
    """One parsed file: its tree, and what is wrong with it so far."""

    source: str
    root: Node
    problems: list[Problem] = field(default_factory=list[Problem])

    def where(self, path: Path, key: bool = False) -> str:
        """`file:line:column` of a value (or of its key); of the nearest thing around it when it is missing."""
        node = shown = self.root
        for i, token in enumerate(path):
            pair = node.pair(token)
            if pair is None:
                break
            node = pair[1]
            shown = pair[0] if key and i == len(path) - 1 else node
        return f"{self.source}:{shown.line}:{shown.column}"

    def has(self, path: Path) -> bool:
        """Whether there is a value at `path`."""
        node = self.root
        for token in path:
            pair = node.pair(token)
            if pair is None:
                return False
            node = pair[1]
        return True


def read_document(text: str | bytes, source: str) -> Document:
    """The tree of a file that holds one YAML (or JSON) mapping.

    Raises:
        SpecError: it cannot be read as such; one problem, with its place.
    """
    decoded = _decode(text, source)
    try:
        document = _Reader(decoded, source).read()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise SpecError(_syntax(decoded, line, e), f"{source}:{line}:{column}") from e
    except yaml.YAMLError as e:
        raise SpecError(f"not YAML: {' '.join(str(e).split())[:160]}.", f"{source}:1:1") from e
    if document.root.kind == "scalar" and document.root.value is None:
        raise SpecError("the file is empty. Allowed: fields such as schema, name, …", f"{source}:1:1")
    if document.root.kind != "mapping":
        what = "a list" if document.root.kind == "list" else "a single value"
        raise SpecError(
            f"the file holds {what}, not fields. Allowed: lines such as name: my-experiment.", document.where(())
        )
    return document


def read_documents(text: str | bytes, source: str) -> list[Document]:
    """The trees of a file of one or more YAML documents, whatever they hold; empty ones are left out.

    Raises:
        SpecError: it cannot be read as YAML; one problem, with its place.
    """
    decoded = _decode(text, source)
    try:
        return _Reader(decoded, source, many=True).read_all()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise SpecError(_syntax(decoded, line, e), f"{source}:{line}:{column}") from e
    except yaml.YAMLError as e:
        raise SpecError(f"not YAML: {' '.join(str(e).split())[:160]}.", f"{source}:1:1") from e


def _decode(text: str | bytes, source: str) -> str:
    if len(text) > MAX_BYTES:
        raise SpecError("the file is larger than 1 MiB. Allowed: specs of at most 1 MiB.", f"{source}:1:1")
    if isinstance(text, bytes):
        if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise SpecError("the file is UTF-16. Allowed: UTF-8.", f"{source}:1:1")
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as e:
            before = text[: e.start].decode("utf-8")
            line, column = _place(before)
            raise SpecError(
                f"byte 0x{text[e.start]:02x} is not UTF-8. Allowed: UTF-8 text.", f"{source}:{line}:{column}"
            ) from e
    text = text.removeprefix("\ufeff")
    bad = _BAD_CHARACTER.search(text)
    if bad:
        line, column = _place(text[: bad.start()])
        raise SpecError(
            f"the character U+{ord(bad[0]):04X} is not allowed in YAML. Allowed: printable text.",
            f"{source}:{line}:{column}",
        )
    return text


def _place(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _syntax(text: str, line: int, e: yaml.MarkedYAMLError) -> str:
    lines = text.splitlines()
    shown = lines[line - 1] if 0 < line <= len(lines) else ""
    if "\t" in shown[: len(shown) - len(shown.lstrip())]:
        return "not YAML: the line is indented with a tab. Allowed: spaces."
    parts = [part for part in (e.problem, e.context) if part]
    return f"not YAML: {' '.join(', '.join(parts).split())[:200]}."


class _Reader:
    """Events → nodes, without recursion and within bounds."""

    def __init__(self, text: str, source: str, many: bool = False) -> None:
        # libyaml where PyYAML was built with it: ten times as fast
        self.loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        self.source, self.many = source, many
        self.anchors: dict[str, Node] = {}
        self.problems: list[Problem] = []
        self.done: list[Document] = []

    def read(self) -> Document:
        try:
            root = self._read()
        finally:
            self.loader.dispose()
        return Document(self.source, root, self.problems)

    def read_all(self) -> list[Document]:
        try:
            self._read()
        finally:
            self.loader.dispose()
        return self.done

    def _finish(self, root: Node | None) -> None:
        """One document of many has ended: its anchors end with it."""
        if root is not None and (root.kind != "scalar" or root.value is not None):
            self.done.append(Document(self.source, root, self.problems))
        self.anchors, self.problems = {}, []

    def _read(self) -> Node:
        root: Node | None = None
        documents = 0
        total = 0
        stack: list[Node] = []
        keys: list[Node | None] = []
        while True:
            event = self.loader.get_event()
            if event is None or isinstance(event, yaml.StreamEndEvent):
                return root or Node(None, 1, 1)
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1 and not self.many:
                    self._fail(event, "a second document begins here. Allowed: one document in a file.")
            if self.many and isinstance(event, yaml.DocumentEndEvent):
                self._finish(root)
                root = None
                continue
            if isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
                done = stack.pop()
                keys.pop()
                done.open = False
                if stack:
                    stack[-1].size += done.size
                continue
            if not isinstance(event, yaml.NodeEvent):
                continue
            node = self._alias(event) if isinstance(event, yaml.AliasEvent) else self._node(event)
            # an alias counts as what it stands for: the sum grows with every use, and is never expanded to be counted
            total += node.size
            if total > MAX_NODES:
                self._fail(event, f"more than {MAX_NODES} values (aliases counted in full). Allowed: fewer.")
            if not stack:
                root = node
            else:
                self._put(stack[-1], keys, node, event)
            if isinstance(event, yaml.CollectionStartEvent):
                if len(stack) >= MAX_DEPTH:
                    self._fail(event, f"nested more than {MAX_DEPTH} levels deep. Allowed: at most {MAX_DEPTH}.")
                stack.append(node)
                keys.append(None)
            elif stack:
                stack[-1].size += node.size

    def _put(self, parent: Node, keys: list[Node | None], node: Node, event: Any) -> None:
        if parent.kind == "list":
            parent.value.append(node)
            return
        key = keys[-1]
        if key is None:
            if not isinstance(node.value, str) or node.kind != "scalar":
                if node.kind != "scalar":
                    # In a template of Helm or Jinja `{{` is no YAML yet, and reads as a mapping in a mapping.
                    self._fail(
                        event, "a field's name is a list or mapping. Allowed: text; a template is rendered first."
                    )
                text = event.value if isinstance(event, yaml.ScalarEvent) else str(node.value)
                node = Node(text, node.line, node.column)
            keys[-1] = node
            return
        keys[-1] = None
        first = parent.pair(key.value)
        if first is not None:
            where = f"{self.source}:{key.line}:{key.column}"
            what = f'"{key.value}" is given twice, first in line {first[0].line}. Allowed: once.'
            self.problems.append(Problem(where, what))
            return
        parent.value[key.value] = (key, node)

    def _alias(self, event: Any) -> Node:
        known = self.anchors.get(event.anchor)
        if known is None:
            self._fail(event, f"*{event.anchor} refers to nothing. Allowed: a name given with &{event.anchor} above.")
        if known.open:
            self._fail(event, f"*{event.anchor} contains itself. Allowed: references to what is complete.")
        return known

    def _node(self, event: Any) -> Node:
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        tag = event.tag
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self._scalar(event, tag), line, column)
        else:
            is_list = isinstance(event, yaml.SequenceStartEvent)
            if tag not in (None, "!", _TAG + ("seq" if is_list else "map")):
                self._refuse_tag(event, tag)
            node = Node([] if is_list else {}, line, column, "list" if is_list else "mapping", open=True)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def _scalar(self, event: Any, tag: str | None) -> Any:
        text: str = event.value
        if tag == _TAG + "str" or (tag in (None, "!") and not event.implicit[0]):
            bad = _BAD_CHARACTER.search(text)
            if bad:
                self._fail(event, f"the text holds the character U+{ord(bad[0]):04X}. Allowed: printable text.")
            return text
        if tag not in (None, "!", *(_TAG + t for t in ("int", "float", "bool", "null"))):
            self._refuse_tag(event, tag)
        value = resolve_plain(text)
        if isinstance(value, float) and not math.isfinite(value):
            self._fail(event, f"{text[:40]} is not a finite number. Allowed: finite numbers.")
        return value

    def _refuse_tag(self, event: Any, tag: str | None) -> None:
        shown = (tag or "").replace(_TAG, "!!")[:60]
        self._fail(event, f"the tag {shown} is not allowed. Allowed: plain values without tags.")

    def _fail(self, event: Any, what: str) -> NoReturn:
        mark = event.start_mark
        self.problems.append(Problem(f"{self.source}:{mark.line + 1}:{mark.column + 1}", what))
        raise SpecError(self.problems)


def resolve_plain(text: str) -> Any:
    """A plain (unquoted) scalar by the YAML 1.2 core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
