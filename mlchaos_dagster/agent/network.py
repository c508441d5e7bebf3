"""A network fault in this network namespace: `python3 -m mlchaos_dagster.agent.network VERB …`.

    keep PLAN      wait to be told, prepare the fault, keep it until its end (the container's main process)
    go LEASE       tell it to prepare, say when it is; on the line `go` at standard input: begin
    status LEASE   what the kernel holds and what a client sees, as JSON
    stop LEASE     end it, and say what is left, as JSON
    clean LEASE    take away what a dead agent left; says what is left (the main process of a cleaning container)

Needs CAP_NET_ADMIN and, for the switch in /proc, to be the root of the network namespace; nothing else.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from mlchaos_dagster.agent.network_client import REACHED_S, ask

VERBS = ("keep", "go", "status", "stop", "clean")
_STARTS_S = 2.5
"""How long `status` and `stop` wait for an agent whose container runs already: it opens its door first of all."""


def keep(text: str) -> int:
    """The fault, from preparation to end. What only this needs is imported here: a look must cost little."""
    from mlchaos_dagster.agent.network_home import at_home
    from mlchaos_dagster.agent.network_keeper import Keeper, last_words
    from mlchaos_dagster.agent.network_plan import Plan

    try:
        plan = at_home(Plan.from_json(text))
    except ValueError as e:
        last_words(why=str(e), rules=0, error=str(e))
        sys.stderr.write(f"mlchaos: {e}\n")
        return 2
    return Keeper(plan).run()


def _say(said: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def go(lease: str) -> int:
    """In two steps, so that all pods are prepared before the first one begins."""
    said = ask(lease, "prepare", REACHED_S, REACHED_S)
    _say(said)
    if said.get("error") or said["phase"] != "prepared" or sys.stdin.readline().strip() != "go":
        return 1
    said = ask(lease, "go")
    _say(said)
    return 1 if said.get("error") else 0


def clean(lease: str) -> int:
    """Remove, read back, tell."""
    from mlchaos_dagster.agent import network_rules as rules
    from mlchaos_dagster.agent.network_keeper import last_words

    left, error = -1, ""
    try:
        rules.remove(lease)
        left = len(rules.read(lease))
    except rules.RulesError as e:
        error = str(e)
    last_words(lease=lease, why="cleaned", rules=left, error=error)
    _say({"lease": lease, "rules": left, "error": error})
    return 0 if left == 0 and not error else 1


def main(arguments: list[str]) -> int:
    """The command line."""
    if len(arguments) != 2 or arguments[0] not in VERBS:
        sys.stderr.write(f"usage: network {'|'.join(VERBS)} PLAN|LEASE\n")
        return 2
    verb, what = arguments
    try:
        if verb == "keep":
            return keep(what)
        if verb == "go":
            return go(what)
        if verb == "clean":
            return clean(what)
        said = ask(what, verb, _STARTS_S)
        _say(said)
        return 1 if said.get("error") else 0
    except OSError as e:
        sys.stderr.write(f"mlchaos: no agent answers: {e.strerror or e}\n")
        return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
