"""The edge: certificates and credentials are replaced under load, replicas are cut off, and the audit log tells of it."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mlchaos_dagster.probes.http import HttpProbe, HttpProbeConfig
from mlchaos_dagster.probes.once import success_ratio
from mlchaos_dagster.sandbox import audit, pki
from mlchaos_dagster.sandbox.api import SandboxRefused
from mlchaos_dagster.sandbox.edge import Edge

from .conftest import Platform, eventually

pytestmark = [pytest.mark.timeout(180), pytest.mark.req("R3-06", "R4-11")]


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_a_changed_a_missing_and_a_cut_line_are_seen(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    assert audit.verify(log) is None and audit.head(log).n == 0
    heads = [audit.append(log, "me", "isolated", "here", number=number) for number in range(4)]
    assert audit.verify(log, heads[3]) is None and audit.head(log) == heads[3]
    good = log.read_bytes()
    lines = good.splitlines(keepends=True)
    for content, known, broken in (
        (good.replace(b'"number":1', b'"number":7'), None, 3),
        (lines[0] + lines[2] + lines[3], None, 2),
        (b"".join([lines[0], lines[2], lines[1], lines[3]]), None, 2),
        (good.replace(b'"number":3', b'"number":7'), heads[3], 4),
        (b"".join(lines[:2]), heads[3], 3),
        (good[:-9], None, 4),
        (b"", heads[0], 1),
    ):
        log.write_bytes(content)
        assert audit.verify(log, known) == broken
    log.write_bytes(good)
    assert audit.summary(log)["what"] == {"isolated": 4} and audit.summary(log)["intact"]


def test_entries_of_several_writers_make_one_chain(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    threads = [
        threading.Thread(target=lambda: [audit.append(log, "me", "did", "here") for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert audit.verify(log) is None and audit.head(log).n == 40


def an_edge(directory: Path, **mechanisms: bool) -> Edge:
    """An edge that was never started."""
    config = {"mechanisms": {"cert_reload": True, "credential_overlap": True} | mechanisms, "sandbox": str(directory)}
    return Edge(SimpleNamespace(config=config, registry=CollectorRegistry()))  # type: ignore[arg-type]


@pytest.mark.parametrize("on", [True, False])
def test_what_the_mechanisms_do(on: bool, tmp_path: Path) -> None:
    edge = an_edge(tmp_path, cert_reload=on, credential_overlap=on)
    pki.ensure(edge.files)
    old = edge.files.authorization.read_text().strip()
    edge.look()
    before = edge.fingerprint
    assert before == pki.served(edge.files)[0] and edge.good(old) and not edge.good("Bearer guessed")
    new = pki.new_credential()
    pki.accept(edge.files, [(new, None), (old, time.time() + 60)])
    after = pki.issue(edge.files)
    edge.look()
    assert edge.fingerprint == (after if on else before) and edge.certificates == (2 if on else 1)
    assert edge.good(new) and edge.good(old) is on
    pki.accept(edge.files, [(new, None), (old, time.time() - 0.001)])
    edge.look()
    assert edge.good(new) and not edge.good(old)
    for path in (edge.files.ca, edge.files.server, edge.files.authorization, edge.files.accepted):
        assert path.stat().st_mode & 0o077 == 0


@contextmanager
def tls_server(files: pki.Files) -> Iterator[tuple[str, ssl.SSLContext, list[str]]]:
    """A server that answers 200 to whoever sends the secret that is on disk; its address, context and what was sent."""
    context, sent, ports = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), list[str](), list[int]()
    context.load_cert_chain(files.server)
    up = threading.Event()
    told: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                sent.append(next(line for line in head.splitlines() if line.startswith("Authorization")))
                good = files.authorization.read_text().strip() in sent[-1]
                writer.write(b"HTTP/1.1 %s OK\r\nContent-Length: 0\r\n\r\n" % (b"200" if good else b"401"))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.transport.abort()

    async def serve() -> None:
        stop = asyncio.Event()
        told.append((asyncio.get_running_loop(), stop))
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        ports.append(server.sockets[0].getsockname()[1])
        up.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert up.wait(5)
    try:
        yield f"https://127.0.0.1:{ports[0]}/", context, sent
    finally:
        told[0][0].call_soon_threadsafe(told[0][1].set)
        thread.join(5)


def test_the_probe_takes_new_secrets_and_sees_revoked_certificates(tmp_path: Path) -> None:
    files = pki.files(tmp_path)
    pki.ensure(files)
    first = files.authorization.read_text().strip()
    with tls_server(files) as (url, context, sent):
        assert success_ratio(url, 2, 2.0, headers={"Authorization": first}, ca_file=str(files.trust)) == 1
        config = HttpProbeConfig(
            url,
            rate_per_s=50,
            timeout_s=2,
            headers={"Authorization": first},
            header_files={"Authorization": str(files.authorization)},
            ca_file=str(files.trust),
            connection_lifetime_s=0.1,
        )
        samples: list[Any] = []

        def seen(status: int) -> bool:
            samples.extend(new := probe.drain())
            return any(sample.status == status for sample in new)

        with HttpProbe(config) as probe:
            zero = time.monotonic()
            probe.start(zero)
            eventually(lambda: seen(200))
            pki.give_to_clients(files, "Bearer second")
            eventually(lambda: sent[-1] == "Authorization: Bearer second")
            since = time.monotonic() - zero
            # The server goes on with the old certificate: refused by new connections once it is revoked, not before.
            _, serial = pki.served(files)
            pki.issue(files)
            eventually(lambda: seen(200) and sum(sample.sent_s > since for sample in samples) > 10)
            assert {sample.status for sample in samples if sample.sent_s > since} == {200}
            pki.revoke(files, serial)
            eventually(lambda: seen(0))
            context.load_cert_chain(files.server)
            eventually(lambda: seen(200))


# -- the platform -----------------------------------------------------------------------------------------------------


@pytest.fixture
def edge(jobs: Platform) -> Platform:
    """The sandbox without a part that says much of itself, with the edge."""
    jobs.client.start_parts(["edge"])
    jobs.wait_ready()
    eventually(lambda: "audit_intact" in jobs.client.signals() and "edge" in state(jobs))
    return jobs


def state(platform: Platform) -> dict[str, Any]:
    return json.loads((platform.directory / "state.json").read_text())


def whoami(platform: Platform, credential: str) -> int:
    """Status of a request with a credential, over TLS as clients verify it."""
    where = state(platform)["edge"]
    context = ssl.create_default_context(cafile=where["ca"])
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    connection = http.client.HTTPSConnection(where["url"].removeprefix("https://"), timeout=3, context=context)
    try:
        connection.request("GET", "/whoami", headers={"Authorization": credential})
        return connection.getresponse().status
    finally:
        connection.close()


def fingerprint(platform: Platform) -> str:
    """Of the certificate that a new connection gets."""
    host, _, port = state(platform)["edge"]["url"].removeprefix("https://").partition(":")
    pem = ssl.get_server_certificate((host, int(port)))
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def credential_of(platform: Platform) -> str:
    return Path(state(platform)["edge"]["credential_file"]).read_text().strip()


def test_a_certificate_is_replaced_under_load_and_the_old_one_revoked(edge: Platform) -> None:
    before, where = fingerprint(edge), state(edge)["edge"]
    config = HttpProbeConfig(
        f"{where['url']}/predict?entity_id={{n}}",
        rate_per_s=20,
        timeout_s=3,
        headers={"Authorization": credential_of(edge)},
        ca_file=where["ca"],
        connection_lifetime_s=0.2,
    )
    with HttpProbe(config) as probe:
        probe.start(time.monotonic())
        lease = edge.inject("certificate_rotation", "edge")
        (fault,) = edge.client.faults()
        assert fault["effective"] and fault["before"] == before and fault["served"] == fault["after"] != before
        assert fingerprint(edge) == fault["after"]
        with pytest.raises(SandboxRefused, match="another certificate_rotation is not complete"):
            edge.inject("certificate_rotation", "edge")
        edge.client.remove_fault(lease)
        assert edge.client.faults() == [] and fingerprint(edge) == fault["after"]
        samples = probe.stop()
    # A handshake that fails is no connection. 503 is an answer over TLS: of a platform that a busy machine is too slow for.
    assert {200} <= {sample.status for sample in samples} <= {200, 503}
    _, serial = pki.served(pki.files(edge.directory))
    assert pki.revoked(pki.files(edge.directory)) and serial not in pki.revoked(pki.files(edge.directory))
    eventually(lambda: edge.client.signals()["certificates_served"] == 2)
    assert whoami(edge, credential_of(edge)) == 200


def test_an_old_credential_is_refused_after_its_overlap_or_an_early_end(edge: Platform) -> None:
    old, accepted = credential_of(edge), pki.files(edge.directory).accepted
    assert whoami(edge, old) == 200 and whoami(edge, "Bearer guessed") == 401
    lease = edge.inject("credential_rotation", "edge", overlap_s=1.5)
    assert whoami(edge, old) == 200 and len(json.loads(accepted.read_text())) == 2
    new = eventually(lambda: (now := credential_of(edge)) != old and now)
    assert whoami(edge, new) == 200
    eventually(lambda: whoami(edge, old) == 401)
    eventually(lambda: edge.client.faults()[0]["withdrawn"])
    edge.client.remove_fault(lease)
    assert len(json.loads(accepted.read_text())) == 1 and edge.client.faults() == []
    # A long overlap, ended at its deadline: what would have come anyway has come.
    edge.inject("credential_rotation", "edge", deadline_s=0.3, overlap_s=60)
    eventually(lambda: edge.client.faults() == [])
    assert [whoami(edge, one) for one in (new, credential_of(edge))] == [401, 200]
    log = edge.directory / audit.NAME
    eventually(lambda: audit.summary(log)["refused_from"].get("127.0.0.1", 0) >= 2)
    assert audit.verify(log) is None and audit.summary(log)["what"]["credential_withdrawn"] == 2


def test_an_isolated_replica_is_cut_off_runs_on_and_comes_back(edge: Platform) -> None:
    pid = edge.process("inference-1")["pid"]
    lease = edge.inject("network_isolation", "inference-1")
    fault = next(fault for fault in edge.client.faults() if "links" in fault)
    assert fault["effective"] and "gateway->inference-1 refuses connections" in fault["evidence"][0]
    assert edge.client.link_status("gateway->inference-1") is None
    assert edge.process("inference-1")["pid"] == pid and edge.process("inference-1")["ready"]
    assert edge.client.gateway_state()["isolated"] == ["inference-1"] and edge.ask(401).status == 503
    eventually(lambda: edge.client.signals()["isolated_replicas"] == 1)
    os.kill(edge.process("proxy-inference")["pid"], 9)  # a network that comes back does not let it back
    eventually(lambda: any(f["evidence"][0].startswith("proxy gateway->") for f in edge.client.status()["faults"]))
    edge.client.remove_fault(lease)
    assert edge.client.faults() == [] and edge.client.link_status("gateway->inference-1") == 200
    assert edge.client.gateway_state()["isolated"] == [] and eventually(lambda: edge.ask().status == 200)
    edge.inject("network_isolation", "inference-1", deadline_s=0.6)
    eventually(lambda: edge.client.faults() == [])
    eventually(lambda: edge.client.gateway_state()["isolated"] == [])
    what = [entry["what"] for entry in audit.entries(edge.directory / audit.NAME)]
    assert what.count("isolated") == what.count("released") == 2


def test_faults_of_the_edge_are_checked_and_a_changed_audit_log_is_seen(edge: Platform) -> None:
    for kind, target, params in (
        ("certificate_rotation", "gateway", {}),
        ("certificate_rotation", "edge", {"overlap_s": 1}),
        ("credential_rotation", "edge", {"overlap_s": -1}),
        ("network_isolation", "proxy-inference", {}),
        ("network_isolation", "worker-1", {}),
    ):
        with pytest.raises(SandboxRefused):
            edge.inject(kind, target, **params)
    log = edge.directory / audit.NAME
    audit.append(log, "me", "looked", "test")
    eventually(lambda: edge.client.signals()["audit_entries"] == audit.head(log).n)
    good = log.read_bytes()
    log.write_bytes(b"".join(good.splitlines(keepends=True)[:-1]))  # whoever cuts the end leaves a chain that fits
    assert audit.verify(log) is None
    eventually(lambda: edge.client.signals()["audit_intact"] == 0)
    log.write_bytes(good)
    eventually(lambda: edge.client.signals()["audit_intact"] == 1)
