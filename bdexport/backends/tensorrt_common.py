"""What building and running with TensorRT share: the two packages behind one interface, TensorRT's log, engine files.

An engine file is a stored (not compressed) zip: ``plan``, TensorRT's own form; ``part.json``, what it was built with
and for; ``layers.json``, what TensorRT's inspector says about its layers, where the engine could be loaded when built.
"""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bdexport.backends.base import Readable
from bdexport.backends.first_use import once
from bdexport.errors import BackendError
from bdexport.files import writing
from bdexport.json_text import MalformedError, parse_json, why
from bdexport.packages import install_line

SCHEMA = "bdexport-tensorrt-engine/1"
PLAN, DESCRIPTION, LAYERS = "plan", "part.json", "layers.json"  # inside an engine file
ANY_TIME = (1980, 1, 1, 0, 0, 0)  # in the zip, so that equal engines are equal files
KEPT_LINES = 50  # of TensorRT's log, of each thread's work
QUOTED_CHARACTERS = 600
OLDEST, NEWEST_MAJOR = (10, 3), 11  # of the package tensorrt; contexts take memory of a given size from 10.1 on
# Lines of the log that only say where in TensorRT's sources it was, or begin or end what the parser's errors say too.
NOISE = ("Begin node", "End node", "While parsing node", "catchCudaError")


@dataclass(frozen=True)
class Flavour:
    """One of the two products: our name of its backend, its Python module, and how it is installed."""

    name: str
    module: str
    title: str

    @property
    def rtx(self) -> bool:
        """TensorRT for RTX: no GPU is needed to build, kernels are compiled where the engine runs."""
        return self.name == RTX.name

    @property
    def install(self) -> str:
        """The line that installs it."""
        return install_line(self.name)


TENSORRT = Flavour("tensorrt", "tensorrt", "TensorRT")
RTX = Flavour("tensorrt-rtx", "tensorrt_rtx", "TensorRT for RTX")


class Api:
    """One imported TensorRT: its module, its one log, and its version."""

    def __init__(self, flavour: Flavour, module: Any) -> None:
        self.flavour, self.module = flavour, module
        self.log = _logger(module)
        self.version: str = module.__version__


@once
def load_api(flavour: Flavour) -> Api:
    """Import it. Raises ImportError; BackendError for a version that this package does not know."""
    module = import_module(flavour.module)
    if not flavour.rtx and not OLDEST <= _major_and_minor(module.__version__) < (NEWEST_MAJOR + 1, 0):
        raise BackendError(
            f"backend {flavour.name}: this version of TensorRT is not supported",
            got=module.__version__,
            expected=f"{OLDEST[0]}.{OLDEST[1]} or newer, up to {NEWEST_MAJOR}.x",
            remedy=flavour.install,
        )
    return Api(flavour, module)


def _major_and_minor(version: str) -> tuple[int, int]:
    major, minor = (int(number) for number in version.split(".")[:2])
    return major, minor


def same_major(one: str, other: str) -> bool:
    """Whether two versions have their first number in common."""
    return one.partition(".")[0] == other.partition(".")[0]


# ---- TensorRT's log ----------------------------------------------------------------------------------------------


class LogLines:
    """What TensorRT said during one piece of work, the last lines of it."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=KEPT_LINES)
        self._warnings: deque[str] = deque(maxlen=KEPT_LINES)

    def add(self, line: str, error: bool) -> None:
        """Keep one line."""
        (self._errors if error else self._warnings).append(" ".join(line.split()))

    def clear(self) -> None:
        """Forget everything."""
        self._errors.clear()
        self._warnings.clear()

    def quote(self) -> str:
        """What an error says of it: the errors, else the warnings; "nothing" if there are none."""
        lines = list(self._errors) or list(self._warnings)
        told = list(dict.fromkeys(line for line in lines if not any(noise in line for noise in NOISE)))
        text = " | ".join(told or lines) or "nothing"
        return text if len(text) <= QUOTED_CHARACTERS else f"{text[:QUOTED_CHARACTERS]}.."


class LogBook:
    """Whose lines are whose. TensorRT keeps the first logger of a process for part of what it says, so there is one.

    A line goes to the work under way in the thread that says it; threads of TensorRT's own have none, so theirs go to
    all work under way. Lines from outside of any work are kept apart, in :attr:`rest`.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._open: list[LogLines] = []
        self.rest = LogLines()

    @contextmanager
    def capture(self) -> Iterator[LogLines]:
        """Collect the lines of this thread's work."""
        before, lines = getattr(self._thread, "lines", None), LogLines()
        self._thread.lines = lines
        self._open.append(lines)
        try:
            yield lines
        finally:
            self._open.remove(lines)
            self._thread.lines = before

    def write(self, line: str, error: bool) -> None:
        """One line of the log."""
        own = getattr(self._thread, "lines", None)
        for lines in (own,) if own is not None else tuple(self._open) or (self.rest,):
            lines.add(line, error)


def _logger(module: Any) -> Any:
    """A logger object of this TensorRT; ``.book`` has what it said. Information and details are not kept."""
    kept = {module.ILogger.INTERNAL_ERROR: True, module.ILogger.ERROR: True, module.ILogger.WARNING: False}

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.book = LogBook()

        def log(self, severity: Any, message: str) -> None:
            error = kept.get(severity)
            if error is not None:
                self.book.write(message, error)

    return Logger()


# ---- engine files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineDescription:
    """What one engine was built with and for. ``layers``: None, or why the inspector's view is missing."""

    part: str
    flavour: str
    version: str
    gpu: str | None  # model that it was built on; None: on none
    compute_capabilities: tuple[str, ...]  # none: whatever TensorRT for RTX builds for by itself
    batches: tuple[int, int, int]  # smallest, what kernels were chosen for, largest
    version_compatible: bool
    hardware_compatible: str | None
    layers: str | None


def write_engine(path: Path, description: EngineDescription, plan: bytes, layers: str | None) -> None:
    """Write an engine file, atomically."""
    members = {
        DESCRIPTION: json.dumps({"schema": SCHEMA} | asdict(description), indent=1).encode(),
        PLAN: plan,
    }
    if layers is not None:
        members[LAYERS] = layers.encode()
    with writing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as packed:
        for name, data in members.items():
            packed.writestr(zipfile.ZipInfo(name, ANY_TIME), data)


def read_engine(path: Readable, part: str, flavour: Flavour, remedy: str) -> tuple[EngineDescription, bytes]:
    """An engine file's description and plan. Raises BackendError for anything that is not this part's engine."""
    where = f"{part} [{flavour.name}]: {path}"
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as packed:
            data = parse_json(packed.read(DESCRIPTION))
            plan = packed.read(PLAN)
        if data.pop("schema") != SCHEMA:
            raise MalformedError("another schema")
        for name in ("compute_capabilities", "batches"):
            data[name] = tuple(data[name])
        description = EngineDescription(**data)
        _smallest, _chosen, _largest = map(int, description.batches)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise BackendError(f"{where} is no engine ({why(error)})", remedy=remedy) from error
    if (description.part, description.flavour) != (part, flavour.name):
        got = f"{description.part} [{description.flavour}]"
        raise BackendError(f"{where} is another engine", got=got, expected=f"{part} [{flavour.name}]", remedy=remedy)
    return description, plan


def read_layers(path: Path) -> Any | None:
    """TensorRT's view of an engine's layers (parsed JSON); None where it could not be had at build time."""
    with zipfile.ZipFile(path) as packed:
        return json.loads(packed.read(LAYERS)) if LAYERS in packed.namelist() else None
