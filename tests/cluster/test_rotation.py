"""Credentials and certificates are rotated; a service that mounts them is asked what it accepts and shows."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from pathlib import Path

import pytest

from mlchaos_dagster.domain.environment import KubernetesObjects, Target
from mlchaos_dagster.drivers.cluster.handler import Injection
from mlchaos_dagster.drivers.kubernetes.driver import KubernetesDriver
from mlchaos_dagster.drivers.kubernetes.faults import handler
from mlchaos_dagster.engine.ports import no_step
from mlchaos_dagster.kube.client import Site
from mlchaos_dagster.kube.refs import Ref
from tests.cluster.conftest import TARGET_IMAGE, Faulting, eventually, kubectl, objects

pytestmark = pytest.mark.timeout(180)

VERIFIER = """
import http.server, pathlib
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        accepted = [p.read_text() for p in pathlib.Path("/secret").glob("token*")]
        self.send_response(200 if self.headers.get("Authorization") in accepted else 401)
        self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 8080), Answer).serve_forever()
"""
"""Accepts what is in its mounted Secret now: the token, and the one before while it is there."""

TLS = """
import http.server, ssl
server = http.server.ThreadingHTTPServer(("", 8443), http.server.SimpleHTTPRequestHandler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
def fresh(*_):
    again = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    again.load_cert_chain("/secret/tls.crt", "/secret/tls.key")
    _[0].context = again
fresh(type("", (), {})())
context.load_cert_chain("/secret/tls.crt", "/secret/tls.key")
context.sni_callback = fresh
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
"""Loads its certificate anew for each connection."""


def service(namespace: str, program: str, port: int) -> str:
    """A pod that mounts the Secret `edge`, running; its name."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "edge"},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "edge",
                    "image": TARGET_IMAGE,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python3", "-u", "-c", program],
                    "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
                    "volumeMounts": [{"name": "secret", "mountPath": "/secret"}],
                    "resources": {
                        "requests": {"cpu": "20m", "memory": "32Mi"},
                        "limits": {"cpu": "200m", "memory": "128Mi"},
                    },
                }
            ],
            "volumes": [{"name": "secret", "secret": {"secretName": "edge"}}],
        },
    }
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
    kubectl("wait", "-n", namespace, "pod/edge", "--for=condition=Ready", "--timeout=60s", timeout=70)
    return "edge"


def sync(namespace: str) -> None:
    """A kubelet looks at a pod's Secrets when the pod changes; else within a minute or so."""
    kubectl("annotate", "pod", "edge", "-n", namespace, f"test/now={time.time()}", "--overwrite")


def inside(namespace: str, code: str) -> str:
    """What a Python in the pod says."""
    return kubectl("exec", "-n", namespace, "edge", "--", "python3", "-c", code).strip()


def status(namespace: str, token: str) -> int:
    """What the service answers to a credential."""
    code = (
        "import urllib.request as u, urllib.error as e\n"
        f"r = u.Request('http://127.0.0.1:8080', headers={{'Authorization': {token!r}}})\n"
        "try: print(u.urlopen(r, timeout=2).status)\n"
        "except e.HTTPError as x: print(x.code)\n"
    )
    return int(inside(namespace, code))


def secret(namespace: str) -> dict[str, str]:
    (found,) = objects("secret", namespace, "app=edge")
    return {k: base64.b64decode(v).decode() for k, v in found["data"].items()}


def marks(namespace: str) -> list[str]:
    (found,) = objects("secret", namespace, "app=edge")
    return [a for a in found["metadata"].get("annotations", {}) if a.startswith("mlchaos.dev/")]


def credential(namespace: str, value: str = "Bearer before") -> KubernetesObjects:
    kubectl(
        "create", "secret", "generic", "edge", "-n", namespace, f"--from-literal=token={value}", "--from-literal=user=a"
    )
    kubectl("label", "secret", "edge", "-n", namespace, "app=edge")
    return KubernetesObjects(kind="Secret", key="token")


@pytest.mark.req("R3-06")
def test_the_old_credential_is_accepted_until_the_overlap_is_over_and_refused_by_the_service_after_it(
    faulting: Faulting, namespace: str
) -> None:
    where = credential(namespace)
    service(namespace, VERIFIER, 8080)
    assert status(namespace, "Bearer before") == 200
    lease = faulting.lease("credential_rotation", "app=edge", objects=where, overlap_s=12.0)
    faulting.driver.inject(lease)
    begun = time.monotonic()
    new = secret(namespace)["token"]
    assert new != "Bearer before" and new.startswith("Bearer ") and secret(namespace)["user"] == "a"
    evidence = faulting.driver.active(lease)
    assert evidence.present and evidence.effective, evidence
    written = json.dumps([lease.undo, evidence.lines], default=str) + kubectl(
        "get", "secret", "edge", "-n", namespace, "-o", "jsonpath={.metadata}"
    )
    assert "before" not in written and new not in written  # neither is told anywhere
    sync(namespace)
    eventually(lambda: status(namespace, new) == 200, 60)
    if time.monotonic() - begun < 10:
        assert status(namespace, "Bearer before") == 200
    eventually(lambda: "token.previous" not in secret(namespace), 20)
    assert faulting.driver.active(lease).effective  # an act: it is still the new one
    sync(namespace)
    eventually(lambda: status(namespace, "Bearer before") == 401, 60)
    assert status(namespace, new) == 200
    faulting.driver.recover(lease)
    assert secret(namespace) == {"token": new, "user": "a"} and marks(namespace) == []
    assert not faulting.driver.active(lease).present


def test_recovered_early_and_elsewhere_it_is_complete(
    faulting: Faulting, namespace: str, driver: KubernetesDriver
) -> None:
    where = credential(namespace)
    lease = faulting.lease("credential_rotation", "app=edge", objects=where, overlap_s=3600.0)
    faulting.driver.inject(lease)
    new = secret(namespace)["token"]
    faulting.driver.inject(lease)  # a second one changes nothing: the old one is not lost for the overlap
    assert secret(namespace) == {"token": new, "token.previous": "Bearer before", "user": "a"}
    driver.recover(lease)
    driver.recover(lease)
    assert secret(namespace) == {"token": new, "user": "a"} and marks(namespace) == []
    assert not driver.active(lease).present


def test_whoever_has_lost_the_lease_completes_it_from_what_the_secret_says(
    faulting: Faulting, namespace: str, site: Site
) -> None:
    lease = faulting.lease("credential_rotation", "app=edge", objects=credential(namespace), overlap_s=3600.0)
    faulting.driver.inject(lease)
    refs = tuple(Ref.parse(t) for t in lease.targets)
    handler("credential_rotation").recover(site, Injection(lease, refs, {}), no_step)
    assert set(secret(namespace)) == {"token", "user"} and marks(namespace) == []


def test_recovered_before_it_was_made_nothing_is_rotated(faulting: Faulting, namespace: str) -> None:
    lease = faulting.lease("credential_rotation", "app=edge", objects=credential(namespace), overlap_s=0.0)
    faulting.driver.recover(lease)
    assert secret(namespace) == {"token": "Bearer before", "user": "a"} and marks(namespace) == []
    assert not faulting.driver.active(lease).present
    kubectl("delete", "secret", "edge", "-n", namespace)
    faulting.driver.recover(lease)
    assert any("is gone" in line for line in faulting.driver.active(lease).lines)


def refused(driver: KubernetesDriver, kind: str, where: KubernetesObjects) -> str:
    target = Target(select="app=edge", kubernetes=where)
    ids = driver.resolve(target)
    return "\n".join(f"{o.saw} | {o.needs}" for o in driver.preflight(kind, ids, ids, {}, target=target))


def test_what_is_no_credential_or_kept_by_others_is_refused(driver: KubernetesDriver, namespace: str) -> None:
    where = credential(namespace)
    assert refused(driver, "credential_rotation", where) == ""
    assert 'has no key "tokn" | targets.….kubernetes.key: token or user' in refused(
        driver, "credential_rotation", where.model_copy(update={"key": "tokn"})
    )
    assert "is of type Opaque | type kubernetes.io/tls" in refused(driver, "certificate_rotation", where)
    kubectl("patch", "secret", "edge", "-n", namespace, "-p", '{"immutable": true}')
    assert "is immutable" in refused(driver, "credential_rotation", where)


def openssl(*words: str, cwd: Path) -> str:
    done = subprocess.run(["openssl", *words], capture_output=True, text=True, cwd=cwd, check=True)
    return done.stdout


def certificate(namespace: str, tmp_path: Path) -> KubernetesObjects:
    """A CA and a certificate of its, made by openssl."""
    new = ("-newkey", "rsa:2048", "-nodes")
    openssl(
        "req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test CA", "-days", "2", cwd=tmp_path
    )
    openssl("req", *new, "-keyout", "tls.key", "-out", "tls.csr", "-subj", "/O=ml/CN=edge", cwd=tmp_path)
    (tmp_path / "names").write_text("subjectAltName=DNS:edge.example,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
    openssl(
        *("x509", "-req", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", "tls.crt", "-days", "1", "-extfile", "names"),
        cwd=tmp_path,
    )
    files = [f"--from-file={tmp_path / name}" for name in ("ca.crt", "ca.key")]
    kubectl("create", "secret", "generic", "ca", "-n", namespace, *files)
    kubectl(
        *("create", "secret", "tls", "edge", "-n", namespace),
        *(f"--cert={tmp_path / 'tls.crt'}", f"--key={tmp_path / 'tls.key'}"),
    )
    kubectl("label", "secret", "edge", "-n", namespace, "app=edge")
    return KubernetesObjects(kind="Secret", ca="ca")


def shown(namespace: str) -> str:
    """PEM of the certificate that a new connection to the service gets."""
    return inside(namespace, "import ssl; print(ssl.get_server_certificate(('127.0.0.1', 8443)))")


@pytest.mark.req("R4-11")
def test_a_new_certificate_of_the_same_names_and_ca_is_served(
    faulting: Faulting, namespace: str, tmp_path: Path
) -> None:
    where = certificate(namespace, tmp_path)
    service(namespace, TLS, 8443)
    old = secret(namespace)
    assert shown(namespace) == old["tls.crt"].strip()
    lease = faulting.lease("certificate_rotation", "app=edge", objects=where)
    assert "PRIVATE" not in json.dumps(lease.undo)
    faulting.driver.inject(lease)
    new = secret(namespace)
    assert new["tls.crt"] != old["tls.crt"] and new["tls.key"] != old["tls.key"]
    evidence = faulting.driver.active(lease)
    assert evidence.present and evidence.effective, evidence
    sync(namespace)
    eventually(lambda: shown(namespace) == new["tls.crt"].strip(), 90, 0.5)
    (tmp_path / "new.crt").write_text(new["tls.crt"])
    assert (
        openssl("verify", "-CAfile", "ca.crt", "-purpose", "sslserver", "new.crt", cwd=tmp_path).strip().endswith("OK")
    )
    same = [
        openssl("x509", "-in", f, "-noout", "-subject", "-ext", "subjectAltName,extendedKeyUsage", cwd=tmp_path)
        for f in ("tls.crt", "new.crt")
    ]
    assert same[0] == same[1] and "edge.example" in same[0]
    faulting.driver.recover(lease)
    assert secret(namespace) == new and marks(namespace) == []
    assert not faulting.driver.active(lease).present


def test_a_certificate_of_another_ca_is_refused(driver: KubernetesDriver, namespace: str, tmp_path: Path) -> None:
    where = certificate(namespace, tmp_path)
    assert refused(driver, "certificate_rotation", where) == ""
    assert 'CA "nobody": there is no such Secret' in refused(
        driver, "certificate_rotation", where.model_copy(update={"ca": "nobody"})
    )
    (tmp_path / "other").mkdir()
    other = tmp_path / "other"
    openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.crt"),
        *("-subj", "/CN=test CA", "-days", "2"),
        cwd=other,
    )
    files = [f"--from-file={other / name}" for name in ("ca.crt", "ca.key")]
    kubectl("create", "secret", "generic", "other", "-n", namespace, *files)
    assert "was not issued by this CA" in refused(
        driver, "certificate_rotation", where.model_copy(update={"ca": "other"})
    )
