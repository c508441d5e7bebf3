"""Engines of Litmus as drafts: what is taken, put right and refused, each with its place; and the files of a user."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mlchaos_dagster.catalog import Catalog
from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.faults import is_held
from mlchaos_dagster.domain.manifests.drafts import Brought, body, place, to_yaml
from mlchaos_dagster.domain.manifests.files import bring
from mlchaos_dagster.domain.nodes import read_document
from mlchaos_dagster.domain.parsing import parse_experiment
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.errors import SpecError

USER = Path(__file__).parents[3] / "shared" / "data" / "user"
ENGINE = """\
apiVersion: litmuschaos.io/v1alpha1
kind: ChaosEngine
metadata: {name: web-chaos, namespace: shop, labels: {team: a}, annotations: {why: x}}
spec:
  appinfo: {appns: shop, applabel: app=web, appkind: deployment}
  chaosServiceAccount: sa
  experiments:
    - name: pod-delete
      spec:
        components:
          env:
            - {name: TOTAL_CHAOS_DURATION, value: "60"}
"""


def user_file(name: str) -> Brought:
    path = USER / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    brought = bring(path.read_bytes(), name)
    assert brought is not None
    return brought


def brought(text: str) -> Brought:
    found = bring(text, "f.yaml")
    assert found is not None
    return found


def cluster() -> Environment:
    """The shipped one, with both tools."""
    environment = Catalog().environment("cluster")
    more = {"litmus": ("litmus_engine",), "chaos_mesh": ("chaos_mesh_resource",)}
    native = (*environment.backends["kubernetes"], "gpu_memory_hog")
    return environment.model_copy(update={"backends": {**environment.backends, "kubernetes": native, **more}})


def engine_of(found: Brought, n: int = 0) -> dict[str, Any]:
    return found.drafts[n].fault["engine"]


def entry(found: Brought) -> dict[str, Any]:
    return engine_of(found)["experiments"][0]


def env(found: Brought) -> dict[str, str]:
    return {e["name"]: e["value"] for e in entry(found)["spec"]["components"]["env"]}


def said(found: Brought) -> str:
    return "\n".join(str(p) for p in (*found.notes, *found.problems))


# ---- engines


@pytest.mark.req("R3-01")
def test_a_right_engine_is_taken_as_it_is_and_placed_on_its_pods() -> None:
    found = brought(ENGINE + "            - {name: PODS_AFFECTED_PERC, value: '50'}\n")
    assert (found.notes, found.problems) == ([], [])
    (draft,) = found.drafts
    engine = engine_of(found)
    assert (engine["labels"], engine["annotations"], engine["chaosServiceAccount"]) == (
        {"team": "a"},
        {"why": "x"},
        "sa",
    )
    placed = place(draft, cluster())
    target = placed.environment.targets[placed.experiment.target]
    assert (target.select, target.kubernetes.namespace, target.kubernetes.kind) == ("app=web", "shop", "Pod")
    assert (placed.experiment.duration, placed.experiment.blast_radius.fraction) == (60.0, 0.5)
    assert found.hints and "natively" in found.hints[0] and "pod_delete" in found.hints[0]


@pytest.mark.req("R3-01")
def test_a_misspelt_variable_is_said_and_an_unlike_one_is_left_alone() -> None:
    found = brought(
        ENGINE + "            - {name: PODS_AFECTED_PERC, value: '50'}\n            - {name: OURS, value: x}\n"
    )
    (note,) = found.notes
    assert 'Litmus reads no "PODS_AFECTED_PERC". Did you mean "PODS_AFFECTED_PERC"?' in note.what
    assert not found.problems and env(found)["OURS"] == "x"


def test_a_target_of_the_environment_with_the_same_pods_is_used() -> None:
    text = ENGINE.replace("appns: shop, applabel: app=web", "appns: mlplatform, applabel: app=inference")
    placed = place(brought(text).drafts[0], cluster())
    assert (placed.experiment.target, dict(placed.added)) == ("prediction-service", {})
    elsewhere = place(brought(text.replace("appns: mlplatform", "appns: shop")).drafts[0], cluster())
    assert [t.kubernetes.namespace for t in elsewhere.added.values()] == ["shop"]


def test_without_a_share_one_pod_is_hit_and_container_and_node_targets_are_kept() -> None:
    assert brought(ENGINE).drafts[0].radius == {"count": 1}
    (draft,) = brought(ENGINE + "            - {name: TARGET_CONTAINER, value: main}\n").drafts
    assert draft.selection.container == "main"
    node = ENGINE.replace("pod-delete", "node-drain") + "            - {name: TARGET_NODE, value: node-7}\n"
    (draft,) = brought(node).drafts
    assert (draft.selection.kind, draft.selection.select) == ("Node", "kubernetes.io/hostname=node-7")
    assert place(draft, cluster()).experiment.blast_radius.count == 1


def test_each_experiment_of_an_engine_becomes_one_of_its_own() -> None:
    found = brought(ENGINE + ENGINE.split("experiments:\n")[1].replace("pod-delete", "pod-cpu-hog"))
    assert [d.name for d in found.drafts] == ["web-chaos-pod-delete", "web-chaos-pod-cpu-hog"]
    assert [[e["name"] for e in engine_of(found, n)["experiments"]] for n in (0, 1)] == [
        ["pod-delete"],
        ["pod-cpu-hog"],
    ]
    same = brought(ENGINE + ENGINE.split("experiments:\n")[1])
    assert [d.name for d in same.drafts] == ["web-chaos-pod-delete", "web-chaos-pod-delete-2"]


def test_several_documents_in_a_file_and_what_is_no_fault_among_them() -> None:
    found = brought(f"{ENGINE}---\napiVersion: v1\nkind: Service\nmetadata: {{name: x}}\n---\n{ENGINE}")
    assert [d.name for d in found.drafts] == ["web-chaos", "web-chaos-2"]
    assert said(found) == "f.yaml:15:7  kind: a Service is no fault: apply it with kubectl."


CORRECTED = [
    # instead of … this is written, this is said, and this is what comes of it
    ('value: "60"', 'value: "30s"', '"30" is taken for "30s"', {"TOTAL_CHAOS_DURATION": "30"}),
    ('value: "60"', 'value: "2m"', '"120" is taken for "2m"', {"TOTAL_CHAOS_DURATION": "120"}),
    ('value: "60"', "value: 45", '"45" is taken', {"TOTAL_CHAOS_DURATION": "45"}),
    ("appkind: deployment", "appkind: Deployment", 'written "deployment"', {}),
    ("  chaosServiceAccount: sa\n", "", "missing field chaosServiceAccount", {}),
    (
        "  chaosServiceAccount: sa\n",
        "  chaosServiceAccount: sa\n  annotationCheck: 'true'\n",
        "left out: Litmus 3 reads",
        {},
    ),
    ("  chaosServiceAccount: sa\n", "  chaosServiceAccount: sa\n  engineState: stop\n", "is ours to say", {}),
    ("name: TOTAL_CHAOS_DURATION", "name: RAMP_TIME", "no TOTAL_CHAOS_DURATION: 30 s", {"RAMP_TIME": "60"}),
    ("name: pod-delete", "name: my-own-fault", "none of Litmus's own experiments", {}),
]


@pytest.mark.req("R3-01")
@pytest.mark.parametrize(("old", "new", "note", "variables"), CORRECTED, ids=[c[1] or "gone" for c in CORRECTED])
def test_what_is_common_and_wrong_is_put_right_and_said(
    old: str, new: str, note: str, variables: dict[str, str]
) -> None:
    found = brought(ENGINE.replace(old, new))
    assert found.problems == [] and len(found.drafts) == 1
    assert [str(n).startswith("f.yaml:") and note in str(n) for n in found.notes] == [True]
    assert {k: v for k, v in env(found).items() if k in variables} == variables
    place(found.drafts[0], cluster())


REFUSED = [
    ("appkind: deployment", "appkind: deploymnt", 'f.yaml:5:54  spec.appinfo.appkind: "deploymnt" is not known. Did you mean "deployment"?'),
    (", appkind: deployment", "", "spec.appinfo: applabel without appkind. Allowed: both"),
    ("experiments:", "experiment:", 'f.yaml:7:3  spec.experiment: no such field. Did you mean "experiments"?'),
    ('value: "60"', 'value: "-5"', 'TOTAL_CHAOS_DURATION: "-5" is not a number of seconds.'),
    ('value: "60"', 'value: "0"', "TOTAL_CHAOS_DURATION: 0 is not more than zero."),
    ("name: TOTAL", "nam: TOTAL", 'no such field. Did you mean "name"?'),
    ("    - name: pod-delete\n", "    - name: pod-delete\n      probe: []\n", 'spec.experiments[0].probe: no such field. Did you mean "spec.probe"?'),
    ("name: pod-delete", "name: gpu-temperature", 'Litmus has no experiment "gpu-temperature", and we none that is the same. Natively: gpu_mem'),
    ("name: pod-delete", "name: a/../b", "is not the name of an object"),
    ("chaosServiceAccount: sa", "chaosServiceAccount: ../x", "is not the name of an object"),
    ("appns: shop", "appns: ../x", "is not the name of an object"),
    ("namespace: shop", "namespace: a/b", "is not the name of an object"),
    ("litmuschaos.io/v1alpha1", "litmuschaos.io/v1", 'Did you mean "litmuschaos.io/v1alpha1"?'),
    ("kind: ChaosEngine", "kind: ChaosEngin", 'kind: "ChaosEngin" is not known. Did you mean "ChaosEngine"?'),
    ("appns: shop, applabel: app=web", "applabel: 'app in web;x'", "is not a label selector"),
    ("  appinfo: {appns: shop, applabel: app=web, appkind: deployment}", "  selectors: {pods: [], workloads: []}", "exactly one of pods, workloads"),
]  # fmt: skip


@pytest.mark.req("R3-01")
@pytest.mark.parametrize(("old", "new", "problem"), REFUSED, ids=[r[1] or "gone" for r in REFUSED])
def test_what_cannot_be_meant_is_refused_once_with_its_place(old: str, new: str, problem: str) -> None:
    assert old in ENGINE
    found = brought(ENGINE.replace(old, new))
    assert [problem in str(p) for p in found.problems] == [True], said(found)
    assert str(found.problems[0]).startswith("f.yaml:")


def test_a_template_and_a_fault_outside_of_the_cluster_need_a_target_by_name() -> None:
    blank = ENGINE.replace(
        "appns: shop, applabel: app=web, appkind: deployment", "appns: '', applabel: '', appkind: ''"
    )
    outside = ENGINE.replace("pod-delete", "ec2-stop-by-id")
    for text, why in ((blank, "its appinfo names no applabel"), (outside, "it hits EC2 instances, which no cluster")):
        found = brought(text)
        assert found.problems == []
        with pytest.raises(SpecError, match=why):
            place(found.drafts[0], cluster())
        assert place(found.drafts[0], cluster(), "prediction-service").experiment.target == "prediction-service"


def test_a_target_by_name_takes_the_file_and_the_container_that_were_written() -> None:
    text = ENGINE.replace("pod-delete", "model-corruption") + "            - {name: FILE_PATH, value: /m/x.pt}\n"
    placed = place(brought(text).drafts[0], cluster(), "prediction-service")
    (name,) = placed.added
    assert (placed.experiment.target, placed.added[name].kubernetes.path) == (name, "/m/x.pt")


def test_without_the_backend_one_line_says_what_to_add() -> None:
    with pytest.raises(SpecError) as e:
        place(brought(ENGINE).drafts[0], Catalog().environment("cluster"))
    (problem,) = e.value.problems
    assert "add to its file: backends: {litmus: [litmus_engine]}." in str(problem)


def test_kills_that_are_repeated_are_held_and_single_ones_are_not() -> None:
    once = brought(ENGINE + "            - {name: CHAOS_INTERVAL, value: '60'}\n").drafts[0].fault
    again = brought(ENGINE + "            - {name: CHAOS_INTERVAL, value: '10'}\n").drafts[0].fault
    assert [is_held("litmus_engine", f) for f in (once, again, brought(ENGINE).drafts[0].fault)] == [False, True, True]


# ---- probes


def probed(probe: str) -> Brought:
    return brought(ENGINE + "        probe:\n          - " + probe.replace("\n", "\n            ") + "\n")


RUN = "runProperties: {probeTimeout: 5s, interval: 2s}"


def probe_of(found: Brought) -> dict[str, Any]:
    return entry(found)["spec"]["probe"][0]


@pytest.mark.req("R3-01")
def test_old_probes_are_brought_up_to_date() -> None:
    found = probed(
        "name: p\ntype: httpProbe\nmode: continuous\nrunProperties: {probeTimeout: 5, interval: '2', retry: '3'}\n"
        "httpProbe/inputs: {url: http://x, insecureSkipTLS: true, method: {get: {criteria: ==, responseCode: 200}}}"
    )
    assert found.problems == [] and len(found.notes) == 6
    assert probe_of(found) == {
        "name": "p",
        "type": "httpProbe",
        "mode": "Continuous",
        "runProperties": {"probeTimeout": "5s", "interval": "2s", "retry": 3},
        "httpProbe/inputs": {
            "url": "http://x",
            "insecureSkipVerify": True,
            "method": {"get": {"criteria": "==", "responseCode": "200"}},
        },
    }


def test_an_inline_source_is_no_source_and_one_with_an_image_is_kept() -> None:
    text = (
        "name: p\ntype: cmdProbe\nmode: Edge\n"
        + RUN
        + "\ncmdProbe/inputs: {command: date, %scomparator: {type: string, criteria: contains, value: x}}"
    )
    assert "source" not in probe_of(probed(text % "source: inline, "))["cmdProbe/inputs"]
    kept = probed(text % "source: {image: 'a:1', hostNetwork: 'true'}, ")
    assert probe_of(kept)["cmdProbe/inputs"]["source"] == {"image": "a:1", "hostNetwork": True}
    assert "missing field image" in said(probed(text % "source: {imag: a}, ")) or "Did you mean" in said(
        probed(text % "source: {imag: a}, ")
    )


def test_what_litmus_never_runs_is_left_out() -> None:
    found = probed("name: p\ntype: sloProbe\nmode: EOT\n" + RUN + "\nsloProbe/inputs: {platformEndpoint: x}")
    assert "probe" not in entry(found)["spec"] and "Litmus never runs it" in said(found)


@pytest.mark.parametrize("query", ["up", 'rate(x{a="b"}[5m]) > 1', r"x{a=~\"b.*$\"}", "`id`$(id)\\", "a'b"])
def test_a_query_reaches_promql_as_it_was_written_through_the_shell_of_litmus(query: str) -> None:
    found = probed(
        f"name: p\ntype: promProbe\nmode: EOT\n{RUN}\npromProbe/inputs: {{endpoint: http://p, query: {json.dumps(query)}, "
        "comparator: {criteria: <, value: 1}}"
    )
    written = probe_of(found)["promProbe/inputs"]["query"]
    shell = subprocess.run(["/bin/sh", "-c", f'printf %s "{written}"'], capture_output=True, text=True, check=True)
    assert shell.stdout == query


def test_a_post_becomes_a_command_whose_words_no_shell_changes() -> None:
    body, url = """{"q": "it's $(id)"}""", "http://x/?a=1&b=2"
    found = probed(
        f"name: p\ntype: httpProbe\nmode: EOT\n{RUN}\nhttpProbe/inputs: {{url: '{url}', method: {{post: {{body: "
        f"{json.dumps(body)}, criteria: '<', responseTimeout: 1500}}}}}}"
    )
    probe = probe_of(found)
    assert probe["type"] == "cmdProbe" and probe["runProperties"]["probeTimeout"] == "1500ms"
    inputs = probe["cmdProbe/inputs"]
    assert inputs["comparator"] == {"type": "int", "criteria": "==", "value": "200"}
    shown = inputs["command"].replace("curl", "printf '%s\\n'", 1)
    out = subprocess.run(["/bin/sh", "-c", shown], capture_output=True, text=True, check=True).stdout.splitlines()
    assert body in out and url in out and "Content-Type: application/json" in out and "1.5" in out


WRONG_PROBES = [
    ("type: httpProb\nmode: EOT", 'Did you mean "httpProbe"?'),
    ("type: httpProbe\nmode: Sometimes\nhttpProbe/inputs: {url: x, method: {get: {criteria: ==, responseCode: '1'}}}", '"Sometimes" is not known.'),
    ("type: httpProbe\nmode: EOT", "missing field httpProbe/inputs, which a httpProbe needs."),
    ("type: httpProbe\nmode: EOT\nhttpProbe/inputs: {url: x, method: {}}", "needs exactly one of get, post; it has none."),
    ("type: promProbe\nmode: EOT\npromProbe/inputs: {endpoint: x, comparator: {criteria: '<', value: '1'}}", "missing field query"),
    ("type: cmdProbe\nmode: EOT\ncmdProbe/inputs: {command: x, comparator: {type: int, criteria: more, value: '1'}}", '"more" is not known.'),
    ("type: k8sProbe\nmode: EOT\nk8sProbe/inputs: {version: v1, resource: pods, operation: exists}", '"exists" is not known.'),
    ("type: k8sProbe\nmode: EOT\nk8sProbe/inputs: {version: v1, resource: pods, operation: create}", "missing field data"),
]  # fmt: skip


@pytest.mark.parametrize(("probe", "problem"), WRONG_PROBES, ids=[p[0][:60] for p in WRONG_PROBES])
def test_a_wrong_probe_is_refused(probe: str, problem: str) -> None:
    found = probed(f"name: p\n{RUN}\n{probe}")
    assert [problem in str(p) for p in found.problems] == [True], said(found)


# ---- what is written is what is read


def test_an_engine_in_a_file_of_ours_is_looked_at_as_closely() -> None:
    draft = brought(ENGINE).drafts[0]
    text = to_yaml(body(draft, cluster(), "prediction-service"))
    wrong = [
        ("components:", "component:", 'no such field. Did you mean "components"?'),
        ("appkind: deployment", "appkind: pod", '"pod" is not known'),
        ("- name: TOTAL_CHAOS_DURATION", "- x", "Allowed: fields"),
    ]
    for old, new, problem in wrong:
        assert old in text
        cut = text.replace(old, new).replace(
            '            value: "60"\n', "" if new == "- x" else '            value: "60"\n'
        )
        with pytest.raises(SpecError) as e:
            parse_experiment(cut, "f.yaml")
        assert problem in str(e.value) and str(e.value).startswith("f.yaml:"), str(e.value)
    query = "name: p\ntype: promProbe\nmode: EOT\nrunProperties: {probeTimeout: 5s, interval: 2s}\npromProbe/inputs: "
    found = probed(query + "{endpoint: http://p, query: 'x{a=\"b\"}', comparator: {criteria: <, value: '1'}}")
    placed = place(found.drafts[0], cluster())
    written = to_yaml(body(found.drafts[0], cluster(), placed.experiment.target))
    assert parse_experiment(written) == placed.experiment  # escaped once, not once more


def test_what_is_written_as_yaml_is_read_back_as_the_same() -> None:
    for text in (ENGINE, ENGINE.replace('value: "60"', 'value: "1e3"').replace("TOTAL_CHAOS_DURATION", "X")):
        draft = brought(text).drafts[0]
        placed = place(draft, cluster())
        assert parse_experiment(to_yaml(body(draft, cluster(), placed.experiment.target))) == placed.experiment
    odd = {
        "a": ["1e3", "no", "0x1", "12:30", "null", "", " x", "1_000", "~", "-", "# x", "a: b", "ä\n b", "true"],
        "b": 1.5,
    }
    assert read_document(to_yaml(odd), "x").root.plain() == odd


# ---- a user's files


@pytest.mark.req("R3-01")
def test_the_users_engine_runs_with_its_probe_mended() -> None:
    found = user_file("engine-api-gateway-pod-delete.yaml")
    assert found.problems == [] and len(found.notes) == 3
    probe = probe_of(found)
    assert probe["runProperties"] == {"probeTimeout": "5s", "retry": 3, "interval": "2s"}
    assert probe["httpProbe/inputs"]["insecureSkipVerify"] is True
    experiment = place(found.drafts[0], cluster()).experiment
    assert (experiment.name, experiment.duration, experiment.blast_radius.count) == ("api-gateway-chaos", 60.0, 1)
    assert is_held("litmus_engine", experiment.fault.params())


@pytest.mark.parametrize(
    ("name", "kind", "length"),
    [
        ("engine-gpu-memory-hog.yaml", "gpu_memory_hog", 300),
        ("fragment-model-corruption.yaml", "model_corruption", 180),
        ("fragment-container-kill.yaml", "litmus_engine", 60),
        ("fragment-pod-cpu-hog.yaml", "litmus_engine", 120),
        ("fragment-pod-memory-hog.yaml", "litmus_engine", 180),
        ("fragment-pod-network-latency.yaml", "litmus_engine", 120),
        ("fragment-pod-network-loss.yaml", "litmus_engine", 60),
    ],
)
def test_every_other_experiment_of_the_user_can_be_placed(name: str, kind: str, length: float) -> None:
    found = user_file(name)
    assert found.problems == [] and len(found.drafts) == 1
    target = "" if name.startswith("engine") else "prediction-service"
    experiment: Experiment = place(found.drafts[0], cluster(), target).experiment
    assert (experiment.fault.kind, experiment.duration) == (kind, length)
    if kind == "gpu_memory_hog":
        assert experiment.fault.params() == {"fraction": 0.8} and "Litmus has no experiment" in said(found)
    if kind == "model_corruption":
        assert experiment.fault.params() == {"how": "random_bytes"} and "Litmus has no experiment" in said(found)
    if name == "fragment-pod-network-latency.yaml":
        assert probe_of(found)["runProperties"]["probeTimeout"] == "5s"
        assert "curl" in probe_of(found)["cmdProbe/inputs"]["command"]


@pytest.mark.req("R3-01")
def test_what_the_user_wrote_has_the_form_that_the_api_server_takes_and_before_had_not() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    path = USER.parent / "litmus" / "crds" / "chaosengine_crd.yaml"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    versions = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = jsonschema.Draft202012Validator(versions[0]["schema"]["openAPIV3Schema"]["properties"]["spec"])
    names = [p.name for p in sorted(USER.iterdir()) if p.name.startswith(("engine", "fragment", "schedule"))]
    engines = [d.fault["engine"] for n in names for d in user_file(n).drafts if "engine" in d.fault]
    assert len(engines) == 7 and not [e.message for one in engines for e in schema.iter_errors(one)]
    raw = yaml.safe_load((USER / "engine-api-gateway-pod-delete.yaml").read_text())["spec"]
    assert "5 is not of type 'string'" in [e.message for e in schema.iter_errors(raw)]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("experiment-template.yaml", "experiment in sentences"),
        ("rollback.yaml", "under abort:"),
        ("game-days.yaml", "--suite game-day"),
        ("chaos-metrics.yaml", "mlchaos history"),
        ("dashboard.json", "Grafana"),
    ],
)
def test_a_users_file_that_is_no_experiment_is_answered_in_one_line(name: str, answer: str) -> None:
    (problem,) = user_file(name).problems
    assert str(problem).startswith(f"{name}:") and answer in problem.what and "\n" not in str(problem)


def test_the_users_stages_are_ours() -> None:
    path = USER / "progressive.yaml"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    assert bring(path.read_bytes(), "progressive.yaml") is None


# ---- anything at all

_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 500), st.floats(allow_nan=False), st.text(max_size=12))
_WORDS = st.sampled_from(
    "name spec appinfo applabel appkind appns experiments probe type mode runProperties httpProbe/inputs method get post criteria "
    "url components env value TOTAL_CHAOS_DURATION pod-delete node-drain gpu-memory-hog model-corruption httpProbe cmdProbe EOT "
    "cmdProbe/inputs command comparator source promProbe promProbe/inputs query endpoint schedule repeat timeRange startTime "
    "workDays includedDays minChaosInterval hour everyNthHour engineTemplateSpec templates entry children templateType Serial "
    "networkChaos podChaos action delay selector labelSelectors namespaces duration stressors target 8h 02:00 30s * @every".split()
)
_TREES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(_SCALARS, _WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_WORDS, inner, max_size=5)),
    max_leaves=25,
)
_KINDS = (
    "ChaosEngine",
    "ChaosSchedule",
    "PodChaos",
    "NetworkChaos",
    "StressChaos",
    "JVMChaos",
    "AWSChaos",
    "Schedule",
    "Workflow",
)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(_KINDS), _TREES, st.booleans())
def test_anything_brings_experiments_or_problems_and_never_another_error(kind: str, spec: Any, bare: bool) -> None:
    group = "litmuschaos.io" if kind.startswith("Chaos") else "chaos-mesh.org"
    whole = (
        [{"name": "pod-delete", "spec": spec}]
        if bare
        else {"apiVersion": f"{group}/v1alpha1", "kind": kind, "spec": spec}
    )
    try:
        found = bring(json.dumps(whole), "f.json")
        assert found is not None and (found.drafts or found.problems)
        for draft in found.drafts if not found.problems else ():
            place(draft, PLACE, "" if draft.selection.select else "prediction-service")
    except SpecError as e:
        assert all(len(str(p).splitlines()) == 1 for p in e.problems)


PLACE = cluster()
