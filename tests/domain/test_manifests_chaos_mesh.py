"""Resources of Chaos Mesh as drafts, and schedules of both tools as those of suites."""

from __future__ import annotations

from typing import Any

import pytest

from mlchaos_dagster.domain.faults import is_held
from mlchaos_dagster.domain.manifests.drafts import Brought, place, suite_of
from mlchaos_dagster.errors import SpecError

from .test_manifests import ENGINE, brought, cluster, said, user_file

DELAY = """\
apiVersion: chaos-mesh.org/v1alpha1
kind: NetworkChaos
metadata: {name: slow-web, namespace: shop, annotations: {experiment.chaos-mesh.org/pause: "true", why: x}}
spec:
  action: delay
  mode: fixed-percent
  value: "50"
  selector: {labelSelectors: {app: web, tier: front}}
  delay: {latency: 90ms, correlation: "25"}
  duration: 40s
"""
KILL = """\
apiVersion: chaos-mesh.org/v1alpha1
kind: PodChaos
metadata: {name: kill-web}
spec: {action: pod-kill, mode: one, selector: {namespaces: [shop], labelSelectors: {app: web}}}
"""


def resource_of(found: Brought, n: int = 0) -> dict[str, Any]:
    return found.drafts[n].fault["resource"]


def test_a_right_resource_is_taken_as_it_is_and_ends_when_its_duration_does() -> None:
    found = brought(DELAY)
    assert (found.notes, found.problems) == ([], [])
    (draft,) = found.drafts
    assert resource_of(found)["annotations"] == {"why": "x"}
    assert "duration" not in resource_of(found)["spec"] and resource_of(found)["spec"]["delay"]["latency"] == "90ms"
    placed = place(draft, cluster())
    (target,) = placed.added.values()
    assert (target.select, target.kubernetes.namespace) == ("app=web,tier=front", "shop")
    assert (placed.experiment.duration, placed.experiment.blast_radius.fraction) == (40.0, 0.5)
    assert is_held("chaos_mesh_resource", placed.experiment.fault.params())
    assert not is_held("chaos_mesh_resource", brought(KILL).drafts[0].fault)


@pytest.mark.parametrize(
    ("mode", "radius"),
    [
        ("mode: all", {"fraction": "100%"}),
        ("mode: fixed, value: '2'", {"count": 2}),
        ("mode: random-max-percent, value: '30'", {"fraction": "30%"}),
    ],
)
def test_how_many_pods(mode: str, radius: dict[str, Any]) -> None:
    assert brought(KILL.replace("mode: one", mode)).drafts[0].radius == radius


def test_expressions_are_a_label_selector() -> None:
    terms = "{key: a, operator: In, values: [x, y]}, {key: b, operator: Exists}, {key: c, operator: DoesNotExist}"
    (draft,) = brought(KILL.replace("labelSelectors: {app: web}", f"expressionSelectors: [{terms}]")).drafts
    assert draft.selection.select == "a in (x, y),b,!c"


REFUSED = [
    ("delay: {latency: 90ms", "dely: {latency: 90ms", 'Did you mean "delay"?'),
    ("latency: 90ms", "latency: 90", '"90" is not a duration.'),
    ("action: delay", "action: dely", 'spec.action: "dely" is not known. Did you mean "delay"?'),
    ("action: delay", "action: loss", "action loss needs loss."),
    ('value: "50"', 'value: "150"', 'mode fixed-percent with value "150". Allowed: 1 to 100'),
    ("duration: 40s", "duration: 40s\n  direction: both", "both needs target."),
    ("duration: 40s", "duration: 40s\n  remoteCluster: b", "it acts in another cluster"),
    ("duration: 40s", "duration: 0s", "not more than zero"),
    ("kind: NetworkChaos", "kind: NetworkChoas", 'Did you mean "NetworkChaos"?'),
    ("  selector: {labelSelectors: {app: web, tier: front}}\n", "", "spec: missing field selector."),
]


@pytest.mark.parametrize(("old", "new", "problem"), REFUSED, ids=[r[1].strip() or "gone" for r in REFUSED])
def test_what_its_webhook_would_refuse_is_refused_with_its_place(old: str, new: str, problem: str) -> None:
    assert old in DELAY
    found = brought(DELAY.replace(old, new))
    assert any(problem in str(p) and str(p).startswith("f.yaml:") for p in found.problems), said(found)


@pytest.mark.parametrize("wrong", ["delay: {latency: 90}", "duration: 40"])
def test_what_is_there_and_wrong_is_not_called_missing_as_well(wrong: str) -> None:
    key = wrong.partition(":")[0]
    text = "".join(f"  {wrong}\n" if line.startswith(f"  {key}:") else line for line in DELAY.splitlines(keepends=True))
    found = brought(text)
    assert len(found.problems) == 1 and "is not a duration" in str(found.problems[0]), said(found)
    assert not any("no duration" in str(note) for note in found.notes)


@pytest.mark.parametrize(
    ("selector", "why"),
    [
        ("{namespaces: [a, b], labelSelectors: {x: y}}", "pods of 2 namespaces"),
        ("{namespaces: [a]}", "every pod of namespace a"),
        ("{pods: {a: [web-0]}}", "pods by name"),
        ("{labelSelectors: {x: y}, nodes: [n]}", "their nodes"),
    ],
)
def test_a_selector_that_is_no_target_of_ours_needs_one_by_name(selector: str, why: str) -> None:
    text = KILL.replace("{namespaces: [shop], labelSelectors: {app: web}}", selector)
    (draft,) = brought(text).drafts
    with pytest.raises(SpecError, match=why):
        place(draft, cluster())
    assert place(draft, cluster(), "prediction-service").experiment.target == "prediction-service"


def test_what_is_outside_of_the_cluster_passes_through_with_a_target_by_name() -> None:
    text = KILL.replace("PodChaos", "AWSChaos").split("spec:")[0]
    found = brought(text + "spec: {action: ec2-stop, awsRegion: eu, ec2Instance: i-1, duration: 1m}")
    (draft,) = found.drafts
    assert found.problems == [] and "an EC2 instance" in draft.selection.why_none and draft.duration_s == 60
    place(draft, cluster(), "prediction-service")


def test_a_schedule_is_an_experiment_and_a_suite() -> None:
    text = KILL.replace("PodChaos", "Schedule").split("spec:")[0]
    text += "spec: {schedule: '%s', type: PodChaos, podChaos: {action: pod-kill, mode: one, selector: {labelSelectors: {a: b}}}}"
    cases = [
        ("@every 10m", {"cron": "*/10 * * * *", "timezone": "UTC", "min_interval": "10m"}),
        ("@every 5s", {"cron": "* * * * *", "timezone": "UTC", "min_interval": "1m"}),
        ("@every 2h", {"cron": "0 */2 * * *", "timezone": "UTC", "min_interval": "2h"}),
        ("CRON_TZ=Europe/Berlin 0 3 * * 1-5", {"cron": "0 3 * * 1-5", "timezone": "Europe/Berlin"}),
        ("30 0 3 * * ?", {"cron": "0 3 * * *", "timezone": "UTC"}),
        ("@daily", {"cron": "0 0 * * *", "timezone": "UTC"}),
    ]
    for line, expected in cases:
        found = brought(text % line)
        (suite,) = found.suites
        assert (found.problems, suite.schedule) == ([], expected)
        assert suite_of(suite, [d.name for d in found.drafts])["experiments"] == ["kill-web"]
    assert '"every day" is not a cron line' in said(brought(text % "every day"))
    assert '"PodChoas" is not a kind' in said(brought((text % "@daily").replace("type: PodChaos", "type: PodChoas")))


WORKFLOW = """\
apiVersion: chaos-mesh.org/v1alpha1
kind: Workflow
metadata: {name: w}
spec:
  entry: all
  templates:
    - {name: all, templateType: Serial, children: [a, wait, both]}
    - {name: wait, templateType: Suspend, deadline: 10s}
    - {name: both, templateType: Parallel, children: [b, check]}
    - {name: check, templateType: StatusCheck, statusCheck: {}}
    - {name: a, templateType: PodChaos, deadline: 20s, podChaos: {action: pod-failure, mode: one, selector: {labelSelectors: {x: y}}}}
    - name: b
      templateType: Schedule
      deadline: 40s
      schedule: {schedule: "@every 2s", type: PodChaos, podChaos: {action: pod-kill, mode: one, selector: {labelSelectors: {x: y}}}}
    - {name: alone, templateType: Suspend}
"""


def test_a_workflow_is_its_faults_in_order_and_says_what_is_not_done() -> None:
    found = brought(WORKFLOW)
    assert found.problems == []
    assert [(d.name, d.duration_s) for d in found.drafts] == [("w-a", 20.0), ("w-b", 30.0)]
    assert found.suites[0].schedule is None
    for note in (
        '"wait" is a Suspend',
        '"both" is a Parallel',
        '"check" is a StatusCheck',
        "run once",
        "nothing leads to alone",
    ):
        assert note in said(found)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("children: [b, check]", "children: [b, all]", '"all" leads to itself'),
        ("children: [b, check]", "children: [b, chek]", 'no template "chek". Did you mean "check"?'),
        ("entry: all", "entry: al", 'no template "al". Did you mean "all"?'),
        ("templateType: Serial", "templateType: Serious", '"Serious" is not known. Did you mean "Serial"?'),
    ],
)
def test_a_wrong_workflow(old: str, new: str, problem: str) -> None:
    assert problem in said(brought(WORKFLOW.replace(old, new)))


# ---- ChaosSchedule

SCHEDULE = (
    "apiVersion: litmuschaos.io/v1alpha1\nkind: ChaosSchedule\nmetadata: {name: nightly}\nspec:\n  schedule: %s\n"
    "  engineTemplateSpec:\n  " + ENGINE.split("spec:\n", 1)[1].replace("\n", "\n  ")
)


@pytest.mark.req("R3-05")
def test_the_users_schedule_is_the_night_of_working_days() -> None:
    found = user_file("schedule-nightly.yaml")
    assert found.problems == [] and len(found.drafts) == 1
    (suite,) = found.suites
    assert suite.schedule == {
        "cron": "0 2 * * 1-5",
        "timezone": "UTC",
        "window": "02:00-04:00",
        "days": ["mon", "tue", "wed", "thu", "fri"],
        "min_interval": "8h",
    }
    assert "the environment needs kubernetes: {litmus: {namespace: chaos-engineering}}" in said(found)
    assert "hour: {everyNthHour: 8}" in said(found) and "repeat.properties" in said(found)
    suite_of(suite, ["x"])


PLANS = [
    ("{repeat: {timeRange: {startTime: '02:30', endTime: '04:15'}, properties: {minChaosInterval: {hour: {everyNthHour: 1, minuteOfTheHour: 20}}}}}", "20 3 * * *", "1h", "02:30-04:15"),
    ("{repeat: {properties: {minChaosInterval: {hour: {everyNthHour: 8, minuteOfTheHour: 30}}}}}", "30 */8 * * *", "8h", None),
    ("{repeat: {properties: {minChaosInterval: {minute: {everyNthMinute: 20}}}, workHours: {includedHours: 9-17}}}", "*/20 9-17 * * *", "20m", "09:00-18:00"),
    ("{repeat: {properties: {minChaosInterval: {hour: {everyNthHour: 2}}}, workHours: {includedHours: 0-4}, workDays: {includedDays: 'Sat,Sun'}}}", "0 0,2,4 * * 0,6", "2h", "00:00-05:00"),
    ("{repeat: {timeRange: {startTime: '22:30', endTime: '02:00'}, minChaosInterval: 8h}}", "30 22 * * *", "8h", "22:30-02:00"),
    ("{repeat: {timeRange: {startTime: '02:00', endTime: '04:00', workDays: {includedDays: Mon-Fri}}, minChaosInterval: 1h}}", "0 2,3 * * 1-5", "1h", "02:00-04:00"),
    ("{repeat: {timeRange: {startTime: '2026-05-12T05:47:00Z'}, properties: {minChaosInterval: {hour: {everyNthHour: 1}}}}}", "0 * * * *", "1h", None),
]  # fmt: skip


@pytest.mark.req("R3-05")
@pytest.mark.parametrize(("plan", "cron", "interval", "window"), PLANS, ids=[p[0][:60] for p in PLANS])
def test_a_plan_is_a_cron_line_in_a_zone(plan: str, cron: str, interval: str, window: str | None) -> None:
    found = brought(SCHEDULE % plan)
    assert found.problems == [], said(found)
    when = found.suites[0].schedule
    assert when is not None
    assert (when["cron"], when["timezone"], when["min_interval"], when.get("window")) == (cron, "UTC", interval, window)
    suite_of(found.suites[0], ["x"])


@pytest.mark.parametrize("plan", ["{now: true}", "{once: {executionTime: '2026-05-12T05:47:00Z'}}"])
def test_what_does_not_repeat_has_no_schedule(plan: str) -> None:
    found = brought(SCHEDULE % plan)
    assert found.problems == [] and found.suites[0].schedule is None and "gets no schedule" in said(found)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ("{repeat: {properties: {minChaosInterval: {hour: {everyNth: 8}}}}}", "needs hour: {everyNthHour: 8}"),
        ("{repeat: {properties: {minChaosInterval: 8}}}", '"8" is not an interval'),
        (
            "{repeat: {workDays: {includedDays: 'Mon,Tuu'}, minChaosInterval: 8h}}",
            '"Tuu" is not a day. Did you mean "Tue"?',
        ),
        ("{repeat: {workHours: {includedHours: 9-26}, minChaosInterval: 8h}}", '"9-26" is not an hour'),
        ("{repeat: {timeRange: {startTime: '2 am', endTime: '04:00'}}}", '"2 am" is not a time'),
        ("{repeat: {}, repaet: 1}", 'Did you mean "repeat"?'),
    ],
)
def test_a_wrong_plan(plan: str, problem: str) -> None:
    assert problem in said(brought(SCHEDULE % plan))
