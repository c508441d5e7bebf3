"""What every subcommand shares: the options given everywhere, settings, catalog, environment, and how to print.

The options may stand before or after the subcommand; the later one wins. Nothing here imports Dagster.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from mlchaos_dagster import settings as surroundings

if TYPE_CHECKING:
    from mlchaos_dagster.catalog import Catalog
    from mlchaos_dagster.domain.environment import Environment

F = TypeVar("F", bound=Callable[..., Any])
_META = "mlchaos"
_NARROWEST = 12
"""A last column is never cut below this; a terminal that is narrower than that wraps."""


class Word(click.ParamType):
    """One of a few words; anything else is one clear line with the nearest right one."""

    name = "word"

    def __init__(self, what: str, allowed: Sequence[str]) -> None:
        self.what, self.allowed = what, list(allowed)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word itself. Fails with the nearest right one."""
        if value in self.allowed:
            return value
        self.fail(self._unknown(str(value)), param, ctx)

    def _unknown(self, word: str) -> str:
        from difflib import get_close_matches

        near = get_close_matches(word, self.allowed, 1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        return f'no such {self.what} "{word}".{hint} Allowed: {", ".join(self.allowed)}.'

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The words, for help."""
        return "|".join(self.allowed)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        """The words that begin so."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in self.allowed if word.startswith(incomplete)]


class Names(click.ParamType):
    """Names from the library, for shell completion; what they mean is checked by the command."""

    def __init__(self, kind: str) -> None:
        self.name, self.kind = kind, kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        """The names that begin so; none where the library is wrong."""
        from click.shell_completion import CompletionItem

        from mlchaos_dagster.errors import MlChaosError

        try:
            names = App(ctx.meta.get(_META, {})).catalog.names(self.kind)
        except MlChaosError:
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def common(command: F) -> F:
    """`--environment`, `--library`, `--output`, `--home`: on the group and on every command."""

    def keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value not in (None, ()):
            ctx.meta.setdefault(_META, {})[param.name] = value

    options = (
        click.option("--environment", "-e", metavar="NAME", type=Names("environment"), help="Where to run."),
        click.option("--library", metavar="DIR", multiple=True, help="A further folder of specs; may be repeated."),
        click.option("--output", "-o", type=Word("format", ("text", "json")), help="JSON on stdout is only JSON."),
        click.option("--home", metavar="DIR", help="State directory (default: MLCHAOS_HOME, else .mlchaos)."),
    )
    decorated: Any = command
    for option in reversed(options):
        decorated = _with_callback(option, keep)(decorated)
    return decorated


def _with_callback(option: Callable[[Any], Any], callback: Any) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        command = option(command)
        parameter = command.params[-1] if isinstance(command, click.Command) else command.__click_params__[-1]
        parameter.callback, parameter.expose_value = callback, False
        return command

    return decorate


class App:
    """The surroundings of one call."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.json: bool = given.get("output") == "json"

    @cached_property
    def settings(self) -> surroundings.Settings:
        """Environment variables, overridden by options."""
        found = surroundings.load()
        if self.given.get("home"):
            found = replace(found, home=surroundings.Home(Path(self.given["home"]).expanduser().resolve()))
        if self.given.get("library"):
            further = tuple(Path(p).expanduser() for p in self.given["library"])
            found = replace(found, library=(*further, *found.library))
        if self.given.get("environment"):
            found = replace(found, environment=self.given["environment"])
        return found

    @cached_property
    def catalog(self) -> Catalog:
        """All library directories. Raises SpecError: one of them is none."""
        from mlchaos_dagster.catalog import Catalog

        return Catalog(self.settings.library)

    @cached_property
    def environment(self) -> Environment:
        """The chosen environment. Raises SpecError: no such name, or its file is wrong."""
        return self.catalog.environment(self.settings.environment)

    @property
    def color(self) -> bool:
        """Whether stdout takes colour: a terminal, and nobody said NO_COLOR."""
        return self.settings.color and not self.json and sys.stdout.isatty()

    @property
    def width(self) -> int:
        """Columns of the terminal; 0 where stdout is none, and nothing needs to be cut."""
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0

    def out(self, text: str = "") -> None:
        """A line for people; nothing where JSON was asked for."""
        if not self.json:
            click.echo(text, color=self.color or None)

    def dump(self, value: Any) -> None:
        """The answer as JSON, where it was asked for."""
        if self.json:
            click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str))

    def note(self, text: str) -> None:
        """A line beside the answer: stderr."""
        click.echo(text, err=True)


def current() -> App:
    """The app of the running command."""
    return App(click.get_current_context().meta.get(_META, {}))


def leave(code: int) -> NoReturn:
    """End the command with an exit code."""
    raise click.exceptions.Exit(code)


def _cut(text: str, width: int) -> str:
    """At most `width` characters; a cut falls between words where there is one, and is shown."""
    if len(text) <= width:
        return text
    kept = text[: width - 1]
    between = kept.rfind(" ")
    return (kept[:between] if between > width // 2 else kept).rstrip() + "…"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], width: int = 0) -> str:
    """Columns as wide as they need, two spaces apart; the last one is cut where it would wrap at `width` (0: never)."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    room = width - sum(widths[:-1]) - 2 * (len(widths) - 1)
    if width and room < widths[-1]:
        room = max(room, _NARROWEST)
        lines = [[*line[:-1], _cut(line[-1], room)] for line in lines]
        widths[-1] = room
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
