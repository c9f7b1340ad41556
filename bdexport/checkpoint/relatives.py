"""Relatives of the ResNet, and other networks, told by their keys: so that a refusal says what the file holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bdexport.checkpoint.fitting import shown
from bdexport.errors import CheckpointError

PLAIN = "a plain ResNet: basic or bottleneck blocks with batch norm after each convolution"
NEXT_STEP = (
    "bdexport cannot run such a network; `bdexport train --arch resnet18 --dataset D --data DIR` trains a plain one on "
    "your data, and `bdexport zoo` lists trained ones"
)

# Name and a pattern of keys that only this family has. The first that is found names the file: what stands inside a
# block comes before what stands at the top.
FAMILIES: tuple[tuple[str, str], ...] = (
    ("a ResNet with channel attention (SE-ResNet)", r"layer\d+\.\d+\.(se|se_\w+|fc1|fc2|squeeze\w*)\."),
    ("a ResNet with attention (CBAM, ECA, BAM, CoordAtt)", r"layer\d+\.\d+\.(ca|sa|cbam|eca|bam|attn|attention)\."),
    ("a ResNeSt or SK-ResNet", r"layer\d+\.\d+\.conv\d\.(rsoftmax|fc1|attn|conv\.weight)"),
    ("a Res2Net", r"layer\d+\.\d+\.convs\.\d"),
    ("a ResNet with group norm", r"layer\d+\.\d+\.(gn|group_?norm)\d"),
    ("a CLIP ResNet with attention pooling", r"(^|\.)attnpool\."),
    ("a ResNet under the names of Hugging Face's transformers", r"embedder\.embedder\.convolution\.weight$"),
    ("a Swin transformer", r"relative_position_bias_table$"),
    (
        "a vision transformer (ViT, DeiT)",
        r"(^|\.)(cls_token|class_token|pos_embed\w*|pos_embedding|patch_embed\.proj\.weight)$|\.attn\.qkv\.weight$",
    ),
    ("a ConvNeXt", r"(^|\.)downsample_layers\.\d|stages\.\d+\.blocks\.\d+\.conv_dw\.|\.dwconv\.|\.layer_scale"),
    ("a DenseNet", r"denseblock\d+\."),
    (
        "an EfficientNet or a MobileNet",
        r"(^|\.)(conv_stem|_conv_stem)\.|features\.\d+\.(conv|\d+\.block)\.|\.conv_dw\.",
    ),
    ("a pre-activation Wide ResNet", r"^block\d+\.layer\.\d+\."),
    ("a RegNet", r"(^|\.)(trunk_output|s1\.b1)\."),
    ("an Inception network", r"(^|\.)(Mixed_\d\w|inception\d\w)\."),
    ("a VGG or an AlexNet", r"^features\.\d+\.weight$"),
    ("a ResNet with a deep stem (ResNet-C, ResNet-D)", r"^(conv1\.\d+|stem\.\d+(\.\d+)*|stem\.conv\d)\.weight$"),
)


def refuse_relatives(state: Mapping[str, Any], what: str) -> None:
    """Raise :class:`CheckpointError` naming the family of a network that is no plain ResNet, where it is known."""
    for family, pattern in FAMILIES:
        key = next((key for key in state if re.search(pattern, key)), None)
        if key is not None:
            raise _refusal(what, family, f"keys such as {shown(key)}")
    key = _norm_before(state)
    if key is not None:
        raise _refusal(what, "a pre-activation ResNet (ResNet v2)", f"{key} for what goes into the convolution")
    first = next((key for key in state if re.fullmatch(r"(layer\d+|blocks\.\d+)\.\d+\.conv1\.weight", key)), None)
    if first is None:
        return
    block = first.removesuffix("conv1.weight")
    if f"{block}bn1.weight" in state and f"{block}bn1.running_mean" not in state:
        got = f"{block}bn1.weight without {block}bn1.running_mean"
        raise _refusal(what, "a ResNet with group norm (or another without running statistics)", got)
    if not any(key.startswith(f"{block}bn") for key in state):
        raise _refusal(what, "a ResNet without batch norm (Fixup, SkipInit, folded)", f"no {block}bn1.weight")
    pooled = next((key for key in state if _is_convolution(state, key, r"layer\d+\.0\.(downsample|shortcut)\.1")), None)
    if pooled is not None:
        raise _refusal(what, "a ResNet-D: it pools before the convolution of a shortcut", f"a convolution {pooled}")
    if f"{block}conv1.bias" in state:
        got = f"{block}conv1.bias"
        raise _refusal(what, "a ResNet whose convolutions have biases", got)


def _refusal(what: str, family: str, got: str) -> CheckpointError:
    return CheckpointError(f"{what}: {family}, not supported", got=got, expected=PLAIN, remedy=NEXT_STEP)


def _norm_before(state: Mapping[str, Any]) -> str | None:
    """A first batch norm of a block that is as wide as what goes into the convolution, and not as what comes out."""
    for key, value in state.items():
        if re.fullmatch(r"(layer\d+|blocks\.\d+)\.\d+\.conv1\.weight", key) is None:
            continue
        norm = key.replace("conv1.weight", "bn1.weight")
        width = state.get(norm)
        if not isinstance(value, Tensor) or not isinstance(width, Tensor) or value.ndim != 4 or width.ndim != 1:
            continue
        if len(width) == value.shape[1] != value.shape[0]:
            return norm
    return None


def _is_convolution(state: Mapping[str, Any], key: str, module: str) -> bool:
    value = state[key]
    return re.fullmatch(rf"{module}\.weight", key) is not None and isinstance(value, Tensor) and value.ndim == 4
