"""A `Platform` over the engine's simulated world: real guards, window, judgement and records; simulated time and target."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import sim

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Budget
from mlchaos_dagster.engine.stops import FileStop, SignalStop, StopFiles
from mlchaos_dagster.orchestration.platform import RealPlatform
from mlchaos_dagster.orchestration.ports import Published
from mlchaos_dagster.settings import Home, Settings


def experiment(name: str = "sim-pod-failure", **changes: Any) -> Experiment:
    return Experiment.model_validate({**sim.EXPERIMENT, "name": name, **changes})


def environment(**changes: Any) -> Environment:
    return Environment.model_validate({**sim.ENVIRONMENT, **changes})


@dataclass
class SimPlatform(RealPlatform):
    """Like the real one, but for what a run touches."""

    root: Path
    world: sim.World = field(default_factory=sim.World)
    prepare: Callable[[sim.World, str], None] = lambda world, run_id: None
    """Called with each run's fresh world."""
    health: float = 1.0
    left: float | Exception | None = None
    """Error budget left."""
    at: datetime = datetime(2026, 11, 23, 2, 0, tzinfo=timezone.utc)
    swept: list[str] = field(default_factory=list)
    recovered: list[str] = field(default_factory=list)
    worlds: dict[str, sim.World] = field(default_factory=dict)
    draw: bool = False
    """Pictures and reports take longer than the simulated run, and have tests of their own."""

    def __post_init__(self) -> None:
        home = Home(self.root)
        super().__init__(Settings(home=home, environment="sim", library=(), color=False, user="tester"))

    def now(self) -> datetime:
        return self.at

    def build_run(
        self,
        experiment: Experiment,
        environment: Environment,
        *,
        run_id: str,
        stops: Sequence[Any] = (),
        **options: Any,
    ) -> Any:
        world = sim.World()
        # One simulated hour apart, so that records of later runs are later.
        world.clock.t += 3600.0 * len(self.worlds)
        self.worlds[run_id] = self.world = world
        self.prepare(world, run_id)
        left = self.left if isinstance(self.left, float) else None
        run = sim.build(self.root, world, run_id=run_id, shadow=options["shadow"], health=self.health, budget=left)
        run.experiment, run.environment, run.started_by = experiment, environment, options["started_by"]
        run.kit.gate = self.root / "gates" / f"{environment.name}.json"
        run.kit.signals_deferred = SignalStop
        run.stops += [FileStop(StopFiles(self.settings.home), run_id), *stops]
        if options.get("progress"):
            run.tell = options["progress"]
        return run

    def picture(self, *of: Any) -> bytes | None:
        return super().picture(*of) if self.draw else None

    def publish(self, record: Any, samples: Any, verdict: Any) -> Published:
        if self.draw:
            return super().publish(record, samples, verdict)
        self.store().save_verdict(record, verdict)
        return Published(self.store().path(record.run_id), None)

    def budget(self, environment: Environment) -> Budget | None:
        if isinstance(self.left, Exception):
            raise self.left
        return None if self.left is None else Budget(self.left, "simulated")

    def ledger(self) -> FileLedger:
        return FileLedger(self.root / "ledger", sim.SimClock())

    def leases(self) -> Any:
        return self.ledger().leases()

    def sweep(self) -> list[str]:
        return self.swept

    def recover(self, run_ids: Sequence[str]) -> list[str]:
        self.recovered += run_ids
        for lease in self.leases():
            if not run_ids or lease.run_id in run_ids:
                self.ledger().close(lease, ["taken away"])
        return [f"recovered {i}" for i in run_ids]
