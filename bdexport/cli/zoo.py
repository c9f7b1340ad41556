"""``bdexport zoo``: the trained models that ship with bdexport, and the card of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, table_console, write_json_result
from bdexport.cli.options import writable
from bdexport.cli.stages import size_text

if TYPE_CHECKING:
    from rich.table import Table


def zoo(
    name: Annotated[str | None, typer.Argument(help="Show the card of this model, e.g. zoo:resnet20-digits.")] = None,
    json: Annotated[
        str | None, typer.Option(help="Write the card, or all, to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """List the trained models that ship with bdexport. Every command that takes a checkpoint takes zoo:NAME."""
    from bdexport.zoo import reading_card, zoo_card, zoo_names
    from bdexport.zoo.card import card_to_markdown

    out = table_console(json)
    if name is not None:
        card = zoo_card(name)
        with reading_card(name):
            text = card_to_markdown(card)
        out.print(text, end="", soft_wrap=True)
        result = card
    else:
        cards = [zoo_card(known) for known in zoo_names()]
        out.print(_table(cards))
        out.print("base: the network that the model goes back to, measured as its card says")
        out.print("accuracy and usage: on the whole test set; 'bdexport zoo NAME' shows how each was trained")
        result = {"schema": "bdexport.zoo/1", "models": cards}
    if json is not None:
        write_json_result(json, result)


def _table(cards: list[dict[str, Any]]) -> Table:
    from bdexport.zoo import PREFIX, reading_card

    table = FittedTable(
        title=f"{len(cards)} model{'s' * (len(cards) != 1)} in the zoo", expendable=("size", "masks", "FLOPs", "full")
    )
    for heading in ("model", "data"):
        table.add_column(heading)
    for heading in ("base", "full", "policy", "blocks run", "FLOPs", "masks", "size"):
        table.add_column(heading, justify="right")
    for card in cards:
        with reading_card(str(card.get("name"))):
            table.add_row(*_row(PREFIX, card))
    return table


def _row(prefix: str, card: dict[str, Any]) -> tuple[str, ...]:
    full, policy = card["result"]["full"], card["result"]["policy"]
    used = policy["blocks_used"]
    return (
        prefix + card["name"],
        card["data"]["name"],
        f"{card['base'].get('origin', card['base'])['accuracy']:.2f} %",
        f"{full['accuracy']:.2f} %",
        f"{policy['accuracy']:.2f} %",
        f"{used['mean']:.1f} +- {used['std']:.1f} of {card['num_blocks']}",
        f"{policy['flops']['mean']:.3g} ({policy['flops']['mean'] / full['flops'] - 1:+.0%})",
        str(policy["unique_masks"]),
        size_text(card["bytes"]),
    )
