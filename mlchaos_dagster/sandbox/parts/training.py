"""Training: two workers that read their shards from the object store, train, and write checkpoints there."""

from __future__ import annotations

import time

from . import Part, Process, View

WORKERS = ("trainer-1", "trainer-2")
_RATE_LASTS_S = 1.0


def _read(view: View) -> dict[str, float]:
    """Gauges over both workers. What a dead worker did stands in its progress file; see ``progress``."""
    from mlchaos_dagster.sandbox.progress import path_of, read

    now = time.monotonic()
    slots = {name: view.slots[name] for name in WORKERS if name in view.slots}
    # A worker that never lived in this sandbox may have left a file in the one before.
    told = {name: read(path_of(view.directory, name)) for name, slot in slots.items() if slot.last_port}
    known = {name: progress for name, progress in told.items() if progress is not None and progress.started_at}
    found: dict[str, float] = {"training_workers_ready": sum(slot.ready for slot in slots.values())}
    if len(known) == len(WORKERS):
        alive = {name for name, progress in known.items() if slots[name].running and progress.pid == slots[name].pid}
        # A dead worker is where it will resume from: all that was in its memory is gone.
        steps = {name: p.step if name in alive else p.checkpoint_step for name, p in known.items()}
        found |= {
            "training_step": sum(steps.values()),
            "training_step_rate": sum(
                p.rate for name, p in known.items() if name in alive and now - p.updated_at < _RATE_LASTS_S
            ),
            "steps_behind": sum(max(0, p.best - steps[name]) for name, p in known.items()),
            "lost_steps": max(p.lost_steps for p in known.values()),
            "checkpoint_age": max(now - (p.checkpoint_at or p.started_at) for p in known.values()),
            "checkpoints_skipped": sum(p.checkpoints_skipped for p in known.values()),
            "training_loss": max(p.loss for p in known.values()),
            "bad_shards": sum(p.bad_shards for p in known.values()),
            "store_failures": sum(p.store_failures for p in known.values()),
        }
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
