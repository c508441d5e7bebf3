"""A network fault in this network namespace: `python3 -m mlchaos_dagster.agent.network VERB …`.

    keep PLAN      prepare the fault, wait for `go`, keep it until its end (the container's main process)
    go LEASE       wait until it is prepared and say so; on the line `go` at standard input: begin
    status LEASE   what the kernel holds and what a client sees, as JSON
    stop LEASE     end it, and say what is left, as JSON
    clean LEASE    take away what a dead agent left; says what is left (the main process of a cleaning container)

Needs CAP_NET_ADMIN and, for the switch in /proc, to be the root of the network namespace; nothing else.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

from mlchaos_dagster.agent import network_rules as rules
from mlchaos_dagster.agent.network_home import at_home
from mlchaos_dagster.agent.network_keeper import Keeper, address, last_words
from mlchaos_dagster.agent.network_plan import Plan

VERBS = ("keep", "go", "status", "stop", "clean")
_REACHED_S = 5.0
"""Longest wait for an agent that starts up."""
_ANSWER_S = 4.0


def ask(lease: str, word: str, reached_s: float = 0.0) -> dict[str, Any]:
    """One word to the agent of a lease. Raises OSError: none is there (within `reached_s`), or it does not answer."""
    end = time.monotonic() + reached_s
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.settimeout(_ANSWER_S)
            try:
                s.connect(address(lease))
            except ConnectionRefusedError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.02)  # there is no event for a socket that is not bound yet
                continue
            s.sendall(word.encode() + b"\n")
            said = b"".join(iter(lambda: s.recv(65536), b""))
            return json.loads(said)


def _say(said: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def go(lease: str) -> int:
    """In two steps, so that all pods are prepared before the first one begins."""
    said = ask(lease, "status", _REACHED_S)
    _say(said)
    if said.get("error") or said["phase"] != "prepared" or sys.stdin.readline().strip() != "go":
        return 1
    said = ask(lease, "go")
    _say(said)
    return 1 if said.get("error") else 0


def clean(lease: str) -> int:
    """Remove, read back, tell."""
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
            return Keeper(at_home(Plan.from_json(what))).run()
        if verb == "go":
            return go(what)
        if verb == "clean":
            return clean(what)
        said = ask(what, verb)
        _say(said)
        return 1 if said.get("error") else 0
    except ValueError as e:
        last_words(why=str(e), rules=0, error=str(e))
        sys.stderr.write(f"mlchaos: {e}\n")
        return 2
    except OSError as e:
        sys.stderr.write(f"mlchaos: no agent answers: {e.strerror or e}\n")
        return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
