"""``clipdeploy zoo``: list the models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.params import ModelName
from clipdeploy.cli.usage import group

if TYPE_CHECKING:
    from rich.console import Group

    from clipdeploy.models.cards import ModelCard
    from clipdeploy.models.clips import PublishedClip


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _gmacs(card: ModelCard) -> str:
    """With four digits, so that the table fits 80 columns."""
    gmacs = card.macs / 1e9
    return f"{gmacs:.2f}" if gmacs < 100 else f"{gmacs:.1f}"


def _published(card: ModelCard) -> str:
    known = [(f"top-{k}", value) for k, value in ((1, card.top1), (5, card.top5))]
    return ", ".join(f"{name} {value:.2f} %" for name, value in known if value is not None) or "-"


def _table(cards: tuple[ModelCard, ...]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from clipdeploy.models.download import is_cached

    # Without patch and image size, which are in the name, the table fits 80 columns.
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("model", overflow="fold")
    for title in ("GMACs", "top-1", "top-5"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for card in cards:
        table.add_row(
            card.name,
            _gmacs(card),
            _percent(card.top1),
            _percent(card.top5),
            "*" if is_cached(card) else "",
        )
    short = ", ".join(card.short for card in cards if card.short)
    notes = (
        f"\n* weights are on this machine\nShort names: {short}\n"
        "CLIPs, for --zero-shot: `clipdeploy zoo clips`"
    )
    return Group(table, Text(notes))


def _clip_table(clips: tuple[PublishedClip, ...]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from clipdeploy.models.download import is_hub_cached

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("CLIP", overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("px", justify="right", no_wrap=True)
    table.add_column("top-1", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each in clips:
        cached = "*" if is_hub_cached(each.hub_folder) else ""
        table.add_row(
            each.name, each.architecture, str(each.image_size), _percent(each.top1), cached
        )
    notes = (
        "\n* weights are on this machine\ntop-1: zero-shot on ImageNet, `--zero-shot imagenet` "
        "with --templates openai80"
    )
    return Group(table, Text(notes))


def _weights(card: ModelCard) -> str:
    if card.shipped:
        return "shipped with clipdeploy"
    return card.url or "not published: pass --checkpoint"


def _describe(card: ModelCard) -> str:
    from clipdeploy.models.cards import recipe_notes

    lines = [
        card.name,
        f"  also called   {', '.join(card.aliases) or '-'}",
        f"  pretraining   {card.pretrain}",
        f"  geometry      {card.image_size} px in {card.patch} px patches: {card.tokens} tokens, "
        f"{card.depth} blocks of width {card.width}, {card.heads} heads, {card.classes} classes",
        f"  size          {card.params / 1e6:.2f} M parameters, {card.macs / 1e9:.2f} GMACs",
        f"  published     {_published(card)}",
        f"  weights       {_weights(card)}",
    ]
    notes = [f"  {option:22}  {note}" for option, note in recipe_notes(card).items()]
    return "\n".join([*lines, *notes])


@group(invoke_without_command=True)
@stage_command
def zoo(context: Context) -> None:
    """List the models; `zoo show NAME` describes one."""
    if click.get_current_context().invoked_subcommand is None:
        _list(context)


@zoo.command("list")
@stage_command
def list_cards(context: Context) -> None:
    """List all models: size and published accuracy."""
    _list(context)


def _list(context: Context) -> None:
    from clipdeploy.core.passport import settings_of
    from clipdeploy.models.cards import all_cards
    from clipdeploy.models.download import is_cached

    listed = [settings_of(card) | {"at_hand": is_cached(card)} for card in all_cards()]
    emit(context, listed, lambda: _table(all_cards()))


@zoo.command(epilog="\b\nclipdeploy zoo clips")
@stage_command
def clips(context: Context) -> None:
    """List the published CLIPs: names for `export --zero-shot` and zero-shot accuracy."""
    from clipdeploy.core.passport import settings_of
    from clipdeploy.models.clips import published_clips
    from clipdeploy.models.download import is_hub_cached

    found = published_clips()
    listed = [settings_of(each) | {"at_hand": is_hub_cached(each.hub_folder)} for each in found]
    emit(context, listed, lambda: _clip_table(found))


@zoo.command(epilog="\b\nclipdeploy zoo show clip-vit-base-p16")
@click.argument("name", type=ModelName())
@stage_command
def show(context: Context, name: str) -> None:
    """Describe one model, by its name, timm name or alias."""
    from clipdeploy.models.cards import find

    card = find(name)
    emit(context, card, lambda: _describe(card))
