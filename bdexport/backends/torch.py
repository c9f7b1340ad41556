"""The torch backend: the reference that every other backend is verified against. Build half only.

An engine file is the part's weights as safetensors, with the two networks' specs in the header, so that a part can be
opened without its checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.arrays import ArrayRows, closed_error, no_device_error
from bdexport.backends.base import Availability, BuildOptions, BuildsWhereItRuns, Readable, RunOptions, Session
from bdexport.backends.forking import forked_error, note_pool
from bdexport.backends.output_guard import check_rows
from bdexport.backends.torch_cuda import TorchCudaSession, check_torch_cuda
from bdexport.cuda import cuda_ordinal
from bdexport.errors import BackendError, BuildError, UsageError
from bdexport.packages import install_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bdexport.bundle import Bundle, Manifest
    from bdexport.models.pair import BlockDropNet

HEADER = "bdexport"  # the key of the specs in the engine's header
Array = NDArray[Any]


class TorchBackend(BuildsWhereItRuns):
    """Builds and opens parts as torch modules, in evaluation mode, batch norm as trained (not folded)."""

    name = "torch"
    precisions: tuple[str, ...] = ("fp32",)
    engine_suffix = ".safetensors"
    computes = True

    def available(self) -> Availability:
        """Whether torch and safetensors are installed."""
        missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
        if missing:
            return Availability(False, f"{' and '.join(missing)} not installed", install_line("build"))
        return Availability(True, "torch is installed")

    def versions(self) -> Mapping[str, str]:
        """Engines are weights: they depend on no version of torch; it is recorded for the reader."""
        import torch

        return {"torch": torch.__version__}

    def fingerprint(self) -> str:
        """Engines run on every machine."""
        return "any"

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        """Write the part's weights; ``graph`` is not read. Raises BuildError without a ``model``."""
        from safetensors.torch import save

        from bdexport.partition import part_module

        if options.precision not in self.precisions:
            raise BuildError(f"{part} [torch]: precision", got=options.precision, expected=", ".join(self.precisions))
        if model is None:
            raise BuildError(f"{part} [torch]: is built from a model, not from a graph", remedy="pass the model")
        # A fixed mask has no policy network: its part is a layer of K units, whatever they keep.
        policy = getattr(model.policy, "spec", None)
        deciding = None if policy is None else policy.to_json()
        specs = {"network": model.network.spec.to_json(), "policy": deciding, "part": part}
        # clone: ``full`` may hold one storage under two names, which safetensors refuses.
        state = {name: value.detach().clone() for name, value in part_module(model, part).state_dict().items()}
        engine.write_bytes(save(state, {HEADER: json.dumps(specs)}))

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        """Load every part of ``bundle`` on the CPU or a GPU."""
        ordinal = cuda_ordinal(options.device)
        if ordinal is None and options.device != "cpu":
            raise no_device_error(self.name, options.device, "cpu or cuda")
        if ordinal is not None:
            check_torch_cuda(options.device, ordinal)
        skeleton: BlockDropNet | None = None
        modules: dict[str, nn.Module] = {}
        for part in bundle.manifest.parts:
            specs, state = _read_engine(bundle.engine_file(part), part)
            skeleton = skeleton or _skeleton(specs)
            modules[part] = _load_part(skeleton, part, state)
        if ordinal is not None:
            return TorchCudaSession(bundle.manifest, modules, ordinal, options.stream)
        return TorchSession(bundle.manifest, modules, options.threads)


class TorchSession(ArrayRows):
    """See :class:`bdexport.backends.base.Session`. Tensors are numpy arrays; torch sees their memory."""

    def __init__(self, manifest: Manifest, modules: Mapping[str, nn.Module], threads: int | None = None) -> None:
        import torch

        note_pool("torch", torch.get_num_threads() if threads is None else threads)
        notes = ["torch: the reference, not made for speed"]
        if threads is not None and threads != torch.get_num_threads():
            # torch has one pool per process; there is no pool per session to set.
            torch.set_num_threads(threads)
            notes.append(f"torch: {threads} threads set for the whole process")
        self.device, self.threads = "cpu", torch.get_num_threads()
        self.notes: tuple[str, ...] = tuple(notes)
        self._modules = dict(modules)
        self._outputs = {part: entry.output.shape for part, entry in manifest.parts.items()}
        self._closed = False

    def put(self, part: str, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def get(self, part: str, tensor: Array) -> Array:
        return tensor.copy()

    def run(self, part: str, x: Array) -> Array:
        import torch

        modules = self._modules
        if self._closed:
            raise closed_error("torch")
        with torch.inference_mode(), _reported(part):
            out = modules[part](torch.from_numpy(x if x.flags.writeable else x.copy()))
        result: Array = out.contiguous().numpy()
        check_rows(f"{part} [torch]", result, len(x), self._outputs[part])
        return result

    def run_path(self, parts: Sequence[str], x: Array) -> Array:
        for part in parts:
            x = self.run(part, x)
        return x

    def in_fork(self) -> TorchSession:
        """See :meth:`bdexport.backends.base.ForkingSession.in_fork`. With one thread, no pool is asked for."""
        import torch

        threads = torch.get_num_threads()  # of the whole process, whatever this session was opened with
        if threads > 1:
            why = f"whose pool of {threads} threads torch cannot make anew in this one"
            more = ", before torch computes anything in the parent; or start workers by 'spawn'; or pass threads=1"
            raise forked_error("session [torch]", why, more=more)
        return self

    def close(self) -> None:
        self._closed = True
        self._modules = {}  # not emptied: another thread's call may have begun


@contextmanager
def _reported(part: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise BackendError(f"{part} [torch]: {str(error).splitlines()[0]}") from error


def session_from_model(manifest: Manifest, model: BlockDropNet, threads: int | None = None) -> TorchSession:
    """A session straight from a model in memory: the reference at build time."""
    from bdexport.partition import part_module

    return TorchSession(manifest, {part: part_module(model, part) for part in manifest.parts}, threads)


def _read_engine(path: Readable, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        state = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # which load() has checked
        specs = json.loads(header["__metadata__"][HEADER])
        if specs["part"] != part:
            raise ValueError(f"it holds {specs['part']}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _engine_error(part, f"{path} is no engine: {error}") from error
    return specs, state


def _skeleton(specs: Mapping[str, Any]) -> BlockDropNet:
    """The pair of networks that the parts of one bundle are cut from, without weights (torch's meta device)."""
    import torch

    from bdexport.architecture import policy_spec_from_json, resnet_spec_from_json
    from bdexport.models.pair import BlockDropNet

    try:
        with torch.device("meta"):
            network = resnet_spec_from_json(specs["network"])
            if specs["policy"] is not None:
                return BlockDropNet(network, policy_spec_from_json(specs["policy"]))
            model = BlockDropNet(network)
            model.set_mask([True] * network.num_blocks)  # the engine's weights say what it keeps
            return model
    except (KeyError, TypeError, UsageError) as error:
        raise _engine_error(str(specs["part"]), f"its network cannot be made: {error}") from error


def _load_part(skeleton: BlockDropNet, part: str, state: Mapping[str, Tensor]) -> nn.Module:
    from bdexport.partition import part_module

    try:
        module = part_module(skeleton, part)
        module.load_state_dict(dict(state), assign=True)
    except (RuntimeError, UsageError) as error:
        raise _engine_error(part, str(error)) from error
    return module


def _engine_error(part: str, reason: str) -> BackendError:
    return BackendError(f"{part} [torch]: {' '.join(reason.split())}", remedy="rebuild the bundle")
