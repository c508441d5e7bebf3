"""Files of Litmus and Chaos Mesh on the command line: `check`, `run` and `import` take them as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from mlchaos_dagster.errors import Problem, SpecError

if TYPE_CHECKING:
    from mlchaos_dagster.cli.app import App
    from mlchaos_dagster.domain.environment import Environment
    from mlchaos_dagster.domain.manifests.drafts import Brought, Placed

SUFFIXES = (".yaml", ".yml", ".json")


def is_file(name: str) -> bool:
    """Whether an argument is a file, not the name of an experiment."""
    return Path(name).suffix in SUFFIXES and Path(name).is_file()


def no_lost_file(names: Iterable[str]) -> None:
    """Raises SpecError: one of the arguments is meant as a file, and is not there."""
    lost = [n for n in names if Path(n).suffix in SUFFIXES and not Path(n).exists()]
    if lost:
        raise SpecError(
            [Problem(n, "no such file. Allowed: a file, or a name that `mlchaos list` shows.") for n in lost]
        )


def no_file(name: str) -> None:
    """Where only the name of an experiment is taken. Raises SpecError: it is meant as a file."""
    no_lost_file([name])
    if is_file(name):
        file = quote(name)
        how = f"mlchaos check {file} says what it holds, mlchaos import {file} makes experiments of other tools' YAML"
        raise SpecError(f"a file. Allowed: a name that `mlchaos list` shows; {how}.", name)


def read(path: Path) -> Brought | None:
    """What a file of another tool brings; None: it is one of ours. Raises SpecError: it cannot be read."""
    from mlchaos_dagster.catalog import read_spec, show_source
    from mlchaos_dagster.domain.manifests.files import bring

    return bring(read_spec(path), show_source(path))


def taken(paths: Iterable[Path]) -> list[Brought]:
    """What each of the files brings.

    Raises:
        SpecError: one of them is not another tool's, or cannot be run; with the problems of all.
    """
    found: list[Brought] = []
    problems: list[Problem] = []
    for path in paths:
        brought = read(path)
        if brought is None:
            problems.append(
                Problem(str(path), "no file of Litmus or Chaos Mesh. Allowed: their YAML, with apiVersion and kind.")
            )
        else:
            problems += brought.problems
            found.append(brought)
    if problems:
        raise SpecError(problems)
    return found


def tell(app: App, brought: Brought) -> None:
    """Warnings and hints, beside the answer."""
    for note in brought.notes:
        app.note(f"warning  {note}")
    for hint in brought.hints:
        app.note(f"hint     {hint}")


def placed(files: list[Brought], environment: Environment, target: str = "") -> list[Placed]:
    """The experiments of files in an environment; the environment of the last one has the targets of all.

    Raises:
        SpecError: with the problems of all.
    """
    from mlchaos_dagster.domain.manifests.drafts import place

    found: list[Placed] = []
    problems: list[Problem] = []
    for draft in (d for brought in files for d in brought.drafts):
        try:
            one = place(draft, environment, target)
        except SpecError as e:
            problems += e.problems
            continue
        environment = one.environment
        found.append(one)
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))
    return found


@dataclass
class Looked:
    """What `check` says of other tools' files."""

    rest: list[Path] = field(default_factory=list[Path])
    """Files that are ours."""
    files: int = 0
    wrong: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])
    warnings: list[Problem] = field(default_factory=list[Problem])
    notes: list[str] = field(default_factory=list[str])


def look(paths: Iterable[Path], environment: Environment | None, target: str = "") -> Looked:
    """Sort files out; those of other tools are checked, against the environment where it is one of a cluster."""
    looked = Looked()
    for path in paths:
        try:
            brought = read(path)
        except SpecError as e:
            looked.files, looked.wrong = looked.files + 1, looked.wrong + 1
            looked.problems += e.problems
            continue
        if brought is None:
            looked.rest.append(path)
            continue
        problems, notes = _checked(brought, environment, target)
        looked.files += 1
        looked.wrong += bool(problems)
        looked.problems += problems
        looked.warnings += brought.notes
        looked.notes += [*brought.hints, *notes]
    return looked


def _checked(brought: Brought, environment: Environment | None, target: str) -> tuple[list[Problem], list[str]]:
    problems, notes = list(brought.problems), list[str]()
    if problems:
        return problems, notes
    template = False
    for draft in brought.drafts:
        if not draft.selection.select and not target:
            template = True
            notes.append(f"{draft.where}  {draft.what}: {draft.selection.why_none}; --target says it when it is run.")
        elif environment is not None and environment.kubernetes is not None:
            try:
                placed([_only(brought, draft.name)], environment, target)
            except SpecError as e:
                problems += e.problems
    if not problems:
        n = len(brought.drafts)
        words = f"{n} experiment{'s' * (n != 1)}: {', '.join(d.name for d in brought.drafts)}"
        here = environment.name if environment is not None and environment.kubernetes is not None else "ENVIRONMENT"
        meant = "NAME" if template else quote(target)
        of = f"{quote(brought.source)} -e {here}" + (f" --target {meant}" if template or target else "")
        notes.append(f"{brought.source}: {words}. Run it: mlchaos run {of}; keep it: mlchaos import {of} --to DIR")
    return problems, notes


def _only(brought: Brought, name: str) -> Brought:
    from dataclasses import replace

    return replace(brought, drafts=[d for d in brought.drafts if d.name == name])
