"""Bring the cards up to date with this version's presets and wording; no figure and no model changes.

    python -m bdexport.zoo.refresh

A card's command names a preset and what differed from it: when a preset changes, the difference does too. Each command
is made again from the settings in the model's file (unless it was given by hand), each ``.md`` from its ``.json``.
"""

from __future__ import annotations

from pathlib import Path

from bdexport.checkpoint import load_checkpoint
from bdexport.files import write_json, write_text
from bdexport.zoo import PREFIX, zoo_card, zoo_folder, zoo_names
from bdexport.zoo.add import training_command
from bdexport.zoo.card import card_to_markdown


def refresh(folder: Path) -> None:
    """Write every card of the zoo anew to ``folder``."""
    for name in zoo_names():
        card = zoo_card(name)
        if not card["command_given"]:
            card["command"] = training_command(load_checkpoint(PREFIX + name))
        write_json(folder / f"{name}.json", card)
        write_text(folder / f"{name}.md", card_to_markdown(card))


if __name__ == "__main__":
    refresh(zoo_folder())
