"""What is missing for Litmus, and whom an experiment hits, against a cluster that is a dictionary."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mlchaos_dagster.domain.environment import Kubernetes, Target
from mlchaos_dagster.drivers.cluster.handler import Request
from mlchaos_dagster.drivers.litmus import guards
from mlchaos_dagster.drivers.litmus.selection import select
from mlchaos_dagster.kube.client import ApiRefused, Cluster, Site
from mlchaos_dagster.kube.refs import Ref

LITMUS = "/apis/litmuschaos.io/v1alpha1"
DEPLOYMENTS = "/apis/apps/v1/deployments"
PODS = "/api/v1/namespaces/ml/pods"
RULE = {"apiGroups": ["apps"], "resources": ["replicasets"], "verbs": ["get", "list"]}
ROLLOUTS = {"apiGroups": ["argoproj.io"], "resources": ["rollouts"], "verbs": ["get"]}


def operator(image: str = "litmuschaos/chaos-operator:3.28.0", up: int = 1, **env: Any) -> dict[str, Any]:
    variables = [{"name": k, **v} if isinstance(v, dict) else {"name": k, "value": v} for k, v in env.items()]
    template = {"metadata": {"labels": {}}, "spec": {"containers": [{"image": image, "env": variables}]}}
    return {
        "metadata": {"name": "op", "namespace": "chaos"},
        "spec": {"template": template},
        "status": {"availableReplicas": up},
    }


def pod(name: str, owner: str = "rs-1", kind: str = "ReplicaSet") -> dict[str, Any]:
    owners = [{"kind": kind, "name": owner, "uid": f"uid-{owner}", "controller": True}]
    return {"metadata": {"name": name, "namespace": "ml", "uid": f"uid-{name}", "ownerReferences": owners}}


class Paper:
    """`Cluster` whose objects are given."""

    def __init__(self, **changes: Any) -> None:
        kinds = [{"name": n} for n in guards.CRDS]
        experiment = {
            "metadata": {"name": "pod-delete"},
            "spec": {"definition": {"scope": "Namespaced", "permissions": [RULE, ROLLOUTS]}},
        }
        behind = {"ownerReferences": [{"kind": "Deployment", "name": "web", "uid": "u", "controller": True}]}
        self.places: dict[str, Any] = {
            LITMUS: {"resources": kinds},
            DEPLOYMENTS: [operator()],
            f"{LITMUS}/namespaces/ml/chaosexperiments/pod-delete": experiment,
            "/api/v1/namespaces/ml/serviceaccounts/litmus-admin": {},
            "/apis/apps": {},
            "/apis/apps/v1/namespaces/ml/replicasets/rs-1": {"metadata": behind},
            PODS: [pod("a"), pod("b")],
            **changes,
        }
        self.denied: set[str] = set()
        self.webhook = ""

    def get(self, path: str) -> Any:
        if path.startswith(PODS + "/"):
            return next((p for p in self.places[PODS] if p["metadata"]["name"] == path.rpartition("/")[2]), None)
        return self.places.get(path)

    def list(self, path: str, **_: Any) -> list[Any]:
        return self.places.get(path, [])

    def create(self, path: str, body: dict[str, Any], **query: str) -> dict[str, Any]:
        if path.endswith("subjectaccessreviews"):
            return {"status": {"allowed": body["spec"]["resourceAttributes"]["resource"] not in self.denied}}
        assert query == {"dryRun": "All"}  # nothing is made by a guard
        if self.webhook:
            raise ApiRefused(self.webhook, 422)
        return body


def request(kind: str = "pod_delete", hit: tuple[str, ...] = ("a",), **params: Any) -> Request:
    refs = tuple(Ref("pod", "ml", name, f"uid-{name}") for name in hit)
    return Request(kind, refs, refs, params, Target(select="app=web"))


def site(paper: Paper) -> Site:
    return Site(cast(Cluster, paper), Kubernetes.model_validate({"namespace": "ml", "context": "x"}))


def said(paper: Paper, **given: Any) -> str:
    return "\n".join(f"{o.saw} | {o.needs}" for o in guards.objections(site(paper), request(**given)))


def test_nothing_is_missing() -> None:
    assert said(Paper()) == ""  # rules for Argo Rollouts are not asked for where it is not installed


@pytest.mark.parametrize(
    "changes,words",
    [
        ({LITMUS: None}, "no chaosengines, chaosexperiments, chaosresults of litmuschaos.io | helm show crds"),
        (
            {DEPLOYMENTS: [operator("other/thing:1")]},
            "runs nowhere: no Deployment of it in any namespace | helm upgrade",
        ),
        ({DEPLOYMENTS: [operator(up=0)]}, "no replica that is available | kubectl -n chaos scale deployment op"),
        ({DEPLOYMENTS: [operator(WATCH_NAMESPACE="a, b")]}, "watches a, b, and the ChaosEngine is in ml"),
        (
            {DEPLOYMENTS: [operator(WATCH_NAMESPACE={"valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}})]},
            "watches chaos, and",
        ),
        (
            {f"{LITMUS}/namespaces/ml/chaosexperiments/pod-delete": None},
            "no ChaosExperiment pod-delete in namespace ml",
        ),
        (
            {"/api/v1/namespaces/ml/serviceaccounts/litmus-admin": None},
            "kubectl create serviceaccount litmus-admin -n ml",
        ),
    ],
)
def test_what_is_missing(changes: dict[str, Any], words: str) -> None:
    assert words in said(Paper(**changes))


def test_one_operator_that_watches_is_enough() -> None:
    two = [operator(WATCH_NAMESPACE="a"), operator("registry.local:5000/chaos-operator:3", WATCH_NAMESPACE="ml,b")]
    assert said(Paper(**{DEPLOYMENTS: two})) == ""


def test_rights_of_the_account_and_words_of_a_webhook() -> None:
    paper = Paper()
    paper.denied.add("replicasets")
    assert "may not get, list replicasets in ml: pod-delete needs it | kubectl apply -f manifests/litmus/roles" in said(
        paper
    )
    paper = Paper()
    paper.webhook = "spec.experiments[0].name: Invalid value"
    assert "would be refused: spec.experiments[0].name: Invalid value" in said(paper)


def test_privileged_helpers_under_pod_security() -> None:
    labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    changes = {"/api/v1/namespaces/ml": labels, f"{LITMUS}/namespaces/ml/chaosexperiments/pod-cpu-hog": {}}
    assert "pod security restricted of namespace ml refuses" in said(
        Paper(**changes), kind="cpu_stress", cores=1, load=1
    )
    assert said(Paper(**{"/api/v1/namespaces/ml": labels})) == ""  # pod-delete has no helper


def test_deletions_at_an_interval_only_where_they_stay_with_the_frozen() -> None:
    assert "cannot be kept to the frozen pods" in said(Paper(), interval_s=5.0)
    assert said(Paper(), hit=("a", "b"), interval_s=5.0) == ""
    whole = select(site(Paper()), request(hit=("a", "b"), interval_s=5.0))
    assert whole.workloads == (("deployment", "web"),)
    stable = Paper(**{PODS: [pod("db-0", "db", "StatefulSet"), pod("db-1", "db", "StatefulSet")]})
    found = select(site(stable), request(hit=("db-0",), interval_s=5.0))
    assert found.stable and found.pods == ("db-0",) and not found.workloads
    assert select(site(Paper()), request()).workloads == ()  # once: by name


def test_a_partition_wants_an_owner_that_litmus_knows() -> None:
    bare = Paper(
        **{PODS: [pod("a", "job", "Job")], f"{LITMUS}/namespaces/ml/chaosexperiments/pod-network-partition": {}}
    )
    assert "wants pods of one deployment" in said(bare, kind="network_isolation")
