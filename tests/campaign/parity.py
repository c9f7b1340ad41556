"""Random architectures, on every backend and with every executor, against PyTorch's ``forward_masked``."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import ClassVar, get_args

import numpy as np
import torch
from bundles import torch_logits
from tiny import with_statistics

import bdexport
from bdexport.architecture import BlockKind, DroppedTransition, Family, PolicySpec, ResNetSpec, Shortcut
from bdexport.errors import UsageError
from bdexport.models.pair import BlockDropNet
from bdexport.runtime.orchestrator import executors_of
from campaign.cases import Kind, Tally, attempt
from campaign.networks import backends, build, random_images, random_masks

TOLERANCE = 1e-4  # of the largest logit, or absolute where logits are below 1
FAMILIES: tuple[Family, ...] = get_args(Family)
KINDS: tuple[BlockKind, ...] = get_args(BlockKind)
BATCHES = (1, 1, 2, 7, 33, 84)


class Parity(Kind):
    """One case: a network, a backend, and 128 images with masks of their own for every executor."""

    name: ClassVar[str] = "parity"
    about: ClassVar[str] = "logits of one image with one mask, compared with PyTorch's"
    share: ClassVar[float] = 6
    limit_s: ClassVar[float] = 120.0

    def case(self, random: Random, scratch: Path) -> Tally:
        """Build a random network and compare all executors."""
        torch.set_num_threads(1)
        model = random_model(random)
        backend = random.choice(backends())
        size = random.choice(((24, 32), (32, 32), (40, 64), (33, 47)))
        num_blocks = model.network.spec.num_blocks
        paths = random.choice((None, 1, 3))
        tally = Tally()
        # Sizes that some networks cannot halve are refused.
        built = attempt(tally, "build", lambda: build(scratch / "bundle", model, backend, paths, size))
        if built is None:
            return tally
        with bdexport.load(built.path, threads=1, fused=built.manifest.fused is not None) as loaded:
            for batch in BATCHES:
                images = random_images(random, batch, size)
                masks = random_masks(random, batch, num_blocks)
                inputs = loaded.manifest.preprocess.normalise(images)
                expected = torch_logits(model, inputs, masks)
                allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
                for name, orchestrator in executors_of(loaded).items():
                    gaps = np.abs(orchestrator(images, masks=masks).logits - expected).max(axis=1)
                    tally.right += int((gaps <= allowed).sum())
                    if not (gaps <= allowed).all():
                        spec = f"{model.network.spec} {backend} {name} batch {batch}"
                        tally.failures.append(f"{spec}: {gaps.max():.2e} is above {allowed:.2e}")
        return tally


def random_model(random: Random) -> BlockDropNet:
    """A network of any family, kind of block, shortcut and rule that bdexport knows, with random statistics."""
    while True:
        family = random.choice(FAMILIES)
        stages = tuple(random.choice((1, 1, 2, 3)) for _ in range(random.choice((1, 2, 3, 4))))
        width = random.choice((4, 8, 16))
        try:
            network = ResNetSpec(
                family,
                random.choice(KINDS),
                stages,
                tuple(width * (index + 1) for index in range(len(stages))),
                random.choice(get_args(Shortcut)),
                num_classes=random.choice((2, 3, 10, 101)),
                dropped_transition=random.choice(get_args(DroppedTransition)),
            )
            pooled = family == "imagenet"
            policy = PolicySpec(
                family, (1, 1), (4, 8), network.num_blocks, "conv" if pooled else "avgpool", 2 if pooled else 1
            )
            torch.manual_seed(random.getrandbits(32))
            return with_statistics(BlockDropNet(network, policy).eval())
        except UsageError:  # some combinations do not exist
            continue
