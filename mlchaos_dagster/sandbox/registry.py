"""The model registry: versions of one model in the bucket ``models``, and which of them was promoted.

    prediction/versions/<version>/model.bin   the artifact        prediction/versions/<version>/card.json   see ``model``
    prediction/current.json                   {"version", "previous", "promoted_by"}: what people and pipelines promote
    prediction/golden.json                    {"rows", "scores", "tolerance"}: what any version must answer

``RegistryClient`` is how replicas and the rollout read it: through their own links, so that a fault on the store is felt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from .s3 import S3, S3Error, S3Unavailable

BUCKET = "models"
PREFIX = "prediction"
CURRENT = f"{PREFIX}/current.json"
GOLDEN = f"{PREFIX}/golden.json"

_Result = TypeVar("_Result")


class RegistryUnavailable(Exception):
    """The registry did not answer, or not with what it should have; what is served goes on."""


def artifact_key(version: str) -> str:
    """Where a version's artifact is."""
    return f"{PREFIX}/versions/{version}/model.bin"


def card_key(version: str) -> str:
    """Where a version's card is."""
    return f"{PREFIX}/versions/{version}/card.json"


class RegistryClient:
    """Calls to the registry, each in a thread. ``url`` says where the store is now."""

    def __init__(self, url: Callable[[], str], token: str) -> None:
        self._s3 = S3(url, token, tries=2, timeout_s=1.0)

    async def artifact(self, version: str) -> bytes:
        """A version's bytes. Raises RegistryUnavailable."""
        return await self._call(self._s3.get, BUCKET, artifact_key(version))

    async def card(self, version: str) -> dict[str, Any]:
        """A version's card. Raises RegistryUnavailable."""
        return await self._json(card_key(version))

    async def current(self) -> dict[str, Any] | None:
        """What was promoted; None when nothing ever was. Raises RegistryUnavailable."""
        return await self._if_there(CURRENT)

    async def golden(self) -> dict[str, Any] | None:
        """What any version must answer; None when nobody said so yet. Raises RegistryUnavailable."""
        return await self._if_there(GOLDEN)

    async def _if_there(self, key: str) -> dict[str, Any] | None:
        try:
            return await self._json(key)
        except RegistryUnavailable as error:
            if isinstance(error.__cause__, S3Error) and error.__cause__.status == 404:
                return None
            raise

    async def publish(self, artifact: bytes, card: dict[str, Any]) -> None:
        """Store a version; it serves nobody until it is promoted. Raises RegistryUnavailable."""
        await self._call(self._s3.put, BUCKET, artifact_key(card["version"]), artifact)
        await self._call(self._s3.put, BUCKET, card_key(card["version"]), json.dumps(card).encode())

    async def write(self, key: str, value: dict[str, Any]) -> None:
        """Store a JSON object. Raises RegistryUnavailable."""
        await self._call(self._s3.put, BUCKET, key, json.dumps(value).encode())

    async def _json(self, key: str) -> dict[str, Any]:
        content = await self._call(self._s3.get, BUCKET, key)
        try:
            value = json.loads(content)
        except ValueError as error:
            raise RegistryUnavailable(f"{key} is not JSON") from error
        if not isinstance(value, dict):
            raise RegistryUnavailable(f"{key} is not a JSON object")
        return value

    async def _call(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)
        except (S3Error, S3Unavailable) as error:
            raise RegistryUnavailable(str(error)) from error
