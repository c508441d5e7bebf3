"""Text → experiment, environment or suite, with every problem of a file in one go.

    file:line:column  path: what is wrong. Did you mean "x"? Allowed: …

Pure: text in, a model or a `SpecError` out, never anything else. Reading files is the catalog's business; what only an
environment can tell (unknown SLI, no backend) is in `checks`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, Literal, TypeVar, Union

from pydantic import BaseModel, ValidationError

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.faults import ALIASES, FAULTS
from mlchaos_dagster.domain.nodes import Document, Node, Path, read_document
from mlchaos_dagster.domain.spec import Experiment, Suite
from mlchaos_dagster.domain.stages import Progressive, StageFile
from mlchaos_dagster.errors import Problem, SpecError

Kind = Literal["experiment", "progressive", "environment", "suite", "stages"]
M = TypeVar("M", bound=BaseModel)

MODELS: dict[Kind, type[BaseModel]] = {
    "experiment": Experiment,
    "progressive": Progressive,
    "environment": Environment,
    "suite": Suite,
    "stages": StageFile,
}


@dataclass(frozen=True)
class Parsed(Generic[M]):
    """A model and the places of its values, for problems found later."""

    value: M
    document: Document
    origin: Callable[[Path], Path] | None = None
    """Where a value was written that stands elsewhere in the file: a stage's, in the experiment of that stage."""

    def place(self, path: Path) -> Path:
        """The path of a value in its file."""
        return written(self.document, self.origin(path) if self.origin else path)

    def where(self, path: Path, key: bool = False) -> str:
        """`file:line:column` of a value, or of its key."""
        return self.document.where(self.place(path), key)


def parse_experiment(text: str | bytes, source: str = "experiment") -> Experiment:
    """An experiment from YAML or JSON.

    Raises:
        SpecError: with all problems of the text.
    """
    return parse_model(text, source, Experiment).value


def parse_environment(text: str | bytes, source: str = "environment") -> Environment:
    """An environment from YAML or JSON. Raises SpecError with all problems of the text."""
    return parse_model(text, source, Environment).value


def parse_suite(text: str | bytes, source: str = "suite") -> Suite:
    """A suite from YAML or JSON. Raises SpecError with all problems of the text."""
    return parse_model(text, source, Suite).value


def parse_any(text: str | bytes, source: str = "spec") -> Parsed[Any]:
    """Whatever the file holds: see `kind_of`.

    Raises:
        SpecError: with all problems of the text.
    """
    document = read_document(text, source)
    return validate(document, MODELS[kind_of(document)])


def kind_of(document: Document) -> Kind:
    """What a file is by its fields.

    `targets:` makes an environment, `experiments:` a suite, `stages:` an experiment in stages,
    `progressive_chaos:` stages alone; else it is an experiment.
    """
    marks: tuple[tuple[str, Kind], ...] = (
        ("targets", "environment"),
        ("experiments", "suite"),
        ("progressive_chaos", "stages"),
        ("stages", "progressive"),
    )
    for mark, kind in marks:
        if document.has((mark,)):
            return kind
    return "experiment"


def parse_experiment_file(text: str | bytes, source: str) -> Parsed[Experiment] | Parsed[Progressive]:
    """An experiment, with stages or without. Raises SpecError with all problems of the text."""
    document = read_document(text, source)
    return validate(document, Progressive) if document.has(("stages",)) else validate(document, Experiment)


def parse_model(text: str | bytes, source: str, model: type[M]) -> Parsed[M]:
    """Any closed model from YAML or JSON. Raises SpecError with all problems of the text."""
    return validate(read_document(text, source), model)


def validate(document: Document, model: type[M]) -> Parsed[M]:
    """Fill a model from a tree.

    Raises:
        SpecError: with all problems, in the order of the file.
    """
    problems = list(document.problems)
    try:
        value = model.model_validate(document.root.plain())
    except ValidationError as e:
        problems += _Words(document, model).problems(e)
        raise SpecError(sort_problems(problems)) from e
    if problems:
        raise SpecError(sort_problems(problems))
    return Parsed(value, document)


def written(document: Document, path: Path) -> Path:
    """A path as the file has it: a mapping that stands for the list of its values has keys, not numbers."""
    node: Node | None = document.root
    found: list[str | int] = []
    for token in path:
        if node is not None and node.kind == "mapping" and isinstance(token, int):
            names = list(node.value)
            token = names[token] if token < len(names) else token
        found.append(token)
        pair = node.pair(token) if node is not None else None
        node = pair[1] if pair else None
    return tuple(found)


def sort_problems(problems: Iterable[Problem]) -> list[Problem]:
    """In the order of the file; the same line of text once."""

    def place(problem: Problem) -> tuple[str, int, int]:
        file, _, rest = problem.where.rpartition(":")
        file, _, line = file.rpartition(":")
        return (file, int(line), int(rest)) if line.isdigit() and rest.isdigit() else (problem.where, 0, 0)

    return sorted(dict.fromkeys(problems), key=place)


def show_path(path: Sequence[str | int]) -> str:
    """`("steady_state", 0, "at_least")` → `steady_state[0].at_least`."""
    text = ""
    for token in path:
        text += f"[{token}]" if isinstance(token, int) else f".{token}" if text else str(token)
    return text


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that was probably meant."""
    allowed = list(allowed)
    if word in ALIASES and ALIASES[word] in allowed:
        return ALIASES[word]
    found = get_close_matches(
        word[:100].lower().replace("-", "_"), [a.lower().replace("-", "_") for a in allowed], 1, 0.6
    )
    return next((a for a in allowed if found and a.lower().replace("-", "_") == found[0]), None)


def unknown(what: str, word: str, allowed: Iterable[str]) -> str:
    """`no such WHAT "word". Did you mean "x"? Allowed: …`."""
    allowed = list(allowed)
    near = nearest(word, allowed)
    hint = f' Did you mean "{near}"?' if near else ""
    return one_line(f'no such {what} "{word}".{hint} Allowed: {", ".join(allowed) or "none here"}.')


def one_line(text: str, limit: int = 640) -> str:
    """Fit for one line of a terminal: no line breaks or control characters, not endless, ends with a full stop."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return text if text.endswith((".", "?", "…", "!")) else text + "."


class _Words:
    """pydantic's errors → problems in our words."""

    def __init__(self, document: Document, model: type[BaseModel]) -> None:
        self.document, self.model = document, model

    def problems(self, error: ValidationError) -> list[Problem]:
        found: list[tuple[Path, dict[str, Any]]] = []
        for item in error.errors(include_url=False):
            found.append((written(self.document, self._path(item["loc"])), typing.cast("dict[str, Any]", item)))
        # a misspelt field is also a missing one: one mistake, one line
        misspelt = {
            (*path[:-1], nearest(str(path[-1]), self._fields(item["loc"][:-1])))
            for path, item in found
            if item["type"] == "extra_forbidden"
        }
        kept: list[Problem] = []
        missing: dict[Path, list[str]] = {}
        for path, item in found:
            if item["type"] == "missing":
                if path not in misspelt:
                    missing.setdefault(path[:-1], []).append(str(path[-1]))
            # a list whose items are wrong is "too short" for pydantic, not for people
            elif item["type"] != "too_short" or not any(p[: len(path)] == path and p != path for p, _ in found):
                kept.append(self._problem(path, item))
        for parent, names in missing.items():
            what = f"{show_path(parent)}: missing " if parent else "missing "
            what += f"field {names[0]}" if len(names) == 1 else f"fields {', '.join(names)}"
            kept.append(Problem(self.document.where(parent), what + "."))
        return kept

    def _path(self, loc: Sequence[str | int]) -> Path:
        """Without the tags of unions, which pydantic puts into the location."""
        path: list[str | int] = []
        annotation: Any = self.model
        for token in loc:
            if token == "[key]":
                break
            inner = _step(annotation, token)
            if isinstance(inner, _Tag):
                annotation = inner.model
                continue
            path.append(token)
            annotation = inner
        return tuple(path)

    def _fields(self, loc: Sequence[str | int]) -> list[str]:
        annotation: Any = self.model
        for token in loc:
            annotation = _step(annotation, token)
            annotation = annotation.model if isinstance(annotation, _Tag) else annotation
        models = _models(annotation)
        return [f.alias or name for m in models[:1] for name, f in m.model_fields.items()]

    def _problem(self, path: Path, item: dict[str, Any]) -> Problem:
        kind: str = item["type"]
        key = kind == "extra_forbidden"
        if kind in ("union_tag_invalid", "union_tag_not_found"):
            path, what, key = self._fault(path, kind, item)
        elif key:
            allowed = self._fields(item["loc"][:-1])
            near = nearest(str(path[-1]), allowed)
            what = f"no such field.{f' Did you mean {_quoted(near)}?' if near else ''} Allowed: {', '.join(allowed)}."
        elif kind == "value_error":
            path, what = self._own(path, str(item["ctx"]["error"]))
        else:
            what = self._plain(path, kind, item)
        shown = show_path(path)
        return Problem(self.document.where(path, key), one_line(f"{shown}: {what}" if shown else what))

    def _fault(self, path: Path, kind: str, item: dict[str, Any]) -> tuple[Path, str, bool]:
        if kind == "union_tag_invalid":
            return (*path, "kind"), unknown("fault", str(item["ctx"]["tag"]), FAULTS), False
        node = _at(self.document.root, path)
        names = list(node.value) if node and node.kind == "mapping" else []
        near = nearest("kind", names)
        if near is not None:
            return (*path, near), 'no such field. Did you mean "kind"? Allowed: kind.', True
        return path, f"missing field kind. Allowed: kind: {', '.join(FAULTS)}.", False

    def _own(self, path: Path, message: str) -> tuple[Path, str]:
        """A validator of ours; it may begin with the path of the field that it means."""
        head, colon, rest = message.partition(": ")
        tokens = _tokens(head) if colon else None
        place = written(self.document, (*path, *tokens)) if tokens else path
        if tokens and (self.document.has(place) or tokens[0] in self._fields(path)):
            return place, rest
        return path, message

    def _plain(self, path: Path, kind: str, item: dict[str, Any]) -> str:
        node = _at(self.document.root, path)
        value = _shown(node) if node is not None else repr(item.get("input"))
        ctx: dict[str, Any] = item.get("ctx", {})
        if kind == "literal_error":
            allowed = [
                w.strip("'").replace("True", "true") for w in str(ctx["expected"]).replace(" or ", ", ").split(", ")
            ]
            word = str(item["input"])
            near = nearest(word, allowed)
            hint = f" Did you mean {_quoted(near)}?" if near and near != word else ""
            return f"{value} is not known.{hint} Allowed: {', '.join(allowed)}."
        if kind == "string_pattern_mismatch":
            if "a-z0-9" in str(ctx["pattern"]):
                return f"{value} is not a name. Allowed: lower-case letters, digits and dashes, such as my-service-1."
            return f"{value} has the wrong form. Allowed: the form {ctx['pattern']}."
        comparisons = {
            "greater_than": ("is not more than", "gt"),
            "greater_than_equal": ("is less than", "ge"),
            "less_than": ("is not less than", "lt"),
            "less_than_equal": ("is more than", "le"),
        }
        if kind in comparisons:
            words, name = comparisons[kind]
            limit = ctx[name]
            shown = f"{limit * 100:g}%" if value.rstrip('"').endswith("%") else f"{limit:g}"
            side = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}[name]
            return f"{value} {words} {shown}. Allowed: {side} {shown}."
        if kind in ("too_short", "string_too_short"):
            return f"{'empty' if ctx['min_length'] == 1 else 'too short'}. Allowed: at least {ctx['min_length']}."
        if kind in ("too_long", "string_too_long"):
            return f"too long. Allowed: at most {ctx['max_length']}."
        wanted = _WANTED.get(kind)
        return f"{value} is not {wanted[0]}. Allowed: {wanted[1]}." if wanted else f"{value}: {item['msg']}."


_FIELDS = ("a set of fields", "lines such as name: value, indented below the field")
_WANTED = {
    "string_type": ("text", 'text, in quotes where it looks like a number, such as "30"'),
    "tuple_type": ("a list", "a list, such as [a, b]"),
    "list_type": ("a list", "a list, such as [a, b]"),
    "dict_type": _FIELDS,
    "mapping_type": _FIELDS,
    "model_type": _FIELDS,
    "model_attributes_type": _FIELDS,
    "int_type": ("a whole number", "a whole number, such as 3"),
    "int_parsing": ("a whole number", "a whole number, such as 3"),
    "int_from_float": ("a whole number", "a whole number, such as 3"),
    "float_type": ("a number", "a number, such as 50"),
    "float_parsing": ("a number", "a number, such as 50"),
    "bool_type": ("true or false", "true, false"),
    "bool_parsing": ("true or false", "true, false"),
    **dict.fromkeys(
        ("datetime_type", "datetime_parsing", "datetime_from_date_parsing", "datetime_object_invalid"),
        ("a time", "a time with its zone, such as 2026-12-20T00:00:00+01:00"),
    ),
}


class _Tag:
    """A step into a member of a discriminated union: it is in pydantic's location, not in the file."""

    def __init__(self, model: Any) -> None:
        self.model = model


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models an annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (typing.Annotated, Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in _models(a)]
    return []


def _step(annotation: Any, token: str | int) -> Any:
    """The annotation of what stands at `token` within `annotation`; None when it cannot be told."""
    models = _models(annotation)
    if models:
        if len(models) > 1 and token in FAULTS:
            return _Tag(FAULTS[str(token)])
        for model in models:
            for name, field in model.model_fields.items():
                if token in (name, field.alias):
                    return field.annotation
        return None
    for part in (annotation, *typing.get_args(annotation)):
        origin, args = typing.get_origin(part), typing.get_args(part)
        if origin is typing.Annotated:
            return _step(args[0], token)
        if origin is dict:
            return args[1]
        if origin in (tuple, list):
            return args[0]
    return None


def _at(node: Node, path: Path) -> Node | None:
    for token in path:
        pair = node.pair(token)
        if pair is None:
            return None
        node = pair[1]
    return node


def _tokens(head: str) -> Path | None:
    """`abort[0].sli` → ("abort", 0, "sli"); None when it is not a path."""
    tokens: list[str | int] = []
    for part in head.split("."):
        name, *indices = part.split("[")
        if not name.replace("_", "").replace("-", "").isalnum() or not all(i[:-1].isdigit() for i in indices):
            return None
        tokens += [int(name) if name.isdigit() else name, *(int(i[:-1]) for i in indices)]
    return tuple(tokens)


def _quoted(word: str | None) -> str:
    return f'"{word}"'


def _shown(node: Node) -> str:
    if node.kind != "scalar":
        return f"a {node.kind}" if node.value else f"an empty {node.kind}"
    if node.value is None:
        return "nothing"
    if isinstance(node.value, bool):
        return str(node.value).lower()
    if isinstance(node.value, str):
        return f'"{node.value[:60]}{"…" if len(node.value) > 60 else ""}"'
    return f"{node.value}"
