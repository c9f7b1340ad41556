"""``bdexport retarget``: another mean number of blocks for a trained policy, without training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bdexport.cli.console import progress, table_console, write_json_result
from bdexport.cli.loading import (
    Arch,
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
from bdexport.cli.options import MaxPixels, writable

if TYPE_CHECKING:
    from torch import Tensor


def retarget(
    checkpoint: Annotated[Path, typer.Argument(help="RUN folder, .safetensors, PyTorch file or zoo:NAME.")],
    target_blocks: Annotated[float, typer.Option(help="Mean number of kept blocks, at most.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint, .safetensors.")],
    dataset: Annotated[str, typer.Option(help="cifar10, cifar100, folder or digits.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data set (digits needs none).")] = None,
    max_pixels: MaxPixels = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 250,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    arch: Arch = None,
    shortcut: ShortcutKind = None,
    dropped_transition: DroppedRule = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize_short: ResizeShort = None,
    class_names: ClassNames = None,
    json: Annotated[
        str | None, typer.Option(help="Write the result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Slide a policy along its frontier: one shift of all its logits gives the validation split the wanted mean.

    Nothing is trained. The accuracy shown is the validation split's; 'bdexport evaluate' gives the test set's.
    """
    from dataclasses import replace

    from bdexport.checkpoint import (
        build_model,
        check_suffix,
        load_checkpoint,
        loading_record,
        named_by,
        save_checkpoint,
    )
    from bdexport.dataset import check_classes, check_folder, load_dataset, unnamed_classes
    from bdexport.errors import UsageError
    from bdexport.evaluate import policy_statistics, run_masks
    from bdexport.files import check_writable, refuse_existing
    from bdexport.models.flops import count_flops
    from bdexport.retarget import policy_logits
    from bdexport.retarget import retarget as shift_policy
    from bdexport.train.data import DeviceImages

    check_folder(dataset, data)
    refuse_existing(out, overwrite)
    check_suffix(out)
    check_writable(out)
    loading = Loading(arch, shortcut, dropped_transition, mean, std, size, resize_short, class_names)
    found = load_checkpoint(checkpoint, **loading.arguments())
    model = build_model(found)
    if not 0 < target_blocks <= found.network.num_blocks:
        blocks = found.network.num_blocks
        raise UsageError("--target-blocks", got=target_blocks, expected=f"above 0, at most {blocks}")
    chosen = load_dataset(dataset, data, "validation", max_pixels=max_pixels)
    check_classes(chosen, found.network.num_classes, found.class_names)
    found = named_by(found, chosen)
    say_assumed(found, checkpoint)
    source = DeviceImages(chosen.arrays(found.preprocess), chosen.labels, found.preprocess, "cpu")
    flops = count_flops(model, found.preprocess.size)
    with progress() as bar:

        def batches(title: str) -> Iterable[tuple[Tensor, Tensor]]:
            return bar.track(source.batches(batch), total=-(-len(source) // batch), description=title)

        before = run_masks(model, batches("before"), model.masks)
        shift = shift_policy(model, policy_logits(model, batches("policy")), target_blocks)
        after = run_masks(model, batches("after"), model.masks)
    state = found.state | {"policy.fc.bias": model.policy.fc.bias.detach().clone()}
    training = found.training | {
        "retargeted": {"target_blocks": target_blocks, "logit_shift": shift},
        "policy_statistics": policy_statistics(after, "validation"),
    }
    save_checkpoint(out, replace(found, state=state, training=training, sha256=None))
    result = {
        "schema": "bdexport.retarget/1",
        "checkpoint": checkpoint,
        "out": out,
        "loading": loading_record(found),
        "logit_shift": shift,
        "before": before.to_json(flops, with_policy=True),
        "after": after.to_json(flops, with_policy=True),
    }
    shown = table_console(json)
    for note in unnamed_classes(chosen, found.class_names):
        shown.print(note, soft_wrap=True)
    shown.print(
        f"{out}: logits shifted by {shift:+.3f}; validation accuracy {before.accuracy:.2f} % with "
        f"{before.blocks_used.mean():.2f} blocks -> {after.accuracy:.2f} % with {after.blocks_used.mean():.2f}"
    )
    if json is not None:
        write_json_result(json, result)
