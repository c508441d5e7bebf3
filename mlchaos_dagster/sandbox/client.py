"""The control API as Python calls: synchronous, standard library only, every call bounded by two seconds."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .config import SandboxRefused, SandboxUnavailable

CALL_TIMEOUT_S = 2.0


def read_state(directory: Path | str) -> dict[str, Any] | None:
    """The sandbox's state file; None when there is none (or half a one)."""
    try:
        state = json.loads((Path(directory) / "state.json").read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "control_url" in state and "token" in state else None


class SandboxClient:
    """Talks to the sandbox in ``directory``; reads the state file at each call, so that it survives down and up."""

    def __init__(self, directory: Path | str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.directory = Path(directory)
        self._timeout_s = timeout_s

    def status(self) -> dict[str, Any]:
        """Processes, links, mechanisms and faults, read from the processes themselves."""
        return self._call("GET", "/status")

    def signals(self) -> dict[str, float]:
        """Ready and running replicas and restarts, as the supervisor knows them at this moment."""
        return self._call("GET", "/signals")

    def faults(self) -> list[dict[str, Any]]:
        """The faults present now.

        Raises:
            SandboxUnavailable: also when one of the proxies did not answer: then nobody knows.
        """
        answer = self._call("GET", "/faults")
        if answer["unanswered"]:
            raise SandboxUnavailable(f"no answer from {', '.join(answer['unanswered'])}: its faults are not known")
        return answer["faults"]

    def add_fault(
        self,
        *,
        lease_id: str,
        token: int,
        kind: str,
        target: str,
        deadline_s: float,
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Inject; the same lease, target and kind again changes nothing. Returns the fault as seen at its target.

        Raises:
            SandboxRefused: bad input (400), fenced or removed lease (409), not possible now (503): nothing is in force.
            SandboxUnavailable: no answer; the fault may be in force, so remove the lease.
        """
        body = {
            "lease_id": lease_id,
            "token": token,
            "kind": kind,
            "target": target,
            "params": dict(params or {}),
            "deadline_s": deadline_s,
        }
        # Killing and confirming may take its time; two seconds of silence is still the bound.
        return self._call("POST", "/faults", body)

    def fault_targets(self, kind: str) -> list[str]:
        """The processes that a kind with a handler of its own can be put on now."""
        return self._call("GET", f"/targets?kind={quote(kind)}")["targets"]

    def remove_fault(self, lease_id: str) -> dict[str, Any]:
        """Take away everything of a lease and fence it for ever; safe to repeat, and for unknown leases."""
        return self._call("DELETE", f"/faults/{quote(lease_id, safe='')}")

    def scale(self, replicas: int) -> dict[str, Any]:
        """Set the number of inference replicas."""
        return self._call("PUT", "/scale", {"replicas": replicas})

    def start_parts(self, parts: Iterable[str]) -> list[str]:
        """Bring parts of the platform up, with what they require; readiness follows. All parts there are."""
        return self._call("PUT", "/parts", {"parts": list(parts)})["parts"]

    def requests(self, window_s: float) -> dict[str, Any]:
        """Gateway requests of the last ``window_s`` seconds: ``{total, bad, window_s, covered_s, age_s}``."""
        return self._call("GET", f"/requests?window_s={window_s:g}")

    def shutdown(self) -> dict[str, Any]:
        """Ask the supervisor to take everything down; returns before it has."""
        return self._call("POST", "/shutdown", {})

    def gateway_state(self) -> dict[str, Any]:
        """The gateway's own account of its mechanisms (breaker, fallback, rotation)."""
        url = self._state().get("gateway_url")
        if not url:
            raise SandboxUnavailable("the gateway has no port yet")
        return _request(url, "GET", "/state", None, {}, self._timeout_s)

    def link_round_trip(self, link: str, timeout_s: float = 1.0) -> float | None:
        """Seconds that GET /healthz takes through the link's proxy; None when nothing came back in time."""
        began = time.perf_counter()
        return None if self.link_status(link, timeout_s) is None else time.perf_counter() - began

    def link_status(self, link: str, timeout_s: float = 1.0) -> int | None:
        """HTTP status of GET /healthz through the link's proxy, whatever it is; None when nothing came back in time."""
        port = self._state().get("link_ports", {}).get(link)
        if port is None:
            raise SandboxUnavailable(f"no link {link!r}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        try:
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            response.read()
            return response.status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _state(self) -> dict[str, Any]:
        state = read_state(self.directory)
        if state is None:
            raise SandboxUnavailable(f"no sandbox is up in {self.directory}")
        return state

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        state = self._state()
        return _request(state["control_url"], method, path, body, {"X-Sandbox-Token": state["token"]}, self._timeout_s)


def _request(url: str, method: str, path: str, body: Any, headers: dict[str, str], timeout_s: float) -> Any:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout_s)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SandboxUnavailable(f"{method} {url}{path}: {error or type(error).__name__}") from error
    finally:
        connection.close()
    if response.status >= 400:
        raise SandboxRefused(str(answer.get("error", answer)), response.status)
    return answer
