"""A training worker: reads its shards from the object store, trains, writes checkpoints, resumes from the last good one.

The steps run in this process's event loop, all that talks to the store in threads: a store that is slow or gone delays
checkpoints and fresh data, and no step.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .checkpoints import Shelf
from .learner import Learner
from .lifeline import Lifeline
from .progress import ProgressFile, path_of
from .remote_progress import RemoteProgress, become
from .s3 import S3, S3Error, S3Unavailable
from .shard_reader import ShardReader

WORKERS = 2
_STEP_S = 0.05
_CHECKPOINT_S = 2.0
_READ_S = 2.5
_AGAIN_S = 0.5
_TRIES = 8
_TERMINATED = 128 + 15
_STORE_DOWN = (S3Error, S3Unavailable)
_T = TypeVar("_T")


class Trainer:
    """One worker's life: resume, read, train."""

    def __init__(self, config: dict[str, Any], address: Callable[[], str], say: Callable[[bool, str], None]) -> None:
        """Set up; nothing is read yet.

        Args:
            config: of the process.
            address: where the object store is now.
            say: takes (ready, reason).
        """
        name, token, mechanisms = str(config["name"]), str(config["token"]), config["mechanisms"]
        # A supervisor counts its workers from 1, the status service from 0: each has its own share either way.
        number = (int(name.rpartition("-")[2]) - 1) % WORKERS
        self._patient = bool(mechanisms["retries"])
        tries = _TRIES if self._patient else 1
        sandbox = int.from_bytes(hashlib.sha256(token.encode()).digest()[:7], "big")
        self.progress: ProgressFile | RemoteProgress
        if status := dict(config.get("peers") or {}).get("training_status"):
            self.progress = RemoteProgress(status, token, name, str(config.get("holder") or ""))
        else:
            self.progress = ProgressFile(path_of(Path.cwd(), name), sandbox)
        self.learner = Learner(int(config["seed"]), number)
        # A client each: a long read must not keep a checkpoint waiting.
        self.data = S3(address, token, tries=tries)
        self.store = S3(address, token, tries=tries)
        self.reader = ShardReader(self.data, number, WORKERS, mechanisms["data_validation"])
        self.shelf = Shelf(self.store, name)
        self.keeps_checkpoints = bool(mechanisms["checkpoints"])
        self.resumed_from = 0
        self.checkpoints = 0
        self.checkpoint_failures = 0
        self._say = say
        self._recent: deque[float] = deque()

    async def run(self) -> None:
        """Train for ever.

        Raises:
            BadShard: without validation, data that cannot be read ends the worker.
            S3Error, S3Unavailable: without retries, the first request that fails does.
        """
        await asyncio.to_thread(self.progress.recall)
        before = self.progress.step
        if self.keeps_checkpoints:
            self._say(False, "looking for the last checkpoint")
            found = await self._until_answered(self.shelf.latest)
            if found is not None:
                self.learner.restore(found.state)
                self.resumed_from = found.step
                # The wall clock: another machine's monotonic one begins elsewhere.
                age_s = max(0.0, time.time() - float(found.state["saved_at"]))
                self.progress.checkpoint_at = time.monotonic() - age_s
        self._say(False, "reading the training data")
        await self._until_answered(self.reader.read)
        self._begin(before)
        await asyncio.gather(self._train(), self._read_again(), *([self._save()] if self.keeps_checkpoints else []))

    def state(self) -> dict[str, Any]:
        """What GET /state tells."""
        now = time.monotonic()
        return {
            "step": self.learner.step_number,
            "loss": self.learner.loss,
            "epoch": self.learner.rows_seen // max(1, sum(len(y) for _, y in self.reader.shards.values())),
            "steps_per_s": self.progress.rate,
            "best_step": self.progress.best,
            "resumed_from_step": self.resumed_from,
            "lost_steps": self.progress.lost_steps,
            "checkpoint_step": self.progress.checkpoint_step,
            "checkpoint_age_s": now - (self.progress.checkpoint_at or self.progress.started_at or now),
            "checkpoints": self.checkpoints,
            "checkpoint_failures": self.checkpoint_failures,
            "checkpoints_skipped": self.shelf.skipped,
            "shards": len(self.reader.shards),
            "bad_shards": len(self.reader.bad),
            "data_reads": self.reader.reads,
            "store_failures": self.data.failures + self.store.failures,
        }

    async def _until_answered(self, work: Callable[[], _T]) -> _T:
        """Do what cannot be done without; the store will be back."""
        while True:
            try:
                return await asyncio.to_thread(work)
            except _STORE_DOWN as error:
                if not self._patient:
                    raise
                self._say(False, f"waiting for the object store: {error}")
                await asyncio.sleep(_AGAIN_S)

    def _begin(self, before: int) -> None:
        progress, step, now = self.progress, self.learner.step_number, time.monotonic()
        progress.lost_steps = max(0, before - step)
        progress.step, progress.checkpoint_step, progress.started_at = step, self.resumed_from, now
        if not self.resumed_from:
            progress.checkpoint_at = 0.0
        progress.checkpoints_skipped, progress.loss = self.shelf.skipped, self.learner.loss
        progress.rate, progress.updated_at, progress.pid = 0.0, now, os.getpid()
        progress.write()

    async def _train(self) -> None:
        due = time.monotonic()
        while True:
            now = time.monotonic()
            if self.reader.usable:
                self.learner.step(tuple(self.reader.shards.values()))
                self._recent.append(now)
                self._say(True, "ok")
            else:
                good, bad = len(self.reader.shards), len(self.reader.bad)
                self._say(False, f"only {good} of {good + bad} shards are good")
            while self._recent and self._recent[0] <= now - 1.0:
                self._recent.popleft()
            progress, step = self.progress, self.learner.step_number
            progress.step, progress.best = step, max(step, progress.best)
            progress.rate, progress.updated_at = float(len(self._recent)), now
            progress.loss, progress.bad_shards = self.learner.loss, len(self.reader.bad)
            progress.store_failures = self.data.failures + self.store.failures
            progress.write()
            due = max(due + _STEP_S, now)  # what a busy machine has kept from us is not made up for
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _read_again(self) -> None:
        while True:
            await asyncio.sleep(_READ_S)
            try:
                await asyncio.to_thread(self.reader.read)
            except _STORE_DOWN:
                if not self._patient:
                    raise
                # Training goes on from memory.

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(_CHECKPOINT_S)
            step, saved_at = self.learner.step_number, time.monotonic()
            state = {**self.learner.state(), "saved_at": np.array(time.time())}
            if step == self.progress.checkpoint_step:
                continue
            try:
                await asyncio.to_thread(self.shelf.save, step, state)
            except _STORE_DOWN:
                if not self._patient:
                    raise
                self.checkpoint_failures += 1
                continue
            self.checkpoints += 1
            self.progress.checkpoint_step, self.progress.checkpoint_at = step, saved_at


async def main(lifeline: Lifeline) -> None:
    """Serve until told to stop."""
    from aiohttp import web
    from prometheus_client import Gauge

    from .service import Service

    service = Service(lifeline)
    config, status = service.config, service.peers.get("training_status", "")
    if status:
        # A pod is whichever worker has none: what its Job knows of it is a random name.
        worker = await asyncio.to_thread(become, status, str(config["token"]), str(config["name"]))
        config |= {"holder": config["name"], "name": worker}
    trainer = Trainer(
        service.config,
        lambda: service.peers.get("object_store", ""),
        lambda ready, reason: (
            None if (ready, reason) == (service.ready, service.reason) else service.set_ready(ready, reason)
        ),
    )
    for name, about in (
        ("step", "Steps done"),
        ("loss", "Smoothed cross entropy"),
        ("steps_per_s", "Steps in the last second"),
        ("lost_steps", "Steps that the last death cost"),
        ("checkpoint_age_s", "Seconds since the last checkpoint"),
        ("bad_shards", "Shards that are set aside"),
        ("store_failures", "Requests to the store that failed"),
    ):
        Gauge(f"training_{name}", about, registry=service.registry).set_function(
            lambda name=name: float(trainer.state()[name])
        )

    async def state(request: web.Request) -> web.Response:
        return web.json_response(trainer.state())

    async def train() -> None:
        await service.peers_known.wait()
        await trainer.run()

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.print_exception(type(error), error, error.__traceback__)
            sys.stderr.flush()
            os._exit(1)  # as a training script ends that does not catch it

    async def started() -> None:
        tasks.append(asyncio.get_running_loop().create_task(train()))
        tasks[0].add_done_callback(ended)

    tasks: list[asyncio.Task[None]] = []
    service.app.router.add_get("/state", state)
    await service.serve(started)
    if isinstance(trainer.progress, RemoteProgress):
        # To its Job a pod is a slice of the training that ends when it is told to go: what is in the last checkpoint is done.
        trainer.progress.leave()
        os._exit(0)
    os._exit(_TERMINATED)  # at once: threads may be waiting for a store that is gone
