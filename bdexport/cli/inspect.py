"""``bdexport inspect``: what is in a bundle, whether every hash holds, and whether it can run here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import FittedTable, table_console, write_json_result
from bdexport.cli.options import VerifyKey, writable
from bdexport.cli.stages import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from bdexport.bundle import Bundle, Manifest

SHOWN_MASKS = 10
NO_DIGEST = "not checked: it holds no digest, as those of earlier builds"
NOT_CHECKED = "there, and not checked: pass --verify-key"


def inspect(
    bundle: Annotated[Path, typer.Argument(help="BUNDLE folder.")],
    verify_key: VerifyKey = None,
    json: Annotated[
        str | None, typer.Option(help="Write everything to this file ('-': stdout).", callback=writable)
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also every setting that the network was trained with.")
    ] = False,
) -> None:
    """Print a bundle's manifest, check the hash of every file, and say whether it can run on this machine."""
    from bdexport.bundle import SIGNATURE, opened_with_problems

    opened, problems = opened_with_problems(bundle, verify_key)
    manifest, signed = opened.manifest, (bundle / SIGNATURE).is_file()
    here = runs_here(opened, intact=not problems)
    out = table_console(json)
    for table in (_overview(manifest, verbose), _parts(manifest), _policy(manifest)):
        if table.row_count:
            out.print(table)
    count = len(manifest.files())
    for problem in problems:
        out.print(f"damaged: {problem}")
    if not problems:
        out.print(f"files: all {count} hashes hold, nothing else is there")
    out.print(f"manifest: {'its digest holds' if manifest.sealed else NO_DIGEST}")
    if signed:
        out.print(f"signature: {'holds' if verify_key is not None else NOT_CHECKED}")
    out.print(f"here: {'runs' if here['ok'] else 'does not run'} ({here['reason']})")
    if json is not None:
        integrity = {
            "ok": not problems,
            "problems": [str(problem) for problem in problems],
            "manifest_digest_checked": manifest.sealed,
            "signed": signed,
            "signature_checked": verify_key is not None,
        }
        result = {"schema": "bdexport.inspect/1", "bundle": bundle, "integrity": integrity, "here": here}
        write_json_result(json, result | {"manifest": manifest.to_json()})
    if problems:
        raise problems[0]


def runs_here(bundle: Bundle, intact: bool) -> dict[str, Any]:
    """Whether ``bdexport run BUNDLE`` would on this machine, found by loading it: ``{"ok", "reason", "executor"}``.

    A damaged bundle (not ``intact``) is not loaded.
    """
    from bdexport.errors import BackendError, BundleError, UsageError
    from bdexport.runtime import load

    if not intact:
        return {"ok": False, "reason": "damaged", "executor": None}
    try:
        loaded = load(bundle)
    except (BackendError, BundleError, UsageError) as error:  # of the backend, or of the executor that is recorded
        return {"ok": False, "reason": str(error), "executor": None}
    with loaded:
        threads = "" if loaded.threads is None else f", {loaded.threads} thread{'s' * (loaded.threads != 1)}"
        where = f"{bundle.manifest.backend} on {loaded.device}{threads}"
        reason = f"{where}; all engines load; executor {loaded.executor}"
        return {"ok": True, "reason": reason, "executor": loaded.executor}


def _overview(manifest: Manifest, verbose: bool) -> Table:
    table = FittedTable(title=f"bundle {manifest.name}, format {manifest.format_version}", show_header=False)
    crossing = ", ".join(map(str, manifest.transitions)) or "none"
    pre = manifest.preprocess
    batch = "any batch" if manifest.max_batch is None else f"batches up to {manifest.max_batch}"
    geometry = f"short side to {pre.resize_short}, centre crop" if pre.resize_short else "scaled"
    rows = {
        "network": f"{manifest.architecture}, {manifest.num_blocks} blocks, {len(manifest.class_names)} classes",
        "transitions": f"{crossing} (dropped: {manifest.dropped_transition})",
        "engines": f"{manifest.backend}, {manifest.precision}, {batch}",
        "mask": str(manifest.extra.get("fixed_mask") or ""),
        "executor": _executor(manifest),
        "preprocessing": f"RGB {pre.size[1]}x{pre.size[0]} ({geometry}, {pre.resampling}), "
        f"mean {_numbers(pre.mean)}, std {_numbers(pre.std)}",
        "classes": _classes(manifest.class_names),
        "created": manifest.created,
        "built with": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())),
        "built on": " ".join(filter(None, (manifest.fingerprint, manifest.compute_capability))),
        "checkpoint": f"{manifest.checkpoint['form']}, SHA-256 {manifest.checkpoint['sha256'][:16]}..",
        "verified": _verified(manifest),
        "trained": _scalars(manifest.training if verbose else _main_settings(manifest.training)),
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    return table


def _executor(manifest: Manifest) -> str:
    executor = manifest.executor or {}
    return f"{executor['choice']} ({executor['reason']})" if {"choice", "reason"} <= set(executor) else ""


def _classes(names: tuple[str, ...]) -> str:
    return ", ".join(names[:12]) + (f", .. ({len(names)})" if len(names) > 12 else "")


def _verified(manifest: Manifest) -> str:
    report = manifest.verification
    if report is None:
        return "no"
    shown = ("ok", "reference", "max_logit_difference", "worst_part", "images")
    return _scalars({key.replace("_", " "): report[key] for key in shown if key in report})


def _main_settings(training: dict[str, Any]) -> dict[str, Any]:
    """What the network was trained from and what came of it; of the dozens of settings those that name the others."""
    settings = training.get("settings")
    named = {key: settings[key] for key in ("preset", "seed") if key in settings} if isinstance(settings, dict) else {}
    left_out = ("settings", "machine", "torch", "seconds", "threads", "validation")
    kept = {key: value for key, value in training.items() if key not in left_out}
    reached = training.get("validation")
    policy = reached.get("policy") if isinstance(reached, dict) else None
    if isinstance(reached, dict) and isinstance(policy, dict):
        used = policy.get("blocks_used")
        kept["validation"] = {
            "full accuracy": reached.get("full_accuracy"),
            "policy accuracy": policy.get("accuracy"),
            "blocks used": used.get("mean") if isinstance(used, dict) else None,
        }
    return kept | named


def _scalars(data: dict[str, Any], prefix: str = "") -> str:
    """The plain values of a JSON object, nested ones by their dotted names; lists are left out."""
    texts = []
    for key, value in data.items():
        if isinstance(value, dict):
            texts.append(_scalars(value, f"{prefix}{key}."))
        elif isinstance(value, float):
            texts.append(f"{prefix}{key} {value:.4g}")
        elif isinstance(value, str | int):
            texts.append(f"{prefix}{key} {value}")
    return ", ".join(filter(None, texts))


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:g}" for value in values)


def _parts(manifest: Manifest) -> Table:
    table = FittedTable(title=f"{len(manifest.parts)} parts")
    for name in ("part", "input", "output"):
        table.add_column(name)
    for name in ("FLOPs", "graph", "engine"):
        table.add_column(name, justify="right")
    for part in manifest.parts.values():
        shapes = ["x".join(map(str, ("N", *spec.shape))) for spec in (part.input, part.output)]
        sizes = ["-" if entry is None else size_text(entry.bytes) for entry in (part.graph, part.engine)]
        table.add_row(part.name, *shapes, f"{part.flops:.3e}", *sizes)
    return table


def _policy(manifest: Manifest) -> Table:
    """The masks that occur most, with their share of the images they were counted on."""
    statistics = manifest.policy_statistics
    masks = statistics.get("masks", [])
    title = f"policy: {len(masks)} most frequent masks on {statistics.get('images')} {statistics.get('split')} images"
    table = FittedTable(title=title)
    for name in ("mask (block 0 first)", "blocks", "images", "share"):
        table.add_column(name, justify="left" if name.startswith("mask") else "right")
    for row in masks[:SHOWN_MASKS]:
        share = row["count"] / statistics["images"]
        table.add_row(row["mask"], str(row["mask"].count("1")), str(row["count"]), f"{100 * share:.1f} %")
    return table
