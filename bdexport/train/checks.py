"""What a run is refused for, before anything is written."""

from __future__ import annotations

from dataclasses import replace

from bdexport.checkpoint.header import Header, header_from_text, header_to_text
from bdexport.class_names import EXPECTED, unusable_names, usable_names
from bdexport.config import PolicyConfig, TrainConfig
from bdexport.dataset import check_classes
from bdexport.errors import DatasetError, TrainingError, UsageError
from bdexport.evaluate import fixed_strategy
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.preprocess import Preprocess
from bdexport.train.distributed import World
from bdexport.train.phases import levels_from_text
from bdexport.train.request import TrainRequest, description, goes_on, learns_decisions, wanted_gates, wanted_policy
from bdexport.train.sequential import check_sequential
from bdexport.train.settings import check_ranges
from bdexport.train.state import MODEL_FILE, STATE_FILE, agree_on_run, differences


def checked(request: TrainRequest, config: TrainConfig) -> TrainConfig:
    """Settle phases that the request rules out, and refuse what cannot work."""
    check_ranges(config)
    if request.base_only and request.initial is not None:
        raise UsageError("--base-only with --base: nothing to train", remedy="leave one of them out")
    for split in (request.train, request.validation):
        known = () if request.initial is None else request.initial.class_names
        check_classes(split, request.network.num_classes, known)
    if request.base_only:
        config = replace(
            config,
            method="blockdrop",
            prime=replace(config.prime, epochs=0),
            adapt=replace(config.adapt, epochs=0),
            curriculum=replace(config.curriculum, epochs=0),
            finetune=replace(config.finetune, epochs=0),
        )
    if request.initial is not None:
        config = replace(config, pretrain=replace(config.pretrain, epochs=0))
        if goes_on(request, config):  # with what decides, from where it is; these are for a fresh one
            config = replace(
                config, prime=replace(config.prime, epochs=0), policy=replace(config.policy, order_images=0)
            )
    elif config.pretrain.epochs == 0:
        raise UsageError("no base network to start from", remedy="pass --base CKPT or --pretrain-epochs N")
    levels_from_text(config.adapt.levels, request.network.num_blocks)
    if config.method == "fixed":
        _check_fixed(request, config)
    if config.method == "sequential":
        check_sequential(config)
    if config.method in ("act", "sact") and max(request.network.stages) < 2:
        raise UsageError(
            f"method {config.method}",
            got=f"one block a stage ({request.network.name})",
            expected="a stage of two blocks or more: a stage halts after its first",
        )
    _check_policy(config.policy, request.network.num_blocks)
    if config.method == "blockdrop" and config.policy.estimator == "marginal" and not request.base_only:
        _check_marginal(config, request.network.num_blocks)
    return config


def _check_policy(policy: PolicyConfig, num_blocks: int) -> None:
    if policy.estimator == "leave_one_out" and policy.samples < 2:
        raise UsageError("leave_one_out", got=f"{policy.samples} sample", expected="--samples of at least 2")
    if policy.estimator == "gumbel" and policy.reward != "probability":
        got = f"reward {policy.reward}, which has no gradient"
        raise UsageError("estimator gumbel", got=got, expected="--reward probability")
    target = policy.target_blocks
    if target is not None and not 0 < target <= num_blocks:
        raise UsageError("target blocks", got=target, expected=f"above 0, at most {num_blocks}")
    for alpha in (policy.exploration_bound, policy.finetune_bound_start, policy.finetune_bound_end):
        if not 0.5 < alpha <= 1:
            raise UsageError("alpha", got=alpha, expected="above 0.5, at most 1")


def _check_marginal(config: TrainConfig, num_blocks: int) -> None:
    levels = levels_from_text(config.adapt.levels, num_blocks)
    if not levels:
        raise UsageError("estimator marginal", got="no levels", expected="--set adapt.levels=15,10,7,5 or the like")
    if config.policy.target_blocks is None:
        raise UsageError("estimator marginal", got="no block budget", expected="--target-blocks")
    if len(levels) < 2 or not levels[-1] <= config.policy.target_blocks <= levels[0]:
        raise UsageError(
            "adapt.levels",
            got=f"{config.adapt.levels} for {config.policy.target_blocks:g} blocks on average",
            expected="two levels or more, and a budget between them: the policy gives each image one of them",
            remedy="pass --set adapt.levels=.. or another --target-blocks",
        )


def _check_fixed(request: TrainRequest, config: TrainConfig) -> None:
    mask, kept, num_blocks = config.fixed.mask, config.fixed.kept, request.network.num_blocks
    if kept == 0 or (mask == "search" and (kept is None or not 1 <= kept <= num_blocks)):
        raise UsageError("fixed.kept", got=kept, expected=f"1 to {num_blocks} blocks", remedy="pass --kept K")
    if mask != "search":
        fixed_strategy(mask, kept, 0, BlockDropNet(request.network))


def check_size(model: BlockDropNet, preprocess: Preprocess) -> None:
    """Both networks halve the image, the policy after pooling it; not every size can be divided like that."""
    try:
        count_flops(model, preprocess.size)
    except RuntimeError as error:
        height, width = preprocess.size
        raise UsageError(
            f"images of {height}x{width} pixels cannot be halved as often as the networks halve them",
            got=f"a policy that pools its input by {model.policy.spec.input_pool} first",
            remedy="choose another pooling, e.g. --set policy.input_pool=1",
        ) from error


def check_can_be_saved(request: TrainRequest, config: TrainConfig) -> None:
    """Refuse now what the model's file could not hold at the end of the run. Raises DatasetError, CheckpointError.

    A run that has finished an epoch is saved all the same, whatever its classes are called
    (:func:`bdexport.class_names.usable_names`): its work must not be lost for a name.
    """
    names = request.train.class_names
    unusable = unusable_names(names)
    if unusable and not (request.out / STATE_FILE).exists():
        listed = "; ".join(f"{name} ({why})" for name, why in unusable[:10])
        raise DatasetError(
            f"data set {request.train.name}: {len(unusable)} of {len(names)} class names cannot be stored",
            got=listed,
            expected=EXPECTED,
            remedy="rename the classes' folders",
        )
    gates = wanted_gates(config)
    decides = learns_decisions(request, config)
    header = Header(
        network=request.network,
        policy=wanted_policy(request, config) if decides and gates is None else None,
        preprocess=request.preprocess,
        class_names=usable_names(names),
        training=description(request, config),
        gates=gates if decides else None,
    )
    header_from_text(header_to_text(header), str(request.out / MODEL_FILE))


def check_same_run(request: TrainRequest, config: TrainConfig, world: World) -> None:
    """Raise TrainingError unless every process was given the same run."""
    own = description(request, config)
    leader, *others = world.everyones(own)
    for rank, other in enumerate(others, 1):
        found = differences(leader, other)
        if found:
            raise TrainingError(
                f"rank {rank} was given another run than rank 0",
                got="; ".join(found.values()),
                remedy="start every process with the same settings and data",
            )


def agree(request: TrainRequest, config: TrainConfig, world: World) -> bool:
    """Whether the run existed; raises TrainingError where it was another one (:func:`agree_on_run`)."""
    return world.once(lambda: agree_on_run(request.out, description(request, config)))
