"""`mlchaos doctor --backend`: each part of Litmus and of Chaos Mesh is taken away in turn, told, and nothing else is."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.cli.doctor import PARTS
from mlchaos_dagster.domain.environment import Environment, Kubernetes
from mlchaos_dagster.drivers.chaos_mesh import checkup as chaos_mesh
from mlchaos_dagster.drivers.cluster.points import Point, version
from mlchaos_dagster.drivers.litmus import checkup as litmus
from mlchaos_dagster.drivers.litmus.faults import EXPERIMENTS
from mlchaos_dagster.kube import reach
from mlchaos_dagster.kube.client import ApiRefused, Cluster, Forbidden, Permission, Site

SPACE = "mlplatform"
"""Where the targets of the environment `cluster` are."""
PODS = f"/api/v1/namespaces/{SPACE}/pods"
EXPERIMENTS_AT = f"/apis/litmuschaos.io/v1alpha1/namespaces/{SPACE}/chaosexperiments"
SYSTEM = "/api/v1/namespaces/chaos-mesh/pods"
CONTROLLERS = "/apis/apps/v1/namespaces/chaos-mesh/deployments"


HEART = "/apis/coordination.k8s.io/v1/namespaces/mlchaos-system/leases/mlchaos-sweeper"


def heart(tool: str) -> dict[str, Any]:
    """Of a sweeper that has rights for one tool."""
    return {"metadata": {"annotations": {reach.REACHES: SPACE, reach.REACHES_TOOLS: f"{SPACE}/{tool}"}}}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights that were bound a moment ago are not waited for."""
    monkeypatch.setattr(reach, "_TOLD_WITHIN_S", -1.0)


def resources(*names: str) -> dict[str, Any]:
    return {"resources": [{"name": n, "kind": n, "verbs": ["list"]} for n in names]}


def workload(name: str, namespace: str, image: str, **env: str) -> dict[str, Any]:
    variables = [{"name": k, "value": v} for k, v in env.items()]
    container = {"name": "c", "image": image, "env": variables}
    return {
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"replicas": 1, "template": {"spec": {"containers": [container]}}},
        "status": {"availableReplicas": 1},
    }


def pod(name: str, node: str, **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": SPACE, "uid": name, "labels": labels},
        "spec": {"nodeName": node},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }


def experiment(name: str) -> dict[str, Any]:
    rule = {"apiGroups": ["apps"], "resources": ["replicasets"], "verbs": ["get", "list"]}
    absent = {"apiGroups": ["apps.openshift.io"], "resources": ["deploymentconfigs"], "verbs": ["get"]}
    definition = {"image": "example.org/litmuschaos/go-runner:3.28.0", "permissions": [rule, absent]}
    return {"metadata": {"name": name}, "spec": {"definition": definition}}


class Installed:
    """A cluster that has it all, as dictionaries."""

    def __init__(self) -> None:
        meta = {"annotations": {"chaos-mesh.org/inject": "enabled"}, "labels": {}}
        operator = "example.org/litmuschaos/chaos-operator:3.28.0"
        controller = "example.org/chaos-mesh/chaos-mesh:v2.8.1"
        self.places: dict[str, Any] = {
            "/api/v1": resources("pods"),
            "/apis/apps": {"preferredVersion": {"groupVersion": "apps/v1"}},
            "/apis/apps/v1": resources("replicasets"),
            "/apis/litmuschaos.io/v1alpha1": resources("chaosengines", "chaosexperiments", "chaosresults"),
            "/apis/chaos-mesh.org/v1alpha1": resources(*chaos_mesh.PLURALS),
            f"/api/v1/namespaces/{SPACE}": {"metadata": meta},
            f"/api/v1/namespaces/{SPACE}/serviceaccounts/litmus-admin": {"metadata": {}},
            "/apis/apps/v1/deployments": [workload("litmus", "chaos", operator, WATCH_NAMESPACE="")],
            CONTROLLERS: [workload("manager", "chaos-mesh", controller, ENABLE_FILTER_NAMESPACE="true")],
            EXPERIMENTS_AT: [experiment(name) for name in sorted(set(EXPERIMENTS.values()))],
            PODS: [pod("a", "n1"), pod("b", "n2")],
            SYSTEM: [pod("d1", "n1"), pod("d2", "n2")],
        }
        self.denied: set[str] = set()
        self.account_denied: set[str] = set()
        self.webhook: Callable[[Mapping[str, Any]], None] = webhook

    def get(self, path: str) -> Any:
        return copy.deepcopy(self.places.get(path))

    def list(self, path: str, *, labels: str = "", fields: str = "") -> list[Any]:
        found = self.places.get(path, [])
        if isinstance(found, Exception):
            raise found
        return copy.deepcopy(found)

    def allowed(self, permission: Permission) -> bool:
        return permission.resource not in self.denied

    def create(self, path: str, body: Mapping[str, Any], **query: str) -> dict[str, Any]:
        if path.endswith("subjectaccessreviews"):
            return {"status": {"allowed": body["spec"]["resourceAttributes"]["verb"] not in self.account_denied}}
        assert query == {"dryRun": "All"}, "doctor changes nothing"
        self.webhook(body)
        return dict(body)


def webhook(body: Mapping[str, Any]) -> None:
    """As Chaos Mesh's: it wants the container's name."""
    if body["spec"]["action"] == "container-kill":
        said = 'admission webhook "vpodchaos.kb.io" denied the request: spec.containerNames: Required value'
        raise Forbidden(f"not allowed: {said}", 403)


def refusing(said: str) -> Callable[[Mapping[str, Any]], None]:
    def refuse(_: Mapping[str, Any]) -> None:
        raise ApiRefused(f"POST /x: {said} (500)", 500)

    return refuse


ENVIRONMENT = Catalog().environment("cluster")


def looked(cluster: Installed, points: Callable[[Site, Environment], Any], **options: Any) -> list[Point]:
    made = Kubernetes(context="c", namespace=SPACE, **options)
    return list(points(Site(cast(Cluster, cluster), made), ENVIRONMENT))


def wrong(found: list[Point]) -> list[tuple[str, str]]:
    return [(p.what, p.help) for p in found if p.state == "missing"]


@pytest.mark.req("R0-01", "R1-06")
@pytest.mark.parametrize("points", [litmus.points, chaos_mesh.points])
def test_nothing_is_missing_where_all_is_there(points: Any) -> None:
    found = looked(Installed(), points)
    assert [p for p in found if p.state != "ok"] == []
    assert len(found) >= 6, "a line for each part"


def without(path: str) -> Callable[[Installed], None]:
    return lambda cluster: cluster.places.pop(path) and None


def changed(path: str, change: Callable[[Any], Any]) -> Callable[[Installed], None]:
    return lambda cluster: change(cluster.places[path])


def _watch(value: str) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        found[0]["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = value

    return change


LITMUS: dict[str, tuple[Callable[[Installed], Any], str, str]] = {
    "CRDs": (without("/apis/litmuschaos.io/v1alpha1"), "litmus: CRDs", "helm show crds litmus-core --repo"),
    "operator": (without("/apis/apps/v1/deployments"), "litmus: operator", "helm upgrade --install litmus"),
    "operator at 0": (
        changed("/apis/apps/v1/deployments", lambda d: d[0]["spec"].update(replicas=0)),
        "litmus: operator",
        "kubectl scale deployment litmus -n chaos --replicas=1",
    ),
    "operator down": (
        changed("/apis/apps/v1/deployments", lambda d: d[0].update(status={})),
        "litmus: operator",
        "kubectl describe deployment litmus -n chaos",
    ),
    "operator elsewhere": (
        changed("/apis/apps/v1/deployments", _watch("chaos")),
        "litmus: operator",
        "kubernetes.litmus.namespace: chaos",
    ),
    "an experiment": (
        changed(EXPERIMENTS_AT, lambda e: e.pop()),
        f"litmus: experiments in {SPACE}",
        f"kubectl apply -n {SPACE} -k manifests/litmus/faults",
    ),
    "its image": (
        changed(EXPERIMENTS_AT, lambda e: e[0]["spec"]["definition"].pop("image")),
        f"litmus: experiments in {SPACE}",
        f"kubectl apply -n {SPACE} -k manifests/litmus/faults",
    ),
    "account": (
        without(f"/api/v1/namespaces/{SPACE}/serviceaccounts/litmus-admin"),
        f"litmus: account in {SPACE}",
        f"kubectl create serviceaccount litmus-admin -n {SPACE}",
    ),
    "its rights": (
        lambda cluster: cluster.account_denied.add("list"),
        f"litmus: account in {SPACE}",
        f"kubectl create rolebinding litmus-faults -n {SPACE} --clusterrole=litmus-faults",
    ),
    "pod security": (
        changed(
            f"/api/v1/namespaces/{SPACE}",
            lambda n: n["metadata"]["labels"].update({"pod-security.kubernetes.io/enforce": "restricted"}),
        ),
        f"litmus: helpers in {SPACE}",
        f"kubectl label namespace {SPACE} pod-security.kubernetes.io/enforce=privileged --overwrite",
    ),
    "sweeper's rights": (
        lambda cluster: cluster.places.update({HEART: heart("chaos_mesh")}),
        "litmus: sweeper",
        f"kubectl apply -n {SPACE} -k manifests/rbac/litmus/namespace",
    ),
    "our rights": (
        lambda cluster: cluster.denied.add("chaosresults"),
        "litmus: our rights",
        f"kubectl apply -n {SPACE} -k manifests/rbac/litmus/namespace",
    ),
}
"""What is taken away → the line that tells it, and how its help begins or what it holds."""
X509 = "failed calling webhook: tls: failed to verify certificate: x509: certificate has expired"
CHAOS_MESH: dict[str, tuple[Callable[[Installed], Any], str, str]] = {
    "CRDs": (without("/apis/chaos-mesh.org/v1alpha1"), "chaos_mesh: CRDs", "helm show crds chaos-mesh --repo"),
    "controller": (
        without(CONTROLLERS),
        "chaos_mesh: controller",
        "kubernetes: {chaos_mesh: {system_namespace: chaos}}",  # the first that is found anywhere
    ),
    "controller at 0": (
        changed(CONTROLLERS, lambda d: d[0]["spec"].update(replicas=0)),
        "chaos_mesh: controller",
        "kubectl scale deployment manager -n chaos-mesh --replicas=1",
    ),
    "old": (
        changed(CONTROLLERS, lambda d: d[0]["spec"]["template"]["spec"]["containers"][0].update(image="x:v2.1.0")),
        "chaos_mesh: version",
        "helm upgrade --install chaos-mesh",
    ),
    "let in": (
        changed(f"/api/v1/namespaces/{SPACE}", lambda n: n["metadata"].pop("annotations")),
        "chaos_mesh: filter",
        f"kubectl annotate namespace {SPACE} chaos-mesh.org/inject=enabled",
    ),
    "a daemon": (changed(SYSTEM, lambda d: d.pop()), "chaos_mesh: daemon", "kubectl get node n2"),
    "a daemon not ready": (
        changed(SYSTEM, lambda d: d[1].update(status={})),
        "chaos_mesh: daemon",
        "kubectl logs d2 -n chaos-mesh",
    ),
    "webhook": (
        lambda cluster: setattr(cluster, "webhook", lambda body: None),
        f"chaos_mesh: webhook in {SPACE}",
        "helm upgrade --install chaos-mesh",
    ),
    "its certificate": (
        lambda cluster: setattr(cluster, "webhook", refusing(X509)),
        f"chaos_mesh: webhook in {SPACE}",
        "helm upgrade --install chaos-mesh",
    ),
    "its server": (
        lambda cluster: setattr(cluster, "webhook", refusing("failed calling webhook: no endpoints available")),
        f"chaos_mesh: webhook in {SPACE}",
        "kubectl get pods,endpoints -n chaos-mesh",
    ),
    "sweeper's rights": (
        lambda cluster: cluster.places.update({HEART: heart("litmus")}),
        "chaos_mesh: sweeper",
        f"kubectl apply -n {SPACE} -k manifests/rbac/chaos_mesh/namespace",
    ),
    "our rights": (
        lambda cluster: cluster.denied.add("podchaos"),
        "chaos_mesh: our rights",
        f"kubectl apply -n {SPACE} -k manifests/rbac/chaos_mesh/namespace",
    ),
}


@pytest.mark.req("R0-01", "R1-06")
@pytest.mark.parametrize(
    ("points", "part"),
    [*((litmus.points, part) for part in LITMUS), *((chaos_mesh.points, part) for part in CHAOS_MESH)],
)
def test_each_missing_part_is_told_with_the_command_that_brings_it(points: Any, part: str) -> None:
    take_away, what, help = (LITMUS if points is litmus.points else CHAOS_MESH)[part]
    cluster = Installed()
    take_away(cluster)
    found = wrong(looked(cluster, points))
    assert {name for name, _ in found} == {what}, "this, and nothing else"
    assert help in found[0][1]
    for line in PARTS.split(found[0][1]):  # as they are printed: what follows an arrow is a command and nothing else
        if line.startswith(("kubectl ", "helm ")):
            words = shlex.split(line)
            assert not {"then", "or", "for"} & set(words) and not any(w.endswith((",", ";")) for w in words), line


def test_the_sweepers_rights_come_with_their_roles_and_a_whole_role_is_one_line() -> None:
    """A binding alone, to a role that is not there, changes nothing."""
    cluster = Installed()
    cluster.places[HEART] = heart("chaos_mesh")
    ((_, help),) = wrong(looked(cluster, litmus.points))
    assert help.startswith("kubectl apply -k manifests/rbac/litmus; kubectl apply -n ")
    cluster.places[HEART] = heart("litmus")
    ((_, help),) = wrong(looked(cluster, chaos_mesh.points))
    assert help.startswith("kubectl kustomize manifests/rbac/chaos_mesh | sed s/chaos-testing/chaos-mesh/ | kubectl ")
    cluster = Installed()
    cluster.account_denied |= {"list", "get", "create", "delete"}
    said = [p for p in looked(cluster, litmus.points) if p.state == "missing"]
    assert len(said) == len({p.help for p in said}) <= 2, [p.saw for p in said]


def test_what_may_not_be_seen_is_not_called_missing() -> None:
    cluster = Installed()
    cluster.places["/apis/apps/v1/deployments"] = Forbidden("not allowed: deployments", 403)
    (point,) = (p for p in looked(cluster, litmus.points) if p.state != "ok")
    assert (point.what, point.state) == ("litmus: operator", "optional") and "only who may look" in point.saw


def test_an_open_filter_is_worth_a_word() -> None:
    cluster = Installed()
    cluster.places[CONTROLLERS] = [workload("m", "chaos-mesh", "x:v2.8.1")]
    (point,) = (p for p in looked(cluster, chaos_mesh.points) if p.state != "ok")
    assert (point.what, point.state) == ("chaos_mesh: filter", "optional")


@pytest.mark.parametrize(
    ("image", "state"),
    [
        ("r.example.org:5000/a/b:v2.8.1", "ok"),
        ("a/b:2.7.0-rc1", "ok"),
        ("a/b:3.0@sha256:12", "ok"),
        ("a/b:2.5.9", "missing"),
        ("a/b:latest", "optional"),
        ("r.example.org:5000/a/b", "optional"),
        ("a/b:1", "optional"),
    ],
)
def test_versions_as_images_tell_them(image: str, state: str) -> None:
    assert version("x", image, (2, 6), "upgrade").state == state
