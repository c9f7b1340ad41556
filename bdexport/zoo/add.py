"""For who maintains the zoo: a finished run becomes a model of the zoo, with a card of what was measured.

    bdexport evaluate RUN --dataset cifar10 --data DIR --json evaluate.json
    bdexport evaluate BASE --dataset cifar10 --data DIR --json base.json
    python -m bdexport.zoo.add RUN NAME --evaluation evaluate.json --base-evaluation base.json

Every figure of the card is read from the run and from the two evaluations, which are checked to be of this very model
and of a whole test set; the command is made from the settings that the run recorded. What no file says, such as the
licence of a base that is not known here, has to be given.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdexport.checkpoint import Checkpoint, load_checkpoint
from bdexport.checkpoint.reading import checkpoint_file
from bdexport.config import TrainConfig, preset
from bdexport.dataset import needs_folder
from bdexport.errors import BdexportError, CheckpointError, OutputError, UsageError
from bdexport.files import sha256_file, writing
from bdexport.json_text import MalformedError, parse_json, why
from bdexport.train.data_size import AS_THEY_ARE, following_settings, follows
from bdexport.train.settings import with_assignments
from bdexport.train.state import METRICS_FILE
from bdexport.train.unused import why_unused
from bdexport.zoo import CARD_SCHEMA, LOG_SUFFIX, MAX_BYTES, zoo_card, zoo_folder, zoo_names
from bdexport.zoo.card import card_to_markdown

NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "digits": 360}
WHAT_THE_IMAGES_ARE = {
    "cifar10": "32x32 colour photographs of ten kinds of objects and animals",
    "cifar100": "32x32 colour photographs of a hundred kinds of objects, plants and animals",
    "digits": "handwritten digits, 8x8 grey, scaled up to the network's input",
}
FEW_MASKS = 5

# Bases by their SHA-256: where they come from, their licence, and what a reader of the card should know.
PUBLIC_CIFAR = {
    "source": "github.com/akamaster/pytorch_resnet_cifar10, Y. Idelbayev, 2018",
    "licence": "BSD-2-Clause, see LICENSE-pytorch_resnet_cifar10.txt",
    "limit": "The base was trained by its author on all 50,000 training images, the validation split's included, "
    "so that accuracies on the validation split are too high. The test images are not among them.",
}
KNOWN_BASES = {
    "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850": PUBLIC_CIFAR,  # resnet32
    "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367": PUBLIC_CIFAR,  # resnet56
}


@dataclass(frozen=True)
class Addition:
    """What to add. ``command`` stands in for the one made from the settings, e.g. for a run of several steps."""

    run: Path
    name: str
    evaluation: Path
    base_evaluation: Path | None = None
    origin_evaluation: Path | None = None
    base_source: str | None = None
    base_licence: str | None = None
    command: str | None = None
    licence: str = "Apache-2.0"


def add_to_zoo(addition: Addition, folder: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write NAME.safetensors, NAME.json, NAME.md and the run's log to ``folder`` (default: the zoo); return the card.

    All are written beside their places and renamed when they are complete. Raises UsageError, CheckpointError
    (a run or an evaluation that is none, or of another model) and OutputError (the name is taken, the zoo too large).
    """
    folder = folder or zoo_folder()
    if not NAME.fullmatch(addition.name):
        raise UsageError("name", got=repr(addition.name), expected="a-z, 0-9, single dots and dashes inside")
    targets = [folder / f"{addition.name}.{suffix}" for suffix in ("md", "json", "safetensors", LOG_SUFFIX)]
    if not overwrite and any(path.exists() for path in targets):
        raise OutputError(f"{targets[2]}: exists already", remedy="choose another name, or pass --overwrite")
    card = card_of(addition)
    text = json.dumps(card, indent=2, allow_nan=False) + "\n"
    others = sum(path.stat().st_size for path in folder.glob("*") if path.is_file() and path not in targets)
    if others + card["bytes"] > MAX_BYTES:
        raise OutputError("the zoo is full", got=f"{others + card['bytes']} bytes", expected=f"at most {MAX_BYTES}")
    # Renamed from the last to the first: a model whose card is not there yet is not listed.
    with ExitStack() as stack:
        markdown, data, model, log = (stack.enter_context(writing(target)) for target in targets)
        markdown.write_text(card_to_markdown(card))
        data.write_text(text)
        shutil.copyfile(checkpoint_file(addition.run), model)
        try:
            shutil.copyfile(addition.run / METRICS_FILE, log)
        except OSError as error:
            what = f"{addition.run / METRICS_FILE}: the run's log cannot be read ({error.strerror})"
            raise CheckpointError(what, expected="a run folder") from error
    return card


def card_of(addition: Addition) -> dict[str, Any]:
    """The card of a finished run. Raises as :func:`add_to_zoo`."""
    path = checkpoint_file(addition.run)
    checkpoint = load_checkpoint(path)
    training = checkpoint.training
    if checkpoint.policy is None or not training.get("complete"):
        raise CheckpointError(f"{path}: not the model of a finished run with a policy", remedy="train it to its end")
    evaluation = _evaluation(addition.evaluation, checkpoint, training["dataset"]["name"])
    digest = sha256_file(path)
    if evaluation["checkpoint_sha256"] != digest:
        raise CheckpointError(f"{addition.evaluation}: measured on another file", expected=f"{path} as it is now")
    base = _base(addition, checkpoint)
    limit = base.pop("limit", None)
    return {
        "schema": CARD_SCHEMA,
        "name": addition.name,
        "architecture": checkpoint.network.name,
        "num_blocks": checkpoint.network.num_blocks,
        "class_names": list(checkpoint.class_names),
        "weights": sum(tensor.numel() for tensor in checkpoint.state.values()),
        "bytes": path.stat().st_size,
        "sha256": digest,
        "data": training["dataset"] | {"test": evaluation["dataset"]["images"]},
        "base": base,
        "teachers": training.get("teachers", []),
        "teachers_sha256": training.get("teachers_sha256", []),  # older runs know their names only
        "result": {
            "dataset": evaluation["dataset"]["name"],
            "split": evaluation["dataset"]["split"],
            "images": evaluation["dataset"]["images"],
            "full": evaluation["full"],
            "policy": evaluation["policy"],
            "fixed": evaluation.get("fixed", {}),
        },
        "command": addition.command or training_command(checkpoint),
        "command_given": addition.command is not None,
        "seed": training["settings"]["seed"],
        "seconds": training["seconds"],
        "machine": training["machine"],
        "device": training.get("device"),
        "versions": {
            "bdexport": training["bdexport"],
            "torch": training["torch"],
            "python": training["machine"]["python"],
        },
        "licence": addition.licence,
        "intended_use": _intended_use(checkpoint, evaluation),
        "limits": [*_limits(checkpoint, evaluation), *([limit] if limit else [])],
    }


def _evaluation(path: Path, checkpoint: Checkpoint, dataset: str) -> dict[str, Any]:
    """What ``bdexport evaluate --json`` wrote, of the whole test set of ``dataset`` with a network like this one."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, MalformedError) as error:
        what, remedy = f"{path}: not the JSON of bdexport evaluate ({why(error)})", "evaluate again with --json FILE"
        raise CheckpointError(what, remedy=remedy) from error
    if not isinstance(found, dict) or found.get("schema") != "bdexport.evaluate/1" or "checkpoint_sha256" not in found:
        raise CheckpointError(
            f"{path}: not the JSON of this version's bdexport evaluate", remedy="evaluate again with --json FILE"
        )
    where = found["dataset"]
    got = (found["architecture"], where["name"], where["split"], where["images"])
    expected = (checkpoint.network.name, dataset, "test", TEST_IMAGES.get(dataset, where["images"]))
    if got != expected:
        shown = ("{}, {} {}, {} images".format(*side) for side in (got, expected))
        raise CheckpointError(f"{path}: not an evaluation for this card", got=next(shown), expected=next(shown))
    return found


def _base(addition: Addition, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the run started from, how good that was, and on what terms it came."""
    training = checkpoint.training
    if training["base"] is None:
        return _own_base(addition, training)
    if addition.base_evaluation is None:
        raise UsageError(
            f"the accuracy of the base {training['base']} is not known",
            remedy="pass --base-evaluation FILE, the JSON of bdexport evaluate BASE",
        )
    measured = _evaluation(addition.base_evaluation, checkpoint, training["dataset"]["name"])
    if Path(measured["checkpoint"]).name != training["base"]:
        raise CheckpointError(
            f"{addition.base_evaluation}: of another base", got=measured["checkpoint"], expected=training["base"]
        )
    recorded = training.get("base_sha256") or measured["checkpoint_sha256"]  # older runs know its name only
    if measured["checkpoint_sha256"] != recorded:
        raise CheckpointError(
            f"{addition.base_evaluation}: of another file than the run's base {training['base']}",
            got=f"SHA-256 {measured['checkpoint_sha256']}",
            expected=recorded,
            remedy="evaluate the file that the run started from",
        )
    known = KNOWN_BASES.get(measured["checkpoint_sha256"], {})
    source, licence = addition.base_source or known.get("source"), addition.base_licence or known.get("licence")
    if source is None or licence is None:
        raise UsageError(
            f"where the base {training['base']} comes from is not known", remedy="pass --base-source and --base-licence"
        )
    base = {
        "name": training["base"],
        "sha256": measured["checkpoint_sha256"],
        "source": source,
        "licence": licence,
        "accuracy": measured["full"]["accuracy"],
        "measured_on": f"{measured['dataset']['images']} test images",
        "split": "test",
        "images": measured["dataset"]["images"],
    }
    origin = _origin(addition, checkpoint, measured["checkpoint_sha256"])
    base |= {} if origin is None else {"origin": origin}
    return base | ({"limit": known["limit"]} if "limit" in known else {})


def _origin(addition: Addition, checkpoint: Checkpoint, base_sha256: str) -> dict[str, Any] | None:
    """The network that the base itself was trained from: as it was measured, or as the base's own card has it.

    A base that finetuning has lowered is no measure of what the model has lost. None where the base goes back to none.
    """
    if addition.origin_evaluation is not None:
        found = _evaluation(addition.origin_evaluation, checkpoint, checkpoint.training["dataset"]["name"])
        return {
            "name": Path(found["checkpoint"]).name,
            "sha256": found["checkpoint_sha256"],
            "accuracy": found["full"]["accuracy"],
            "split": found["dataset"]["split"],
            "images": found["dataset"]["images"],
        }
    cards = [zoo_card(name) for name in zoo_names()]
    base = next((card["base"] for card in cards if card["sha256"] == base_sha256), None)
    if base is None:
        return None
    return base.get("origin") or {name: base[name] for name in ("name", "sha256", "accuracy", "split", "images")}


def _own_base(addition: Addition, training: dict[str, Any]) -> dict[str, Any]:
    """The base that the run itself trained, as its own log has it."""
    path = addition.run / METRICS_FILE
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the run's log cannot be read ({error})", expected="a run folder") from error
    last = [row for row in rows if row["phase"] == "pretrain"][-1]
    return {
        "name": f"trained in this run, {last['epoch']} epochs",
        "sha256": None,
        "source": "pretraining, from scratch",
        "licence": addition.licence,
        "accuracy": last["validation"]["accuracy"],
        "measured_on": f"{training['dataset']['validation']} validation images, end of pretraining",
        "split": "validation",
        "images": training["dataset"]["validation"],
    }


def training_command(checkpoint: Checkpoint) -> str:
    """The line that trains it again: preset, data and every setting that is not the preset's.

    Raises :class:`UsageError` when a recorded setting is not known to this version.
    """
    training = checkpoint.training
    recorded = training["settings"]
    words = ["bdexport", "train", "--arch", checkpoint.network.name]
    if training["base"] is not None:
        words += ["--base", training["base"]]
        words += ["--fresh-policy"] if training.get("fresh_policy") else []
    for teacher in training.get("teachers", []):
        words += ["--teacher", teacher]
    words += ["--dataset", training["dataset"]["name"]]
    if needs_folder(training["dataset"]["name"]):
        words += ["--data", "DIR"]
    if training["dataset"].get("limit") is not None:
        words += ["--images", str(training["dataset"]["limit"])]
    words += ["--preset", recorded["preset"]]
    num_blocks, with_base = checkpoint.network.num_blocks, training["base"] is not None
    changed = [
        (name, "none" if value is None else str(value))
        for name, value in changed_settings(recorded, num_blocks, training["dataset"]["train"])
    ]
    config = with_assignments(preset(recorded["preset"], num_blocks), [f"{name}={value}" for name, value in changed])
    for name, value in changed:
        if with_base and name.startswith("pretrain."):  # a base rules them out, also no epochs at all
            continue
        if why_unused(name, value, config, with_base=with_base, base_only=False, goes_on=False) is None:
            words += ["--set", f"{name}={value}"]
    return shlex.join([*words, "--out", "RUN"])


def changed_settings(recorded: dict[str, Any], num_blocks: int, images: int = AS_THEY_ARE) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the recorded settings that are not those of the preset.

    Of a run on so few ``images`` that settings follow their number, also all that do: whatever is given stays.

    A setting that the record does not have is younger than the run and was what it is by default: switched off.
    """
    effective = _flat(TrainConfig().to_json())
    unknown = set(_flat(recorded)) - set(effective)
    if unknown:
        raise UsageError(
            "recorded settings that this version does not have", got=", ".join(sorted(unknown)), remedy="pass --command"
        )
    usual = _flat(preset(recorded["preset"], num_blocks).to_json())
    fitted = set(following_settings()) if follows(recorded["preset"], images) else set()
    for name, value in (effective | _flat(recorded)).items():
        if value != usual[name] or name in fitted:
            yield name, value


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _intended_use(checkpoint: Checkpoint, evaluation: dict[str, Any]) -> str:
    name = evaluation["dataset"]["name"]
    what = WHAT_THE_IMAGES_ARE.get(name, f"images like those of {name}")
    return (
        f"Trying bdexport, measuring dynamic inference, and comparing with other methods on {name}: it sorts {what} "
        f"into {checkpoint.network.num_classes} classes."
    )


def _limits(checkpoint: Checkpoint, evaluation: dict[str, Any]) -> list[str]:
    dataset, policy = evaluation["dataset"], evaluation["policy"]
    limits = [
        f"Trained and measured on {dataset['name']} alone. Every image gets one of its "
        f"{checkpoint.network.num_classes} classes, whatever it shows; how it does on other images, and under noise or "
        "attack, was not measured.",
        "One run with one seed: the accuracy of another run will differ. "
        f"The standard error of the accuracy on {dataset['images']} images is "
        f"{standard_error(policy['accuracy'], dataset['images']):.2f} points.",
    ]
    if needs_folder(dataset["name"]):
        limits.append(
            "Which images are the validation split follows from their order in the data folder: in a copy in another "
            "order, it holds images that this model was trained on. The test images are held out in every copy."
        )
    if policy["unique_masks"] <= FEW_MASKS:
        limits.append(
            f"The policy uses {policy['unique_masks']} masks only: most of the saving is which blocks it found, little "
            "of it depends on the image."
        )
    return limits


def standard_error(accuracy: float, images: int) -> float:
    """Of a share measured on so many images, both in percent (binomial)."""
    share = accuracy / 100
    return float(100 * (share * (1 - share) / images) ** 0.5)


def main(arguments: list[str] | None = None) -> int:
    """The command line of this file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bdexport.zoo.add", description="Add a finished run to the zoo.")
    parser.add_argument("run", type=Path, help="RUN folder of a finished training")
    parser.add_argument("name", help="its name in the zoo, e.g. resnet32-cifar10")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON of bdexport evaluate RUN, whole test set")
    parser.add_argument("--base-evaluation", type=Path, help="JSON of bdexport evaluate BASE, if the run had a --base")
    parser.add_argument("--origin-evaluation", type=Path, help="the same of what the base itself was trained from")
    parser.add_argument("--base-source", help="where the base comes from, if it is not a known one")
    parser.add_argument("--base-licence", help="the licence of the base, if it is not a known one")
    parser.add_argument("--command", help="default: made from the settings that the run recorded")
    parser.add_argument("--licence", default=Addition.licence, help="of the model; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace a model of that name")
    given = vars(parser.parse_args(arguments))
    overwrite = given.pop("overwrite")
    try:
        card = add_to_zoo(Addition(**given), overwrite=overwrite)
    except BdexportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(card_to_markdown(card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
