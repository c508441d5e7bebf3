"""The supervisor's faults: injected on slots and proxies, ended by removal or deadline, seen at the target.

What is present is asked of the processes each time; the book only remembers what was meant, so that a proxy that had
to be restarted gets its still-valid rules back. Removal comes before everything: a lease once removed can never inject
again, a proxy that does not confirm the removal is killed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from .faults import NETWORK_KINDS, POD_KINDS, Fault, Refused, parse
from .handlers import HANDLERS, Handler, told
from .slots import Slot, is_living_process
from .tombstones import read_tombstones, write_tombstone
from .truth import TruthLog

_CALL_S = 0.6
"""A proxy that has not confirmed by then is killed, so that two of them fit into the caller's two seconds."""
_WATCH_S = 0.1
_AGAIN_S = 0.5
"""Between two tries to take away what has expired and does not go."""

ProxyCall = Callable[[Slot, str, str, Any, float], Awaitable[tuple[int, Any]]]
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


class FaultBook:
    """All faults of one sandbox. ``call`` sends one request to a proxy's control face."""

    def __init__(
        self,
        slots: dict[str, Slot],
        links: Callable[[], Mapping[str, str]],
        call: ProxyCall,
        truth: TruthLog,
        directory: Path,
        handler: Callable[[str], Handler],
    ) -> None:
        self._slots = slots
        self._links = links
        """Link → the proxy process that it runs through."""
        self._call = call
        self._truth = truth
        self._build = handler
        self._handlers: dict[str, Handler] = {}
        self._faults: dict[tuple[str, str, str], Fault] = {}
        self._highest: dict[str, int] = {}
        self._seen_expiries: dict[int, int] = {}
        self.lock = asyncio.Lock()
        self._directory = directory
        self._tombstones = read_tombstones(directory)

    # -- verbs ------------------------------------------------------------------------------------------------------

    async def add(self, body: Any) -> dict[str, Any]:
        """Inject; return the fault as it is afterwards.

        Raises:
            Refused: nothing of it is left in force.
        """
        fault = parse(
            body, self._slots, self._links(), {kind: lambda kind=kind: self._handler(kind) for kind in HANDLERS}
        )
        async with self.lock:
            if fault.lease_id in self._tombstones:
                raise Refused(409, f"lease {fault.lease_id} was removed; it can never inject again")
            highest = self._highest.get(fault.target, 0)
            if fault.token < highest:
                raise Refused(409, f"token {fault.token} is fenced: {fault.target} has seen {highest}")
            if fault.key not in self._faults:
                self._highest[fault.target] = fault.token
                self._faults[fault.key] = fault
                try:
                    await self._inject(fault)
                except BaseException:  # also a cancelled request: half a fault is taken away, then it is told
                    await asyncio.shield(self._take_back(fault))
                    raise
                self._truth.write(
                    "fault_added", fault.target, None, fault.lease_id, kind=fault.kind, params=fault.params
                )
        for seen in (await self.present())["faults"]:
            if (seen["lease_id"], seen["target"], seen["kind"]) == fault.key:
                return seen
        raise Refused(409, f"{fault.kind} on {fault.target} ended before it was seen")

    async def remove(self, lease: str) -> list[dict[str, Any]]:
        """Take everything of a lease away, for ever; return what there was. Safe for leases nobody knows.

        Raises:
            Refused: some targets did not give it up (all are named). They stay in the book; all others are rid of it.
        """
        self._bury(lease)
        removed, refused = list[Fault](), list[Refused]()
        async with self.lock:
            every = (*self._faults.values(), *await self._strays())
            for fault in [fault for fault in every if fault.lease_id == lease]:
                try:
                    await self._clear(fault)
                except Refused as error:
                    refused.append(error)
                    continue
                removed.append(fault)
                self._faults.pop(fault.key, None)
                self._truth.write("fault_removed", fault.target, None, lease, kind=fault.kind)
            # Ask every proxy, not only those we remember: their word counts, and they keep the tombstone too.
            proxies = [slot for slot in self._slots.values() if slot.role == "proxy"]
            await asyncio.gather(*(self.clear_proxy(slot, lease) for slot in proxies))
        if refused:
            raise Refused(refused[0].status, "; ".join(map(str, refused)))
        return [{"target": fault.target, "kind": fault.kind, "params": fault.params} for fault in removed]

    async def present(self) -> dict[str, Any]:
        """Every fault there is, asked of slots and proxies now: {"faults": […], "unanswered": [proxy names]}."""
        rules, unanswered = await self._ask_proxies()
        found: list[dict[str, Any]] = []
        for fault in list(self._faults.values()):
            if fault.kind in NETWORK_KINDS:
                seen = self._seen_network(fault, rules.pop(fault.key, None), unanswered)
            elif fault.kind in POD_KINDS:
                seen = self._seen_pod(fault)
            else:
                seen = await self._seen_other(fault)
            if seen is not None:
                found.append(seen)
        for rule in rules.values():  # in force, though we do not mean it: say so
            fault = Fault(rule["lease_id"], rule["token"], rule["kind"], rule["link"], rule["params"], 0.0)
            fault.deadline = time.monotonic() + rule["remaining_s"]
            found.append(fault.to_dict(effective=bool(rule["first_effect"]), evidence=[_rule_line(rule)]))
        for stray in await self._strays():
            found.append(
                stray.to_dict(effective=True, evidence=[f"{stray.target} has {stray.kind}, which is not meant"])
            )
        meant = {(fault.target, fault.hold_key) for fault in self._faults.values()}
        for slot in self._slots.values():
            for hold in slot.holds:
                if (slot.name, hold) not in meant:
                    lease, kind = hold.rsplit("/", 1)
                    stray = Fault(lease, 0, kind, slot.name, {}, time.monotonic())
                    found.append(stray.to_dict(effective=not slot.running, evidence=[f"{slot.name} is held down"]))
        return {"faults": found, "unanswered": sorted(unanswered)}

    def targets(self, kind: str) -> list[str]:
        """What a kind that has a handler can be put on now. Raises Refused: 400, it has none."""
        if kind not in HANDLERS:
            raise Refused(400, f"{kind!r} has no handler; allowed: {', '.join(HANDLERS)}")
        return sorted(self._handler(kind).targets())

    def _proxy_of(self, link: str) -> str:
        return self._links().get(link, "")

    def on(self, target: str) -> list[str]:
        """Leases with a fault on this process or on a link to it."""
        links = {name for name in self._links() if target in name.split("->")}
        return sorted({f.lease_id for f in self._faults.values() if f.target == target or f.target in links})

    async def reinstate(self, slot: Slot) -> None:
        """Give a proxy that is new the rules that are still meant."""
        async with self.lock:
            for fault in list(self._faults.values()):
                if fault.kind in NETWORK_KINDS and self._proxy_of(fault.target) == slot.name and fault.remaining_s > 0:
                    try:
                        await self._post_rule(slot, fault)
                        self._truth.write("fault_reinstated", fault.target, slot.pid, fault.lease_id, kind=fault.kind)
                    except (Refused, *_UNANSWERED):
                        continue  # not in force, and ``present`` says so

    async def watch(self) -> None:
        """Task: write the moments at which network faults took effect and expired into the truth log."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if not any(fault.kind in NETWORK_KINDS for fault in self._faults.values()):
                continue
            rules, unanswered = await self._ask_proxies()
            for fault in list(self._faults.values()):
                if fault.kind not in NETWORK_KINDS:
                    continue
                rule = rules.get(fault.key)
                if rule is not None:
                    self._log_effect(fault, rule["first_effect"])
                elif fault.remaining_s <= 0 and self._proxy_of(fault.target) not in unanswered:
                    # It died with its proxy, before its time was up; the proxy tells of all others itself.
                    if self._faults.pop(fault.key, None) is not None:
                        self._truth.write("fault_expired", fault.target, None, fault.lease_id, kind=fault.kind)

    # -- kinds with a handler ----------------------------------------------------------------------------------------

    def _handler(self, kind: str) -> Handler:
        if kind not in self._handlers:
            self._handlers[kind] = self._build(kind)
        return self._handlers[kind]

    async def _strays(self) -> list[Fault]:
        meant = set(self._faults)
        return [fault for fault in await told(self._handlers) if fault.key not in meant | set(self._faults)]

    async def _inject(self, fault: Fault) -> None:
        if fault.kind in NETWORK_KINDS:
            await self._inject_network(fault)
        elif fault.kind in POD_KINDS:
            await self._inject_pod(fault)
        else:
            await self._handler(fault.kind).inject(fault)
            fault.tasks.append(asyncio.get_running_loop().create_task(self._expire(fault)))

    async def _take_back(self, fault: Fault) -> None:
        try:
            await self._clear(fault)
        except Refused:  # it may be there: it stays in the book, and is tried again until it is gone
            fault.deadline = time.monotonic()
            fault.tasks.append(asyncio.get_running_loop().create_task(self._expire(fault)))
        else:
            self._faults.pop(fault.key, None)

    async def _seen_other(self, fault: Fault) -> dict[str, Any] | None:
        seen = await self._handler(fault.kind).seen(fault)
        if seen is None:
            return None
        effective, evidence, details = seen
        if effective:
            self._log_effect(fault, time.monotonic())
        return fault.to_dict(effective=effective, evidence=evidence, **details)

    # -- pods -------------------------------------------------------------------------------------------------------

    async def _inject_pod(self, fault: Fault) -> None:
        slot = self._slots[fault.target]
        if fault.kind != "pod_failure" and "interval_s" not in fault.params and not slot.running:
            raise Refused(409, f"{fault.target} is not running: there is nothing to delete")
        if fault.kind == "pod_failure":
            slot.hold(fault.hold_key)
        await self._kill(fault, slot)
        if fault.kind == "pod_failure" and slot.running:
            raise Refused(503, f"{fault.target} is still running after {fault.params.get('signal', 'SIGKILL')}")
        loop = asyncio.get_running_loop()
        fault.tasks.append(loop.create_task(self._expire(fault)))
        if "interval_s" in fault.params:
            fault.tasks.append(loop.create_task(self._kill_again(fault, slot)))

    async def _kill(self, fault: Fault, slot: Slot) -> None:
        pid = await slot.kill(fault.lease_id, fault.params.get("signal", "SIGKILL"))
        if pid is not None:
            fault.killed.append(pid)
        if pid is not None or not slot.running:
            self._log_effect(fault, time.monotonic())

    async def _kill_again(self, fault: Fault, slot: Slot) -> None:
        while True:
            await asyncio.sleep(fault.params["interval_s"])
            await self._kill(fault, slot)

    async def _expire(self, fault: Fault) -> None:
        await asyncio.sleep(fault.remaining_s)
        while True:
            async with self.lock:
                if fault.key not in self._faults:
                    return
                try:
                    await self._clear(fault)
                except Refused as error:
                    self._truth.write("fault_lingers", fault.target, None, fault.lease_id, error=str(error))
                else:
                    del self._faults[fault.key]
                    self._truth.write("fault_expired", fault.target, None, fault.lease_id, kind=fault.kind)
                    return
            await asyncio.sleep(_AGAIN_S)

    def _seen_pod(self, fault: Fault) -> dict[str, Any]:
        slot = self._slots.get(fault.target)
        gone = [pid for pid in fault.killed if not is_living_process(slot, pid)]
        evidence = [f"{fault.target} pid {pid} is gone" for pid in gone[-3:]]
        if len(gone) > 3:
            evidence.insert(0, f"{len(gone)} processes of {fault.target} were killed")
        effective = bool(gone)
        if fault.kind == "pod_failure":
            down = slot is None or not slot.running
            effective = down
            evidence.append(f"{fault.target} is held down" if down else f"{fault.target} is RUNNING though held")
        return fault.to_dict(effective=effective, evidence=evidence, killed_pids=list(fault.killed))

    # -- network ----------------------------------------------------------------------------------------------------

    async def _inject_network(self, fault: Fault) -> None:
        slot = self._slots[self._proxy_of(fault.target)]
        if not slot.running or slot.port is None:
            raise Refused(503, f"{slot.name} is not running; try again")
        try:
            await self._post_rule(slot, fault)
        except _UNANSWERED as error:
            raise Refused(
                503, f"{slot.name} did not confirm the rule ({type(error).__name__}); it was taken back"
            ) from error

    async def _post_rule(self, slot: Slot, fault: Fault) -> None:
        rule = {
            "lease_id": fault.lease_id,
            "token": fault.token,
            "link": fault.target,
            "kind": fault.kind,
            "params": fault.params,
            "deadline": fault.deadline,
        }
        status, answer = await self._call(slot, "POST", "/rules", rule, _CALL_S)
        if status != 200:
            raise Refused(503 if status == 404 else status, f"{slot.name}: {answer.get('error', status)}")

    async def _clear(self, fault: Fault) -> None:
        """Undo one fault at its target. Raises Refused: it may still be there, and stays in the book."""
        current = asyncio.current_task()
        if fault.kind not in (*NETWORK_KINDS, *POD_KINDS):
            await self._handler(fault.kind).clear(fault)
        for task in fault.tasks:
            if task is not current:
                task.cancel()
        if fault.kind not in POD_KINDS:
            slot = self._slots.get(self._proxy_of(fault.target)) if fault.kind in NETWORK_KINDS else None
            others = [other for other in self._faults.values() if other is not fault]
            if slot is not None and not any(other.lease_id == fault.lease_id for other in others):
                await self.clear_proxy(slot, fault.lease_id)
        elif (slot := self._slots.get(fault.target)) is not None and slot.release(fault.hold_key):
            self._truth.write("released", fault.target, None, fault.lease_id)

    async def clear_proxy(self, slot: Slot, lease: str) -> None:
        """Take every rule of a lease from a proxy, for ever; one that does not confirm is killed."""
        if not slot.running or slot.port is None:
            return  # rules are set only after a proxy has reported its port
        try:
            status, _ = await self._call(slot, "DELETE", f"/rules/{lease}", None, _CALL_S)
            if status == 200:
                return
        except _UNANSWERED:
            pass
        # Not confirmed is not removed. Its rules die with it, and it comes back with those that are still meant.
        self._truth.write("proxy_unresponsive", slot.name, slot.pid, lease)
        await slot.kill(lease)

    async def _ask_proxies(self) -> tuple[dict[tuple[str, str, str], dict[str, Any]], set[str]]:
        rules: dict[tuple[str, str, str], dict[str, Any]] = {}
        unanswered: set[str] = set()

        async def ask(slot: Slot) -> None:
            pid = slot.pid or 0
            try:
                after = self._seen_expiries.get(pid, 0)
                _, answer = await self._call(slot, "GET", f"/rules?after={after}", None, _CALL_S / 2)
            except _UNANSWERED:
                if slot.running:
                    unanswered.add(slot.name)
                return
            for rule in answer["rules"]:
                rules[(rule["lease_id"], rule["link"], rule["kind"])] = rule
            for event in answer["expired"]:
                if event["number"] > self._seen_expiries.get(pid, 0):
                    self._seen_expiries[pid] = event["number"]
                    self._expired(event)

        slots = [
            slot for slot in self._slots.values() if slot.role == "proxy" and slot.running and slot.port is not None
        ]
        await asyncio.gather(*(ask(slot) for slot in slots))
        return rules, unanswered

    def _expired(self, event: dict[str, Any]) -> None:
        fault = self._faults.pop((event["lease_id"], event["link"], event["kind"]), None)
        if fault is not None:
            self._log_effect(fault, event["first_effect"])
        moment = {"at": event["at"], "mono": event["mono"]}
        self._truth.write("fault_expired", event["link"], None, event["lease_id"], kind=event["kind"], **moment)

    def _seen_network(self, fault: Fault, rule: dict[str, Any] | None, unanswered: set[str]) -> dict[str, Any] | None:
        proxy = self._proxy_of(fault.target)
        if rule is not None:
            self._log_effect(fault, rule["first_effect"])
            evidence = [_rule_line(rule)]
            return fault.to_dict(effective=bool(rule["first_effect"]), evidence=evidence, counters=rule["counters"])
        if proxy in unanswered:
            return fault.to_dict(effective=False, evidence=[f"{proxy} does not answer: nobody knows"])
        if fault.remaining_s <= 0:
            return None
        return fault.to_dict(effective=False, evidence=[f"{proxy} was restarted and gets the rule back once it is up"])

    def _log_effect(self, fault: Fault, mono: float | None) -> None:
        if mono is not None and not fault.effective_logged:
            fault.effective_logged = True
            at = time.time() - (time.monotonic() - mono)
            self._truth.write("fault_effective", fault.target, None, fault.lease_id, kind=fault.kind, at=at, mono=mono)

    def _bury(self, lease: str) -> None:
        if lease in self._tombstones:
            return
        self._tombstones.add(lease)
        try:
            write_tombstone(self._directory, lease)
        except OSError:
            pass  # memory suffices while this supervisor lives


def _rule_line(rule: dict[str, Any]) -> str:
    done = ", ".join(f"{what} {count}" for what, count in rule["counters"].items() if count)
    return f"proxy {rule['link']}: {rule['kind']} in force; {done or 'nothing was touched yet'}"
