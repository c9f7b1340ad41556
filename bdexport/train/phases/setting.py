"""What every phase works on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bdexport.config import TrainConfig
from bdexport.errors import UsageError
from bdexport.evaluate import Strategy, fixed_strategy
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import ResNet
from bdexport.train.distributed import ALONE, World


@dataclass
class Setting:
    """What every phase works on.

    ``teachers`` are frozen, undropped networks whose logits are averaged (the base itself, or others that were asked
    for), or none; ``teacher_logits`` are their outputs (N, C) for the training images as they are, where cached.
    ``world``: which shard of each batch this process sees; what is random per image is drawn with :meth:`rand` or
    :meth:`randint`, what is not linear in a mean over the batch takes ``world.batch_mean``.
    """

    model: BlockDropNet
    teachers: list[ResNet]
    teacher_logits: Tensor | None
    config: TrainConfig
    device: str
    bf16: bool
    generator: torch.Generator
    world: World = ALONE
    # From the policy's features to classes: the policy's backbone learns through it, and it is thrown away at the end.
    classifier: nn.Linear = field(init=False)
    critic: nn.Sequential = field(init=False)  # of the marginal estimator: features -> success at each level, log-odds
    memory: tuple[Tensor, Tensor] | None = None  # .. judged images: features (M, F), success (M, L)
    price: float = 0.0  # .. and what a block costs, in points of accuracy
    order: list[int] | None = None  # blocks from the least to the most important, once it is known
    fixed_mask: str | None = None  # method fixed: what :func:`bdexport.evaluate.fixed_strategy` takes, once it is known

    def __post_init__(self) -> None:
        features = self.model.policy.spec.widths[-1]
        self.classifier = nn.Linear(features, self.model.network.spec.num_classes).to(self.device)
        levels = levels_from_text(self.config.adapt.levels, self.num_blocks)
        self.critic = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, max(1, len(levels))))
        self.critic.to(self.device)

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.model.network.blocks)

    def rand(self, *shape: int, rows: int = 0) -> Tensor:
        """Uniform numbers, float32; dimension ``rows`` counts the images that this process sees."""
        return self.world.rand(shape, self.generator, rows)

    def randint(self, low: int, high: int, images: int) -> Tensor:
        """A whole number from ``low`` to ``high`` - 1 for each of the images that this process sees."""
        return self.world.randint(low, high, images, self.generator)

    def fixed_strategy(self) -> tuple[str, Strategy]:
        """The title and the masks of :attr:`fixed_mask`, for the images that this process sees."""
        assert self.fixed_mask is not None  # the phase that needs it has begun
        config = self.config
        return fixed_strategy(self.fixed_mask, config.fixed.kept, config.seed, self.model, self.world.places)

    def autocast(self) -> torch.autocast:
        """bf16 where the run uses it."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)


def levels_from_text(text: str, num_blocks: int) -> list[int]:
    """``"15,8,4"`` -> [15, 8, 4]; raises UsageError unless these are different numbers of blocks, most first."""
    if not text.strip():
        return []
    try:
        levels = [int(word) for word in text.split(",")]
    except ValueError:
        levels = []
    if not levels or sorted(set(levels), reverse=True) != levels or not 1 <= levels[-1] <= levels[0] <= num_blocks:
        raise UsageError(
            "adapt.levels",
            got=repr(text),
            expected=f"different numbers of blocks, most first, at most {num_blocks}, like {num_blocks},1",
        )
    return levels
