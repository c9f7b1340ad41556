"""What ``gpu_session.sh`` does in its two calls: the steps in order, the most important first, and what each needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpu_common import DRY_RUN_VARIABLE

CALL_SECONDS = {1: 300, 2: 330}
BACKENDS = "BDEXPORT_GPU_BACKENDS"
TESTS = ("-m", "pytest", "-q", "-m", "gpu", "-W", "default", "--timeout", "60", "-p", "no:cacheprovider")
NOT_IN_A_SESSION = ("--deselect", "tests/gpu/test_gpu_backends.py::test_failing_again_and_again_leaks_nothing[torch]")
TRAINING_TESTS = (
    "test_a_run_learns[self_critical-fp32]",
    "test_a_run_learns[marginal-bf16]",
    "test_what_blockdrop_is_compared_with_learns[fixed]",
    "test_a_run_resumes[marginal-finetune 2]",
)


@dataclass(frozen=True)
class Step:
    """One program with its own time limit. ``command``: what follows ``python``; tests write their result by a variable
    of the environment, the scripts by ``--json``. ``onnxruntime``: it needs the package with the CUDA provider.
    """

    name: str
    limit_s: int
    command: tuple[str, ...]
    onnxruntime: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_tests(self) -> bool:
        """Whether pytest runs it."""
        return self.command[:2] == TESTS[:2]


def steps_of(call: int, dry_run: bool) -> list[Step]:
    """The steps of a call; in a dry run with as little work as shows that each of them runs."""
    steps = _first_call(dry_run) if call == 1 else _second_call(dry_run)
    # One thread: a dry run is often one of several things that a small machine does.
    marked = {DRY_RUN_VARIABLE: "1", "OMP_NUM_THREADS": "1"} if dry_run else {}
    return [Step(s.name, s.limit_s, s.command, s.onnxruntime, {**s.environment, **marked}) for s in steps]


def _first_call(dry_run: bool) -> list[Step]:
    backends = ("tests/gpu/test_gpu_backends.py", *NOT_IN_A_SESSION)
    return [
        Step("probe", 45, ("benchmarks/gpu_probe.py", "--only", "driver", "conditionals", "torch")),
        Step("tests-interface", 45, (*TESTS, "tests/gpu/test_cuda_interface.py", "tests/gpu/test_cuda_network.py")),
        Step("tests-torch", 90, (*TESTS, *backends), environment={BACKENDS: "torch"}),
        Step("latency-torch", 90, _latency("torch", dry_run)),
        Step("training-probe", 45, _training("resnet32", dry_run, "--steps", "5", "--rounds", "2", "--warmup", "20")),
    ]


def _second_call(dry_run: bool) -> list[Step]:
    backends = {BACKENDS: "onnxruntime"}
    trained = tuple(f"tests/gpu/test_gpu_training.py::{name}" for name in TRAINING_TESTS[-1 if dry_run else 0 :])
    speed = ("--steps", "20", "--rounds", "3", "--warmup")
    return [
        Step("tests-onnxruntime", 90, (*TESTS, "tests/gpu/test_gpu_backends.py"), True, backends),
        Step("latency-onnxruntime", 90, _latency("onnxruntime", dry_run), True),
        Step("probe-onnxruntime", 30, ("benchmarks/gpu_probe.py", "--only", "onnxruntime"), True),
        Step("training-resnet32", 45, _training("resnet32", dry_run, *speed, "60")),
        Step("training-resnet110", 60, _training("resnet20" if dry_run else "resnet110", dry_run, *speed, "30")),
        Step("tests-training", 60, (*TESTS, *trained)),
    ]


def _latency(backend: str, dry_run: bool) -> tuple[str, ...]:
    """Without ResNet-101, whose building takes longest."""
    workloads = ("small",) if dry_run and backend == "onnxruntime" else ("small", "batch", "all-kept")
    return ("benchmarks/gpu.py", "--backends", backend, "--workloads", *workloads)


def _training(arch: str, dry_run: bool, *amount: str) -> tuple[str, ...]:
    if dry_run:
        amount = (
            "--device",
            "cpu",
            "--threads",
            "1",
            "--precision",
            "fp32",
            "--batch",
            "8",
            "--steps",
            "1",
            "--rounds",
            "1",
        )
    else:
        amount = ("--device", "cuda", "--batch", "1024", *amount)
    return ("benchmarks/training.py", "--arch", arch, *amount)
