"""Rollback actions: what is done for a service after the fault was taken away, once, bounded, and undone (R3-09).

    fault proven gone ─ a limit was broken? act ─ recovery sampled (slower than allowed? act) ─ undo

Every action has a lease of its own, written before it and closed when the target says that nothing of it is left. An
action helps the recovery, so it lasts as long as the run watches that: until the service is steady again or the
observation ends. Whoever dies meanwhile, watchdog and sweeper undo it as they would a fault; so does `mlchaos recover`.
An action that fails is told and changes no verdict: the fault is gone by then.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from mlchaos_dagster.domain.record import ActionFacts, Evidence
from mlchaos_dagster.domain.spec import RestartUnhealthy, RollbackAction
from mlchaos_dagster.engine.ports import Acting, Lease, Objection
from mlchaos_dagster.engine.renewal import RENEW_EVERY_S
from mlchaos_dagster.errors import DriverError, LeaseRefused, MlChaosError, StoreError

if TYPE_CHECKING:
    from mlchaos_dagster.engine.run import Run

MAX_WORKLOADS = 10
"""Scaled by one action at most, whatever its selector matches."""


def objections(run: Run) -> Iterator[Objection]:
    """What speaks against the actions, asked before anything is touched: they must be allowed when they are needed."""
    spec, driver = run.experiment.rollback, run.kit.driver
    if spec is None:
        return
    can = acting(run)
    ask = getattr(driver, "preflight", None)
    for action in spec.actions:
        if can is None or action.kind not in can.actions:
            yield Objection(f"backend {driver.name} does not {action.kind}", "no rollback, or another backend")
            continue
        target = run.environment.targets[action.of.target]
        ids = driver.resolve(target)
        if not ids:
            yield Objection(f"rollback: {target.select} matches nothing", "a target that exists")
        elif ask is not None:
            yield from ask(action.kind, ids, ids, action.of.params(), target=target)


def acting(run: Run) -> Acting | None:
    """The driver, if it takes actions."""
    return cast(Acting, run.kit.driver) if getattr(run.kit.driver, "actions", None) else None


class Rollback:
    """The actions of one run: taken at most once, kept alive while they last, undone."""

    def __init__(self, run: Run) -> None:
        self.run, self.spec = run, run.experiment.rollback
        self.done = self.spec is None or run.shadow
        self._held: dict[int, Lease] = {}
        self._renewed = -RENEW_EVERY_S

    @property
    def acted(self) -> bool:
        """Whether actions were taken: the recovery is then watched to its end."""
        return bool(self.run.actions)

    def after_breach(self) -> None:
        """Act if a limit was broken and the fault is proven gone."""
        run = self.run
        if run.abort is not None and run.abort.cause == "limit" and run.clean is not None and run.clean.proven:
            self._act(run.abort.reason)

    def look(self, t: float, since: float) -> None:
        """While the recovery is watched: keep what was done alive; act when the recovery takes too long."""
        self._renew(t)
        limit = self.spec.slower_than if self.spec else None
        if limit is not None and t - since >= limit:
            self._act(f"not steady again {limit:g} s after the fault was gone")

    def undo(self) -> None:
        """As it was before, last action first. What cannot be undone now keeps its lease for the sweeper."""
        for index, lease in sorted(self._held.items(), reverse=True):
            self._undo(index, lease)
        self._held.clear()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _act(self, why: str) -> None:
        if self.done or self.spec is None:
            return
        self.done = True
        for action in self.spec.actions:
            facts = ActionFacts(kind=action.kind, target=action.of.target, why=why, t=round(self.run.watch.now, 4))
            self.run.actions.append(facts)
            index = len(self.run.actions) - 1
            try:
                self._take(index, action)
            except MlChaosError as e:
                self._note(index, error=str(e))
            except Exception as e:  # noqa: BLE001  a crashing driver costs the action, not the run's result
                self._note(index, error=f"{type(e).__name__}: {e}")
            facts = self.run.actions[index]
            said = facts.error or "; ".join(facts.lines) or "nothing needed it"
            self.run.incident("action", f"{facts.kind} on {facts.target}: {said}", lease=facts.lease_id, why=why)

    def _take(self, index: int, action: RollbackAction) -> None:
        run, kit, driver = self.run, self.run.kit, acting(self.run)
        if driver is None or action.kind not in driver.actions:
            raise DriverError(f"backend {kit.driver.name} does not {action.kind}")
        target, params = run.environment.targets[action.of.target], action.of.params()
        most = action.of.at_most if isinstance(action.of, RestartUnhealthy) else MAX_WORKLOADS
        ids = driver.affected(action.kind, target, params)[:most]
        if not ids:
            return
        lease_id = f"mlchaos-{action.kind.replace('_', '-')}-{uuid.uuid4().hex[:10]}"
        lifetime = run.environment.sampling.recovery_timeout + run.environment.safety.deadline_grace
        lease = kit.ledger.open(
            Lease(
                id=lease_id,
                run_id=run.run_id,
                experiment=run.experiment.name,
                environment=run.environment.name,
                driver=kit.driver.name,
                kind=action.kind,
                targets=ids,
                params=params,
                undo=kit.driver.undo(
                    action.kind, ids, params, target=target, backup=kit.backups / lease_id, step=self._step
                ),
                duration_s=lifetime,
                opened_wall=kit.clock.wall(),
                deadline_wall=kit.clock.wall() + lifetime,
                owner=kit.owner,
            )
        )
        self._held[index] = lease
        self._note(index, ids=ids, lease_id=lease.id)
        kit.ledger.check(lease)
        kit.driver.inject(lease, self._step)
        evidence = kit.driver.active(lease)
        self._note(index, lines=evidence.lines)
        if not evidence.present:  # an act: nothing of it is left to be undone
            del self._held[index]
            kit.ledger.close(lease, evidence.lines)

    def _undo(self, index: int, lease: Lease) -> None:
        run, kit = self.run, self.run.kit
        end = kit.clock.monotonic() + run.environment.safety.recover_timeout
        evidence, said, pause = Evidence(present=True, effective=False), "", 0.05
        while evidence.present:
            try:
                kit.driver.recover(lease, self._step)
                evidence = kit.driver.active(lease)
                said = "; ".join(evidence.lines)
            except Exception as e:  # noqa: BLE001  one failed attempt; it is tried again, and then told
                said = str(e) if isinstance(e, DriverError) else f"{type(e).__name__}: {e}"
            if not evidence.present:
                break
            if kit.clock.monotonic() >= end:
                command = f"mlchaos recover {lease.id}"
                self._note(index, error=f"not undone: {said}", command=command)
                run.incident("error", f"{lease.kind} is not undone: {said}", lease=lease.id, command=command)
                return
            self._step(0, 0)
            kit.clock.sleep(pause)
            pause = min(2 * pause, 0.5)
        facts = run.actions[index]
        self._note(index, lines=(*facts.lines, *evidence.lines), undone_at=round(run.watch.now, 4))
        try:
            kit.ledger.close(lease, evidence.lines)
        except StoreError as e:
            run.incident("error", f"lease {lease.id} is left for the sweeper: {e}")

    def _note(self, index: int, **facts: object) -> None:
        self.run.actions[index] = self.run.actions[index].model_copy(update=facts)

    def _step(self, done: int, total: int) -> None:
        self._renew(self.run.watch.pump())

    def _renew(self, t: float) -> None:
        if t - self._renewed < RENEW_EVERY_S:
            return
        self._renewed = t
        for index, lease in list(self._held.items()):
            try:
                self.run.kit.ledger.renew(lease)
            except LeaseRefused as e:  # somebody undoes it: it is theirs now
                del self._held[index]
                self._note(index, error=f"taken over: {e}")
            except StoreError:
                pass  # a full disk: it is undone regardless, when its time has come
