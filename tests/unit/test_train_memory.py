"""What a step takes, against counting by hand; and what is said when it is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from training_cases import CONFIG, request

from bdexport.errors import TrainingError
from bdexport.models.pair import BlockDropNet
from bdexport.train.memory import MemoryPlan, check_memory, memory_explained, memory_plan
from bdexport.train.methods import METHODS
from bdexport.train.phases import Phase, Setting
from bdexport.train.state import generator_for

GB = 10**9


@pytest.fixture
def setting() -> Setting:
    """Three blocks, all phases."""
    model = BlockDropNet(request(Path("unused")).network)
    return Setting(model, [], None, CONFIG, "cpu", False, generator_for(0, 0, 0, "cpu"))


class Small(nn.Module):
    """Keeps its input (for the convolution) and its output (for the ReLU)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.conv(x)).relu()

    logits = forward


def test_a_step_is_measured_per_image(setting: Setting) -> None:
    """Oracle: by hand, float32: 3 channels into a convolution, 5 out of a ReLU; weights count once, not per image."""
    setting.model.network = Small()  # type: ignore[assignment]
    setting.model.policy = Small()  # type: ignore[assignment]
    plan = memory_plan(setting, (8, 6), 1000)
    assert plan.network == plan.policy == 4 * 8 * 6 * (3 + 5)
    weights = 2 * 4 * (5 * 3 * 9 + 5)
    assert plan.fixed == 1000 + 4 * weights


def test_measuring_leaves_no_trace(setting: Setting) -> None:
    """Oracle: weights, statistics and the random numbers that follow are what they were."""
    before = {name: tensor.clone() for name, tensor in setting.model.state_dict().items()}
    random_state = torch.get_rng_state()
    memory_plan(setting, (12, 12), 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in setting.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def phases_of(setting: Setting, batch: int) -> list[Phase]:
    config = replace(CONFIG, finetune=replace(CONFIG.finetune, batch=batch))
    return [phase(replace(setting, config=config)) for phase in METHODS[CONFIG.method]]


def test_a_batch_that_cannot_fit_is_refused_with_one_that_does(setting: Setting) -> None:
    """Oracle: by hand; 1 MB an image and phase, 1.4 times that at the peak, 1 GB free: 512 images fit, 4096 do not."""
    plan = MemoryPlan(fixed=0, network=1e6, policy=0.0, available=GB)
    with pytest.raises(TrainingError) as caught:
        check_memory(plan, phases_of(setting, 4096), pytest.fail)
    text = (
        "finetune: a step at batch 4096 takes up to 5.73 GB: got 1.00 GB of free memory; try --set finetune.batch=512"
    )
    assert str(caught.value) == text
    check_memory(plan, phases_of(setting, 512), pytest.fail)
    check_memory(replace(plan, processes=8), phases_of(setting, 4096), pytest.fail)


def test_a_batch_that_may_fit_is_only_warned_about(setting: Setting) -> None:
    """Oracle: between all of the estimate and half of it, nobody knows: masks leave blocks out."""
    notes: list[str] = []
    plan = MemoryPlan(fixed=0, network=1e6, policy=0.0, available=GB)
    check_memory(plan, phases_of(setting, 1024), notes.append)
    (note,) = notes
    assert "warning: finetune: a step at batch 1024 takes up to 1.43 GB, 1.00 GB are free" in note


def test_data_that_do_not_fit_are_said_to_be_them(setting: Setting) -> None:
    """Oracle: no batch is to blame."""
    plan = MemoryPlan(fixed=2 * GB, network=1e6, policy=0.0, available=GB)
    with pytest.raises(TrainingError, match=r"the data set and the model take 2\.00 GB: got 1\.00 GB"):
        check_memory(plan, phases_of(setting, 64), pytest.fail)


def test_running_out_of_memory_names_a_batch(setting: Setting) -> None:
    """Oracle: what torch itself raises for memory that no machine has; other errors pass unchanged."""
    plan = MemoryPlan(fixed=0, network=1e6, policy=0.0, available=GB)
    finetune = phases_of(setting, 1024)[-1]
    with (
        pytest.raises(TrainingError, match=r"finetune at batch 1024: out of memory \(.*; try --set finetune.batch=512"),
        memory_explained(plan, lambda: finetune, 500),
    ):
        torch.empty(1 << 52)
    with (
        pytest.raises(TrainingError, match=r"the last evaluation: out of memory .*--set evaluation_batch=250"),
        memory_explained(plan, lambda: None, 500),
    ):
        bytearray(1 << 52)
    with pytest.raises(RuntimeError, match="must match"), memory_explained(plan, lambda: finetune, 500):
        torch.ones(2) + torch.ones(3)
