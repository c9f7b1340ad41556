"""The settings of a training run: one frozen dataclass per phase, and the only defaults. ``None`` means absent.

Imported from :mod:`bdexport.config`, like the settings of every other stage.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Estimator = Literal["self_critical", "leave_one_out", "nested", "gumbel", "marginal"]
Method = Literal["blockdrop", "fixed", "sequential", "act", "sact"]
RewardKind = Literal["correct", "probability"]
Optimiser = Literal["sgd", "adam"]


@dataclass(frozen=True)
class PretrainConfig:
    """Training of the base network itself: SGD with Nesterov momentum, one linear warm-up, cosine decay."""

    epochs: int = 0
    batch: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warmup_epochs: float = 1.0


@dataclass(frozen=True)
class AdaptConfig:
    """Stochastic depth (Huang et al., ECCV 2016) before the policy is learned: each image runs a random mask.

    Blocks of an ordinary network cannot be left out at all without loss, so that the policy's first rewards say
    little; a network that has seen missing blocks tells it which ones an image needs.
    """

    epochs: int = 0
    batch: int = 128
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.25
    keep_low: float = 0.2  # per image, the keep rate is uniform in [keep_low, keep_high]
    keep_high: float = 1.0
    # Numbers of kept blocks, e.g. "15,11,8,6,4": each image runs one of these many, the same nested blocks for all, in
    # their order of importance on order_images training images. Empty: stochastic depth.
    levels: str = ""
    full_share: float = 0.3  # with levels: share of each batch that runs the first of them; the others share the rest
    order_images: int = 1000
    final_rate: float = 0.0  # learning rate at the end, as a share of its peak


@dataclass(frozen=True)
class PrimeConfig:
    """The policy's backbone learns to classify before it learns to decide; that classifier is thrown away.

    What tells a cat from a dog also tells a hard image from an easy one, and labels teach it faster than rewards do.
    """

    epochs: int = 0
    batch: int = 128
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.5


@dataclass(frozen=True)
class CurriculumConfig:
    """Curriculum learning of the policy on the frozen network (Algorithm 1, lines 3-13).

    The paper opens one more block per epoch and goes on to ``epochs``. ``epoch_share`` is the share of the training
    set that counts as one epoch here.
    """

    epochs: int = 20
    batch: int = 256
    learning_rate: float = 1e-3
    epoch_share: float = 1.0
    blocks_per_epoch: int = 1


@dataclass(frozen=True)
class FinetuneConfig:
    """Joint finetuning (Algorithm 1, lines 14-16): policy loss plus cross-entropy of the sampled path."""

    epochs: int = 20
    batch: int = 128
    optimiser: Optimiser = "sgd"
    network_learning_rate: float = 0.02
    policy_learning_rate: float = 3e-4
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.25
    policy_share: float = 1.0  # share of each batch that the policy learns from; the network learns from all of it
    full_share: float = 0.0  # share of each batch that runs every block, so that the full network stays accurate
    level_share: float = 0.0  # share that runs a random number of each image's most probable blocks
    schedule: Literal["cosine", "step"] = "cosine"  # step: x0.1 for the last fifth, as in the paper


@dataclass(frozen=True)
class FixedConfig:
    """Method ``fixed``: the network is finetuned under a mask that no image influences; what a policy has to beat.

    It runs as many steps as ``finetune`` says, with the network's settings from there.
    """

    mask: str = "distribute-k"  # first-k, distribute-k, random-k (drawn per image), search, or a text of 0 and 1
    kept: int | None = None  # K of the first four; needed there
    search_images: int = 1000  # of the validation split, for ``search``: backward elimination on them


@dataclass(frozen=True)
class HaltingConfig:
    """Methods ``act`` and ``sact``: stages that halt early (Figurnov et al., CVPR 2017); what they have of their own.

    They run as many steps as ``finetune`` says, with the network's settings from there.
    """

    ponder_weight: float = 0.01  # tau in the paper: what a block costs, against the classification loss
    margin: float = 0.01  # epsilon in the paper: a stage halts at a cumulative score of 1 - margin
    initial_logit: float = -3.0  # of the halting scores: at the start, nearly every block runs


@dataclass(frozen=True)
class PolicyConfig:
    """How the policy learns, in both phases."""

    wrong_prediction_penalty: float = 5.0  # gamma in the paper (Eqn. 3)
    exploration_bound: float = 0.8  # alpha in the paper: s = alpha s + (1 - alpha)(1 - s), in training only
    finetune_bound_start: float = 0.8  # alpha when finetuning begins ..
    finetune_bound_end: float = 0.8  # .. and, reached linearly, when it ends
    reward: RewardKind = "correct"
    estimator: Estimator = "self_critical"
    samples: int = 1  # masks drawn per image and step; leave_one_out needs at least 2
    temperature: float = 1.0  # gumbel: of the relaxed gates; a low one is nearly hard and its gradient noisy
    cuts: int = 5  # nested: numbers of kept blocks at which the reward is run, per step
    order_images: int = 0  # > 0: a fresh policy starts with the blocks in their order of importance on so many images
    order_spread: float = 2.5  # .. and with logits from -order_spread to +order_spread around initial_keep_logit
    entropy_bonus: float = 0.0  # weight of the Bernoulli entropy of the open blocks, annealed to 0 over each phase
    initial_keep_logit: float = 0.0  # bias of the policy's last layer at the start of the curriculum
    target_blocks: float | None = None  # mean number of kept blocks to aim at; None: whatever the reward leads to
    budget_weight: float = 20.0  # weight of the squared distance from target_blocks / K, once all blocks are open
    # What the policy gradient reaches: all of the policy, or its head alone, while the backbone goes on learning to
    # classify in finetuning (rewards are a weak teacher of what prime has taught the backbone already).
    learns: Literal["all", "head"] = "all"
    # nested: weight of each block's entropy, throughout; the best logit is then the block's marginal reward / softness,
    # so that decisions stay open instead of saturating for all images alike
    softness: float = 0.0
    memory: int = 16_384  # marginal: judged images that are remembered, and learned from again ..
    lessons: int = 8  # .. so many times a step
    hidden: int = 0  # units of a layer between backbone and last layer; the paper has none
    input_pool: int | None = None  # average-pool the policy's input so many times; None: as in the paper
    stem_stride: int = 1  # of the policy's first convolution (CIFAR); 2: a quarter of its FLOPs and less
    stages: str = ""  # blocks of the policy's stages, e.g. "1,1,2"; empty: as in the paper
    widths: str = ""  # .. and their channels, e.g. "24,48,96"


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied, each by its own draw; None: as suits the data set, see docs/training.md."""

    mirror: bool | None = None  # left and right swapped for every second image
    shift: int | None = None  # in pixels, up to which an image is moved each way, its border filled with zeros (a crop)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run, but for the data and the machine."""

    preset: str = "cpu"
    method: Method = "blockdrop"
    seed: int = 0
    validation_share: float = 0.1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    distillation_weight: float = 0.0  # weight of the KL divergence to the undropped base network's softened outputs
    distillation_temperature: float = 4.0
    # live: the teacher sees each augmented image; cached: it saw each image once, as it is (one forward less a step)
    distillation: Literal["live", "cached"] = "live"
    mirrored_teacher: bool = True  # cached: averaged with the mirrored image, where mirroring is an augmentation
    retarget: bool = True  # at the end, shift the policy's logits so that the validation mean meets target_blocks
    recalibrate_images: int = 10_000  # batch-norm statistics are re-estimated on this many greedy paths at the end
    static_images: int = 1000  # of the validation split, for the static mask that the policy is held against; 0: none
    evaluation_batch: int = 500
    # An epoch sees every image: what whole batches leave over is spread over them. False: up to a batch is left out.
    whole_epochs: bool = False
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    prime: PrimeConfig = field(default_factory=PrimeConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    fixed: FixedConfig = field(default_factory=FixedConfig)
    halting: HaltingConfig = field(default_factory=HaltingConfig)

    def to_json(self) -> dict[str, Any]:
        """The resolved settings as a JSON object."""
        return asdict(self)
