"""What was seen of a lease's objects, in the words of evidence; and the notes that processes of one lease leave each other."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlchaos_dagster.domain.record import Evidence
from mlchaos_dagster.drivers import s3_client
from mlchaos_dagster.drivers.s3_objects import Look, Original
from mlchaos_dagster.engine.files import sync_directory, write_json
from mlchaos_dagster.engine.ports import Lease, Step
from mlchaos_dagster.errors import InjectFailed, StoreError

LATE_S = s3_client.READ_S * s3_client.ATTEMPTS + 1.0
"""How long after it was sent a request of a killed process may come out of the store's queue: as long as its sender would
have waited for it, and a second for what was sent after the last note of it."""
_LOOK_EVERY_S = 0.5


class Notes:
    """What the processes of one lease leave each other in its backup directory; a note that is missing only costs time."""

    def __init__(self, lease: Lease) -> None:
        self.directory = Path(lease.undo["backup"])
        self._deadline = lease.deadline_wall

    @property
    def armed(self) -> bool:
        """Whether the lease was not recovered yet."""
        return (self.directory / "armed").exists()

    @property
    def orderly(self) -> bool:
        """Whether no request of an injection can be under way."""
        return self.directory.is_dir() and (
            not (self.directory / "injecting").exists() or (self.directory / "injected").exists()
        )

    @property
    def late_s(self) -> float:
        """For how long a request of the injection may still come through; 0 after an orderly end."""
        if self.orderly:
            return 0.0
        now = time.time()
        try:
            sent = (self.directory / "injecting").stat().st_mtime
        except OSError:
            sent = min(now, self._deadline)  # nothing is begun after the deadline
        return min(LATE_S, max(0.0, sent + LATE_S - now))

    def looks(self, step: Step) -> Iterator[None]:
        """One look; after an injection that did not end orderly one after the other, until nothing can come any more."""
        while True:
            left = self.late_s
            yield
            if not left:
                return
            left = min(left, _LOOK_EVERY_S)
            while left > 0:
                step(0, 0)
                time.sleep(min(left, s3_client.STEP_S))
                left -= s3_client.STEP_S

    def sending(self) -> None:
        """A request of the injection is about to be sent, or under way."""
        with contextlib.suppress(OSError):
            os.utime(self.directory / "injecting")

    def begin(self) -> None:
        """Raises InjectFailed: it cannot be noted."""
        try:
            (self.directory / "injecting").write_text("")
            sync_directory(self.directory)
        except OSError as e:
            raise InjectFailed(
                f"cannot write in {self.directory}: {e.strerror or e}", driver="s3", verb="inject"
            ) from e

    def end(self, counts: Counter[bool], total: int, conditional: bool) -> None:
        """The injection has ended and no request of it is under way; `counts`: objects written or left alone."""
        self._keep(
            "injected", {"written": counts[True], "changed": counts[False], "of": total, "conditional": conditional}
        )

    def disarm(self) -> None:
        """From here on nothing more is injected."""
        with contextlib.suppress(OSError):
            (self.directory / "armed").unlink()

    def restored(self, states: Counter[str]) -> None:
        """Every object was read back; how many are in which state."""
        self._keep("restored", dict(states))

    def read(self, name: str) -> dict[str, Any]:
        """A note; empty when there is none."""
        try:
            return {**json.loads((self.directory / name).read_text())}
        except (OSError, ValueError, TypeError):
            return {}

    def _keep(self, name: str, value: Mapping[str, Any]) -> None:
        if self.directory.is_dir():
            with contextlib.suppress(StoreError):
                write_json(self.directory / name, value)


def evidence(lease: Lease, objects: Sequence[Original], seen: Mapping[str, Look]) -> Evidence:
    """From what was seen of the objects to what it means. Effective: damage is served, and no chosen object was left out."""
    states = Counter(found.state for found in seen.values())
    before = {o.key: o.sha256 for o in objects}
    read = {key: found.sha256 == before[key] for key, found in seen.items() if found.sha256}
    damaged = {key for key, found in seen.items() if found.state == "ours" and not read.get(key, False)}
    present = any(found.present for found in seen.values())
    lines = _present_lines if present else _clean_lines
    effective = bool(damaged) and states["same"] == 0
    return Evidence(present=present, effective=effective, lines=tuple(lines(lease, len(objects), seen, states, read)))


def _present_lines(
    lease: Lease, chosen: int, seen: Mapping[str, Look], states: Counter[str], read: Mapping[str, bool]
) -> list[str]:
    place, how = lease.undo["place"], lease.params.get("how", "")
    under = f"s3://{place['bucket']}/{lease.undo['prefix']}"
    if len(seen) < chosen:
        what = (
            f"{states['ours']:,} of {len(seen):,} looked at of {chosen:,} chosen objects (of {lease.undo['matched']:,})"
        )
    else:
        what = f"{states['ours']:,} of {lease.undo['matched']:,} objects"
    lines = [f"{what} under {under} are damaged ({how})"]
    if states["same"]:
        lines.append(f"{states['same']:,} of {chosen:,} chosen objects are as before")
    if hidden := sum(1 for found in seen.values() if found.below):
        lines.append(f"{hidden:,} objects have a damaged version below what others wrote")
    mine = [key for key, found in seen.items() if found.state == "ours" and found.sha256]
    if mine:
        differ = sum(1 for key in mine if not read[key])
        lines.append(f"content of {len(mine):,} read: SHA-256 differs from before in {differ:,}")
    return lines + _others(states) + _injected(lease)


def _clean_lines(
    lease: Lease, chosen: int, seen: Mapping[str, Look], states: Counter[str], read: Mapping[str, bool]
) -> list[str]:
    if s3_client.sandbox_is_another(lease.undo["place"]):
        return ["another sandbox than then is up: its store has nothing of the lease"]
    what = "version id" if lease.undo["versioned"] else "content"
    lines = [f"{states['same']:,} of {chosen:,} objects: {what} as before"]
    same = [key for key in read if seen[key].state == "same"]
    back = Notes(lease).read("restored").get("same", 0)
    if back == states["same"] and back > len(same):
        lines[0] += f"; SHA-256 of each as before, {len(same):,} of them read once more"
    elif same:
        lines[0] += f"; SHA-256 of {len(same):,} read: as before"
    if wrong := [key for key in same if not read[key]]:
        lines.append(f"{len(wrong):,} objects have another content under their old version, such as {wrong[0]}")
    return lines + _others(states) + _injected(lease)


def _others(states: Counter[str]) -> list[str]:
    lines = [f"{states['theirs']:,} written by others meanwhile, kept"] if states["theirs"] else []
    return lines + ([f"{states['gone']:,} deleted by others meanwhile"] if states["gone"] else [])


def _injected(lease: Lease) -> list[str]:
    """What the injector counted."""
    said = Notes(lease).read("injected")
    lines: list[str] = []
    if said.get("changed"):
        lines.append(f"{said['changed']:,} had been changed by others before the fault and were left alone")
    if said.get("conditional") is False:
        lines.append("this store ignores If-Match: each object was looked at just before it was written instead")
    return lines
