"""``clipdeploy completion``: the script that makes a shell complete commands."""

from __future__ import annotations

import click

from clipdeploy.cli.usage import command

__all__ = ["COMPLETE_VARIABLE", "SHELLS", "completion"]

SHELLS = ("bash", "zsh", "fish")
# click's own name for it, which is made of the program's.
COMPLETE_VARIABLE = "_CLIPDEPLOY_COMPLETE"


@command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that completes commands, options, model names and artifacts.

    One line, once, for each shell:

    \b
    bash  echo 'eval "$(clipdeploy completion bash)"' >> ~/.bashrc
    zsh   echo 'eval "$(clipdeploy completion zsh)"' >> ~/.zshrc
    fish  clipdeploy completion fish > ~/.config/fish/completions/clipdeploy.fish

    It takes effect in the next shell. In zsh the line has to come after compinit.
    """
    import json

    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    # Without the settings: a broken clipdeploy.toml must not disturb a shell that starts.
    made = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    script = made(ctx.find_root().command, {}, "clipdeploy", COMPLETE_VARIABLE).source()
    click.echo(json.dumps({"shell": shell, "script": script}, indent=2) if as_json else script)
