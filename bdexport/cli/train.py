"""``bdexport train``: from a pretrained network (or nothing) to a network with a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.cli.console import err_console, progress, table_console, write_json_result
from bdexport.cli.loading import (
    ClassNames,
    DroppedRule,
    Loading,
    Mean,
    ResizeShort,
    ShortcutKind,
    Size,
    Std,
    say_assumed,
)
from bdexport.cli.options import LEAVE_OUT, MaxPixels, refuse, writable
from bdexport.cli.stages import show_skipped
from bdexport.config import PRESETS

if TYPE_CHECKING:
    from rich.console import Console

    from bdexport.architecture import ResNetSpec
    from bdexport.checkpoint import Checkpoint
    from bdexport.config import TrainConfig
    from bdexport.preprocess import Preprocess
    from bdexport.train.distributed import World
    from bdexport.train.request import TrainRequest

PRESET_HELP = "Settings to start from: " + "; ".join(f"{name}: {text}" for name, text in PRESETS.items()) + "."
SMOKE_NOTE = "preset smoke only shows that training runs; --preset cpu trains long enough for its accuracy to count"


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="RUN folder; an unfinished run there is resumed.")],
    dataset: Annotated[str, typer.Option(help="cifar10, cifar100, folder or digits.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits needs none).")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Only the first N training images, and validation images in proportion.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="e.g. resnet32; recognised from --base when left out.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="Checkpoint (or zoo:NAME) to start from; without it the base is trained.")
    ] = None,
    teacher: Annotated[
        list[Path] | None, typer.Option(help="Checkpoint to distil from instead of the base; several are averaged.")
    ] = None,
    preset: Annotated[str, typer.Option(help=PRESET_HELP)] = "cpu",
    method: Annotated[
        str | None,
        typer.Option(help="blockdrop; for comparison: fixed (finetuned under a fixed mask), sequential, act, sact."),
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Of --method fixed: first-k, distribute-k, random-k, search, or 0s and 1s.")
    ] = None,
    kept: Annotated[int | None, typer.Option(help="K of the fixed mask.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is random.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="Train the base network and stop.")] = False,
    prime_epochs: Annotated[int | None, typer.Option(help="Epochs in which the policy's backbone classifies.")] = None,
    fresh_policy: Annotated[
        bool, typer.Option("--fresh-policy", help="Learn a new policy although the base has one.")
    ] = False,
    pretrain_epochs: Annotated[int | None, typer.Option(help="Epochs for the base network itself.")] = None,
    adapt_epochs: Annotated[int | None, typer.Option(help="Epochs of stochastic depth before the policy.")] = None,
    curriculum_epochs: Annotated[int | None, typer.Option(help="Epochs of curriculum learning.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="Epochs of joint finetuning.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step, in every phase.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Penalty of a wrong prediction (Eqn. 3).")] = None,
    target_blocks: Annotated[float | None, typer.Option(help="Mean kept blocks to aim at (budget loss).")] = None,
    alpha: Annotated[float | None, typer.Option(help="Exploration bound, throughout.")] = None,
    estimator: Annotated[
        str | None, typer.Option(help="self_critical (paper), leave_one_out, nested, gumbel or marginal.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Masks drawn per image and step.")] = None,
    reward: Annotated[str | None, typer.Option(help="correct (paper) or probability.")] = None,
    distillation: Annotated[float | None, typer.Option(help="Weight of the undropped base as a teacher.")] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out image files that cannot be decoded, and list them.")
    ] = False,
    max_pixels: MaxPixels = None,
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror", help="Mirror every second image; wrong for text. Default: as suits the data set."
        ),
    ] = None,
    shift: Annotated[
        int | None,
        typer.Option(help="Move images by up to so many pixels (0: not at all). Default: as suits the data set."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, e.g. finetune.batch=256; repeatable.")
    ] = None,
    shortcut: ShortcutKind = None,
    dropped_transition: DroppedRule = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize_short: ResizeShort = None,
    class_names: ClassNames = None,
    json: Annotated[
        str | None, typer.Option(help="Write the training result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Train a BlockDrop policy: curriculum on the frozen network, then joint finetuning. Resumes RUN if cut off.

    Several GPUs or machines: torchrun --nproc-per-node N -m bdexport train ...

    What the checkpoint does not say itself (--mean, --shortcut ..): the options are about --base, and where there is
    none about the network that is trained. A foreign --teacher is read with them, too, and always with the base's
    preprocessing; a teacher in bdexport's own form says everything itself.
    """
    from bdexport.checkpoint.reading import RUN_FILE, checkpoint_file
    from bdexport.files import check_writable, sha256_file, utf8_name
    from bdexport.train.distributed import joined
    from bdexport.train.request import goes_on
    from bdexport.train.unused import check_used

    settings = {
        "method": method,
        "fixed.mask": mask,
        "fixed.kept": kept,
        "seed": seed,
        "precision": precision,
        "pretrain.epochs": pretrain_epochs,
        "prime.epochs": prime_epochs,
        "adapt.epochs": adapt_epochs,
        "curriculum.epochs": curriculum_epochs,
        "finetune.epochs": finetune_epochs,
        **dict.fromkeys(("pretrain.batch", "prime.batch", "adapt.batch", "curriculum.batch", "finetune.batch"), batch),
        "policy.wrong_prediction_penalty": gamma,
        "policy.target_blocks": target_blocks,
        "policy.exploration_bound": alpha,
        "policy.finetune_bound_start": alpha,
        "policy.finetune_bound_end": alpha,
        "policy.estimator": estimator,
        "policy.samples": samples,
        "policy.reward": reward,
        "distillation_weight": distillation,
        "augment.mirror": mirror,
        "augment.shift": shift,
    }
    _check_options(method, mask, kept, fresh_policy, base)
    loading = Loading(arch, shortcut, dropped_transition, mean, std, size, resize_short, class_names)
    if base is None:
        refuse(context, ("class_names",), "without --base: a new network has the data set's")
    check_writable(out / RUN_FILE)  # before data sets are read, not after
    with joined(device) as world:
        found, num_blocks = _base(base, loading)
        config = resolved_config(preset, num_blocks, settings, set_ or [])
        _refuse_without_effect(context, config, base_only=base_only)
        request = _request(dataset, data, config.validation_share, loading, found, out, skip_damaged, max_pixels)
        request = replace(
            request,
            base=None if base is None else utf8_name(base.name),
            base_sha256=None if base is None else sha256_file(checkpoint_file(base)),
            teachers=tuple(
                (utf8_name(path.name), _teacher(path, loading, request.preprocess)) for path in teacher or []
            ),
            teachers_sha256=tuple(sha256_file(checkpoint_file(path)) for path in teacher or []),
            base_only=base_only,
            fresh_policy=fresh_policy,
            device=device,
        )
        given = {name for name, value in settings.items() if value is not None}
        given |= {assignment.partition("=")[0].strip() for assignment in set_ or []}
        request = _limited(request, config, images)
        config, request = _fitted(config, num_blocks, request, given, world)
        going_on = goes_on(request, config)
        check_used(settings, set_ or [], config, with_base=found is not None, base_only=base_only, goes_on=going_on)
        if world.leads:
            _say_assumed(request, base, teacher or [])
        _run(request, config, world, json)


def _check_options(
    method: str | None,
    mask: str | None,
    kept: int | None,
    fresh_policy: bool,
    base: Path | None,
) -> None:
    """Refuse options that would have no effect: whoever gives them expects one."""
    from bdexport.errors import UsageError

    if method != "fixed" and (mask is not None or kept is not None):
        raise UsageError("--mask and --kept", got=f"method {method or 'blockdrop'}", remedy="add --method fixed")
    if kept is not None and mask is not None and not set(mask) - {"0", "1"}:
        raise UsageError("--kept", got=f"the mask {mask}, which says itself what it keeps", remedy="leave --kept out")
    if fresh_policy and base is None:
        raise UsageError("--fresh-policy", got="no --base, and so a fresh policy anyway", remedy="leave it out")


def _refuse_without_effect(context: typer.Context, config: TrainConfig, *, base_only: bool) -> None:
    """Refuse what is no setting and would not be used; settings: :mod:`bdexport.train.unused`. Raises UsageError."""
    if base_only:
        refuse(context, ("teacher",), "with --base-only, which trains the base network and nothing else")
    if config.method == "fixed":
        refuse(context, ("fresh_policy",), "with method fixed, which learns none")
    if config.distillation_weight == 0:
        refuse(context, ("teacher",), "without distillation", f"pass --distillation 1, or {LEAVE_OUT}")


def _run(request: TrainRequest, config: TrainConfig, world: World, json: str | None) -> None:
    """Train; of several processes, the first one shows what it gave."""
    from bdexport.checkpoint import load_checkpoint, loading_record
    from bdexport.train.pipeline import train as run_training
    from bdexport.train.static_mask import static_text

    if not world.leads:
        run_training(request, config, QuietReporter(), world)
        return
    shown = table_console(json)
    path = run_training(request, config, ConsoleReporter(shown), world)
    training = load_checkpoint(path).training
    shown.print(f"{path}: {summary(training)}")
    if config.preset == "smoke":
        shown.print(SMOKE_NOTE, soft_wrap=True)
    static = training["validation"].get("static")
    if static is not None:
        accuracy = training["validation"]["policy"]["accuracy"]
        shown.print(static_text(static, accuracy, request.network.num_blocks, request.out), soft_wrap=True)
    if json is not None:
        loading = None if request.initial is None else loading_record(request.initial)
        result = {"schema": "bdexport.train/1", "checkpoint": path, "loading": loading, "training": training}
        write_json_result(json, result)


def resolved_config(preset: str, num_blocks: int, settings: dict[str, Any], assignments: list[str]) -> TrainConfig:
    """The preset with every given (not None) setting and every ``--set`` applied. Raises UsageError."""
    from bdexport import config
    from bdexport.errors import UsageError
    from bdexport.train.settings import with_assignments, with_setting

    if preset not in PRESETS:
        raise UsageError("preset", got=repr(preset), expected=f"one of {', '.join(PRESETS)}")
    resolved = config.preset(preset, num_blocks)
    for name, value in settings.items():
        if value is not None:
            resolved = with_setting(resolved, name, value)
    return with_assignments(resolved, assignments)


def _limited(request: TrainRequest, config: TrainConfig, images: int | None) -> TrainRequest:
    """Fewer images: as many as asked for, or for the preset ``smoke`` as many as it has the time for."""
    from bdexport.train.data_size import smoke_images

    note = ""
    if images is None and config.preset == "smoke":
        images = smoke_images(request, config)
        note = f"preset smoke: the first {images} of {len(request.train)} training images, to take about a minute"
    if images is None or images >= len(request.train):
        return request
    validation = max(images * len(request.validation) // len(request.train), min(50, len(request.validation)))
    return replace(
        request,
        train=request.train.first(images),
        validation=request.validation.first(validation),
        limit=images,
        notes=(*request.notes, f"{note}; --images N for others") if note else request.notes,
    )


def _fitted(
    config: TrainConfig, num_blocks: int, request: TrainRequest, given: set[str], world: World
) -> tuple[TrainConfig, TrainRequest]:
    """The settings for a data set of this size; a run that an older version began goes on as it was."""
    from bdexport.config import preset
    from bdexport.train.data_size import fitted_text, fitted_to_data
    from bdexport.train.methods import phases_of
    from bdexport.train.state import began_before

    images = len(request.train)
    fitted = fitted_to_data(config, preset(config.preset, num_blocks), images, given)
    old = world.once(lambda: began_before(request.out, "whole_epochs"))
    if fitted == config or old:
        return _with_policy(config, request, given, old), request
    fitted = _with_policy(fitted, request, given, old)
    phases = {phase.settings or phase.name for phase in phases_of(config)}
    if request.initial is not None:
        phases.discard("pretrain")
    return fitted, replace(request, notes=(*request.notes, fitted_text(fitted, images, given, phases)))


def _with_policy(config: TrainConfig, request: TrainRequest, given: set[str], old: bool) -> TrainConfig:
    """For ImageNet-style networks a fresh policy below 5 % of the network's FLOPs, unless one was asked for."""
    from bdexport.models.policy_size import fitting_policy
    from bdexport.train.request import kept_policy, learns_decisions

    asked = given & {"policy.input_pool", "policy.widths", "policy.stages"}
    ours = learns_decisions(request, config) and config.method == "blockdrop" and config.preset != "paper"
    if old or asked or not ours or request.network.family != "imagenet" or kept_policy(request) is not None:
        return config
    spec = fitting_policy(request.network, request.preprocess.size)
    widths = ",".join(map(str, spec.widths))
    return replace(config, policy=replace(config.policy, input_pool=spec.input_pool, widths=widths))


def _base(base: Path | None, loading: Loading) -> tuple[Checkpoint | None, int]:
    """The checkpoint to start from, if any, and the network's number of blocks."""
    from bdexport.architecture import resnet_spec
    from bdexport.checkpoint import load_checkpoint
    from bdexport.errors import UsageError

    arguments = loading.arguments()
    if base is not None:
        found = load_checkpoint(base, **arguments)
        return found, found.network.num_blocks
    if loading.arch is None:
        raise UsageError("no network", expected="--arch NAME, --base CKPT or both")
    return None, resnet_spec(loading.arch).num_blocks


def _teacher(path: Path, loading: Loading, preprocess: Preprocess) -> Checkpoint:
    """A network to distil from: it reads what the base reads, and a foreign file says nothing else about that."""
    from bdexport.checkpoint import load_checkpoint

    found = load_checkpoint(path)
    if found.form == "bdexport":
        return found
    arguments = loading.arguments() | {"arch": None, "preprocess": preprocess}
    if found.network.shortcut == "conv":  # the weights say it
        arguments["shortcut"] = None
    return load_checkpoint(path, **arguments)


def _say_assumed(request: TrainRequest, base: Path | None, teachers: list[Path]) -> None:
    if request.initial is not None and base is not None:
        say_assumed(request.initial, base)
    settled = (
        "preprocessing:",
        "class names:",
        "dropped transition",
    )  # by the trained network; a teacher drops nothing
    for path, (_, found) in zip(teachers, request.teachers, strict=True):
        if found.form != "bdexport":
            notes = (note for note in found.notes if not note.startswith(settled))
            found = replace(found, notes=(*notes, "preprocessing: the same as the trained network's, as it must be"))
        say_assumed(found, path)


def _request(
    dataset: str,
    data: Path | None,
    validation_share: float,
    loading: Loading,
    found: Checkpoint | None,
    out: Path,
    skip_damaged: bool,
    max_pixels: int | None,
) -> TrainRequest:
    """Load the data, and settle on a network for it."""
    from bdexport.checkpoint import named_by
    from bdexport.dataset import load_dataset
    from bdexport.train.request import TrainRequest

    splits = {
        split: load_dataset(
            dataset,
            data,
            split,
            validation_share=validation_share,
            skip_damaged=skip_damaged,
            max_pixels=max_pixels,
        )
        for split in ("train", "validation")
    }
    for chosen in splits.values():
        show_skipped(chosen)
    if found is not None:
        found = named_by(found, splits["train"])
        network, preprocess = found.network, found.preprocess
    else:
        network, preprocess = _new_network(loading, len(splits["train"].class_names))
    return TrainRequest(
        network=network,
        preprocess=preprocess,
        train=splits["train"],
        validation=splits["validation"],
        out=out,
        initial=found,
    )


def _new_network(loading: Loading, num_classes: int) -> tuple[ResNetSpec, Preprocess]:
    """A network that nothing is known of yet, as the family's usual one or as the options say."""
    from bdexport.architecture import resnet_spec
    from bdexport.checkpoint.loading import checked_rule, checked_shortcut
    from bdexport.checkpoint.wishes import preprocess_with
    from bdexport.preprocess import Preprocess

    assert loading.arch is not None
    network = resnet_spec(loading.arch, num_classes, checked_shortcut(loading.shortcut))
    rule = checked_rule(loading.dropped_transition)
    if rule is not None:
        network = replace(network, dropped_transition=rule)
    usual = Preprocess() if network.family == "cifar" else Preprocess((224, 224), resize_short=256)
    return network, preprocess_with(usual, loading.preprocess())


def summary(training: dict[str, Any]) -> str:
    """One line: what the run reached on its validation split."""
    from bdexport.base_figures import points

    validation, measured = training["validation"], training.get("base_measured")

    def against(accuracy: float) -> str:
        return f"{accuracy:.2f} %" if measured is None else f"{accuracy:.2f} % ({points(accuracy, base)})"

    text = "validation accuracy "
    if measured is not None:
        base = measured["accuracy"]
        text += f"{base:.2f} % (your base), "
    text += f"{against(validation['full_accuracy'])} undropped"
    for title, fixed in validation.get("fixed", {}).items():
        text += f", {against(fixed['accuracy'])} under {title}"
    if "policy" in validation or "gates" in validation:
        policy = validation.get("policy") or validation["gates"]
        used = policy["blocks_used"]
        text += (
            f", {against(policy['accuracy'])} with {used['mean']:.1f} +- {used['std']:.1f} blocks, "
            f"{policy['flops']['mean']:.3g} FLOPs, {policy['unique_masks']} unique masks"
        )
    return text


class ConsoleReporter:
    """A bar per epoch and, on ``out``, one line when it is done."""

    def __init__(self, out: Console) -> None:
        self.out = out

    @contextmanager
    def epoch(self, title: str, steps: int) -> Iterator[Callable[[], None]]:
        """A progress bar over the epoch's steps."""
        with progress() as bar:
            task = bar.add_task(title, total=steps)
            yield lambda: bar.update(task, advance=1)

    def line(self, row: dict[str, Any]) -> None:
        """The figures of one epoch."""
        self.out.print(epoch_line(row))

    def note(self, text: str) -> None:
        """A choice with its reason, or a warning; on stderr."""
        err_console.print(text)


class QuietReporter:
    """For the processes that leave talking to the first one."""

    @contextmanager
    def epoch(self, _title: str, _steps: int) -> Iterator[Callable[[], None]]:
        """No bar."""
        yield lambda: None

    def line(self, row: dict[str, Any]) -> None:
        """No line."""

    def note(self, text: str) -> None:
        """No note."""


def epoch_line(row: dict[str, Any]) -> str:
    """``finetune 3  loss 0.31  train 92.1 %  val 90.8 %  reward 0.61  blocks 6.8 +- 1.2  masks 143 ..``."""
    validation, learned = row["validation"], row["train"]
    parts = [f"{row['phase']} {row['epoch']:<3}", f"loss {learned['loss']:.3f}"]
    if "accuracy" in learned:
        parts.append(f"train {learned['accuracy']:.2f} %")
    parts.append(f"val {validation['accuracy']:.2f} %")
    if row["open_blocks"] is not None or "ponder" in learned:  # a method that decides has one of these figures
        used = validation["blocks_used"]
        parts += [
            *(f"{name} {learned[name]:.3f}" for name in ("reward", "success", "ponder") if name in learned),
            f"blocks {used['mean']:.2f} +- {used['std']:.2f}",
            f"masks {validation['unique_masks']}",
        ]
    return "  ".join([*parts, f"{row['seconds']:.0f} s", f"{row['images_per_s']:.0f} images/s"])
