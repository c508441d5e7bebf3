"""Our client with exactly the rights that are shipped, while the observer, kubectl, is whoever KUBECONFIG says.

The roles are those of `manifests/rbac` as they are in this checkout, under names of this session's own, so that neither
what is installed in the cluster counts nor another session is in the way. `RIGHTS=admin` leaves all that out.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import conftest

ROOT = Path(__file__).parents[2]
ACCOUNT = "mlchaos-runner"
CHAOS_MESH = "chaos-mesh"


class Rights:
    """A ServiceAccount in a namespace of its own; `admit` it to a namespace. `remove` it at the end."""

    def __init__(self, folder: Path) -> None:
        self.home = f"mlchaos-test-rights-{uuid.uuid4().hex[:8]}"
        self._found = _shipped()
        conftest.kubectl("create", "namespace", self.home)
        conftest.kubectl("create", "serviceaccount", ACCOUNT, "-n", self.home)
        self._apply([*self._of("ClusterRole"), *self._of("ClusterRoleBinding")])
        self._apply(self._of_tools())
        self.kubeconfig = folder / "runner.kubeconfig"
        self.kubeconfig.write_text(json.dumps(self._config()))
        self.kubeconfig.chmod(0o600)

    def admit(self, namespace: str) -> None:
        """As the target of faults, and as the control namespace."""
        placed = [*self._of("Role"), *self._of("RoleBinding")]
        self._apply([{**one, "metadata": {**one["metadata"], "namespace": namespace}} for one in placed])
        who = f"--as=system:serviceaccount:{self.home}:{ACCOUNT}"
        may = ["auth", "can-i", "delete", "pods", "-n", namespace, who]
        conftest.eventually(lambda: conftest.kubectl(*may, check=False).strip() == "yes")

    def grant(self, namespace: str, verb: str, resource: str) -> None:
        """One right more than is shipped, in one namespace."""
        conftest.kubectl("create", "role", "more", "-n", namespace, f"--verb={verb}", f"--resource={resource}")
        who = f"--serviceaccount={self.home}:{ACCOUNT}"
        conftest.kubectl("create", "rolebinding", "more", "-n", namespace, "--role=more", who)

    def remove(self) -> None:
        """Account and roles."""
        for kind in ("ClusterRoleBinding", "ClusterRole"):
            names = [one["metadata"]["name"] for one in self._of(kind)]
            conftest.kubectl("delete", kind, *names, "--ignore-not-found", check=False)
        for one in self._of_tools():
            meta = one["metadata"]
            conftest.kubectl("delete", one["kind"], meta["name"], "-n", meta["namespace"], check=False)
        conftest.kubectl("delete", "namespace", self.home, "--wait=false", check=False)

    def _of_tools(self) -> list[dict[str, Any]]:
        """What is bound where another tool runs: here that is not where its manifests say."""
        there = conftest.kubectl("get", "namespace", CHAOS_MESH, "--ignore-not-found", "-o", "name")
        placed = [*self._of("Role"), *self._of("RoleBinding")] if there else []
        tool = [one for one in placed if "mlchaos-chaos-mesh-system" in one["metadata"]["name"]]
        return [{**one, "metadata": {**one["metadata"], "namespace": CHAOS_MESH}} for one in tool]

    def _of(self, kind: str) -> list[dict[str, Any]]:
        """Of the runner, under this session's names."""
        bindings = [o for o in self._found if "subjects" in o and ACCOUNT in [s["name"] for s in o["subjects"]]]
        roles = {(b["roleRef"]["kind"], b["roleRef"]["name"]) for b in bindings}
        subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": self.home}
        found: list[dict[str, Any]] = []
        for one in self._found:
            new: dict[str, Any] = {**one, "metadata": {"name": self._named(one["metadata"]["name"])}}
            if one in bindings:
                reference = one["roleRef"]
                new |= {"subjects": [subject]}
                new["roleRef"] = {**reference, "name": self._named(reference["name"])}
            elif (one["kind"], one["metadata"]["name"]) not in roles:
                continue
            if one["kind"] == kind:
                found.append(new)
        return found

    def _named(self, name: str) -> str:
        return f"{name}-{self.home}"  # also in a namespace: a test may install the shipped ones there

    def _config(self) -> dict[str, Any]:
        """The observer's kubeconfig with the account's token; the context keeps its name."""
        token = conftest.kubectl("create", "token", ACCOUNT, "-n", self.home, "--duration=6h").strip()
        found = json.loads(conftest.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
        return {**found, "users": [{"name": found["users"][0]["name"], "user": {"token": token}}]}

    @staticmethod
    def _apply(manifests: list[dict[str, Any]]) -> None:
        conftest.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}))


def _shipped() -> list[dict[str, Any]]:
    paths = [p for p in sorted((ROOT / "manifests/rbac").rglob("*.yaml")) if p.name != "kustomization.yaml"]
    return [one for path in paths for one in yaml.safe_load_all(path.read_text())]
