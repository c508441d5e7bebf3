"""`mlchaos check`."""

from __future__ import annotations

from pathlib import Path

import click

from mlchaos_dagster.cli.app import common, current, leave
from mlchaos_dagster.cli.brought import SUFFIXES, look


@click.command("check")
@click.argument("files", nargs=-1, metavar="[FILES]")
@click.option("--alone", is_flag=True, help="Look at the files only, not at what the environment offers.")
@click.option("--target", metavar="NAME", help="Target of files of Litmus and Chaos Mesh that name none.")
@common
def command(files: tuple[str, ...], alone: bool, target: str | None) -> None:
    """Check spec files (folders are searched); without FILES the whole library.

    FILES may be those of Litmus and Chaos Mesh, too: what would be changed in them is said, and why one cannot be run.

    Prints one line for each problem, `file:line:column  path: what is wrong`, and exits with 2 when there is any.
    """
    app = current()
    paths = None if not files else [p for f in files for p in _expand(Path(f))]
    if paths is not None:
        paths = list(dict.fromkeys(paths))
    environment = None if alone else app.environment
    theirs = None if paths is None else look(paths, environment, target or "")
    found = app.catalog.check(environment, paths if theirs is None else theirs.rest)
    if theirs is not None:
        found.files, found.wrong_files = found.files + theirs.files, found.wrong_files + theirs.wrong
        found.problems += theirs.problems
        found.notes += theirs.notes
    warnings = theirs.warnings if theirs is not None else []
    app.dump(
        {
            "files": found.files,
            "wrong_files": found.wrong_files,
            "notes": found.notes,
            "warnings": [{"where": p.where, "what": p.what} for p in warnings],
            "problems": [{"where": p.where, "what": p.what} for p in found.problems],
        }
    )
    for problem in found.problems:
        app.out(str(problem))
    for warning in warnings:
        app.out(f"warning  {warning}")
    n = len(found.problems)
    if n:
        problems = "1 problem" if n == 1 else f"{n} problems"
        app.out(f"{problems} in {found.wrong_files} of {found.files} file{'s' * (found.files != 1)}")
        leave(2)
    for note in found.notes:
        app.out(note)
    app.out(f"{found.files} file{'s' * (found.files != 1)}, no problems")


def _expand(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and "schemas" not in p.parts)
