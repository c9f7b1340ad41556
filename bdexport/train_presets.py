"""Where a training run's settings start from: ``bdexport train --preset``."""

from __future__ import annotations

from dataclasses import replace

from bdexport.train_config import (
    AdaptConfig,
    CurriculumConfig,
    FinetuneConfig,
    PolicyConfig,
    PretrainConfig,
    PrimeConfig,
    TrainConfig,
)


def preset(name: str, num_blocks: int) -> TrainConfig:
    """The settings of one of :data:`PRESETS` for a network with K = ``num_blocks``; KeyError for another name."""
    return {"smoke": _smoke, "cpu": _cpu, "marginal": _marginal, "paper": _paper}[name](num_blocks)


PRESETS = {
    "smoke": "about a minute, on as few images as that takes: does it run at all",
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
        static_images=100,
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
