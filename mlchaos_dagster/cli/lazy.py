"""A click group that knows its commands by a table and imports one only when it is called."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from typing import Any

import click


class LazyGroup(click.Group):
    """Names → (module, one line of help). `--help` imports none of them; the tests hold the lines to the commands."""

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table, not of the alphabet."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command now; None when there is none."""
        if cmd_name not in self.lazy:
            return None
        command = importlib.import_module(self.lazy[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, but an unknown word tells the nearest one."""
        word = args[0] if args else ""
        if word not in self.lazy and not ctx.resilient_parsing:
            near = get_close_matches(word, self.lazy, 1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise click.UsageError(f'no such command "{word}".{hint} Allowed: {", ".join(self.lazy)}.', ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.lazy.items()])
