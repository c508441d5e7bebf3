"""`mlchaos`: parse, call, and turn every end into an exit code and at most one clear line per problem.

Exit codes: 0 fine or HELD · 1 DEVIATED, or a finding · 2 usage or spec error, nothing touched · 3 REFUSED · 4 ABORTED ·
5 INCONCLUSIVE · 6 internal error · 70 UNCLEAN, a fault may be live.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from mlchaos_dagster import __version__
from mlchaos_dagster.cli.app import common
from mlchaos_dagster.cli.lazy import LazyGroup
from mlchaos_dagster.errors import ConfigError, MlChaosError, Problem, SpecError

EXIT_USAGE, EXIT_INTERRUPTED, EXIT_INTERNAL = 2, 4, 6
_HERE = "mlchaos_dagster.cli."
COMMANDS = {
    "run": (_HERE + "run", "Run experiments: guards, baseline, fault, recovery, verdict."),
    "list": (_HERE + "list", "List experiments, suites and environments."),
    "describe": (_HERE + "describe", "Show one experiment as a document."),
    "check": (_HERE + "check", "Check spec files; every problem with its line."),
    "import": (_HERE + "import_", "Turn YAML of Litmus and Chaos Mesh into experiments."),
    "plan": (_HERE + "plan", "Say how long a window must be to see the effect."),
    "status": (_HERE + "status", "Show what runs, open leases, lever, health and budget."),
    "stop": (_HERE + "stop", "Stop one run, or everything, and wait until it is clean."),
    "recover": (_HERE + "recover", "Take away faults whose owner is gone."),
    "clean": (_HERE + "clean", "Remove everything of ours from a cluster."),
    "report": (_HERE + "report", "Show the report of a run."),
    "history": (_HERE + "history", "List past runs and their outcomes."),
    "sandbox": (_HERE + "sandbox", "Start, stop and look at the embedded ML platform."),
    "init": (_HERE + "init", "Write a first library to a folder."),
    "doctor": (_HERE + "doctor", "Say what is missing and how to get it."),
    "completion": (_HERE + "completion", "Print the completion script of a shell."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="mlchaos", message="%(prog)s %(version)s")
@common
def mlchaos() -> None:
    """Chaos engineering for ML platforms: faults that are always taken away, judged by what was seen."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mlchaos`; returns the exit code and never raises."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = mlchaos.main(arguments or ["--help"], prog_name="mlchaos", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as e:
        return _flushed(e.exit_code)
    except SystemExit as e:  # click ends this way after shell completion, and when nobody reads stdout any more
        if "PacifyFlush" in type(sys.stdout).__name__:
            return _quiet_pipe(0)
        return e.code if isinstance(e.code, int) else 0
    except (click.Abort, KeyboardInterrupt):
        _say(f"interrupted{_left_open(arguments)}")
        return EXIT_INTERRUPTED
    except click.UsageError as e:
        _say(_usage(e))
        return EXIT_USAGE
    except click.ClickException as e:
        _say(_one_line(e.format_message()))
        return EXIT_USAGE
    except SpecError as e:
        for problem in e.problems:
            _say(_problem(problem))
        return EXIT_USAGE
    except ConfigError as e:
        _say(_one_line(str(e)))
        return EXIT_USAGE
    except BrokenPipeError:
        return _quiet_pipe(0)
    except MlChaosError as e:
        _say(f"error: {_one_line(str(e))}")
        return EXIT_INTERNAL
    except Exception as e:  # noqa: BLE001 - the outermost boundary: a traceback is for the log, not for people
        return _internal(e, arguments)


def entry() -> None:
    """The console script: `main`, and out. Taking the interpreter down after Dagster costs a second of CPU for nothing."""
    code = main()
    if "dagster" not in sys.modules:
        sys.exit(code)
    import logging

    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _quiet_pipe(code)
    return code


def _quiet_pipe(code: int) -> int:
    """Whoever read us has gone (`mlchaos list | head`): not an error, and no message at interpreter exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    return code


def _usage(e: click.UsageError) -> str:
    command = e.ctx.command_path if e.ctx else "mlchaos"
    if isinstance(e, click.BadParameter) and e.param is not None:
        name = "/".join(e.param.opts) if isinstance(e.param, click.Option) else e.param.human_readable_name
        if isinstance(e, click.MissingParameter):
            return _one_line(f"{command}: {name} is missing. See {command} --help.")
        return _one_line(f"{command}: {name}: {e.message}")
    message = e.format_message()
    return _one_line(f"{command}: {message}{'' if message.endswith('.') else '.'}")


def _problem(problem: Problem) -> str:
    """`file:line:column  what` for a place in a file, `--option: what` for an argument."""
    if not problem.where:
        return _one_line(problem.what, 1000)
    gap = "  " if problem.where[-1].isdigit() else ": "
    return f"{problem.where}{gap}{_one_line(problem.what, 1000)}"


def _say(text: str) -> None:
    try:
        click.echo(text, err=True)
    except OSError:
        pass


def _one_line(text: str, limit: int = 600) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _internal(error: Exception, arguments: Sequence[str]) -> int:
    import datetime
    import platform
    import tempfile
    import traceback
    import uuid

    from mlchaos_dagster import settings

    number = uuid.uuid4().hex[:8]
    text = "\n".join(
        (
            f"mlchaos {__version__}, Python {platform.python_version()}, {platform.platform()}",
            datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            f"arguments: {list(arguments)!r}",
            "".join(traceback.format_exception(error)),
        )
    )
    where = "could not be written"
    for folder in (_given_home(arguments) or settings.load().home.root, Path(tempfile.gettempdir())):
        path = folder / f"error-{number}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, errors="replace")
        except OSError:
            continue
        where = f"in {path}"
        break
    _say(f"internal error {number}: {_one_line(f'{type(error).__name__}: {error}', 300)}; details {where}")
    return EXIT_INTERNAL


def _left_open(arguments: Sequence[str]) -> str:
    """What to look at when a fault may be live: open leases, or a ledger that does not tell."""
    from mlchaos_dagster import settings
    from mlchaos_dagster.engine.ledger import FileLedger
    from mlchaos_dagster.engine.ports import SystemClock

    try:
        root = _given_home(arguments) or settings.load().home.root
        ledger = FileLedger(settings.Home(root.expanduser().resolve()).ledger, SystemClock())
        count = len(ledger.leases()) + len(ledger.unreadable())
    except (OSError, ValueError, MlChaosError) as e:
        return f"; open leases cannot be read ({e}): see `mlchaos status`"
    return f"; open leases: {count}, see `mlchaos status`" if count else ""


def _given_home(arguments: Sequence[str]) -> Path | None:
    """`--home`, read by hand: the parser may be what failed."""
    for i, word in enumerate(arguments):
        if word == "--home" and i + 1 < len(arguments):
            return Path(arguments[i + 1])
        if word.startswith("--home="):
            return Path(word.removeprefix("--home="))
    return None


if __name__ == "__main__":
    entry()
