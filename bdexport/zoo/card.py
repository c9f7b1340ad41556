"""A model card as Markdown."""

from __future__ import annotations

from typing import Any

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
    full = result["full"]
    rows = [
        f"| base ({base['measured_on']}) | {base['accuracy']:.2f} % | {blocks} | {full['flops']:.4g} | 1 |",
        f"| every block kept | {full['accuracy']:.2f} % | {blocks} | {full['flops']:.4g} | 1 |",
        _row("**policy**", result["policy"]),
        *(_row(f"fixed mask, {name}", row) for name, row in result.get("fixed", {}).items()),
    ]
    return [
        f"| {result['images']} {result['dataset']} {result['split']} images | accuracy | blocks run | FLOPs | masks |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "FLOPs per image: 2 x multiply-accumulates of convolutions and linear layers; for the policy, "
        "its network's included.",
    ]


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
