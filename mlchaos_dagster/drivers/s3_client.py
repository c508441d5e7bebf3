"""How the drivers reach an S3 API: address and credentials from references, bounded calls, work on many objects at once.

A place is what a lease may store of an `S3Location`: references to credentials, never the credentials. boto3 is imported
when the first client is opened: `mlchaos stop` must not pay for it.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlchaos_dagster.domain.environment import S3Location
from mlchaos_dagster.engine.ports import Step
from mlchaos_dagster.errors import ConfigError, DriverError, DriverUnavailable, MlChaosError
from mlchaos_dagster.sandbox import api
from mlchaos_dagster.sandbox.client import read_state
from mlchaos_dagster.settings import resolved

SANDBOX_STORE = "{object_store}"
"""The endpoint that stands for the sandbox's own store."""
CONNECT_S, READ_S, ATTEMPTS = 2.0, 5.0, 2
"""Bounds of one request."""
WORKERS = 8
"""Requests in flight: eight hide the round trip of a remote store, and a local one on two cores is busy with fewer."""
STEP_S = 0.2
"""Longest time between two steps; callers promise half a second."""
_DYING_S = 1.0
"""Processes of a killed sandbox are gone within milliseconds; a busy machine may take longer."""
_MAKING = threading.Lock()
"""boto3 makes clients in one thread at a time only; made, they may be shared."""
_WORKER = threading.local()
"""In threads of `in_parallel`: `cancel`, the event that says that nobody waits for a result any more."""
_T = TypeVar("_T")
_R = TypeVar("_R")


def place_of(s3: S3Location, sandbox: Path) -> dict[str, Any]:
    """What a lease stores of a location; of a store that lives and dies with the sandbox also whose it is.

    A sandbox that keeps its objects at an endpoint of somebody else stands for that endpoint: they outlive it.

    Raises:
        DriverError: credentials are written out instead of referenced.
        DriverUnavailable: it is the sandbox's store, and no sandbox with one is up.
    """
    for name in ("access_key", "secret_key"):
        value = str(getattr(s3, name))
        if value and not value.startswith(("env:", "file:")):
            raise DriverError(f"s3.{name} must be a reference: env:NAME or file:PATH (leases and records keep it)")
    place = s3.model_dump()
    if s3.endpoint == SANDBOX_STORE:
        state = read_state(sandbox)
        if state is None or not api.is_alive(sandbox):
            raise DriverUnavailable(f"no sandbox is up in {sandbox}")
        _sandbox_store(sandbox)
        if kept := _object_store_of(state):
            place |= {"endpoint": kept["endpoint"], "region": kept.get("region") or s3.region}
            place |= {name: place[name] or kept[name] for name in ("access_key", "secret_key")}
        else:
            supervisor = {"pid": state["pid"], "create_time": state["create_time"]}
            place["sandbox"] = {"directory": str(sandbox.resolve()), "supervisor": supervisor}
    url = urlsplit(str(place["endpoint"]))
    if url.username or url.password or url.query:
        raise DriverError("the endpoint of the store carries a user name, a password or a query: leases keep it")
    return place


def sandbox_is_another(place: Mapping[str, Any]) -> bool:
    """Whether the sandbox that is up now in the place's directory was started after the place was recorded."""
    if "sandbox" not in place:
        return False
    state = read_state(place["sandbox"]["directory"]) or {}
    return {name: state.get(name) for name in ("pid", "create_time")} != place["sandbox"]["supervisor"]


def vanished(place: Mapping[str, Any]) -> str:
    """Why nothing of ours can be at the place any more: the sandbox, whose objects live in memory, is gone. Else empty.

    Waits a moment for processes that are dying.
    """
    if "sandbox" not in place:
        return ""
    directory, pid = place["sandbox"]["directory"], place["sandbox"]["supervisor"]["pid"]
    end = time.monotonic() + _DYING_S
    while not api.is_alive(directory) and (left := api.remains(directory)) and time.monotonic() < end:
        time.sleep(0.02)
    if not api.is_alive(directory):
        left = api.remains(directory)
        said = f"supervisor pid {pid} is gone and no process of the sandbox in {directory} is left"
        return "" if left else f"{said}: its objects were in memory, no fault can be there"
    if sandbox_is_another(place) and not (read_state(directory) or {}).get("object_store"):
        return f"another sandbox than then (supervisor pid {pid}) is up in {directory}, without an object store"
    return ""


@contextlib.contextmanager
def opened(place: Mapping[str, Any]) -> Generator[Any, None, None]:
    """A boto3 client for the place, closed at the end. Thread-safe; each request is bounded to about 14 seconds.

    Raises:
        ConfigError: a reference to a credential leads nowhere.
        DriverUnavailable: the sandbox has no store.
    """
    endpoint, access, secret = place["endpoint"], place["access_key"], place["secret_key"]
    if endpoint == SANDBOX_STORE:
        store = _sandbox_store(Path(place["sandbox"]["directory"]))
        endpoint = store["url"]
        access, secret = access or store["access_key"], secret or store["secret_key"]
    # Path style wherever it is not AWS: `bucket.localhost` is no host. Checksums of the newer SDKs are not known to all
    # stores; contents are compared by SHA-256 anyway.
    config = _botocore("config").Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        max_pool_connections=WORKERS,
        s3={"addressing_style": "auto" if "amazonaws.com" in endpoint else "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    keys = {"aws_access_key_id": resolved(access), "aws_secret_access_key": resolved(secret)} if access else {}
    with _MAKING:
        client = _session().client("s3", endpoint_url=endpoint, region_name=place["region"], config=config, **keys)
    client.meta.events.register_first("before-send.s3", _before_send)
    try:
        yield client
    finally:
        client.close()


def tell_unanswered(client: Any, note: Callable[[], None]) -> None:
    """Have `note` called for every PUT of this client that was sent and not answered, also where the next try was."""

    def look(response: Any = None, caught_exception: Exception | None = None, **_: Any) -> None:
        if caught_exception is not None and not isinstance(caught_exception, Cancelled):
            note()

    client.meta.events.register_first("needs-retry.s3.PutObject", look)


@contextlib.contextmanager
def told(kind: type[DriverError], place: Mapping[str, Any], **where: str) -> Generator[None, None, None]:
    """Let the store's failures out as `kind`, in one line that says which store and what it said."""
    failures = (*client_errors(), ConfigError)
    try:
        yield
    except failures as e:
        raise kind(f"s3://{place['bucket']} at {place['endpoint']}: {words(e)}", **where) from e


def client_errors() -> tuple[type[Exception], type[Exception]]:
    """(ClientError: the store answered no; BotoCoreError: it did not answer, or was never asked)."""
    exceptions = _botocore("exceptions")
    return exceptions.ClientError, exceptions.BotoCoreError


def code_of(error: Exception) -> str:
    """The store's word for what went wrong (`NoSuchKey`, `412`); empty when it did not answer."""
    response: Mapping[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def words(error: Exception) -> str:
    """The failure in a line."""
    response: Mapping[str, Any] = getattr(error, "response", None) or {}
    said = response.get("Error", {})
    code, message = str(said.get("Code", "")), str(said.get("Message", ""))
    if not code:
        return " ".join(str(error).split())
    # The reply to HEAD has no body, so all there is is a number.
    plain = {"404": "there is no such bucket or object", "403": "access denied", "400": "bad request"}
    return plain.get(code) or f"{code}: {' '.join(message.split())}"


def in_parallel(work: Callable[[_T], _R], items: Iterable[_T], total: int, step: Step) -> list[_R]:
    """`work` on every item with a few threads; results in order of completion.

    Calls `step` at once and then at least every `STEP_S` seconds, from the calling thread. At the first exception, of a
    `work` or of `step`, nothing more is begun, no further request is sent, and it is raised when all that was in flight
    has ended. Until then `step` is called on: whoever waits for a store that hangs still lives. What it says then is
    raised at the end instead.
    """
    results: list[_R] = []
    feed, waiting, cancel = iter(items), set[Future[_R]](), threading.Event()

    def cancellable(item: _T) -> _R:
        _WORKER.cancel = cancel
        try:
            go_on()
            return work(item)
        finally:
            _WORKER.cancel = None

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="s3") as pool:
        try:
            step(0, total)
            looked = time.monotonic()
            while True:
                # Only a few ahead: ten thousand items must not become ten thousand futures.
                waiting |= {pool.submit(cancellable, item) for item in islice(feed, 2 * WORKERS - len(waiting))}
                if not waiting:
                    break
                finished, waiting = wait(waiting, timeout=STEP_S, return_when=FIRST_COMPLETED)
                results += [future.result() for future in finished]
                if time.monotonic() - looked >= STEP_S:
                    step(len(results), total)
                    looked = time.monotonic()
            step(len(results), total)
        except BaseException as e:
            cancel.set()
            said = _drained(waiting, lambda: step(len(results), total))
            if said is not None and isinstance(e, Exception) and not isinstance(e, type(said)):
                raise said from e
            raise
    return results


class Cancelled(Exception):
    """Nobody waits for the result of this thread any more; never leaves `in_parallel`."""


def go_on() -> None:
    """Called between requests and between chunks of a body. Raises Cancelled."""
    cancel: threading.Event | None = getattr(_WORKER, "cancel", None)
    if cancel is not None and cancel.is_set():
        raise Cancelled


def _drained(waiting: set[Future[_R]], step: Callable[[], None]) -> MlChaosError | None:
    """Wait for all; `step` meanwhile, whatever it says: the first is returned."""
    said: MlChaosError | None = None
    waiting = {future for future in waiting if not future.cancel()}
    while waiting:
        _, waiting = wait(waiting, timeout=STEP_S)
        if waiting:
            try:
                step()
            except MlChaosError as e:
                said = said or e
    return said


def beside(work: Callable[[], _R], step: Step) -> _R:
    """One piece of work of a few seconds, with `step` called meanwhile; see `in_parallel`."""
    return in_parallel(lambda _: work(), (None,), 1, lambda done, total: step(0, 0))[0]


def _before_send(**_: Any) -> None:
    go_on()


def _object_store_of(state: Mapping[str, Any]) -> dict[str, str]:
    """The endpoint and the references that a sandbox was configured with; empty: it keeps objects in memory."""
    config: Mapping[str, Any] = state.get("config") or {}
    return config.get("object_store") or {}


def _sandbox_store(directory: Path) -> dict[str, str]:
    store = (read_state(directory) or {}).get("object_store")
    if not store:
        raise DriverUnavailable(f"the sandbox in {directory} has no object store")
    return store


@lru_cache(maxsize=1)
def _session() -> Any:
    return importlib.import_module("boto3").Session()


def _botocore(module: str) -> Any:
    return importlib.import_module(f"botocore.{module}")
