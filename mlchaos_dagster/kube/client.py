"""One API server: verbs on JSON objects. The only module that knows the `kubernetes` package.

Objects stay the dictionaries that the API speaks: the package's model classes know one version of it, a cluster has
another, and what they do not know they drop on the way back. Every call is bounded in time; reads are tried again when
the connection broke; calls are limited per second so that a run never crowds out the cluster's own clients.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote, urlencode

from mlchaos_dagster.domain.environment import Kubernetes
from mlchaos_dagster.errors import ConfigError, DriverError, DriverUnavailable
from mlchaos_dagster.kube.objects import items, text

_R = TypeVar("_R")

NAME = "kubernetes"
CALLS_PER_S = 50.0
"""Sustained calls a second of one process. client-go's own default is 5 (kubectl: 50)."""
BURST = 100
_PAGE = 500
_RETRIES = 2
"""Of a connection that broke, 0.1 s and 0.2 s later; longer waits are the caller's, who knows what is at stake."""
_PATCH = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml",
}
_IN_A_NAMESPACE = re.compile(r"(?:/api/v1|/apis/[^/]+/[^/]+)/namespaces/([^/]+)/")
_UPGRADE_S = 15.0
"""Bound of every wait on an exec connection. A runtime without CPU takes seconds to start a command."""
_ALWAYS_THERE = ("/api/v1/", "/apis/apps/v1/", "/apis/batch/v1/", "/apis/coordination.k8s.io/v1/", "/apis/policy/v1/")
"""Paths that exist in every cluster."""
_TLS_WORDS = ("CERTIFICATE_VERIFY_FAILED", "certificate")


class ApiRefused(DriverError):
    """The API server answered, and the answer was no."""

    def __init__(self, message: str, code: int, reason: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code, self.reason, self.retry_after_s = code, reason, retry_after_s


class Conflict(ApiRefused):
    """409: it exists already, or somebody changed it since it was read."""


class Forbidden(ApiRefused):
    """403: a permission is missing; the message holds the RBAC rule to add."""


class Gone(ApiRefused):
    """410: a watch must begin anew."""


class NotFound(ApiRefused):
    """404, of a write. (Reads return None.)"""


@dataclass(frozen=True)
class ExecResult:
    """What a command in a container said."""

    code: int
    """-1 when it was cut off by the time limit, or not even started; `err` says why."""
    out: str
    err: str


@dataclass(frozen=True, order=True)
class Permission:
    """One thing that the API server must allow."""

    verb: str
    resource: str
    """Plural, with the subresource after a slash: `pods/eviction`."""
    namespace: str = ""
    """Empty: of the cluster."""
    group: str = ""

    @property
    def rule(self) -> str:
        """The RBAC rule to add, on one line."""
        return self.rule_of(self.verb)

    def rule_of(self, *verbs: str) -> str:
        """The same for several verbs."""
        where = f"Role in namespace {self.namespace}" if self.namespace else "ClusterRole"
        said = ", ".join(f'"{verb}"' for verb in verbs)
        return f'{where}: {{apiGroups: ["{self.group}"], resources: ["{self.resource}"], verbs: [{said}]}}'


class Cluster:
    """One API server as one identity sees it. Threads may share it.

    Args:
        context: Context of the kubeconfig; empty: the pod's own service account.
        kubeconfig: Path; empty with a context: `KUBECONFIG`, else `~/.kube/config`.
        timeout_s: Bound of one call.

    Raises:
        ConfigError: no such file or context; says which there are.
    """

    def __init__(self, context: str = "", kubeconfig: str = "", *, timeout_s: float = 5.0) -> None:
        self.context, self.kubeconfig, self.timeout_s = context, kubeconfig, timeout_s
        self._configuration = _configuration(context, kubeconfig)
        self._bucket = _Bucket(CALLS_PER_S, BURST)
        self._api: Any = None
        self._lock = threading.Lock()

    # -- reading ----------------------------------------------------------------------------------------------------

    def get(self, path: str, **query: str) -> dict[str, Any] | None:
        """One object, or None when there is none."""
        try:
            return self._json("GET", path, query)
        except NotFound:
            return None

    def get_text(self, path: str, **query: str) -> str:
        """A body as it is: what a pod says through the proxy subresource, a log."""
        response = self._call("GET", path, query)
        try:
            return cast(bytes, response.data).decode(errors="replace")
        finally:
            response.release_conn()

    def list(self, path: str, *, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        """All objects of a collection that match, page by page."""
        return self.list_at(path, labels=labels, fields=fields)[0]

    def list_at(self, path: str, *, labels: str = "", fields: str = "") -> tuple[list[dict[str, Any]], str]:
        """As `list`, and the resource version from which a watch goes on."""
        found: list[dict[str, Any]] = []
        query = {"limit": str(_PAGE), "labelSelector": labels, "fieldSelector": fields}
        while True:
            try:
                page = self._json("GET", path, {k: v for k, v in query.items() if v})
            except NotFound:
                if self._gone_around(path):
                    return [], ""
                raise
            if "items" not in page:  # an answer that is no list would read as: nothing is there
                raise DriverUnavailable(f"{self.server} answers {path} with no list", driver=NAME, verb="list")
            found += items(page, "items")
            query["continue"] = text(page, "metadata", "continue")
            if not query["continue"]:
                return found, text(page, "metadata", "resourceVersion")

    def watch(
        self, path: str, resource_version: str, *, labels: str = "", fields: str = "", timeout_s: float = 60.0
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Changes since `resource_version`: (`ADDED` | `MODIFIED` | `DELETED` | `BOOKMARK`, object), until `timeout_s`.

        Raises:
            Gone: too old; list again.
            DriverUnavailable: the connection broke.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(max(1, int(timeout_s))),
            "labelSelector": labels,
            "fieldSelector": fields,
        }
        response = self._call("GET", path, {k: v for k, v in query.items() if v}, read_s=timeout_s + self.timeout_s)
        rest = b""
        try:
            for chunk in response.stream(amt=None, decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in filter(None, lines):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _refusal(int(event["object"].get("code", 0)), event["object"], "GET", path)
                    yield event["type"], event["object"]
        except DriverError:
            raise
        except Exception as e:
            raise DriverUnavailable(f"the watch on {path} broke: {_first_line(e)}", driver=NAME, verb="watch") from e
        finally:
            response.release_conn()
            response.close()

    # -- writing ----------------------------------------------------------------------------------------------------

    def create(self, path: str, body: Mapping[str, Any], **query: str) -> dict[str, Any]:
        """A new object in a collection (or a subresource such as `…/eviction`). Raises Conflict: it is there already.

        With `dryRun="All"` it is only asked whether it would be taken.
        """
        return self._json("POST", path, query, body)

    def replace(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole object; its `resourceVersion` is the fence. Raises Conflict: somebody changed it."""
        return self._json("PUT", path, {}, body)

    def patch(
        self, path: str, body: Mapping[str, Any] | Sequence[Any], *, how: str = "merge", **query: str
    ) -> dict[str, Any]:
        """A part of an object; `how` is merge, strategic, json or apply. With `metadata.resourceVersion`: fenced."""
        return self._json("PATCH", path, query, body, content_type=_PATCH[how])

    def delete(
        self,
        path: str,
        *,
        uid: str = "",
        resource_version: str = "",
        grace_s: int | None = None,
        propagation: str = "Background",
    ) -> bool:
        """Remove an object; of that uid only. False when it was gone (or is another one by now).

        Raises:
            Conflict: with a resource version, when somebody changed the object since (or replaced it).
        """
        body: dict[str, Any] = {"propagationPolicy": propagation, **_preconditions(uid, resource_version)}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            self._json("DELETE", path, {}, body)
        except NotFound:
            return False
        except Conflict:
            if uid and not resource_version:
                return False
            raise
        return True

    def evict(
        self, namespace: str, name: str, *, uid: str = "", resource_version: str = "", grace_s: int | None = None
    ) -> bool:
        """Through the eviction API, which respects PodDisruptionBudgets. False when it was gone.

        Raises:
            ApiRefused: code 429, a budget does not allow it now.
            Conflict: as `delete`.
        """
        options: dict[str, Any] = _preconditions(uid, resource_version)
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": namespace},
            "deleteOptions": options,
        }
        try:
            self.create(f"/api/v1/namespaces/{namespace}/pods/{name}/eviction", body)
        except NotFound:
            return False
        except Conflict:
            if uid and not resource_version:
                return False
            raise
        return True

    # -- inside pods ------------------------------------------------------------------------------------------------

    def exec(
        self,
        namespace: str,
        pod: str,
        container: str,
        command: Sequence[str],
        *,
        stdin: str = "",
        timeout_s: float = 5.0,
    ) -> ExecResult:
        """Run a command in a container and wait for its end, at most `timeout_s` seconds.

        Raises:
            DriverUnavailable: the node did not answer.
            ApiRefused: there is no such container, or it may not be entered.
        """
        with self.open_exec(namespace, pod, container, command, stdin=bool(stdin)) as stream:
            if stdin:
                stream.write(stdin)
            return stream.finish(timeout_s)

    def open_exec(
        self, namespace: str, pod: str, container: str, command: Sequence[str], *, stdin: bool = False
    ) -> ExecStream:
        """Start a command in a container; its standard input ends when the stream is closed, or we die."""
        from kubernetes.stream import ws_client  # pyright: ignore[reportMissingTypeStubs]

        self._bucket.take()
        path = f"{self.server}/api/v1/namespaces/{quote(namespace)}/pods/{quote(pod)}/exec"
        query = [("command", word) for word in command]
        query += [("stdout", "true"), ("stderr", "true"), ("stdin", "true" if stdin else "false"), ("tty", "false")]
        if container:
            query.append(("container", container))
        headers: dict[str, str] = {}
        try:
            import websocket

            websocket.setdefaulttimeout(_UPGRADE_S)  # it has no other way in; without one it waits for ever
            self._client().update_params_for_auth(headers, [], ["BearerToken"])
            url = cast(Any, ws_client).get_websocket_url(path, query)
            socket = cast(Any, ws_client).WSClient(self._configuration, url, headers, True)
        except Exception as e:
            code = int(getattr(e, "status", 0) or getattr(e, "status_code", 0) or 0)
            if code:
                raise _refusal(code, {"message": _of_upgrade(e)}, "CREATE", f"pods/exec of {namespace}/{pod}") from e
            raise DriverUnavailable(
                f"cannot run a command in {namespace}/{pod}: {_of_upgrade(e)}", driver=NAME, verb="exec"
            ) from e
        return ExecStream(socket, f"{namespace}/{pod}")

    # -- who we are, what we may ------------------------------------------------------------------------------------

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self._configuration.host)

    def version(self) -> tuple[int, int]:
        """Of the API server: (major, minor). Needs no permission beyond being somebody."""
        found = self.get("/version") or {}
        digits = [re.sub(r"\D.*", "", text(found, key)) or "0" for key in ("major", "minor")]
        return int(digits[0]), int(digits[1])

    def identity(self) -> str:
        """What tells this cluster from any other: the uid of its namespace kube-system."""
        found = self.get("/api/v1/namespaces/kube-system")
        if found is None:
            raise DriverUnavailable("the cluster has no namespace kube-system", driver=NAME, verb="identity")
        return str(found["metadata"]["uid"])

    def allowed(self, permission: Permission) -> bool:
        """Ask the API server (SelfSubjectAccessReview)."""
        resource, _, subresource = permission.resource.partition("/")
        attributes = {
            "verb": permission.verb,
            "group": permission.group,
            "resource": resource,
            "subresource": subresource,
            "namespace": permission.namespace,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = self.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        return bool(answer.get("status", {}).get("allowed"))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        with self._lock:
            if self._api is None:
                from kubernetes.client import ApiClient  # pyright: ignore[reportMissingTypeStubs]

                self._api = ApiClient(self._configuration)
            return self._api

    def _json(
        self, method: str, path: str, query: Mapping[str, str], body: Any = None, content_type: str = "application/json"
    ) -> dict[str, Any]:
        try:
            response = self._call(method, path, query, body, content_type)
        except Forbidden as e:
            if namespace := self._gone_around(path):
                raise NotFound(f"namespace {namespace} is gone", 404, "NotFound") from e
            raise
        try:
            found = json.loads(response.data)
        except ValueError:
            found = None
        finally:
            response.release_conn()
        if not isinstance(found, dict):  # the login page of a proxy, say
            said = f"{self.server} answers {method} {path} with no object: is it the API server?"
            raise DriverUnavailable(said, driver=NAME, verb=method.lower())
        return cast("dict[str, Any]", found)

    def _gone_around(self, path: str) -> str:
        """The namespace that a path is in, when there is none of that name; else empty.

        Rights that are bound in a namespace go with it: what was allowed there is refused then, and nothing is there.
        """
        found = _IN_A_NAMESPACE.match(path)
        if found is None:
            return ""
        try:
            self._call("GET", f"/api/v1/namespaces/{found[1]}", {}).release_conn()
        except NotFound:
            return found[1]
        except DriverError:
            pass
        return ""

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Any = None,
        content_type: str = "application/json",
        read_s: float | None = None,
    ) -> Any:
        self._bucket.take()
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            client = self._client()
            client.update_params_for_auth(headers, [], ["BearerToken"])
            pool = client.rest_client.pool_manager
            response = pool.request(
                method,
                self.server + path + (f"?{urlencode(query)}" if query else ""),
                body=None if body is None else json.dumps(body).encode(),
                headers=headers,
                timeout=_timeout(self.timeout_s, read_s or self.timeout_s),
                preload_content=read_s is None,
                retries=_retries(method),
            )
        except Exception as e:
            raise DriverUnavailable(self._words(e), driver=NAME, verb=method.lower()) from e
        if response.status >= 400:
            status = _status_of(response)
            if response.status == 404 and not status.get("reason") and path.startswith(_ALWAYS_THERE):
                # Of these every API server says what is missing. Somebody else's 404 must not read as: it is gone.
                said = f"{self.server} does not know {path}: is it the API server?"
                raise DriverUnavailable(said, driver=NAME, verb=method.lower())
            raise _refusal(response.status, status, method, path, response.headers.get("Retry-After", ""))
        return response

    def _words(self, error: Exception) -> str:
        where = f"the API server {self.server} (context {self.context or 'of this pod'})"
        said = _first_line(error)
        if any(word in said for word in _TLS_WORDS):
            return f"{where} shows a certificate that the kubeconfig does not trust: {said}"
        return f"{where} does not answer: {said}"


@dataclass(frozen=True)
class Site:
    """The cluster, and what the environment says about it."""

    cluster: Cluster
    options: Kubernetes


class ExecStream:
    """A command that runs in a container."""

    def __init__(self, socket: Any, where: str) -> None:
        self._socket, self.where = socket, where

    def __enter__(self) -> ExecStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether the connection stands."""
        return bool(self._socket.is_open())

    def write(self, text: str) -> None:
        """To its standard input. Raises DriverUnavailable: the connection broke."""
        self._attempt(lambda: self._socket.write_stdin(text))

    def read(self, timeout_s: float) -> str:
        """What it has written since, waiting at most `timeout_s` seconds. Raises DriverUnavailable: the connection broke."""
        if self.running:
            self._attempt(lambda: self._socket.update(timeout=timeout_s))
        return self._attempt(
            lambda: str(self._socket.read_stdout(timeout=0) or "") if self._socket.peek_stdout() else ""
        )

    def finish(self, timeout_s: float) -> ExecResult:
        """Wait for its end. Raises DriverUnavailable: the connection broke before it."""
        end = time.monotonic() + timeout_s
        while self.running and time.monotonic() < end:
            left = min(0.5, max(0.0, end - time.monotonic()))
            self._attempt(lambda left=left: self._socket.update(timeout=left))
        if self.running:
            return ExecResult(-1, str(self._socket.read_all() or ""), "it did not end in time")
        status = self._socket.read_channel(3)
        err = str(self._socket.read_stderr(timeout=0) or "")
        out = str(self._socket.read_stdout(timeout=0) or "")
        if not status:
            raise DriverUnavailable(f"the command in {self.where} broke off", driver=NAME, verb="exec")
        code = _exit_code(status)
        return ExecResult(code, out, err or ("" if code >= 0 else _why(status)))

    def _attempt(self, call: Callable[[], _R]) -> _R:
        try:
            return call()
        except Exception as e:
            said = f"the command in {self.where} broke off: {_first_line(e)}"
            raise DriverUnavailable(said, driver=NAME, verb="exec") from e

    def close(self) -> None:
        """End its standard input and the connection."""
        self._socket.close()
        self._socket.sock.shutdown()  # a connection that the other end closed keeps its descriptor otherwise


class _Bucket:
    """Token bucket: so many calls a second on average, so many at once."""

    def __init__(self, per_s: float, burst: int) -> None:
        self.per_s, self.burst = per_s, burst
        self._left, self._at = float(burst), time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> None:
        """Wait for one call's turn."""
        with self._lock:
            now = time.monotonic()
            self._left = min(self.burst, self._left + (now - self._at) * self.per_s) - 1
            self._at = now
            wait = -self._left / self.per_s
        if wait > 0:
            time.sleep(wait)


def contexts(kubeconfig: str = "") -> list[str]:
    """Names of the contexts of a kubeconfig. Raises ConfigError: it cannot be read."""
    from kubernetes.config import kube_config  # pyright: ignore[reportMissingTypeStubs]

    try:
        found, _ = cast(Any, kube_config).list_kube_config_contexts(config_file=kubeconfig or None)
    except Exception as e:
        raise ConfigError(f"kubeconfig {kubeconfig or 'of this user'}: {_first_line(e)}") from e
    return [str(c["name"]) for c in found]


def _configuration(context: str, kubeconfig: str) -> Any:
    from kubernetes import client, config  # pyright: ignore[reportMissingTypeStubs]
    from kubernetes.config.config_exception import ConfigException  # pyright: ignore[reportMissingTypeStubs]

    configuration: Any = client.Configuration()
    if kubeconfig and not Path(kubeconfig).is_file():
        raise ConfigError(f"kubeconfig: there is no file {kubeconfig}")
    try:
        if context:
            cast(Any, config).load_kube_config(
                config_file=kubeconfig or None,
                context=context,
                client_configuration=configuration,
                persist_config=False,
            )
        else:
            cast(Any, config).load_incluster_config(client_configuration=configuration)
    except ConfigException as e:
        if not context:
            raise ConfigError("no context is named, and this is no pod: kubernetes.context is needed") from e
        try:
            there = ", ".join(contexts(kubeconfig))
        except ConfigError as other:
            raise other from e
        if context in there.split(", "):
            raise ConfigError(f"context {context} of the kubeconfig cannot be used: {_first_line(e)}") from e
        raise ConfigError(f'the kubeconfig has no context "{context}". Allowed: {there or "(it has none)"}') from e
    except Exception as e:  # a file that is no YAML, a key that is not there
        raise ConfigError(f"kubeconfig {kubeconfig or 'of this user'} cannot be read: {_first_line(e)}") from e
    configuration.connection_pool_maxsize = 32
    configuration.socket_options = _keepalive()
    configuration.retries = False
    return configuration


def _keepalive() -> list[tuple[int, int, int]]:
    """A watch whose server is gone without a word would wait for hours: after 6 s without an answer it breaks."""
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3)):
        if (option := getattr(socket, name, None)) is not None:  # not on every system
            options.append((socket.IPPROTO_TCP, option, value))
    return options


def _timeout(connect_s: float, read_s: float) -> Any:
    from urllib3.util import Timeout

    return Timeout(connect=min(2.0, connect_s), read=read_s)


def _retries(method: str) -> Any:
    """A read may be sent again; a write only when it cannot have arrived."""
    from urllib3.util import Retry

    return Retry(
        total=_RETRIES,
        connect=_RETRIES,
        read=_RETRIES if method == "GET" else 0,
        status=0,
        redirect=0,
        backoff_factor=0.1,
    )


def _status_of(response: Any) -> dict[str, Any]:
    raw: bytes = b""
    try:
        raw = response.data or response.read()
        found = json.loads(raw)
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {"message": str(found)}
    except Exception:  # noqa: BLE001  a proxy's page instead of an answer
        return {"message": raw.decode(errors="replace")[:200]}


def _refusal(code: int, status: Mapping[str, Any], method: str, path: str, retry_after: str = "") -> ApiRefused:
    message = " ".join(str(status.get("message") or "no reason given").split())
    reason = str(status.get("reason") or "")
    wait = float(retry_after) if retry_after.isdigit() else 0.0
    if code == 401:
        return ApiRefused(
            "the API server does not accept the credentials of the kubeconfig (401): expired, or of another cluster",
            code,
            reason,
        )
    if code == 403:
        return Forbidden(f"not allowed: {message}", code, reason)
    kinds = {404: NotFound, 409: Conflict, 410: Gone}
    return kinds.get(code, ApiRefused)(f"{method} {path}: {message} ({code})", code, reason, wait)


def _preconditions(uid: str, resource_version: str) -> dict[str, Any]:
    wanted = {"uid": uid, "resourceVersion": resource_version}
    return {"preconditions": found} if (found := {k: v for k, v in wanted.items() if v}) else {}


def _exit_code(status: str) -> int:
    """Exit status of a command, from the message of the error channel."""
    try:
        found = json.loads(status)
    except ValueError:
        return -1
    if found.get("status") == "Success":
        return 0
    for cause in items(found, "details", "causes"):
        if cause.get("reason") == "ExitCode":
            return int(cause.get("message", -1))
    return -1


def _why(status: str) -> str:
    """Why a command was not even started."""
    try:
        return str(json.loads(status).get("message") or status)
    except ValueError:
        return status


def _of_upgrade(error: Exception) -> str:
    """Why no command was started: what the server said, without the command itself in the address (it is a program)."""
    try:
        said = str(json.loads(getattr(error, "resp_body", b"") or b"")["message"])
    except (ValueError, KeyError, TypeError):
        said = _first_line(error).partition(" -+-+- ")[0]
    return re.sub(r"\?[^\s\"'?]*command=[^\s\"']*", "", said)[:300]


def _first_line(error: BaseException) -> str:
    """The root of what went wrong, in one line."""
    while isinstance(root := error.__cause__ or getattr(error, "reason", None), BaseException):
        error = root
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
