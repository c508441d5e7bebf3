"""An independent observer: shares no code with drivers, probes, ledger or sandbox.

It looks from outside, at sockets, process ids and the platform's truth log, and says what is really
wrong. The only thing it takes from the platform is where its doors are (`state.json`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import ssl
import statistics
import time
import urllib.request
from pathlib import Path
from typing import Any

SLOW_S = 0.25
"""A healthy link answers in a few milliseconds; a loaded machine may need fifty times that."""


def answer_time(port: int, path: str = "/healthz", timeout_s: float = SLOW_S) -> float | None:
    """Seconds to a 200 on a loopback port, over a bare socket; None when there is none in time."""
    begun = time.perf_counter()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as s:
            s.settimeout(timeout_s)
            s.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            head = s.recv(64)
    except OSError:
        return None
    took = time.perf_counter() - begun
    return took if b" 200 " in head.split(b"\r\n")[0] + b" " and took <= timeout_s else None


def throttles(port: int) -> bool:
    """Whether one of ten requests over a bare socket is answered 503: that is a share, not an answer time."""
    for _ in range(10):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=SLOW_S) as s:
                s.settimeout(SLOW_S)
                s.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if b" 503 " in s.recv(64).split(b"\r\n")[0]:
                    return True
        except OSError:
            return False  # no answer at all is somebody else's word
    return False


def alive(pid: int) -> bool:
    """Whether a process runs (zombies do not)."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True


class Observer:
    """What is wrong with one sandbox, seen from outside."""

    def __init__(self, sandbox: Path) -> None:
        self.sandbox = sandbox
        self.last_state: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """The doors; remembered, because a killed supervisor leaves the file or takes it along."""
        try:
            self.last_state = json.loads((self.sandbox / "state.json").read_text())
        except (OSError, ValueError):
            pass
        return self.last_state

    def truth(self) -> list[dict[str, Any]]:
        """The truth log."""
        try:
            lines = (self.sandbox / "truth.jsonl").read_text().splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def live_faults(self) -> set[tuple[str, str]]:
        """(lease, target) that the truth log saw begin and not end; a new supervisor starts clean."""
        live: set[tuple[str, str]] = set()
        for event in self.truth():
            key = (event.get("lease") or "", event.get("who") or "")
            if event["what"] == "supervisor_started":
                live.clear()
            elif event["what"] == "fault_added":
                live.add(key)
            elif event["what"] in ("fault_removed", "fault_expired"):
                live.discard(key)
        return live

    def bad_links(self) -> list[str]:
        """Links that do not answer quickly, three times in a row (one slow answer is a busy machine)."""
        found = []
        for name, port in self.state().get("link_ports", {}).items():
            if all(answer_time(port) is None for _ in range(3)):
                found.append(name)
        return found

    def throttled_links(self) -> list[str]:
        """Links to a store that answer in its place."""
        links = self.state().get("link_ports", {})
        return [name for name, port in links.items() if name.endswith("->object-store") and throttles(port)]

    def platform_gone(self) -> bool:
        """Neither the supervisor nor any of its children runs."""
        state = self.state()
        pids = [state.get("pid", 0), *(c["pid"] for c in state.get("children", {}).values())]
        return not any(alive(p) for p in pids if p)

    def marked_objects(self) -> list[str]:
        """Object versions that say whose fault they are, asked of the store by plain boto3."""
        store = self.state().get("object_store")
        if not store or self.platform_gone():
            return []
        import boto3

        keys = {"aws_access_key_id": store["access_key"], "aws_secret_access_key": store["secret_key"]}
        client = boto3.client("s3", endpoint_url=store["url"], region_name="us-east-1", **keys)
        found = []
        try:
            for bucket in client.list_buckets()["Buckets"]:
                if bucket["Name"] == "checkpoints":
                    continue  # hundreds of versions that trainers wrote; no fault is put there
                for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket["Name"]):
                    for version in page.get("Versions", []):
                        key, number = version["Key"], version["VersionId"]
                        if key.startswith(("trainer-", "worker-")):
                            continue  # a trainer's checkpoints come and go by themselves
                        head = client.head_object(Bucket=bucket["Name"], Key=key, VersionId=number)
                        if any("mlchaos" in name for name in head["Metadata"]):
                            found.append(f"object s3://{bucket['Name']}/{key} version {number} carries a lease")
        except Exception as e:  # noqa: BLE001  unknown is not clean
            return [] if self.platform_gone() else [f"the object store does not say: {type(e).__name__}"]
        finally:
            client.close()
        return found

    def damaged_files(self) -> list[str]:
        """Files that stay when the platform goes: the model that replicas start with."""
        model, card = self.sandbox / "model" / "model.bin", self.sandbox / "model" / "model.json"
        if not card.exists():
            return []
        digest = hashlib.sha256(model.read_bytes()).hexdigest() if model.exists() else "no file"
        return [] if digest == json.loads(card.read_text())["sha256"] else [f"{model.name} is not the one on its card"]

    def damaged_features(self) -> list[str]:
        """What is wrong with the rows of the feature store, read with plain SQL; the file stays when the platform goes."""
        path = self.sandbox / "data" / "features.sqlite"
        if not path.exists():
            return []
        try:
            with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
                found = [
                    f"{kind} {name} is in {path.name}"
                    for kind, name in database.execute("SELECT type, name FROM sqlite_master")
                    if name not in ("features", "source", "schema", "made")
                ]
                expected = database.execute("SELECT mean, std FROM schema ORDER BY feature").fetchall()
                for table in ("source", "features"):
                    rows = [json.loads(text) for (text,) in database.execute(f"SELECT vector FROM {table}")]
                    if nulls := sum(None in row for row in rows):
                        found.append(f"{nulls} rows of {table} have nulls")
                    elif any(
                        abs(statistics.fmean(column) - mean) > 0.01 * std
                        for column, (mean, std) in zip(zip(*rows, strict=True), expected, strict=True)
                    ):
                        found.append(f"the rows of {table} are not where their schema says")
                oldest = time.time() - database.execute("SELECT min(updated_at) FROM features").fetchone()[0]
        except sqlite3.Error as e:
            return [f"{path.name} does not say: {e}"]
        writer = self.state().get("children", {}).get("feature-writer")
        if writer and alive(writer["pid"]) and oldest > 600:
            found.append(f"a row was refreshed {oldest:.0f} s ago")
        return found

    def damaged_databases(self) -> list[str]:
        """What SQLite itself says of the tracking server's databases; the files stay when the platform goes."""
        found = []
        for path in sorted((self.sandbox / "data").glob("tracking-db*.sqlite")):
            try:
                with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as database:
                    said = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
            except sqlite3.Error as e:
                said = str(e)
            if said != "ok":
                found.append(f"{path.name}: {said.splitlines()[-1]}")
        return found

    def strangers(self) -> list[str]:
        """Processes of this sandbox that only a fault starts (submitters of jobs, burners), by their command line."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            ours = str(self.sandbox.resolve()).encode() in words
            name = next((word for word in words if word.startswith((b"submitter-", b"burner-"))), b"")
            if ours and name and alive(int(entry.parent.name)):
                found.append(f"{name.decode()} pid {entry.parent.name}")
        return found

    def edge(self) -> list[str]:
        """What a rotation or an isolation may have left, by plain TLS, plain HTTP and the files themselves."""
        where = self.state().get("edge")
        if not where:
            return []
        found = []
        accepted = json.loads((self.sandbox / "edge" / "accepted.json").read_text())
        secret = Path(where["credential_file"]).read_text().strip()
        if [one["sha256"] for one in accepted] != [hashlib.sha256(secret.encode()).hexdigest()]:
            found.append(f"{len(accepted)} credentials are accepted, or clients have another one")
        host, port = where["url"].removeprefix("https://").split(":")
        context = ssl.create_default_context(cafile=where["ca"])
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        try:
            with socket.create_connection((host, int(port)), timeout=1) as bare:
                with context.wrap_socket(bare, server_hostname=host) as s:
                    s.sendall(f"GET /whoami HTTP/1.1\r\nHost: x\r\nAuthorization: {secret}\r\n\r\n".encode())
                    if b" 200 " not in s.recv(64).split(b"\r\n")[0]:
                        found.append("the edge refuses the credential that clients have")
                    served = ssl.DER_cert_to_PEM_cert(s.getpeercert(binary_form=True) or b"")
        except OSError as e:
            return found if self.platform_gone() else [*found, f"no TLS with the edge: {e}"]
        own = (self.sandbox / "edge" / "server.pem").read_text()
        if served.split("\n")[1:-2] != own[own.index("-----BEGIN CERT") :].strip().split("\n")[1:-1]:
            found.append("the edge serves another certificate than the one on disk")
        before = hashlib.sha256(b"").hexdigest()
        log = self.sandbox / "audit.jsonl"
        for number, line in enumerate(log.read_bytes().splitlines() if log.exists() else [], 1):
            if json.loads(line)["prev"] != before:
                found.append(f"line {number} of the audit log does not fit the one before")
                break
            before = hashlib.sha256(line).hexdigest()
        return found

    def quarantined(self) -> list[str]:
        """Replicas that the gateway says are isolated."""
        try:
            port = self.state()["ports"]["gateway"]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/state", timeout=1) as answer:
                return json.load(answer).get("isolated", [])
        except (OSError, ValueError, KeyError):
            return []

    def wrong(self) -> list[str]:
        """Everything that a fault may have left; empty is clean. A platform that is gone holds no fault but in files."""
        left = self.damaged_files() + self.damaged_features() + self.damaged_databases() + self.strangers()
        if not self.state() or self.platform_gone():
            return left
        left += self.marked_objects()
        return (
            left
            + [f"truth log: {lease} on {who}" for lease, who in self.live_faults()]
            + [f"link {name} does not answer in {SLOW_S:g} s" for name in self.bad_links()]
            + [f"link {name} throttles" for name in self.throttled_links()]
            + [f"{name} is kept out of rotation" for name in self.quarantined()]
            + self.edge()
        )

    def fault_seen(self) -> bool:
        """Whether a fault is on, by the truth log, in a file or in the store."""
        if self.live_faults():
            return True
        damaged = self.damaged_files() + self.damaged_features() + self.damaged_databases()
        if any("does not say" not in line for line in damaged):  # what is being created says nothing yet
            return True
        return bool(self.marked_objects())
