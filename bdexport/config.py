"""Settings: the only defaults. One frozen dataclass per stage; the command line reads its defaults here.

Each stage saves the resolved settings beside what it made. ``None`` means absent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Estimator = Literal["self_critical", "leave_one_out", "nested", "gumbel", "marginal"]
Method = Literal["blockdrop", "fixed", "sequential", "act", "sact"]
RewardKind = Literal["correct", "probability"]
Optimiser = Literal["sgd", "adam"]
CALIBRATED = ("int8", "fp8")  # precisions that need scales, from ``bdexport calibrate``


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
    evaluation_batch: int = 500
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


def preset(name: str, num_blocks: int) -> TrainConfig:
    """The settings of one of :data:`PRESETS` for a network with K = ``num_blocks``; KeyError for another name."""
    return {"smoke": _smoke, "cpu": _cpu, "marginal": _marginal, "paper": _paper}[name](num_blocks)


PRESETS = {
    "smoke": "under a minute on digits: does it run at all",
    "cpu": "about an hour on 2 cores for ResNet-32 on CIFAR-10",
    "marginal": "masks that depend on the image (marginal estimator); two hours on one core for ResNet-32 on CIFAR-10",
    "paper": "the paper's own schedule and estimator (days without a GPU)",
}


def _smoke(num_blocks: int) -> TrainConfig:
    return replace(
        _cpu(num_blocks),
        preset="smoke",
        pretrain=PretrainConfig(epochs=4, batch=64, learning_rate=0.05),
        adapt=AdaptConfig(epochs=1, batch=64),
        curriculum=CurriculumConfig(epochs=2, batch=64, epoch_share=0.5, blocks_per_epoch=-(-num_blocks // 2)),
        finetune=FinetuneConfig(epochs=2, batch=64),
        recalibrate_images=500,
    )


def _cpu(num_blocks: int) -> TrainConfig:
    return TrainConfig(
        preset="cpu",
        distillation_weight=1.0,
        distillation="cached",
        pretrain=PretrainConfig(epochs=60),
        adapt=AdaptConfig(epochs=3, batch=256, learning_rate=0.03),
        curriculum=CurriculumConfig(epochs=10, epoch_share=0.25, blocks_per_epoch=-(-num_blocks // 5)),
        finetune=FinetuneConfig(
            epochs=24,
            batch=256,
            network_learning_rate=0.05,
            policy_learning_rate=5e-4,
            policy_share=0.25,
            full_share=0.05,
        ),
        policy=PolicyConfig(
            wrong_prediction_penalty=1.0,
            finetune_bound_start=0.95,
            finetune_bound_end=1.0,
            reward="probability",
            initial_keep_logit=1.0,
            target_blocks=round(0.52 * num_blocks, 2),
            input_pool=2,
        ),
    )


def _marginal(num_blocks: int) -> TrainConfig:
    levels = [max(1, round(share * num_blocks)) for share in (1, 2 / 3, 0.45, 1 / 3, 0.25)]
    return TrainConfig(
        preset="marginal",
        distillation_weight=1.0,
        distillation="cached",
        pretrain=PretrainConfig(epochs=60),
        prime=PrimeConfig(epochs=10),
        adapt=AdaptConfig(
            epochs=12,
            learning_rate=0.05,
            final_rate=0.1,
            levels=",".join(str(level) for level in sorted(set(levels), reverse=True)),
        ),
        curriculum=CurriculumConfig(
            epochs=2, batch=128, epoch_share=0.2, learning_rate=1e-3, blocks_per_epoch=num_blocks
        ),
        finetune=FinetuneConfig(
            epochs=8,
            network_learning_rate=0.03,
            policy_learning_rate=1e-3,
            policy_share=0.25,
            full_share=0.05,
            level_share=0.25,
        ),
        policy=PolicyConfig(
            estimator="marginal",
            learns="head",
            hidden=64,
            target_blocks=round(0.46 * num_blocks, 2),
        ),
    )


def _paper(num_blocks: int) -> TrainConfig:
    return TrainConfig(
        preset="paper",
        pretrain=PretrainConfig(epochs=164),
        curriculum=CurriculumConfig(epochs=5000, batch=2048, learning_rate=1e-4),
        finetune=FinetuneConfig(
            epochs=2000,
            batch=256,
            optimiser="adam",
            network_learning_rate=1e-4,
            policy_learning_rate=1e-4,
            weight_decay=0.0,
            warmup_epochs=0.0,
            schedule="step",
        ),
    )


@dataclass(frozen=True)
class FusedConfig:
    """Which masks run as one engine each, which executor is taken, and what may run instead of a mask."""

    paths: int | None = None  # None: as many as cover ``coverage`` of the calibration images, at most ``most``
    coverage: float = 0.95
    most: int = 32
    max_bundle_mb: float | None = None  # 10^6 bytes
    measure: bool = True  # choose the executor by measuring; otherwise fused where there are fused paths
    mask_images: int = 2000  # of the validation split, where a data set is given
    quantise: str | None = None  # None: the policy's masks run as they are; cover or budget
    accuracy_budget: float = 0.5  # points of validation accuracy that ``budget`` may lose
    table: tuple[int, ...] = (4, 8, 16, 32)  # numbers of paths that quantising is tabled for


@dataclass(frozen=True)
class ChoiceConfig:
    """How executors are measured when a bundle is built: in turn, on masks as they occur."""

    single_calls: int = 64  # timed calls of batch 1 per executor, after some for warm-up
    batch: int = 64
    batch_calls: int = 4
    seconds: float = 2.0  # for each of the two at most; what is measured by then counts
    worth: float = 0.01  # an executor has to be this share faster than chain, on the mean of both batches


@dataclass(frozen=True)
class TensorRTConfig:
    """What the builders of the backends ``tensorrt`` and ``tensorrt-rtx`` are told; None: TensorRT's own choice."""

    min_batch: int = 1  # smaller batches are refused; masks that differ within a batch need 1
    opt_batch: int = 1  # what kernels are chosen for
    max_batch: int = 256  # where BuildConfig.max_batch is None: TensorRT has no engines for any batch
    workspace_mib: int | None = None  # device memory that kernels may use while one engine runs
    optimization_level: int | None = None  # 0..5: time to build against time to run
    tf32: bool = False  # float32 products with 10 bits of mantissa, which TensorRT would do by itself
    version_compatible: bool = False  # the engine loads in later TensorRT releases of the same major version
    hardware_compatible: str | None = None  # tensorrt: "ampere+" or "same-compute-capability", not this GPU model alone
    compute_capabilities: tuple[str, ...] = ()  # tensorrt-rtx: GPUs to build for, e.g. "8.9"; none: 8.0 and newer


@dataclass(frozen=True)
class BuildConfig:
    """What engines are built for. ``max_batch`` None: any batch, where the backend can."""

    backend: str = "onnxruntime"
    precision: str = "fp32"
    max_batch: int | None = None
    jobs: int = 1  # engines built at a time; backends that choose kernels by timing them want the machine to themselves
    fused: FusedConfig = field(default_factory=FusedConfig)
    tensorrt: TensorRTConfig = field(default_factory=TensorRTConfig)


@dataclass(frozen=True)
class CalibrationConfig:
    """Which images the scales of INT8 and FP8 are gathered from, and where lists and scales are kept."""

    images: int = 512
    split: str = "train"
    batch: int = 64
    folder: str = "calibration"


@dataclass(frozen=True)
class DatasetConfig:
    """How images are held out where the data have no split of their own (see :mod:`bdexport.dataset.splits`).

    The seed belongs to the data, not to a training run: all commands must hold out the same images.
    """

    validation_share: float = TrainConfig.validation_share
    test_share: float = 0.1  # of an image folder without a test folder
    seed: int = 0


@dataclass(frozen=True)
class QuickstartConfig:
    """What ``bdexport quickstart`` trains on scikit-learn's digits, in minutes on two cores; and how it measures."""

    arch: str = "resnet32"
    preset: str = "cpu"
    settings: tuple[str, ...] = (  # as ``train --set`` takes them: 1,257 images make short epochs and small batches
        "pretrain.epochs=10",
        "pretrain.batch=64",
        "pretrain.learning_rate=0.05",
        "adapt.batch=64",
        "curriculum.epochs=4",
        "curriculum.batch=64",
        "curriculum.epoch_share=1",
        "curriculum.blocks_per_epoch=5",
        "finetune.epochs=9",
        "finetune.batch=64",
        "policy.target_blocks=6",
    )
    threads: int = 1
    out: str = "engines/quickstart"
    shown_images: int = 5  # classified one by one, where a model of the zoo is used


@dataclass(frozen=True)
class Tolerance:
    """How far a backend's output may be from the reference's.

    ``part``: of one part's largest value, that largest value's share. ``logits``: of the logits of a whole path, per
    :attr:`VerifyConfig.logit_scale` of their largest value, and never less than this. ``of_mean``: it is the mean
    difference that is held, as a share of the mean value: int8 and fp8 cut off what lies outside the
    calibrated range, so that the largest difference on other images has no bound.
    """

    part: float
    logits: float
    of_mean: bool = False


@dataclass(frozen=True)
class VerifyConfig:
    """What ``bdexport verify`` compares."""

    images: int = 8
    random_masks: int = 100
    frequent_masks: int = 20  # of those in the manifest's policy statistics
    seed: int = 0
    accuracy_images: int = 1000  # of a data set, where one is given
    accuracy_split: str = "validation"
    max_accuracy_drop: float = 1.0  # points below the reference, of the dynamic and of the full network
    logit_scale: float = 100.0  # logits beyond it are compared relative to it: float32 has no more digits
    tolerances: dict[str, Tolerance] = field(
        default_factory=lambda: {
            "fp32": Tolerance(part=1e-4, logits=1e-4),
            # BF16 has 8 significant bits: 0.4 % for each rounding, of which a path has one or two per layer.
            "bf16": Tolerance(part=0.02, logits=0.5),
            # FP16 has 11: 0.05 %.
            "fp16": Tolerance(part=0.004, logits=0.1),
            "int8": Tolerance(part=0.1, logits=0.25, of_mean=True),
            "fp8": Tolerance(part=0.1, logits=0.25, of_mean=True),
        }
    )


@dataclass(frozen=True)
class BenchConfig:
    """How ``bdexport bench`` measures."""

    dataset: str = "cifar10"
    split: str = "test"
    images: int = 1000
    batch: int = 1
    rounds: int = 1  # how often every batch is measured
    turn: int = 1  # timed calls of one side before it is the other's turn
    warmup_batches: int = 10


@dataclass(frozen=True)
class ProfileConfig:
    """How ``bdexport profile`` measures."""

    dataset: str = "synthetic"  # random images at the network's size; or a data set as bench takes it
    split: str = "test"
    images: int = 200
    batch: int = 1
    rounds: int = 1  # how often every batch is measured
    warmup_batches: int = 5
    alone_runs: int = 30  # of every part by itself at batch 1, and of every copy that it is compared with
    bound_share: float = 0.5  # a part is launch- or memory-bound when that takes this share of its time
    max_events: int = 1_000_000  # recorded; about 200 bytes each, and as many lines in a trace


@dataclass(frozen=True)
class RunConfig:
    """How ``bdexport run`` times an image."""

    timed_calls: int = 5  # after warm-up; the median is shown


@dataclass(frozen=True)
class ReportConfig:
    """What ``bdexport report`` shows, and how much of it."""

    split: str = "test"
    batch: int = 250
    accuracy_span: float = 8.0  # points below the best: what is worse lies on the lower edge, not to scale
    heat_map_classes: int = 100  # rows of the per-class heat map, at most
    sheet_classes: int = 10  # classes on a contact sheet, at most
    sheet_policies: int = 3  # masks per class, as in the paper's Figure 4
    sheet_images: int = 8  # per mask, and of the easiest and the hardest
