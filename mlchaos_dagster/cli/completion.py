"""`mlchaos completion`."""

from __future__ import annotations

import click

from mlchaos_dagster.cli.app import Word, common, current


@click.command("completion")
@click.argument("shell", type=Word("shell", ("bash", "zsh", "fish")))
@common
def command(shell: str) -> None:
    """Print the completion script of a SHELL: bash, zsh or fish.

    bash: eval "$(mlchaos completion bash)" in ~/.bashrc; fish: mlchaos completion fish | source.
    """
    from click.shell_completion import get_completion_class

    from mlchaos_dagster.cli.main import mlchaos

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(mlchaos, {}, "mlchaos", "_MLCHAOS_COMPLETE").source_template % {
        "complete_func": "_mlchaos_completion",
        "complete_var": "_MLCHAOS_COMPLETE",
        "prog_name": "mlchaos",
    }
    current().dump({"shell": shell, "script": script})
    current().out(script)
