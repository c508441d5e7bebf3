"""Library directories → experiments, environments and suites by name, parsed when they are asked for.

A library has `experiments/**`, `environments/**` and `suites/**`. Several are read as one; a name that two files claim
is an error that names both. Imports neither Dagster nor numbers: `mlchaos list` and `check` start fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from mlchaos_dagster.domain.checks import check_environment, check_experiment, check_suite
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.nodes import MAX_BYTES
from mlchaos_dagster.domain.parsing import Parsed, nearest, one_line, parse_any, parse_model
from mlchaos_dagster.domain.spec import Experiment, Suite
from mlchaos_dagster.errors import Problem, SpecError

SHIPPED = Path(__file__).parent / "library"
_SUFFIXES = (".yaml", ".yml", ".json")
M = TypeVar("M", bound=BaseModel)


def read_spec(path: Path) -> bytes:
    """A spec file's bytes; of a file that is too large never more than the limit.

    Raises:
        SpecError: it cannot be read.
    """
    try:
        if not path.is_file():  # a pipe nobody writes to would be waited for without end
            path.stat()
            what = "a directory" if path.is_dir() else "no regular file"
            raise SpecError(f"{what}. Allowed: YAML or JSON files", str(path))
        with path.open("rb") as f:
            return f.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:
        raise SpecError(f"cannot be read: {getattr(e, 'strerror', '') or e}", str(path)) from e


def show_source(path: Path) -> str:
    """A path as people type it: relative to here when it is below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def parse_file(path: Path) -> Parsed[Any]:
    """Whatever one file holds. Raises SpecError with all its problems."""
    return parse_any(read_spec(path), show_source(path))


class _Shelf(Generic[M]):
    """The files of one kind, by name; read when the first name is asked for."""

    def __init__(
        self,
        kind: str,
        model: type[M],
        roots: Sequence[Path],
        check: Callable[[M, Parsed[M]], list[Problem]] | None = None,
    ) -> None:
        self.kind, self.model, self.check = kind, model, check
        self.folders = [root / f"{kind}s" for root in roots]
        self.broken: dict[str, SpecError] = {}
        """File stem → what is wrong: the other files stay usable."""
        self.paths: dict[str, Path] = {}
        self._named: dict[str, Parsed[M]] | None = None

    def files(self) -> list[Path]:
        """All files of this kind, in a stable order."""
        found: list[Path] = []
        for folder in self.folders:
            found += sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES and not p.name.startswith("."))
        return list(dict.fromkeys(found))

    def named(self) -> dict[str, Parsed[M]]:
        """Name → parsed file, in the order of names; wrong files are in `broken`."""
        if self._named is None:
            found: dict[str, Parsed[M]] = {}
            for path in self.files():
                try:
                    parsed = parse_model(read_spec(path), show_source(path), self.model)
                except SpecError as e:
                    self.broken[path.stem] = e
                    continue
                name = str(getattr(parsed.value, "name", path.stem))
                if self.check and (problems := self.check(parsed.value, parsed)):
                    self.broken[name] = SpecError(problems)
                elif name in found:
                    problem = duplicate(self.kind, name, self.paths[name], parsed)
                    self.broken[name] = SpecError([*self.broken.get(name, SpecError([])).problems, problem])
                else:
                    found[name], self.paths[name] = parsed, path
            self._named = dict(sorted(found.items()))
        return self._named

    def get(self, name: str) -> Parsed[M]:
        """The file of a name. Raises SpecError: none (nearest name), or it is wrong."""
        named = self.named()
        if name in self.broken:
            raise self.broken[name]
        if name not in named:
            near = nearest(name, named)
            hint = f' Did you mean "{near}"?' if near else ""
            known = ", ".join(named) if len(named) <= 20 else f"{', '.join(list(named)[:20])}, … ({len(named)} in all)"
            raise SpecError(
                one_line(f'no {self.kind} "{name}".{hint} Allowed: {known or "none, the library is empty"}')
            )
        return named[name]

    def all(self) -> list[Parsed[M]]:
        """Every file, in the order of names. Raises SpecError with the problems of all files."""
        named = self.named()
        if self.broken:
            raise SpecError([p for e in self.broken.values() for p in e.problems])
        return list(named.values())


def duplicate(kind: str, name: str, first: Path, second: Parsed[Any]) -> Problem:
    """Two files claim one name."""
    return Problem(
        second.where(("name",)),
        f'name: the {kind} "{name}" is already in {show_source(first)}. Allowed: one file for a name.',
    )


class Catalog:
    """All library directories as one; later ones never override earlier ones silently."""

    def __init__(self, roots: Iterable[Path] = (), shipped: bool = True) -> None:
        """Args: roots: library directories; shipped: read the one in the package, too.

        Raises:
            SpecError: a root is not a directory.
        """
        # the shipped one first: of two files with one name the problem is then the user's, who can rename it
        self.roots = [*([SHIPPED] if shipped else []), *roots]
        for root in self.roots:
            if not root.is_dir():
                raise SpecError(
                    "no such directory. Allowed: a folder with experiments/, environments/, suites/", str(root)
                )
        self._experiments = _Shelf("experiment", Experiment, self.roots)
        self._environments = _Shelf("environment", Environment, self.roots, check_environment)
        self._suites = _Shelf("suite", Suite, self.roots)

    def files(self) -> list[Path]:
        """Every spec file of every kind."""
        return [*self._experiments.files(), *self._environments.files(), *self._suites.files()]

    def experiments(self) -> list[Experiment]:
        """All, by name. Raises SpecError with the problems of all files."""
        return [p.value for p in self._experiments.all()]

    def environments(self) -> list[Environment]:
        """All, by name. Raises SpecError with the problems of all files."""
        return [p.value for p in self._environments.all()]

    def suites(self) -> list[Suite]:
        """All, by name. Raises SpecError with the problems of all files."""
        return [p.value for p in self._suites.all()]

    def experiment(self, name: str) -> Experiment:
        """One by name. Raises SpecError: no such name (with the nearest), or its file is wrong."""
        return self._experiments.get(name).value

    def environment(self, name: str) -> Environment:
        """One by name. Raises SpecError: no such name (with the nearest), or its file is wrong."""
        return self._environments.get(name).value

    def suite(self, name: str) -> Suite:
        """One by name. Raises SpecError: no such name (with the nearest), or its file is wrong."""
        return self._suites.get(name).value

    def names(self, kind: str) -> list[str]:
        """Names of one kind (`experiment`, `environment`, `suite`) whose files can be read."""
        shelf = {"experiment": self._experiments, "environment": self._environments, "suite": self._suites}[kind]
        return list(shelf.named())

    def source(self, name: str) -> Path:
        """The file of an experiment. Raises SpecError."""
        self._experiments.get(name)
        return self._experiments.paths[name]

    def ready(self, name: str, environment: Environment) -> Experiment:
        """An experiment that can run in the environment.

        Raises:
            SpecError: no such name, a wrong file, or the environment cannot do it; with all problems.
        """
        parsed = self._experiments.get(name)
        problems = check_experiment(parsed.value, environment, parsed)
        if problems:
            raise SpecError(problems)
        return parsed.value

    def check(self, environment: Environment | None = None, paths: Sequence[Path] | None = None) -> Checked:
        """Everything wrong with the library's files, or with `paths`; never raises SpecError.

        Args:
            environment: cross-check experiments against it; None: files alone.
            paths: files to look at instead of the library's; suites in them may name library experiments.
        """
        return _check(self, environment, paths)


class Checked:
    """The result of `Catalog.check`."""

    def __init__(self, files: int, problems: list[Problem], wrong: int) -> None:
        self.files, self.problems, self.wrong_files = files, problems, wrong


def _check(catalog: Catalog, environment: Environment | None, paths: Sequence[Path] | None) -> Checked:
    files = catalog.files() if paths is None else list(paths)
    problems: list[Problem] = []
    wrong = 0
    named: dict[tuple[str, str], Path] = {}
    parsed: list[Parsed[Any]] = []
    for path in files:
        try:
            one = parse_file(path)
        except SpecError as e:
            problems += e.problems
            wrong += 1
            continue
        key = (type(one.value).__name__.lower(), str(one.value.name))
        if key in named:
            problems.append(duplicate(key[0], key[1], named[key], one))
            wrong += 1
        named.setdefault(key, path)
        parsed.append(one)
    names = {name for kind, name in named if kind == "experiment"}
    finders: dict[type, Callable[[Parsed[Any]], list[Problem]]] = {
        Experiment: lambda p: check_experiment(p.value, environment, p) if environment else [],
        Environment: lambda p: check_environment(p.value, p),
        Suite: lambda p: check_suite(p.value, names | set(catalog.names("experiment")), p),
    }
    for one in parsed:
        found = finders[type(one.value)](one) if type(one.value) in finders else []
        problems += found
        wrong += bool(found)
    return Checked(len(files), problems, wrong)
