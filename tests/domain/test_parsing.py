"""Every wrong file gives problems with place, path and the allowed values; nothing else ever comes out."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlchaos_dagster.domain import faults
from mlchaos_dagster.domain.nodes import MAX_BYTES, MAX_NODES, read_document, resolve_plain
from mlchaos_dagster.domain.parsing import nearest, parse_any, parse_environment, parse_experiment, parse_suite
from mlchaos_dagster.domain.spec import Experiment, Suite
from mlchaos_dagster.errors import SpecError

GOOD = """\
schema: mlchaos/v1
name: serving-pod-failure
title: The prediction service survives losing 30 % of its pods
hypothesis: It keeps 99 % availability, through recreation and load balancing.
area: serving
owner: ml-platform@example.com
target: prediction-service
fault: {kind: pod_failure}
blast_radius: {fraction: 30%, max_targets: 10}
duration: 10m
steady_state:
  - {sli: availability, at_least: 99%}
  - {sli: latency_p95, below: 300ms}
expect:
  - {signal: ready_replicas, drops: true}
recovery: {within: 30s}
abort: [{sli: error_rate, above: 5%, for: 3s}]
"""
FAULTS = ", ".join(faults.FAULTS)


def problems_of(text: str | bytes) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse_any(text, "f.yaml")
    return [str(p) for p in caught.value.problems]


def test_a_good_file_becomes_si_floats() -> None:
    e = parse_experiment(GOOD)
    assert (e.duration, e.blast_radius.fraction, e.steady_state[1].limit.value) == (600.0, 0.3, 0.3)
    assert (e.abort[0].for_s, e.abort[0].limit.value) == (3.0, 0.05)


def test_what_comes_out_goes_in_again() -> None:
    e = parse_experiment(GOOD)
    dumped = e.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert Experiment.model_validate(dumped) == e


def test_json_is_read_too_with_tabs() -> None:
    body = parse_any(GOOD).document.root.plain()
    assert parse_experiment(json.dumps(body, indent="\t")) == parse_experiment(GOOD)


WRONG_FIELDS = [
    # what is replaced, by what, the problems
    ("kind: pod", "kindd: pod", ['f.yaml:8:9  fault.kindd: no such field. Did you mean "kind"? Allowed: kind.']),
    (
        "pod_failure}",
        "pod_failur}",
        [f'f.yaml:8:15  fault.kind: no such fault "pod_failur". Did you mean "pod_failure"? Allowed: {FAULTS}.'],
    ),
    (
        "pod_failure}",
        "pod_kill}",
        [f'f.yaml:8:15  fault.kind: no such fault "pod_kill". Did you mean "pod_delete"? Allowed: {FAULTS}.'],
    ),
    ("{kind: pod_failure}", "{}", [f"f.yaml:8:8  fault: missing field kind. Allowed: kind: {FAULTS}."]),
    (
        "pod_failure}",
        "pod_delete, signal: kil, intervall: 3s}",
        [
            'f.yaml:8:35  fault.signal: "kil" is not known. Did you mean "kill"? Allowed: kill, term.',
            'f.yaml:8:40  fault.intervall: no such field. Did you mean "interval"? Allowed: kind, interval, signal, evict.',
        ],
    ),
    ("10m\n", "30\n", ["f.yaml:10:11  duration: 30 has no unit. Allowed: ms, s, m, h, d, such as 30s."]),
    (
        "10m\n",
        "5 m s\n",
        [
            'f.yaml:10:11  duration: "5 m s" is not a duration. Allowed: a number with a unit, such as 300ms, 10s, 5m, '
            "1h30m."
        ],
    ),
    (
        "10m\n",
        "-5s\n",
        [
            'f.yaml:10:11  duration: "-5s" is not a duration. Allowed: a number with a unit, such as 300ms, 10s, 5m, '
            "1h30m."
        ],
    ),
    (
        "10m\n",
        "0s\n",
        ['f.yaml:10:11  duration: "0s" is not more than zero. Allowed: a positive duration, such as 10s.'],
    ),
    ("30%", "150%", ['f.yaml:9:26  blast_radius.fraction: "150%" is more than 100%. Allowed: 0% to 100%.']),
    ("30%", "0%", ['f.yaml:9:26  blast_radius.fraction: "0%" is not more than 0%. Allowed: more than 0%.']),
    (
        "30%",
        "0.3",
        ["f.yaml:9:26  blast_radius.fraction: 0.3 has no unit. Allowed: a percentage, such as 30%."],
    ),
    ("fraction: 30%", "count: 0", ["f.yaml:9:23  blast_radius.count: 0 is not more than 0. Allowed: more than 0."]),
    (
        "fraction: 30%",
        "count: 1.5",
        ["f.yaml:9:23  blast_radius.count: 1.5 is not a whole number. Allowed: a whole number, such as 3."],
    ),
    (
        "fraction: 30%",
        "fraction: 30%, count: 2",
        ["f.yaml:9:15  blast_radius: needs exactly one of fraction, count."],
    ),
    (
        "name: serving",
        "name: Serving",
        [
            'f.yaml:2:7  name: "Serving-pod-failure" is not a name. Allowed: lower-case letters, digits and dashes, '
            "such as my-service-1."
        ],
    ),
    (
        "owner: ml-platform@example.com",
        "owner: 3",
        ['f.yaml:6:8  owner: 3 is not text. Allowed: text, in quotes where it looks like a number, such as "30".'],
    ),
    (
        "recovery: {within: 30s}",
        "recovery: 30s",
        [
            'f.yaml:16:11  recovery: "30s" is not a set of fields. Allowed: lines such as name: value, indented below '
            "the field."
        ],
    ),
    ("drops: true", "drops: false", ["f.yaml:15:37  expect[0].drops: false is not known. Allowed: true."]),
    ("99%}", "150%}", ['f.yaml:12:35  steady_state[0].at_least: "150%" is more than 100%. Allowed: 0% to 100%.']),
    ("area: serving", "area: serving\narea: x", ['f.yaml:6:1  "area" is given twice, first in line 5. Allowed: once.']),
    ("area: serving\n", "", ["f.yaml:1:1  missing field area."]),
    ("schema: mlchaos/v1", "schema: v1", ['f.yaml:1:9  schema: "v1" is not known. Allowed: mlchaos/v1.']),
    ("10m\n", "*x\n", ["f.yaml:10:11  *x refers to nothing. Allowed: a name given with &x above."]),
    ("10m\n", ".inf\n", ["f.yaml:10:11  .inf is not a finite number. Allowed: finite numbers."]),
    ("10m\n", '"1\\0"\n', ["f.yaml:10:11  the text holds the character U+0000. Allowed: printable text."]),
    ("duration: ", "\tduration: ", ["f.yaml:10:1  not YAML: the line is indented with a tab. Allowed: spaces."]),
    (
        "{kind: pod_failure}",
        "!!python/object/apply:os.system [id]",
        ["f.yaml:8:8  the tag !!python/object/apply:os.system is not allowed. Allowed: plain values without tags."],
    ),
]


@pytest.mark.parametrize(("old", "new", "expected"), WRONG_FIELDS, ids=[w[1].strip()[:30] for w in WRONG_FIELDS])
def test_a_wrong_field_is_told_with_its_place_and_what_is_allowed(old: str, new: str, expected: list[str]) -> None:
    assert old in GOOD
    found = problems_of(GOOD.replace(old, new, 1))
    assert len(found) == len(expected)
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(beginning)


def test_a_misspelt_field_is_one_problem_not_two() -> None:
    (line,) = problems_of(GOOD.replace("title:", "titel:"))
    assert line.startswith('f.yaml:3:1  titel: no such field. Did you mean "title"? Allowed: schema, name, title, ')


def test_all_problems_of_a_file_are_told_in_its_order() -> None:
    text = GOOD.replace("10m", "30").replace("30%", "150%").replace("area: serving\n", "area: Serving\n")
    assert [line.split("  ")[0] for line in problems_of(text)] == ["f.yaml:5:7", "f.yaml:9:26", "f.yaml:10:11"]


def test_an_abort_limit_looser_than_its_slo_is_refused_at_its_place() -> None:
    text = GOOD.replace("sli: error_rate, above: 5%", "sli: availability, below: 90%")
    (line,) = problems_of(text)
    assert line.startswith("f.yaml:17:9  abort[0]: the limit on availability is looser than the steady state")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(c)}: &{chr(c)} [{','.join(['*' + chr(c - 1)] * 10)}]\n" for c in range(ord("b"), ord("j"))
)
NOT_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "f.yaml:1:1  the file is empty."),
    "only a comment": ("# nothing\n", "f.yaml:1:1  the file is empty."),
    "null document": ("---\n", "f.yaml:1:1  the file is empty."),
    "list": ("- a\n- b\n", "f.yaml:1:1  the file holds a list, not fields."),
    "one word": ("hello", "f.yaml:1:1  the file holds a single value, not fields."),
    "not YAML": ("a: b: c", "f.yaml:1:5  not YAML: mapping values are not allowed"),
    "unclosed": ("a: [", "f.yaml:2:1  not YAML: "),
    "two documents": (GOOD + "---\n" + GOOD, "f.yaml:18:1  a second document begins here."),
    "flow depth": ("[" * 100_000, "f.yaml:1:41  nested more than 40 levels deep."),
    "block depth": ("- " * 100_000, "f.yaml:1:81  nested more than 40 levels deep."),
    "bomb": (BOMB, f"f.yaml:5:17  more than {MAX_NODES} values (aliases counted in full)."),
    "circle": ("a: &a [*a]", "f.yaml:1:8  *a contains itself."),
    "10 MB": (b"a: b\n" * 2_000_000, "f.yaml:1:1  the file is larger than 1 MiB."),
    "latin-1": ("title: Müller".encode("latin-1"), "f.yaml:1:9  byte 0xfc is not UTF-8."),
    "utf-16": (GOOD.encode("utf-16"), "f.yaml:1:1  the file is UTF-16."),
    "NUL": ("a: b\0", "f.yaml:1:5  the character U+0000 is not allowed"),
    "binary": (bytes(range(256)), "f.yaml:2:118  byte 0x80 is not UTF-8."),
    "list as a name": ("? [a]\n: 1\n", "f.yaml:1:3  a field's name is a list or mapping."),
}


@pytest.mark.parametrize("name", NOT_FILES)
def test_what_is_no_spec_file_is_one_line(name: str) -> None:
    text, beginning = NOT_FILES[name]
    (line,) = problems_of(text)
    assert line.startswith(beginning)


def test_the_bomb_is_refused_before_it_is_expanded() -> None:
    import time
    import tracemalloc

    tracemalloc.start()
    before = time.perf_counter()
    problems_of(BOMB)
    assert time.perf_counter() - before < 5
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    assert parse_experiment(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()).name == "serving-pod-failure"


def test_small_anchors_are_fine() -> None:
    text = GOOD.replace("at_least: 99%", "at_least: &high 99%").replace("  - {sli: latency_p95, below: 300ms}\n", "")
    text = text.replace("abort: [{sli: error_rate", "tags: {a: *high}\nabort: [{sli: error_rate")
    assert parse_experiment(text).tags == {"a": "99%"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("on", "on"), ("12:30", "12:30"), ("1_000", "1_000"), ("0o7", "0o7"), ("2026-01-01", "2026-01-01")]
    + [("true", True), ("null", None), ("", None), ("-3", -3), ("1e3", 1000.0), (".5", 0.5), ("3.", 3.0)],
)
def test_plain_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert resolve_plain(text) == value and type(resolve_plain(text)) is type(value)


def test_a_suite_and_an_environment_are_told_by_their_fields() -> None:
    suite = "schema: mlchaos/v1\nname: s\ntitle: S\nexperiments: [a]\n"
    assert isinstance(parse_any(suite).value, Suite) and parse_suite(suite).experiments == ("a",)
    assert problems_of("targets: {a: {select: x}}\n") == [
        "f.yaml:1:1  missing fields schema, name, backends, probe, slis."
    ]


def test_the_environment_s_own_rules_are_placed() -> None:
    text = (
        "schema: mlchaos/v1\nname: e\nbackends: {sandbox: [pod_failure]}\ntargets: {a: {select: x}}\n"
        'probe: {url: "http://x"}\nslis:\n  ready: {signal: nope}\n'
    )
    with pytest.raises(SpecError) as caught:
        parse_environment(text, "f.yaml")
    assert str(caught.value) == "f.yaml:7:10  slis.ready: signal nope is not among signals."


def test_a_number_where_a_word_is_needed_and_a_huge_value_stay_one_short_line() -> None:
    (line,) = problems_of(GOOD.replace("10m\n", f'"{"x" * 100_000}"\n'))
    assert len(line) < 700 and "\n" not in line


def test_nearest_knows_other_tools_words() -> None:
    assert nearest("pod_kill", ["pod_delete", "pod_failure"]) == "pod_delete"
    assert nearest("Pod-Delete", ["pod_delete", "pod_failure"]) == "pod_delete"
    assert nearest("zebra", ["pod_delete"]) is None


def test_size_is_looked_at_before_anything_else() -> None:
    with pytest.raises(SpecError, match="larger than 1 MiB"):
        read_document(b"\xff" * (MAX_BYTES + 1), "f")


# ---- whatever comes in, a model or a SpecError comes out

_LINE = re.compile(r"^f\.yaml:\d+:\d+  .+[.?!…]$", re.DOTALL)


def survives(text: str | bytes) -> None:
    try:
        parse_any(text, "f.yaml")
    except SpecError as e:
        assert e.problems
        for problem in e.problems:
            line = str(problem)
            assert _LINE.match(line), line
            assert "\n" not in line and len(line) < 900


FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    survives(data)


@FUZZ
@given(st.text(alphabet=st.sampled_from("ab:-[]{},&*!|>%@`\"'\n\t #?0.~\\"), max_size=60))
def test_random_yaml_characters(text: str) -> None:
    survives(text)


@FUZZ
@given(st.data())
def test_mutations_of_a_good_file(data: st.DataObject) -> None:
    text = GOOD
    for _ in range(data.draw(st.integers(1, 4))):
        a = data.draw(st.integers(0, len(text)))
        b = min(len(text), a + data.draw(st.integers(0, 12)))
        text = text[:a] + data.draw(st.text(max_size=6)) + text[b:]
    survives(text)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e9, 1e9) | st.sampled_from(
        ["5m", "30%", "pod_delete", "x", "", "1e999", "300ms", "-1s", "2026-01-01T00:00:00Z"]
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["kind", "sli", "above", "for", "select", "url", "x", "0"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@FUZZ
@given(st.sampled_from(sorted(Experiment.model_fields)), _VALUES)
def test_any_value_in_any_field(field: str, value: object) -> None:
    body = parse_any(GOOD).document.root.plain()
    body["schema" if field == "schema_" else field] = value
    survives(json.dumps(body))


@FUZZ
@given(st.dictionaries(st.sampled_from(["targets", "slis", "probe", "limits", "backends", "name", "freezes",
                                        "sandbox", "error_budget", "signals", "schema"]), _VALUES))  # fmt: skip
def test_any_value_in_an_environment(body: dict[str, object]) -> None:
    survives(json.dumps({"targets": {}, **body}))
