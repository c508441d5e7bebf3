"""A worker's view of its training data: shards read from the store again and again, and checked against the manifest."""

from __future__ import annotations

from .learner import Shard
from .s3 import S3, S3Error, S3Unavailable
from .training_data import BUCKET, MANIFEST, BadShard, check, manifest, parse


class ShardReader:
    """Reads the shards of one worker. Blocking; one thread at a time."""

    def __init__(self, s3: S3, worker: int, workers: int, validate: bool) -> None:
        self._s3 = s3
        self._worker, self._workers, self._validate = worker, workers, validate
        self._told: dict[str, dict[str, object]] = {}
        self.shards: dict[str, Shard] = {}
        """Key → content of those that are good, as they were when they could last be read."""
        self.bad: dict[str, str] = {}
        """Key → what is wrong with it."""
        self.reads = 0

    @property
    def usable(self) -> bool:
        """At least half of the shards are good: with fewer, the model would learn something else."""
        return bool(self.shards) and len(self.shards) >= (len(self.shards) + len(self.bad)) / 2

    def read(self) -> None:
        """Read every shard once more.

        Raises:
            BadShard: without validation: what was read cannot be parsed.
            S3Error, S3Unavailable: the store was not reached; shards that were not read are those from before.
        """
        for key in self._keys():
            try:
                content = self._s3.get(BUCKET, key)
                self.reads += 1
                if self._validate:
                    check(content, self._told[key])
                # New dictionaries each time: the training loop goes through them meanwhile.
                self.shards = {**self.shards, key: parse(content)}
                self.bad = {name: why for name, why in self.bad.items() if name != key}
            except S3Error as error:
                if error.status != 404:
                    raise
                self._set_aside(key, "it is not there")
            except BadShard as error:
                if not self._validate:
                    raise BadShard(f"{key}: {error}") from error
                self._set_aside(key, str(error))

    def _set_aside(self, key: str, why: str) -> None:
        self.bad = {**self.bad, key: why}
        self.shards = {name: shard for name, shard in self.shards.items() if name != key}

    def _keys(self) -> list[str]:
        """The shards of worker k of n: every n-th, beginning with the k-th."""
        if not self._validate:
            return self._s3.keys(BUCKET, "shards/")[self._worker :: self._workers]
        try:
            self._told = manifest(self._s3.get(BUCKET, MANIFEST))
        except BadShard as error:
            if not self._told:  # the one from before is as good as ever
                raise S3Unavailable(str(error)) from error
        return sorted(self._told)[self._worker :: self._workers]
