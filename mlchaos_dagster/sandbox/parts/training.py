"""Training: two workers that read their shards from the object store, train, and write checkpoints there."""

from __future__ import annotations

import time

from . import Part, Process, View

WORKERS = ("trainer-1", "trainer-2")


def _read(view: View) -> dict[str, float]:
    """Gauges over both workers. What a dead worker did stands in its progress file; see ``progress``."""
    from mlchaos_dagster.sandbox.progress import path_of, read, summary

    now = time.monotonic()
    slots = {name: view.slots[name] for name in WORKERS if name in view.slots}
    # A worker that never lived in this sandbox may have left a file in the one before.
    told = {name: read(path_of(view.directory, name)) for name, slot in slots.items() if slot.last_port}
    known = {name: progress for name, progress in told.items() if progress is not None and progress.started_at}
    found: dict[str, float] = {"training_workers_ready": sum(slot.ready for slot in slots.values())}
    if len(known) == len(WORKERS):
        alive = {name for name, progress in known.items() if slots[name].running and progress.pid == slots[name].pid}
        found |= summary(known, alive, now)
    return found


PART = Part(
    name="training",
    describe="Two training workers with checkpoints in the object store",
    requires=("storage",),
    processes=tuple(Process(name, "trainer") for name in WORKERS),
    peers={"trainer-*": {"object_store": "trainer->object-store"}},
    signals=(
        "training_step",
        "training_step_rate",
        "training_loss",
        "training_workers_ready",
        "checkpoint_age",
        "lost_steps",
        "steps_behind",
        "bad_shards",
        "checkpoints_skipped",
        "store_failures",
    ),
    read=_read,
)
