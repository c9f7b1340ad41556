"""Settings by name."""

from __future__ import annotations

import pytest

from bdexport.config import PRESETS, TrainConfig, preset
from bdexport.errors import UsageError
from bdexport.train.settings import with_assignments


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
    ],
)
def test_nonsense_is_refused(assignment: str) -> None:
    """Oracle: UsageError for each."""
    with pytest.raises(UsageError):
        with_assignments(TrainConfig(), [assignment])


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_open_every_block_before_the_curriculum_ends(name: str) -> None:
    """Oracle: Algorithm 1 decides all K blocks in the end, whatever K is."""
    for num_blocks in (3, 9, 15, 54):
        curriculum = preset(name, num_blocks).curriculum
        assert curriculum.epochs * curriculum.blocks_per_epoch >= num_blocks
