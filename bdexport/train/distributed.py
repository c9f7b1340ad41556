"""Training by several processes, started with ``torchrun`` (torch.distributed): gloo on CPUs, nccl on GPUs.

Every process holds the whole data set and the whole model. All draw the same permutation and the same random numbers
for the whole batch, as one process would, and each takes every ``size``-th row of both; so the images of a step, their
augmentation and their sampled masks do not depend on the number of processes. What a step averages over the batch is
averaged over the processes:

* gradients: one all-reduce of one flat buffer after the backward pass. ``DistributedDataParallel`` is not used: it
  hooks into ``forward`` of one module, and a step here calls two modules by other names (``forward_masked``,
  ``policy.logits``), several times, partly without gradients, into two optimisers. Blocks that no image of a shard
  keeps get no gradient there, which DDP can only find out by walking the graph in every step. What DDP would gain,
  communication hidden behind the backward pass, is little: a CIFAR network's gradient is 2 to 7 MB.
* functions of a batch mean that are not linear (the budget loss): the mean is taken over the processes first.
* what is no mean at all (the marginal estimator's price, a quantile, and the outcomes that it remembers): every process
  gets all rows of the batch.

Not averaged within a step: batch norm normalises each shard by its own statistics, as DDP does (``SyncBatchNorm``
exists for CUDA only). The running statistics are averaged after each epoch, before the validation.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from bdexport.errors import TrainingError, UsageError

TIMEOUT_S = 600.0  # a process that keeps the others waiting for longer ends the run
FAILED_KEY = "bdexport/failed"  # in the store: the rank that reports the error that ends the run
Value = TypeVar("Value")
Array = TypeVar("Array", bound=NDArray[Any])


@dataclass(frozen=True)
class World:
    """One process among the ``size`` of a run. Rank 0 leads: it alone writes files and prints.

    All methods but ``mine``, ``rand`` and ``randint`` are collective: every process must call them, in the same order.
    A process that is gone ends them with :class:`TrainingError`.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine: which GPU is its own
    local_size: int = 1  # processes of this machine, which share its memory

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def places(self) -> slice:
        """Where the images that this process sees stand in a whole batch."""
        return slice(self.rank, None, self.size)

    def mine(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The shard of a whole batch that this process sees: every ``size``-th row from ``rank`` on.

        Taken in turn, not in runs, so that a leading share of the batch is that share of every shard.
        """
        if self.size == 1:
            return rows
        return rows[(slice(None),) * dim + (self.places,)]

    def rand(self, shape: tuple[int, ...], generator: torch.Generator, rows: int = 0) -> Tensor:
        """Uniform numbers, float32, of ``shape`` for this shard; dimension ``rows`` counts its images.

        All processes draw for the whole batch and end with equal generators.
        """
        whole = [length * self.size if dim == rows else length for dim, length in enumerate(shape)]
        return self.mine(torch.rand(whole, generator=generator, device=generator.device), rows)

    def randint(self, low: int, high: int, count: int, generator: torch.Generator) -> Tensor:
        """``count`` whole numbers from ``low`` to ``high`` - 1, int64, for this shard, as :meth:`rand`."""
        whole = torch.randint(low, high, (count * self.size,), generator=generator, device=generator.device)
        return self.mine(whole)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, without gradient."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        with _talking():
            dist.all_reduce(total)
        return total / self.size

    def batch_mean(self, value: Tensor) -> Tensor:
        """A shard's mean with the whole batch's value and its own gradient.

        A function of it, differentiated and then averaged over the processes, has the gradient that it would have on
        the whole batch: f'(mean) times the mean of the shards' derivatives.
        """
        return value if self.size == 1 else value + (self.mean(value) - value.detach())

    def whole(self, shard: Tensor) -> Tensor:
        """All rows of the batch in order, from the shards that :meth:`mine` gives, all of one length; no gradient."""
        if self.size == 1:
            return shard
        own = shard.detach().contiguous()
        shards = [torch.empty_like(own) for _ in range(self.size)]
        with _talking():
            dist.all_gather(shards, own)
        return torch.stack(shards, dim=1).flatten(0, 1)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over the processes; one that no process has stays None.

        A parameter that only some processes have a gradient for counts as zero in the others: no image there used it.
        """
        if self.size == 1:
            return
        learned = list(parameters)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learned]
        used = torch.tensor([float(p.grad is not None) for p in learned], device=parts[0].device)
        flat = self.mean(torch.cat([*parts, used]))
        *means, used = flat.split_with_sizes([*(p.numel() for p in learned), len(learned)])
        for parameter, mean, count in zip(learned, means, used.tolist(), strict=True):
            if count == 0:
                continue  # optimisers leave a parameter without gradient alone, weight decay and momentum included
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(mean.view_as(parameter))

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """After an epoch: rank 0's parameters everywhere, and the mean of the batch-norm statistics that were learned.

        The parameters are equal already, but for what the hardware of two machines may round differently.
        """
        if self.size == 1:
            return
        norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) and layer.training]
        statistics = [buffer for layer in norms for buffer in layer.buffers() if buffer.is_floating_point()]
        if statistics:
            _write_flat(statistics, self.mean(_flat(statistics)))
        parameters = list(model.parameters())
        flat = _flat(parameters)
        with _talking():
            dist.broadcast(flat, src=0)
        _write_flat(parameters, flat)

    def once(self, work: Callable[[], Value]) -> Value:
        """Let rank 0 alone do ``work`` and give every process its result, or raise its exception in all of them."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error if _picklable(error) else TrainingError(f"rank 0: {type(error).__name__}: {error}")
                self._share(outcome)
                raise
        self._share(outcome)
        value, raised = outcome
        if raised is not None:
            raise raised
        return cast("Value", value)

    def everyones(self, value: Value) -> list[Value]:
        """Each process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _talking():
            dist.all_gather_object(values, value)
        return values

    def gathered(self, shard: Array) -> Array:
        """All rows from the shards that :meth:`mine` gives, in order; a shard may be one row shorter than another."""
        if self.size == 1:
            return shard
        shards = self.everyones(shard)
        whole = np.empty((sum(map(len, shards)), *shard.shape[1:]), shard.dtype)
        for rank, part in enumerate(shards):
            whole[rank :: self.size] = part
        return cast("Array", whole)

    def _share(self, outcome: list[Any]) -> None:
        with _talking():
            dist.broadcast_object_list(outcome, src=0)


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The place of this process in the run that ``torchrun`` started, or :data:`ALONE` without it.

    An exception that leaves the block ends the whole run. One process reports it: the first that fails; the others,
    which then lack a partner or fail in the same way, leave with exit code 1 and say nothing.
    """
    world = _world()
    if world.size == 1:
        yield world
        return
    store = _join(world, device)
    try:
        yield world
        world.mean(torch.zeros(1))  # nobody leaves while another still waits for an answer
    except BaseException as error:
        if not _is_first(store, world):
            raise SystemExit(1) from error
        raise
    dist.destroy_process_group()


def check_batches(batches: dict[str, int], world: World) -> None:
    """Raise :class:`UsageError` where a batch cannot be dealt out evenly: means would weigh images unequally."""
    for name, batch in batches.items():
        if batch % world.size:
            near = max(1, round(batch / world.size)) * world.size
            raise UsageError(
                f"{name}: it counts the images of all processes",
                got=batch,
                expected=f"a multiple of {world.size} (processes)",
                remedy=f"e.g. --set {name}={near}",
            )


def _world() -> World:
    def number(name: str, default: str) -> int:
        text = os.environ.get(name, default)
        try:
            return int(text)
        except ValueError:
            remedy = "unset it, or start with torchrun, which sets it"
            raise UsageError(
                f"environment variable {name}", got=repr(text), expected="a whole number", remedy=remedy
            ) from None

    size = number("WORLD_SIZE", "1")
    if size < 2:
        return ALONE
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, but there is no {', '.join(missing)}",
            remedy="start with torchrun, or unset WORLD_SIZE to train alone",
        )
    rank = number("RANK", "0")
    return World(rank, size, number("LOCAL_RANK", str(rank)), number("LOCAL_WORLD_SIZE", str(size)))


def _join(world: World, device: str) -> Any:  # a Store, which torch.distributed does not export to type checkers
    timeout = timedelta(seconds=TIMEOUT_S)
    with_gpu = device != "cpu" and torch.cuda.is_available()
    try:
        store, _, _ = next(iter(rendezvous("env://", world.rank, world.size, timeout=timeout)))
        if with_gpu:
            torch.cuda.set_device(world.local_rank)
        backend = "cpu:gloo,cuda:nccl" if with_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {world.rank}: the {world.size} processes of this run did not come together ({_first_line(error)})",
            remedy="check that torchrun starts on every machine with the same number of processes and GPUs for them",
        ) from error
    return store


def _is_first(store: Any, world: World) -> bool:
    """Whether no other process has failed before this one."""
    try:
        return bool(store.compare_set(FAILED_KEY, "", str(world.rank)) == str(world.rank).encode())
    except RuntimeError:  # the store went with the process that kept it
        return True


@contextmanager
def _talking() -> Iterator[None]:
    """Map what torch raises when a process does not answer."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"another process of this run is gone or did not answer for {TIMEOUT_S:.0f} s ({_first_line(error)})",
            remedy="see its messages (killed by the system: too little memory); the same command resumes the run",
        ) from error


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _write_flat(tensors: list[Any], flat: Tensor) -> None:
    for tensor, values in zip(tensors, flat.split_with_sizes([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def _picklable(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of anybody's can refuse in any way
        return False
    return True


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
