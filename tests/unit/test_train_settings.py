"""Settings by name."""

from __future__ import annotations

import pytest
import typer

from bdexport.cli.app import build_app
from bdexport.config import PRESETS, TrainConfig, preset
from bdexport.errors import UsageError
from bdexport.train.settings import OPTION_OF, RANGES, check_ranges, per_stage, with_assignments


def test_assignments_reach_nested_fields_with_their_types() -> None:
    """Oracle: the fields' own annotations."""
    config = with_assignments(
        TrainConfig(), ["finetune.batch=64", "policy.target_blocks=6.5", "precision=fp32", "policy.input_pool=none"]
    )
    assert (config.finetune.batch, config.policy.target_blocks, config.precision) == (64, 6.5, "fp32")
    assert config.policy.input_pool is None


@pytest.mark.parametrize(
    "assignment",
    [
        "finetune.batch",
        "finetune=3",
        "nothing=1",
        "finetune.nothing=1",
        "finetune.batch=many",
        "precision=fp8",
        "finetune.batch=-1",
        "policy.wrong_prediction_penalty=nan",
        "seed.x=1",
        "preset=paper",
    ],
)
def test_nonsense_is_refused(assignment: str) -> None:
    """Oracle: UsageError for each."""
    with pytest.raises(UsageError):
        with_assignments(TrainConfig(), [assignment])


def test_a_refused_value_is_named_in_full() -> None:
    """Oracle: the name as it was typed; the one number that may be negative has its own lower end."""
    with pytest.raises(UsageError, match=r"^finetune\.batch: got '-1'"):
        with_assignments(TrainConfig(), ["finetune.batch=-1"])
    with pytest.raises(UsageError, match=r"^policy\.initial_keep_logit: .*at least -100"):
        with_assignments(TrainConfig(), ["policy.initial_keep_logit=nan"])
    assert with_assignments(TrainConfig(), ["policy.initial_keep_logit=-3"]).policy.initial_keep_logit == -3


@pytest.mark.parametrize(
    "assignment",
    [
        "seed=99999999999999999999",
        "distillation_temperature=0",
        "evaluation_batch=0",
        "adapt.batch=0",
        "adapt.weight_decay=1e39",
        "fixed.search_images=0",
        "adapt.keep_high=2",
        "adapt.keep_high=0.1",  # below keep_low
        "curriculum.epoch_share=3",
        "curriculum.blocks_per_epoch=0",
        "finetune.full_share=1",
        "policy.samples=0",
        "policy.input_pool=0",
        "policy.stem_stride=0",
        "policy.wrong_prediction_penalty=1e300",
        "curriculum.learning_rate=1e38",
        "finetune.policy_learning_rate=1e38",
    ],
)
def test_numbers_that_no_run_can_work_with_are_refused(assignment: str) -> None:
    """Oracle: each of them ended a run in an internal error or a loss that is not a number."""
    with pytest.raises(UsageError, match=assignment.partition(".")[0].partition("=")[0]):
        check_ranges(with_assignments(TrainConfig(), [assignment]))


@pytest.mark.parametrize("text", ["24,48", "24,48,0", "24,48,x", "24,48,9999999", "24,48,-96"])
def test_policy_widths_fit_the_stages(text: str) -> None:
    """Oracle: three stages want three positive numbers within what a checkpoint may hold."""
    assert per_stage("policy.widths", "24,48, 96", 3) == (24, 48, 96)
    with pytest.raises(UsageError, match=r"policy\.widths"):
        per_stage("policy.widths", text, 3)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_in_range(name: str) -> None:
    """Oracle: every listed name is a setting, and every preset passes."""
    for num_blocks in (3, 15, 54):
        check_ranges(preset(name, num_blocks))
    assert all(with_assignments(TrainConfig(), [f"{path}=1"]) for path in RANGES)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_open_every_block_before_the_curriculum_ends(name: str) -> None:
    """Oracle: Algorithm 1 decides all K blocks in the end, whatever K is."""
    for num_blocks in (3, 9, 15, 54):
        curriculum = preset(name, num_blocks).curriculum
        assert curriculum.epochs * curriculum.blocks_per_epoch >= num_blocks


@pytest.mark.parametrize(
    ("assignment", "remedy"),
    [
        ("policy.wrong_prediction_penalty=-1", "it is set by --gamma or --set policy.wrong_prediction_penalty=VALUE"),
        ("policy.wrong_prediction_penalty=1e300", "it is set by --gamma or --set"),
        ("finetune.batch=0", "it is set by --batch or --set finetune.batch=VALUE"),
        ("finetune.batch=many", "got 'many', expected a whole number; it is set by --batch or --set"),
        ("adapt.keep_high=2", "it is set by --set adapt.keep_high=VALUE"),
        ("adapt.keep_high=0.1", "got 0.2, expected at most adapt.keep_high, which is 0.1; it is set by"),
        ("retarget=perhaps", "it is set by --set retarget=VALUE"),
        ("precision=fp8", "it is set by --precision or --set precision=VALUE"),
        ("policy.sampels=3", "did you mean policy.samples"),
        ("samples=3", "did you mean policy.samples?"),
        ("batch=3", "did you mean pretrain.batch or prime.batch or adapt.batch or curriculum.batch or finetune.batch?"),
    ],
)
def test_a_refused_setting_comes_with_what_sets_it(assignment: str, remedy: str) -> None:
    """Oracle: the sentence; options have other names than the settings that they set."""
    with pytest.raises(UsageError) as caught:
        check_ranges(with_assignments(TrainConfig(), [assignment]))
    assert remedy in str(caught.value)


def test_the_options_that_are_named_exist() -> None:
    """Oracle: the command's own options, and the settings."""
    group = typer.main.get_group(build_app("train"))
    options = {word for parameter in group.commands["train"].params for word in parameter.opts}
    assert set(OPTION_OF.values()) <= options
    for path in OPTION_OF:
        owner, _, name = path.rpartition(".")
        assert hasattr(getattr(TrainConfig(), owner) if owner else TrainConfig(), name)
