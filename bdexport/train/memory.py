"""How much memory training takes, measured on a few images, and the batch that fits.

A step's memory is the activations that the backward pass needs: they grow with the batch and are counted exactly, by
torch's hooks on saved tensors. Everything else is small beside them or known: weights, gradients, optimiser state, the
data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bdexport.errors import BdexportError, TrainingError
from bdexport.hardware import available_memory
from bdexport.train.phases import Phase, Setting

PEAK = 1.4  # a step's peak over what it saves: gradients on their way, gathered rows (ResNet-32: 1.0 to 1.25 measured)
FROZEN = 0.2  # a pass without gradients holds at most this share of what one with them saves (ResNet-32: the same)
COPIES = 4  # of the weights: themselves, gradients, momentum or Adam's two moments, the best model so far
LEAST_SHARE = 0.5  # masks may leave blocks out; less than this share of the estimate is not counted on
TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: ``fixed`` whatever the batch is, per image while the network learns, per image while only the policy does.

    ``available`` (None: unknown) is what was free before; ``processes`` share each batch.
    """

    fixed: int
    network: float
    policy: float
    available: int | None
    processes: int = 1

    def step_bytes(self, phase: Phase, batch: int) -> float:
        """The peak of one step of ``phase``, in each process."""
        return self.fixed + PEAK * self._per_image(phase) * batch / self.processes

    def fitting_batch(self, phase: Phase, below: int) -> int | None:
        """The largest power of two below ``below`` (a multiple of the processes) whose step fits; None if none does."""
        batch = self.processes
        while 2 * batch < below:
            batch *= 2
        while self.available is not None and batch >= self.processes:
            if self.step_bytes(phase, batch) <= 0.9 * self.available:
                return batch
            batch //= 2
        return batch if batch >= self.processes and self.available is None else None

    def _per_image(self, phase: Phase) -> float:
        if not phase.learns_network:
            return FROZEN * self.network + self.policy
        return self.network + (self.policy if phase.uses_policy else 0.0)


def memory_plan(setting: Setting, image_size: tuple[int, int], data_bytes: int) -> MemoryPlan:
    """Measure a step on a few blank images; ``data_bytes`` of images will still be loaded."""
    model = deepcopy(setting.model).train().requires_grad_(True)
    network, policy = _saved_per_image(setting, image_size, model.network), 0.0
    if model.gates is None:
        policy = _saved_per_image(setting, image_size, model.policy.logits)
    else:  # they may keep more than a plain pass does, or leave blocks out
        network = max(network, _saved_per_image(setting, image_size, partial(model.gates.run, model.network)))
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return MemoryPlan(
        fixed=data_bytes + COPIES * weights,
        network=network,
        policy=policy,
        available=free_memory(setting),
        processes=setting.world.size,
    )


def free_memory(setting: Setting) -> int | None:
    """Bytes that this process can still take on its device; None where nobody knows."""
    if setting.device.startswith("cuda"):
        return torch.cuda.mem_get_info(setting.device)[0]
    free = available_memory()
    return None if free is None else free // setting.world.local_size


def check_memory(plan: MemoryPlan, phases: Sequence[Phase], note: Callable[[str], None]) -> None:
    """Raise :class:`TrainingError` where even half of what a phase's step takes is not free; note what may be tight.

    Too little memory on a CPU ends a process without an exception, so that it is looked for before.
    """
    if plan.available is None:
        return
    if plan.fixed > plan.available:
        raise TrainingError(
            f"the data set and the model take {_gb(plan.fixed)}",
            got=f"{_gb(plan.available)} of free memory",
            remedy="free some memory, or train on fewer or smaller images",
        )
    for phase in phases:
        if phase.epochs == 0:
            continue
        needed = plan.step_bytes(phase, phase.batch)
        if needed <= plan.available:
            continue
        text = f"{phase.name}: a step at batch {phase.batch} takes up to {_gb(needed)}"
        remedy = batch_remedy(plan, phase)
        if plan.fixed + LEAST_SHARE * (needed - plan.fixed) > plan.available:
            raise TrainingError(text, got=f"{_gb(plan.available)} of free memory", remedy=remedy)
        note(f"warning: {text}, {_gb(plan.available)} are free; if it fails, {remedy}")


def batch_remedy(plan: MemoryPlan, phase: Phase) -> str:
    """The batch to try instead of the phase's own."""
    fitting = plan.fitting_batch(phase, phase.batch)
    if fitting is None:
        return "no batch fits: free some memory, or take a smaller network"
    return f"try --set {phase.settings or phase.name}.batch={fitting}"


@contextmanager
def memory_explained(plan: MemoryPlan, running: Callable[[], Phase | None], evaluation_batch: int) -> Iterator[None]:
    """Turn running out of memory into :class:`TrainingError` with the batch that fits.

    ``running`` tells the phase that is at work, or None after the last.
    """
    try:
        yield
    except BdexportError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        phase = running()
        if phase is None:
            what, remedy = "the last evaluation", f"try --set evaluation_batch={max(1, evaluation_batch // 2)}"
        else:
            what, remedy = f"{phase.name} at batch {phase.batch}", batch_remedy(plan, phase)
        raise TrainingError(f"{what}: out of memory ({text})", remedy=remedy) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python's or torch's says so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error).lower() for text in TEXTS)


def _saved_per_image(setting: Setting, image_size: tuple[int, int], forward: Callable[..., Any]) -> float:
    """Bytes that the backward pass of ``forward`` keeps for each image."""
    few, more = (_saved_bytes(setting, image_size, forward, count) for count in (2, 4))
    return (more - few) / 2


def _saved_bytes(setting: Setting, image_size: tuple[int, int], forward: Callable[..., Any], count: int) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(count, 3, *image_size, device=setting.device).to(memory_format=torch.channels_last)
    with saved_tensors_hooks(pack, lambda tensor: tensor), setting.autocast():
        kept = forward(images)  # alive until here, so that no storage's address is used twice
    del kept
    return sum(storages.values())


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
