"""A model card as Markdown."""

from __future__ import annotations

from typing import Any

from bdexport.base_figures import figures_of_card, points
from bdexport.zoo import PREFIX


def card_to_markdown(card: dict[str, Any]) -> str:
    """The whole card, to be read; it holds no figure that is not in ``card``."""
    lines = [
        f"# {card['name']}",
        "",
        f"{card['architecture']} with a BlockDrop policy over {card['num_blocks']} blocks, {card['data']['name']}. "
        f"Use it as `{PREFIX}{card['name']}`.",
        "",
        *_results(card),
        "",
        *_facts(card),
        "",
        "Trained with",
        "",
        *(f"    {line}" for line in card["command"].splitlines()),
        "",
        f"**Intended use.** {card['intended_use']}",
        "",
        "**Limits.**",
        "",
        *(f"- {limit}" for limit in card["limits"]),
    ]
    return "\n".join(lines) + "\n"


def _results(card: dict[str, Any]) -> list[str]:
    """A table: the base, the model undropped, the model under its policy, fixed masks where they were measured."""
    result, base = card["result"], card["base"]
    blocks = card["num_blocks"]
    full, origin = result["full"], base.get("origin")
    first = (
        [] if origin is None else [_plain(f"the base's own base, {origin['name']} ({_images(origin)})", origin, card)]
    )
    rows = [
        *first,
        _plain(f"base ({base['measured_on']})", base, card),
        f"| every block kept | {full['accuracy']:.2f} % | {blocks} | {full['flops']:.4g} | 1 |",
        _row("**policy**", result["policy"]),
        *(_row(f"fixed mask, {name}", row) for name, row in result.get("fixed", {}).items()),
    ]
    return [
        f"| {result['images']} {result['dataset']} {result['split']} images | accuracy | blocks run | FLOPs | masks |",
        "|---|---|---|---|---|",
        *rows,
        "",
        *_against_base(card),
        "FLOPs per image: 2 x multiply-accumulates of convolutions and linear layers; for the policy, "
        "its network's included.",
    ]


def _plain(title: str, measured: dict[str, Any], card: dict[str, Any]) -> str:
    """A network without a policy; it has the undropped network's FLOPs."""
    flops = card["result"]["full"]["flops"]
    return f"| {title} | {measured['accuracy']:.2f} % | {card['num_blocks']} | {flops:.4g} | 1 |"


def _images(measured: dict[str, Any]) -> str:
    return f"{measured['images']} {measured['split']} images"


def _against_base(card: dict[str, Any]) -> list[str]:
    """What the model has lost, where base and model were measured on the same images."""
    base = figures_of_card(card)
    if base is None or base.full is None or base.dynamic is None:
        return []
    every, policy = points(base.full, base.accuracy), points(base.dynamic, base.accuracy)
    return [f"Against {base.name} ({base.accuracy:.2f} %): policy {policy}, every block kept {every}.", ""]


def _row(title: str, row: dict[str, Any]) -> str:
    used, flops = row["blocks_used"], row["flops"]
    return (
        f"| {title} | {row['accuracy']:.2f} % | {used['mean']:.2f} +- {used['std']:.2f} "
        f"| {flops['mean']:.4g} +- {flops['std']:.2g} | {row['unique_masks']} |"
    )


def _facts(card: dict[str, Any]) -> list[str]:
    data, base = card["data"], card["base"]
    facts = {
        "data": f"{data['name']}: {data['train']} images to train, {data['validation']} to choose on, "
        f"{data['test']} to test",
        "base": f"{base['name']} ({base['source']}; {base['licence']})",
        "seed": card["seed"],
        "training time": f"{card['seconds'] / 60:.1f} minutes",
        "hardware": hardware_text(card),
        "software": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
        "weights": f"{card['weights']} numbers, {card['bytes']} bytes, SHA-256 `{card['sha256']}`",
        "licence": card["licence"],
    }
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items())]


def hardware_text(card: dict[str, Any]) -> str:
    """The machine and the device that the model was trained on."""
    machine = card["machine"]
    text = f"{machine['cpu']}, {machine['cores']} core{'s' * (machine['cores'] != 1)}"
    return text if card["device"] is None else f"{card['device']}; {text}"
