"""What only an environment (or the other files) can tell about an experiment, in words and with places.

A file can be well-formed and still ask for an SLI that nobody measures here; that is found before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from mlchaos_dagster.domain.environment import ON_CLUSTERS, VALUE_MEASURES, Environment
from mlchaos_dagster.domain.faults import ACTS_ON, BROUGHT, ON_LINKS, ON_OBJECTS
from mlchaos_dagster.domain.nodes import Path
from mlchaos_dagster.domain.parsing import Parsed, one_line, show_path, sort_problems, unknown
from mlchaos_dagster.domain.secrets import REFERENCE, SECRET_KEY
from mlchaos_dagster.domain.spec import Experiment, Quantity, Suite
from mlchaos_dagster.domain.units import show_percent
from mlchaos_dagster.errors import Problem, SpecError


def check_experiment(
    experiment: Experiment, environment: Environment, parsed: Parsed[Experiment] | None = None
) -> list[Problem]:
    """Everything that keeps the experiment from running in the environment; empty when nothing does.

    Args:
        experiment: what is to run.
        environment: where.
        parsed: the parsed file, for `file:line:column`; without it problems name the experiment.
    """
    found = _Found(experiment, environment, parsed)
    found.target()
    found.fault()
    found.blast_radius()
    found.limits()
    found.rollback()
    return sort_problems(found.problems)


def through(environment: Environment, backend: str, experiments: Iterable[Experiment], where: str) -> Environment:
    """The environment with its faults made by this backend.

    Args:
        environment: where the experiments are to run.
        backend: one of its backends.
        experiments: all of which it must serve.
        where: what the backend was named by, for the words of an error.

    Raises:
        SpecError: it is none of the environment's backends, or does not serve a fault.
    """
    if backend not in environment.backends:
        known = ", ".join(environment.backends)
        what = f"{backend} is no backend of environment {environment.name}. Allowed: {known}"
        if backend in BROUGHT.values() and environment.kubernetes is not None:
            what += f"; or name {backend} in its file, under backends:, with the faults that it is to make (docs/backends.md)"
        raise SpecError(f"{what}.", where)
    served, problems = environment.backends[backend], list[Problem]()
    for kind in dict.fromkeys(e.fault.kind for e in experiments):
        if kind not in served:
            others = [name for name, kinds in environment.backends.items() if kind in kinds]
            allowed = f"Allowed: {', '.join(others)}; or" if others else "To allow it,"
            what = f"{backend} does not serve {kind} in {environment.name}. {allowed} name {kind} under backends.{backend}."
            problems.append(Problem(where, what))
    if problems:
        raise SpecError(problems)
    # What others share among themselves stays with whoever makes it now: an environment says one backend for each kind.
    kept = {
        name: tuple(k for k in kinds if k in served or environment.backend_for(k) == name)
        for name, kinds in environment.backends.items()
    }
    return environment.model_copy(
        update={"prefer": backend, "backends": {n: kinds for n, kinds in kept.items() if kinds}}
    )


def check_environment(environment: Environment, parsed: Parsed[Environment] | None = None) -> list[Problem]:
    """Secrets that are written where only a reference to them belongs."""
    problems: list[Problem] = []
    for name, value in environment.probe.headers.items():
        if SECRET_KEY.search(name) and not REFERENCE.match(value):
            path: Path = ("probe", "headers", name)
            where = parsed.where(path) if parsed else environment.name
            what = "a secret is not written here. Allowed: env:NAME or file:PATH."
            problems.append(Problem(where, one_line(f"{show_path(path)}: {what}")))
    return problems


def check_suite(suite: Suite, experiments: Iterable[str], parsed: Parsed[Suite] | None = None) -> list[Problem]:
    """Names in a suite that are no experiments, or are there twice."""
    known, problems = sorted(experiments), list[Problem]()
    if suite.everything:
        return problems
    for i, name in enumerate(suite.experiments):
        what = ""
        if name not in known:
            what = unknown("experiment", name, known)
        elif name in suite.experiments[:i]:
            what = f'"{name}" is in the suite twice. Allowed: once.'
        if what:
            path: Path = ("experiments", i)
            where = parsed.where(path) if parsed else suite.name
            problems.append(Problem(where, f"{show_path(path)}: {what}"))
    return problems


def check_dependency(
    experiment: Experiment, depends: Mapping[str, str | None], parsed: Parsed[Experiment] | None = None
) -> list[Problem]:
    """What keeps the experiment that this one waits for from ever having held.

    Args:
        experiment: the one that waits.
        depends: all experiments, and what each of them waits for.
        parsed: the parsed file, for `file:line:column`.
    """
    what, name = "", experiment.depends_on
    if name is not None and name not in depends:
        what = unknown("experiment", name, depends)
    chain: list[str] = []
    while not what and name is not None:
        chain.append(name)
        if name == experiment.name:
            what = f"{' waits for '.join([name, *chain])}: none of them could ever start. Allowed: no circle."
        elif name in chain[:-1]:
            break  # a circle of others, told where they stand
        name = depends.get(name)
    if not what:
        return []
    where = parsed.where(("depends_on",)) if parsed else experiment.name
    return [Problem(where, one_line(f"depends_on: {what}"))]


def is_offered(experiment: Experiment, environment: Environment) -> bool:
    """Whether the environment has all that the experiment names: target, fault for it, SLIs and signals."""
    slis = {x.sli for x in (*experiment.steady_state, *experiment.abort, *experiment.expect) if x.sli is not None}
    signals = {x.signal for x in experiment.expect if x.signal is not None}
    return (
        experiment.target in environment.targets
        and environment.backend_for(experiment.fault.kind) is not None
        and fits_objects(experiment, environment)
        and slis <= set(environment.slis)
        and signals <= set(environment.signals)
    )


def fits_objects(experiment: Experiment, environment: Environment) -> bool:
    """Whether the target is of a kind that the fault hits; true where it is no object of a cluster."""
    kind, target = experiment.fault.kind, environment.targets.get(experiment.target)
    if target is None or environment.backend_for(kind) not in ON_CLUSTERS:
        return True
    return target.kubernetes.kind in ON_OBJECTS.get(kind, ("Pod",))


class _Found:
    def __init__(self, experiment: Experiment, environment: Environment, parsed: Parsed[Experiment] | None) -> None:
        self.experiment, self.environment, self.parsed = experiment, environment, parsed
        self.problems: list[Problem] = []

    def add(self, path: Path, what: str) -> None:
        where = self.parsed.where(path) if self.parsed else self.experiment.name
        shown = show_path(self.parsed.place(path) if self.parsed else path)
        self.problems.append(Problem(where, one_line(f"{shown}: {what}")))

    def target(self) -> None:
        if self.experiment.target not in self.environment.targets:
            self.add(("target",), self._here(unknown("target", self.experiment.target, self.environment.targets)))

    def fault(self) -> None:
        kind = self.experiment.fault.kind
        if self.environment.backend_for(kind) is None:
            served = [k for kinds in self.environment.backends.values() for k in kinds]
            self.add(
                ("fault", "kind"),
                f"no backend of environment {self.environment.name} serves {kind}. Allowed: {', '.join(served)}.",
            )
        elif self.environment.sandbox is not None and self.experiment.target in self.environment.targets:
            self._fits(kind)
        elif not fits_objects(self.experiment, self.environment):
            name, targets = self.experiment.target, self.environment.targets
            allowed = ON_OBJECTS.get(kind, ("Pod",))
            fitting = [n for n, t in targets.items() if t.kubernetes.kind in allowed and t.s3 is None]
            self.add(
                ("fault", "kind"),
                f"{kind} is not for a {targets[name].kubernetes.kind}, which {name} is in environment "
                f"{self.environment.name}. Allowed with {kind}: target {', '.join(fitting) or '(there is none)'}.",
            )

    def _fits(self, kind: str) -> None:
        """In the sandbox some faults need links, and the others processes."""
        name, targets = self.experiment.target, self.environment.targets
        network = kind in ON_LINKS
        if network == targets[name].is_link:
            return
        needed, is_there = ("links", "processes") if network else ("processes", "links")
        fitting = [n for n, t in targets.items() if t.is_link == network]
        self.add(
            ("fault", "kind"),
            f"{kind} is for {needed}, and {name} selects {is_there} ({targets[name].select}) in environment "
            f"{self.environment.name}. Allowed with {kind}: target {', '.join(fitting) or '(there is none)'}.",
        )

    def blast_radius(self) -> None:
        radius, limit = self.experiment.blast_radius, self.environment.limits.max_fraction
        if radius.fraction is not None and radius.fraction > limit:
            self.add(
                ("blast_radius", "fraction"),
                f"{show_percent(radius.fraction, 0)} is above limits.max_fraction of environment "
                f"{self.environment.name}. Allowed: at most {show_percent(limit, 0)}.",
            )
        existing = self._known_targets()
        if radius.count is not None and existing is not None and radius.count > existing:
            self.add(
                ("blast_radius", "count"),
                f"{radius.count} is more than exists in environment {self.environment.name}. Allowed: 1 to {existing}.",
            )

    def _known_targets(self) -> int | None:
        """How many targets a sandbox selector matches; None when only the backend can tell."""
        sandbox, target = self.environment.sandbox, self.environment.targets.get(self.experiment.target)
        if sandbox is None or target is None:
            return None
        replicas = [f"inference-{i}" for i in range(1, sandbox.replicas + 1)]
        names = ["gateway", "feature-store", *replicas, "gateway->feature-store"]
        names += [f"gateway->{replica}" for replica in replicas]
        return sum(("->" in name) == target.is_link and fnmatchcase(name, target.select) for name in names) or None

    def rollback(self) -> None:
        """Only the cluster's own driver acts; each action needs its kind of object."""
        for i, action in enumerate(self.experiment.rollback.actions if self.experiment.rollback else ()):
            path: Path = ("rollback", "actions", i, action.kind, "target")
            backend, name = self.environment.backend_for(self.experiment.fault.kind), action.of.target
            if backend not in (None, *ON_CLUSTERS):
                self.add(
                    path[:-1], f"backend {backend} takes no rollback actions. Allowed: none, or backend kubernetes."
                )
            elif name not in self.environment.targets:
                self.add(path, self._here(unknown("target", name, self.environment.targets)))
            else:
                kind = self.environment.targets[name].kubernetes.kind
                fits = ACTS_ON[action.kind]
                if kind not in fits:
                    what = f"{action.kind} is not for a {kind}, which {name} is in {self.environment.name}."
                    self.add(path, f"{what} Allowed: a target of kind {' or '.join(fits)}.")

    def limits(self) -> None:
        for i, slo in enumerate(self.experiment.steady_state):
            self._limit(("steady_state", i), slo.sli, slo.side, slo.limit)
        for i, condition in enumerate(self.experiment.abort):
            side = "above" if condition.above is not None else "below"
            self._limit(("abort", i), condition.sli, side, condition.limit)
            sli = self.environment.slis.get(condition.sli)
            if sli is not None and sli.good_side == side:
                self.add(
                    ("abort", i, side),
                    f"{condition.sli} {side} a limit is what is wished for: it would abort every healthy run. "
                    f"Allowed: {'below' if side == 'above' else 'above'}.",
                )
        for i, expected in enumerate(self.experiment.expect):
            if expected.sli is not None:
                self._sli(("expect", i, "sli"), expected.sli)
            if expected.signal is not None and expected.signal not in self.environment.signals:
                what = unknown("signal", expected.signal, self.environment.signals)
                self.add(("expect", i, "signal"), self._here(what))

    def _limit(self, path: Path, name: str, side: str, limit: Quantity) -> None:
        if not self._sli((*path, "sli"), name):
            return
        sli = self.environment.slis[name]
        if sli.measure in VALUE_MEASURES and self.environment.facing(self.experiment.target).probe.value is None:
            where = f"targets.{self.experiment.target}.probe" if self.environment.probe.value else "probe"
            self.add(
                (*path, "sli"),
                f"{name} is measured on the number in the answer, and {where}.value of environment "
                f"{self.environment.name} does not say where that is. Allowed: value: score, for example.",
            )
        expected = sli.shown_unit
        if limit.unit != expected:
            allowed = {
                "ratio": "a percentage, such as 99%",
                "s": "a duration, such as 300ms",
                "": "a number, such as 2",
            }
            given = {"ratio": "a percentage", "s": "a duration", "": f"{limit.value:g} without a unit"}
            measured = {"ratio": "a ratio", "s": "a time", "": "a plain number"}
            self.add(
                (*path, side), f"{name} is {measured[expected]}, not {given[limit.unit]}. Allowed: {allowed[expected]}."
            )

    def _sli(self, path: Path, name: str) -> bool:
        if name in self.environment.slis:
            return True
        self.add(path, self._here(unknown("SLI", name, self.environment.slis)))
        return False

    def _here(self, message: str) -> str:
        return message.replace(" Allowed:", f" Allowed in {self.environment.name}:", 1)
