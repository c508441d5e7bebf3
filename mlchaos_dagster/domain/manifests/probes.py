"""Probes of a ChaosEngine, as Litmus 3 takes them.

Checked against the CRD of chaos-operator and what litmus-go does with each field; what older versions and their
documents say is brought up to date, with a note.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from mlchaos_dagster.domain.manifests.shapes import TEXT_MAP, TEXTS, Each, Fields, Looker, Rule, Words, go_seconds, part
from mlchaos_dagster.domain.nodes import Path
from mlchaos_dagster.domain.parsing import nearest

_NUMBERS = (">=", "<=", "==", "!=", ">", "<", "oneOf", "OneOf", "between", "Between")
_STRINGS = tuple(w for s in ("equal", "notEqual", "contains", "matches", "notMatches", "oneOf") for w in (s, s[0].upper() + s[1:]))  # fmt: skip
_COMPARATOR = Fields(
    {"type": Words(("int", "float", "string"), fold=True), "criteria": "text", "value": "text"}, ("criteria", "value")
)
_METHOD: dict[str, Rule] = {"criteria": "text", "responseCode": "text", "responseTimeout": "any"}
_RUN = Fields(
    {
        "probeTimeout": "seconds",
        "interval": "seconds",
        "retry": "int",
        "attempt": "int",
        "probePollingInterval": "seconds",
        "initialDelaySeconds": "int",
        "initialDelay": "seconds",
        "evaluationTimeout": "seconds",
        "verbosity": "text",
        "stopOnFailure": "bool",
    },
    ignored=True,
    renamed={"timeout": "probeTimeout", "attempts": "attempt", "retries": "retry"},
)
_SOURCE = Fields(
    {
        "image": "text",
        "hostNetwork": "bool",
        "inheritInputs": "bool",
        "privileged": "bool",
        "args": TEXTS,
        "command": TEXTS,
        "env": Each("any"),
        "labels": TEXT_MAP,
        "annotations": TEXT_MAP,
        "nodeSelector": TEXT_MAP,
        "imagePullPolicy": Words(("Always", "IfNotPresent", "Never"), fold=True),
        "imagePullSecrets": Each("any"),
        "tolerations": Each("any"),
        "volumes": Each("any"),
        "volumeMount": Each("any"),
    },
    ("image",),
    ignored=True,
)
_TYPES = ("httpProbe", "promProbe", "cmdProbe", "k8sProbe", "sloProbe")
PROBE = Fields(
    {
        "name": "text",
        "type": Words(_TYPES, fold=True),
        "mode": Words(("SOT", "EOT", "Edge", "Continuous", "OnChaos"), fold=True),
        "data": "text",
        "runProperties": _RUN,
        "httpProbe/inputs": Fields(
            {
                "url": "text",
                "insecureSkipVerify": "bool",
                "responseTimeout": "any",
                "method": Fields(
                    {
                        "get": Fields({**_METHOD}),
                        "post": Fields({**_METHOD, "body": "text", "bodyPath": "text", "contentType": "text"}),
                    }
                ),
            },
            ("url", "method"),
            ignored=True,
            renamed={"insecureSkipTLS": "insecureSkipVerify", "insecureSkipTlsVerify": "insecureSkipVerify"},
        ),
        "promProbe/inputs": Fields(
            {"endpoint": "text", "query": "text", "queryPath": "text", "comparator": _COMPARATOR},
            ("endpoint", "comparator"),
            ignored=True,
        ),
        "cmdProbe/inputs": Fields(
            {"command": "text", "comparator": _COMPARATOR, "source": "any"}, ("command", "comparator"), ignored=True
        ),
        "k8sProbe/inputs": Fields(
            {
                "group": "text",
                "version": "text",
                "resource": "text",
                "namespace": "text",
                "resourceNames": "text",
                "fieldSelector": "text",
                "labelSelector": "text",
                "operation": Words(("present", "absent", "create", "delete"), fold=True),
            },
            ("version", "resource", "operation"),
            ignored=True,
            renamed={"resourceName": "resourceNames"},
        ),
        "sloProbe/inputs": "any",
    },
    ("name", "type", "mode"),
    ignored=True,
)
_OUTSIDE = (
    "pg_isready",
    "psql",
    "mysql",
    "mysqladmin",
    "redis-cli",
    "mongo",
    "mongosh",
    "kafkacat",
    "kcat",
    "nc",
    "jq",
)
"""Programs that people probe with and the image of Litmus's experiments does not have."""


def probes(look: Looker, found: list[Any], path: Path) -> list[dict[str, Any]]:
    """The probes that Litmus can run, in their right form; what was changed is noted."""
    kept: list[dict[str, Any]] = []
    for i, probe in enumerate(found):
        one = _probe(look, part(probe), (*path, i))
        if one is not None:
            kept.append(one)
    names = [p.get("name") for p in kept]
    for i, name in enumerate(names):
        if name in names[:i]:
            look.problem((*path, i), f'a second probe "{name}". Allowed: one of a name.')
    return kept


def _probe(look: Looker, probe: dict[str, Any], path: Path) -> dict[str, Any] | None:
    kind = probe.get("type")
    if kind is None:
        return None
    if kind == "sloProbe":
        look.note(path, "left out: an sloProbe is evaluated by Harness, and Litmus never runs it.")
        return None
    key = f"{kind}/inputs"
    for other in _TYPES:
        if other != kind and probe.pop(f"{other}/inputs", None) is not None:
            look.note((*path, f"{other}/inputs"), f"left out: the probe is a {kind}.", key=True)
    if not isinstance(probe.get(key), dict):
        look.problem(path, f"missing field {key}, which a {kind} needs.")
        return None
    made = {
        "httpProbe": _http,
        "promProbe": _prom,
        "cmdProbe": _cmd,
        "k8sProbe": _k8s,
    }[kind](look, probe, probe[key], (*path, key))
    _run(look, made, path)
    return made


def _run(look: Looker, probe: dict[str, Any], path: Path) -> None:
    run = probe.setdefault("runProperties", {})
    missing = {"probeTimeout": "5s", "interval": "2s"}
    added = {name: value for name, value in missing.items() if not run.get(name)}
    if added:
        words = ", ".join(f'{name}: "{value}"' for name, value in added.items())
        look.note((*path, "runProperties"), f"Litmus needs {' and '.join(added)}: {words} taken.")
        run.update(added)
    if run.get("initialDelaySeconds") and not run.get("initialDelay"):
        run["initialDelay"] = f"{run['initialDelaySeconds']}s"
    run.pop("initialDelaySeconds", None)
    wrong = probe["type"] in ("promProbe", "k8sProbe") or (probe["type"] == "cmdProbe" and "source" in _inputs(probe))
    if probe.get("mode") == "OnChaos" and run.get("initialDelay") and wrong:
        what = (
            "with mode OnChaos Litmus takes it for a thousand million times as long, and the probe ends after one look."
        )
        look.note((*path, "runProperties", "initialDelay"), what)


def _inputs(probe: dict[str, Any]) -> dict[str, Any]:
    return part(probe.get(f"{probe['type']}/inputs"))


def _http(look: Looker, probe: dict[str, Any], inputs: dict[str, Any], path: Path) -> dict[str, Any]:
    method = part(inputs.get("method"))
    given = [n for n in ("get", "post") if isinstance(method.get(n), dict)]
    if len(given) != 1:
        look.problem((*path, "method"), f"needs exactly one of get, post; it has {' and '.join(given) or 'none'}.")
        return probe
    call = part(method[given[0]])
    at = (*path, "method", given[0])
    timeout = inputs.pop("responseTimeout", None)
    timeout = call.pop("responseTimeout", timeout)
    if timeout is not None:
        _response_time(look, probe, call, timeout, at)
    for name, value in (("criteria", "=="), ("responseCode", "200")):
        if name not in call:
            look.note((*at, name), f'missing, and Litmus needs it: "{value}" is taken.')
            call[name] = value
    _criteria(look, call, _NUMBERS, at)
    return _posted(look, probe, inputs, call, path) if given[0] == "post" else probe


def _response_time(look: Looker, probe: dict[str, Any], call: dict[str, Any], timeout: Any, path: Path) -> None:
    """`criteria: "<"` with a time in milliseconds, as the first versions had it: the answer must come within it."""
    try:
        seconds = float(timeout) / 1000
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 < seconds <= 3600:
        look.problem((*path, "responseTimeout"), "not a time in milliseconds. Allowed: such as 5000.")
        return
    limit = f"{max(1, round(seconds * 1000))}ms" if seconds % 1 else f"{int(seconds)}s"
    probe.setdefault("runProperties", {})["probeTimeout"] = limit
    if call.get("criteria") in ("<", "<=", None) and "responseCode" not in call:
        call["criteria"], call["responseCode"] = "==", "200"
        what = (
            f'Litmus 3 judges no response time: probeTimeout "{limit}" and an answer 200 are taken, which is the same.'
        )
    else:
        what = f'Litmus 3 has no such field: probeTimeout "{limit}" is taken.'
    look.note((*path, "responseTimeout"), what)


def _posted(
    look: Looker, probe: dict[str, Any], inputs: dict[str, Any], call: dict[str, Any], path: Path
) -> dict[str, Any]:
    """A POST as a command: litmus-go takes every httpProbe for a GET, and ends with a nil pointer where there is none."""
    if not isinstance(inputs.get("url"), str):
        return probe
    body, kind = call.get("body", ""), call.get("contentType", "")
    if not kind and _is_json(body):
        kind = "application/json"
    limit = str(part(probe.get("runProperties")).get("probeTimeout") or "5s")
    words = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-X", "POST", "--max-time", _whole(limit)]
    words += ["-k"] if inputs.get("insecureSkipVerify") else []
    words += ["-H", f"Content-Type: {kind}"] if kind else []
    if body:
        words += ["--data-raw", body]
    elif call.get("bodyPath"):
        words += ["--data-binary", f"@{call['bodyPath']}"]
    command = f"{shlex.join([*words, inputs['url']])} || true"
    what = (
        "litmus-go 3 crashes on a POST (it looks for get, which is not there): run as a cmdProbe with curl, which every "
        "image of its experiments has."
    )
    look.note((*path, "method", "post"), what, key=True)
    made = {k: v for k, v in probe.items() if k != "httpProbe/inputs"}
    comparator = {"type": "int", "criteria": call["criteria"], "value": call["responseCode"]}
    return {**made, "type": "cmdProbe", "cmdProbe/inputs": {"command": command, "comparator": comparator}}


def _whole(limit: str) -> str:
    return f"{go_seconds(limit) or 5:g}"


def _is_json(body: str) -> bool:
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _prom(look: Looker, probe: dict[str, Any], inputs: dict[str, Any], path: Path) -> dict[str, Any]:
    query = inputs.get("query")
    if not query and not inputs.get("queryPath"):
        look.problem(path, "missing field query (or queryPath).")
    if isinstance(inputs.get("comparator"), dict):
        _criteria(look, inputs["comparator"], _NUMBERS, (*path, "comparator"))
    if isinstance(query, str) and any(c in query for c in '"$`\\'):
        # Litmus runs `promql --host … "QUERY"` in a shell: within its double quotes these four keep a meaning.
        quoted = query.replace("\\", "\\\\").replace("$", "\\$").replace("`", "\\`").replace('"', '\\"')
        look.note(
            (*path, "query"), "Litmus gives it to a shell in double quotes: what the shell would change is escaped."
        )
        inputs["query"] = quoted
    return probe


def _cmd(look: Looker, probe: dict[str, Any], inputs: dict[str, Any], path: Path) -> dict[str, Any]:
    source = inputs.get("source")
    if isinstance(source, str):
        if source not in ("", "inline"):
            look.problem(
                (*path, "source"), f'"{source[:60]}" is not where a command runs. Allowed: {{image: NAME}}, or none.'
            )
        else:
            look.note((*path, "source"), "left out: a command without source runs inline.", key=True)
        inputs.pop("source")
    elif source is not None:
        node = look.document.root
        for token in (*path, "source"):
            pair = node.pair(token)
            node = pair[1] if pair else node
        inputs["source"] = look.look(node, (*path, "source"), _SOURCE)
    if comparator := part(inputs.get("comparator")):
        _comparator(look, comparator, (*path, "comparator"))
    command = str(inputs.get("command", ""))
    program = command.split()[0].rsplit("/", 1)[-1] if command.split() else ""
    if program in _OUTSIDE and "source" not in inputs:
        what = (
            f"it runs in the image of Litmus's experiments, which has no {program}. Give it one: source: {{image: …}}."
        )
        look.note((*path, "command"), what)
    return probe


def _comparator(look: Looker, comparator: dict[str, Any], path: Path) -> None:
    criteria = comparator.get("criteria")
    if "type" not in comparator:
        kind = "string" if criteria in _STRINGS else "float"
        look.note(path, f'missing field type, which Litmus needs: "{kind}" is taken.')
        comparator["type"] = kind
    if comparator["type"] == "string" and criteria in ("==", "!="):
        comparator["criteria"] = {"==": "equal", "!=": "notEqual"}[criteria]
        look.note((*path, "criteria"), f'for text it is called "{comparator["criteria"]}": taken so.')
    _criteria(look, comparator, _STRINGS if comparator["type"] == "string" else _NUMBERS, path)


def _criteria(look: Looker, comparator: dict[str, Any], allowed: tuple[str, ...], path: Path) -> None:
    word = comparator.get("criteria")
    if word is not None and word not in allowed:
        if word == "=":
            comparator["criteria"] = "=="
            look.note((*path, "criteria"), 'it is called "==": taken so.')
            return
        near = nearest(str(word), allowed)
        hint = f' Did you mean "{near}"?' if near else ""
        shown = ", ".join(a for a in allowed if not a[0].isupper())
        look.problem((*path, "criteria"), f'"{str(word)[:60]}" is not known.{hint} Allowed: {shown}.')


def _k8s(look: Looker, probe: dict[str, Any], inputs: dict[str, Any], path: Path) -> dict[str, Any]:
    if inputs.get("operation") == "create" and not probe.get("data"):
        look.problem((*path[:-1],), "missing field data: what the operation create makes.")
    return probe
