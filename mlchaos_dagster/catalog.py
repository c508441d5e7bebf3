"""Library directories → experiments, environments and suites by name, parsed when they are asked for.

A library has `experiments/**`, `environments/**` and `suites/**`. Several are read as one; a name that two files claim
is an error that names both. Imports neither Dagster nor numbers: `mlchaos list` and `check` start fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from mlchaos_dagster.domain.checks import (
    check_dependency,
    check_environment,
    check_experiment,
    check_suite,
    is_offered,
)
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.nodes import MAX_BYTES
from mlchaos_dagster.domain.parsing import (
    Parsed,
    nearest,
    one_line,
    parse_any,
    parse_experiment_file,
    parse_model,
    sort_problems,
)
from mlchaos_dagster.domain.spec import Experiment, Suite
from mlchaos_dagster.domain.stages import Progressive, StageFile
from mlchaos_dagster.errors import Problem, SpecError

SHIPPED = Path(__file__).parent / "library"
_SUFFIXES = (".yaml", ".yml", ".json")
M = TypeVar("M", bound=BaseModel)
Spec = Experiment | Progressive
"""An experiment as it is written."""
_KINDS = {Experiment: "experiment", Progressive: "experiment", Environment: "environment", Suite: "suite"}


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
        parse: Callable[[bytes, str], Parsed[M]],
        roots: Sequence[Path],
        check: Callable[[M, Parsed[M]], list[Problem]] | None = None,
    ) -> None:
        self.kind, self.parse, self.check = kind, parse, check
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
                    parsed = self.parse(read_spec(path), show_source(path))
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
        self._written: _Shelf[Spec] = _Shelf("experiment", _parse_spec, self.roots)
        self._environments = _Shelf("environment", _parser(Environment), self.roots, check_environment)
        self._suites = _Shelf("suite", _parser(Suite), self.roots)
        self._single: dict[str, Parsed[Experiment]] | None = None

    def files(self) -> list[Path]:
        """Every spec file of every kind."""
        return [*self._written.files(), *self._environments.files(), *self._suites.files()]

    def written(self) -> list[Spec]:
        """The experiments as they were written, with their stages, by name. Raises SpecError with all problems."""
        self._runnable()
        return [p.value for p in self._written.all()]

    def experiments(self) -> list[Experiment]:
        """All that can be run, by name; every stage is one. Raises SpecError with the problems of all files."""
        found = self._runnable()
        self._written.all()
        return [p.value for p in found.values()]

    def environments(self) -> list[Environment]:
        """All, by name. Raises SpecError with the problems of all files."""
        return [p.value for p in self._environments.all()]

    def suites(self, *, expanded: bool = True) -> list[Suite]:
        """All, by name. Raises SpecError with the problems of all files.

        Args:
            expanded: naming what is run: stages, and every experiment where `all` is said; else as written.
        """
        return [self._expanded(p.value) if expanded else p.value for p in self._suites.all()]

    def experiment(self, name: str) -> Experiment:
        """One that can be run. Raises SpecError: no such name (with the nearest), it has stages, or its file is wrong."""
        return self._parsed(name).value

    def progressive(self, name: str) -> Progressive | None:
        """The experiment in stages of that name; None: there is none such. Raises SpecError: its file is wrong."""
        parsed = self._written.named().get(name)
        return parsed.value if parsed is not None and isinstance(parsed.value, Progressive) else None

    def expand(self, name: str) -> tuple[str, ...]:
        """The names to run for a name: its stages in their order, or itself."""
        progressive = self.progressive(name)
        return progressive.stage_names if progressive is not None else (name,)

    def environment(self, name: str) -> Environment:
        """One by name. Raises SpecError: no such name (with the nearest), or its file is wrong."""
        return self._environments.get(name).value

    def suite(self, name: str, *, expanded: bool = True) -> Suite:
        """One by name; see `suites`. Raises SpecError: no such name (with the nearest), or its file is wrong."""
        suite = self._suites.get(name).value
        return self._expanded(suite) if expanded else suite

    def names(self, kind: str) -> list[str]:
        """Names of one kind (`experiment`, `environment`, `suite`) whose files can be read; stages have theirs, too."""
        if kind == "experiment":
            return sorted({*self._written.named(), *self._runnable()})
        return list({"environment": self._environments, "suite": self._suites}[kind].named())

    def source(self, name: str) -> Path:
        """The file of an experiment or of a stage. Raises SpecError."""
        if name not in self._written.named() and name in self._runnable():
            return next(self._written.paths[p.name] for p in self._progressives() if name in p.stage_names)
        self._written.get(name)
        return self._written.paths[name]

    def ready(self, name: str, environment: Environment) -> Experiment:
        """An experiment that can run in the environment.

        Raises:
            SpecError: no such name, a wrong file, or the environment cannot do it; with all problems.
        """
        parsed = self._parsed(name)
        problems = check_experiment(parsed.value, environment, parsed)
        problems += check_dependency(parsed.value, self.dependencies(), parsed)
        if problems:
            raise SpecError(problems)
        return parsed.value

    def dependencies(self) -> dict[str, str | None]:
        """Every experiment whose file can be read, and the one it waits for."""
        return {name: p.value.depends_on for name, p in self._runnable().items()}

    def _progressives(self) -> list[Progressive]:
        return [p.value for p in self._written.named().values() if isinstance(p.value, Progressive)]

    def _runnable(self) -> dict[str, Parsed[Experiment]]:
        if self._single is None:
            found: dict[str, Parsed[Experiment]] = {}
            for name, parsed in self._written.named().items():
                if name in self._written.broken:
                    continue
                for one in runnable(parsed):
                    if one.value.name in found or (one.value.name in self._written.named() and one.value.name != name):
                        problem = _taken(one.value.name, parsed)
                        self._written.broken[name] = SpecError([problem])
                    else:
                        found[one.value.name] = one
            self._single = dict(sorted(found.items()))
        return self._single

    def _parsed(self, name: str) -> Parsed[Experiment]:
        found = self._runnable()
        if name in found and name not in self._written.broken:
            return found[name]
        progressive = self.progressive(name)
        if progressive is not None and name not in self._written.broken:
            stages = ", ".join(progressive.stage_names)
            raise SpecError(f'"{name}" has stages, each of which is an experiment. Allowed here: {stages}.')
        self._written.get(name)
        raise AssertionError("a name that is written can be run or has stages")

    def _expanded(self, suite: Suite) -> Suite:
        if suite.everything:
            names = _in_order(self.dependencies())
        else:
            names = [n for s in suite.experiments for n in self.expand(s)]
        return suite.model_copy(update={"experiments": tuple(dict.fromkeys(names))})

    def check(self, environment: Environment | None = None, paths: Sequence[Path] | None = None) -> Checked:
        """Everything wrong with the library's files, or with `paths`; never raises SpecError.

        Args:
            environment: cross-check experiments against it; None: files alone.
            paths: files to look at instead of the library's; suites in them may name library experiments.
        """
        return _check(self, environment, paths)


class Checked:
    """The result of `Catalog.check`."""

    def __init__(self, files: int, problems: list[Problem], wrong: int, notes: list[str]) -> None:
        self.files, self.problems, self.wrong_files = files, problems, wrong
        self.notes = notes
        """How to use what is right, but is no experiment, environment or suite."""


def runnable(parsed: Parsed[Spec]) -> list[Parsed[Experiment]]:
    """What a file says can be run: the experiment, or one for each of its stages."""
    spec = parsed.value
    if isinstance(spec, Experiment):
        return [Parsed(spec, parsed.document)]
    return [Parsed(spec.stage(i), parsed.document, partial(spec.origin, i)) for i in range(len(spec.stages))]


def _in_order(depends: dict[str, str | None]) -> list[str]:
    """All names, each after the one it waits for; a circle, which `check` tells of, is cut somewhere."""
    found: list[str] = []
    for name in depends:
        chain: list[str] = []
        one: str | None = name
        while one in depends and one not in found and one not in chain:
            chain.append(one)
            one = depends[one]
        found += reversed(chain)
    return found


def _taken(name: str, parsed: Parsed[Spec]) -> Problem:
    what = f'name: its stage "{name}" is the name of another experiment. Allowed: a name whose stages are free.'
    return Problem(parsed.where(("name",)), what)


def _parser(model: type[M]) -> Callable[[bytes, str], Parsed[M]]:
    return lambda text, source: parse_model(text, source, model)


def _parse_spec(text: bytes, source: str) -> Parsed[Spec]:
    parsed = parse_experiment_file(text, source)
    return Parsed(parsed.value, parsed.document)


def _check(catalog: Catalog, environment: Environment | None, paths: Sequence[Path] | None) -> Checked:
    files = catalog.files() if paths is None else list(paths)
    problems: list[Problem] = []
    notes: list[str] = []
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
        if isinstance(one.value, StageFile):
            notes.append(_usage(path, one.value))
            continue
        key = (_KINDS[type(one.value)], str(one.value.name))
        if key in named:
            problems.append(duplicate(key[0], key[1], named[key], one))
            wrong += 1
        named.setdefault(key, path)
        parsed.append(one)
    single = {id(one): runnable(one) for one in parsed if isinstance(one.value, Spec)}
    depends = {p.value.name: p.value.depends_on for ones in single.values() for p in ones}
    for one in parsed:
        taken = [p.value.name for p in single.get(id(one), []) if isinstance(one.value, Progressive)]
        clashes = [_taken(name, one) for name in taken if ("experiment", name) in named]
        problems += clashes
        wrong += bool(clashes)
    names = {name for kind, name in named if kind == "experiment"} | set(depends)

    environments = [p.value for p in parsed if isinstance(p.value, Environment)]
    elsewhere: list[str] = []

    def found_in(one: Parsed[Any]) -> list[Problem]:
        if isinstance(one.value, Environment):
            return check_environment(one.value, one)
        if isinstance(one.value, Suite):
            return check_suite(one.value, names | set(catalog.names("experiment")), one)
        found: list[Problem] = []
        for p in single[id(one)]:
            problems = check_experiment(p.value, environment, p) if environment else []
            if problems and environment and paths is None and _for_another(p.value, environment, environments):
                elsewhere.append(p.value.name)
            else:
                found += problems
            if p.value.depends_on is not None:
                found += check_dependency(p.value, {**catalog.dependencies(), **depends}, p)
        return sort_problems(found)

    for one in parsed:
        found = found_in(one)
        problems += found
        wrong += bool(found)
    if environment and elsewhere:
        others = ", ".join(sorted(elsewhere))
        notes.append(f"for other environments of the library, {environment.name} has not what they need: {others}")
    return Checked(len(files), problems, wrong, notes)


def _for_another(experiment: Experiment, here: Environment, every: Iterable[Environment]) -> bool:
    """Whether something that the experiment names is not to be had here, and some other environment can run it."""
    if is_offered(experiment, here):
        return False
    return any(not check_experiment(experiment, other) for other in every if other.name != here.name)


def _usage(path: Path, stages: StageFile) -> str:
    n = len(stages.progressive_chaos)
    return (
        f"{show_source(path)}: {n} stage{'s' * (n != 1)}, for any experiment of the library. "
        f"Run them, for example, on pods: mlchaos run serving-pod-failure --stages {show_source(path)}"
    )
