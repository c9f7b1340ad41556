"""The kinds of case, by name; each is imported when it is used."""

from __future__ import annotations

from importlib import import_module

from campaign.cases import Kind

KINDS: dict[str, str] = {
    "bundles": "campaign.bundles:Bundles",
    "checkpoints": "campaign.checkpoints:Checkpoints",
    "data": "campaign.data:Data",
    "lists": "campaign.documents:Lists",
    "runs": "campaign.documents:Runs",
    "results": "campaign.documents:Results",
    "kills": "campaign.kills:Kills",
    "races": "campaign.races:Races",
    "soak": "campaign.soak:Soak",
    "parity": "campaign.parity:Parity",
}
SELF_TEST = "selftest"  # finds every sort of failure; only the campaign's own test runs it


def kind_of(name: str) -> type[Kind]:
    """The class of a kind. Raises KeyError for a name that is not in the table."""
    table = KINDS | {SELF_TEST: "campaign.selftest:SelfTest"}
    module, _, cls = table[name].partition(":")
    found: type[Kind] = getattr(import_module(module), cls)
    return found
