"""``clipdeploy completion``: print the script for shell completion."""

from __future__ import annotations

import click

from clipdeploy.cli.options import option
from clipdeploy.cli.usage import command

__all__ = ["COMPLETE_VARIABLE", "SHELLS", "completion"]

SHELLS = ("bash", "zsh", "fish")
# The variable that click derives from the program's name.
COMPLETE_VARIABLE = "_CLIPDEPLOY_COMPLETE"


@command()
@click.argument("shell", type=click.Choice(SHELLS))
@option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the shell script for tab completion.

    It completes commands, options, model names and artifacts. Run once, for your shell:

    \b
    bash  echo 'eval "$(clipdeploy completion bash)"' >> ~/.bashrc
    zsh   echo 'eval "$(clipdeploy completion zsh)"' >> ~/.zshrc
    fish  clipdeploy completion fish > ~/.config/fish/completions/clipdeploy.fish

    It takes effect in the next shell. In zsh the line must come after compinit.
    """
    import json

    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    # Settings are not read: a wrong clipdeploy.toml must not break the start of a shell.
    made = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    script = made(ctx.find_root().command, {}, "clipdeploy", COMPLETE_VARIABLE).source()
    click.echo(json.dumps({"shell": shell, "script": script}, indent=2) if as_json else script)
