"""Settings: the only defaults. One frozen dataclass per stage; the command line reads its defaults here.

Each stage saves the resolved settings beside what it made. ``None`` means absent. Those of training stand in
:mod:`bdexport.train_config` and :mod:`bdexport.train_presets` and are imported from here like the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bdexport.train_config import (
    AdaptConfig,
    AugmentConfig,
    CurriculumConfig,
    Estimator,
    FinetuneConfig,
    FixedConfig,
    HaltingConfig,
    Method,
    Optimiser,
    PolicyConfig,
    PretrainConfig,
    PrimeConfig,
    RewardKind,
    TrainConfig,
)
from bdexport.train_presets import PRESETS, preset

__all__ = [
    "CALIBRATED",
    "LARGEST_POLICY_SHARE",
    "PRESETS",
    "AdaptConfig",
    "AugmentConfig",
    "BenchConfig",
    "BuildConfig",
    "CalibrationConfig",
    "ChoiceConfig",
    "CurriculumConfig",
    "DatasetConfig",
    "Estimator",
    "FinetuneConfig",
    "FixedConfig",
    "FusedConfig",
    "HaltingConfig",
    "Method",
    "Optimiser",
    "PolicyConfig",
    "PretrainConfig",
    "PrimeConfig",
    "ProfileConfig",
    "QuickstartConfig",
    "ReportConfig",
    "RewardKind",
    "RunConfig",
    "TensorRTConfig",
    "Tolerance",
    "TrainConfig",
    "VerifyConfig",
    "preset",
]

LARGEST_POLICY_SHARE = 0.05  # of the full network's cost: a dearer policy is warned of, and none by default
CALIBRATED = ("int8", "fp8")  # precisions that need scales, from ``bdexport calibrate``


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
        "adapt.epochs=3",
        "adapt.learning_rate=0.03",
        "curriculum.learning_rate=0.001",
        "finetune.network_learning_rate=0.05",
        "finetune.policy_learning_rate=0.0005",
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
