"""By hand: ``python -m mlchaos_dagster.sandbox up|down|status DIRECTORY``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import api


def main() -> int:
    """Print the answer as JSON; 0 = done, 1 = no sandbox or not clean, 2 = error."""
    parser = argparse.ArgumentParser(prog="python -m mlchaos_dagster.sandbox")
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--without", action="append", default=[], metavar="MECHANISM", help="switch a mechanism off")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "up":
            config = api.SandboxConfig(replicas=arguments.replicas, mechanisms=dict.fromkeys(arguments.without, False))
            answer = api.up(arguments.directory, config)
        elif arguments.verb == "down":
            answer = api.down(arguments.directory)
        else:
            answer = api.status(arguments.directory)
    except api.SandboxError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    return 0 if answer is not None and answer.get("clean", True) else 1


if __name__ == "__main__":
    sys.exit(main())
