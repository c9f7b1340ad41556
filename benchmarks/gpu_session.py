"""Run the steps of one call of ``gpu_session.sh`` and say what each gave; see ``gpu_session_plan.py`` for the steps.

    benchmarks/gpu_session.sh 1|2 [--out DIR] [--dry-run] [--fresh]

Each step is a process of its own with a time limit (``timeout -s INT``) and writes its JSON as it goes, so a step that
is cut off leaves what it has. Steps that are complete, for this very code, are not run again. A need that is missing
is named in one line, and the steps that can run do. DIR gets at most eight files: a JSON for each step, one for the
session (``session-1.json``) and everything that was printed (``session-1.log``).
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from gpu_common import COMMIT, RESULTS, ROOT, ResultFile, code_digest, gpus_now
from gpu_session_parts import PartsError, checked_parts, default_store, installed, keep_parts, unpacked
from gpu_session_plan import CALL_SECONDS, Step, steps_of

from bdexport.errors import BdexportError
from bdexport.report.benchmarks import SESSION, headline_of

STATE = ROOT / "build" / "gpu-session"  # complete results of earlier calls on this machine
DRY_OUT = ROOT / "build" / "gpu-dry-run"  # of a dry run that is told no folder: it must not replace results
PACKAGES = ("numpy", "PIL", "rich", "typer", "torch", "onnx", "onnxruntime", "safetensors", "sklearn")
TEST_PACKAGES = ("pytest", "pytest_timeout")
DONE, FAILED, CUT, SKIPPED = "done", "failed", "cut off", "not run"
CUT_CODES = (124, 137, -9)  # of `timeout`; where it has to kill a step, it dies of the same signal
GRACE_S = 8  # after Ctrl-C, until a step is killed
RESERVE_S = 5  # of a call, for its own last words
LEAST_S = 15  # a step that has less left is not begun
LEAST_FREE = 200 << 20  # bytes, for results and the steps' temporary files
TAIL_LINES = 6


@dataclass
class Outcome:
    """What became of a step."""

    step: str
    outcome: str
    seconds: float = 0.0
    text: str = ""


class Log:
    """The log file, and a console that gets less of it."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def say(self, text: str) -> None:
        """To both."""
        print(text, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """To the file alone."""
        self._file.write(text + "\n")
        self._file.flush()


def main() -> None:
    started = time.monotonic()
    arguments = _arguments()
    if arguments.commit:
        os.environ[COMMIT] = arguments.commit
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out, call = arguments.out, arguments.call
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(out).free) < LEAST_FREE:
            sys.exit(f"gpu_session.sh: {out}: {free >> 20} MiB are free; {LEAST_FREE >> 20} are needed")
        with (out / f"session-{call}.log").open("a") as file:
            _claim(file, out)
            code = _Session(call, out, arguments.dry_run, arguments.fresh, started, Log(file)).run()
    except KeyboardInterrupt:
        sys.exit("gpu_session.sh: stopped from outside")
    except OSError as error:
        sys.exit(f"gpu_session.sh: {error.filename or out}: cannot be written ({error.strerror})")
    except BdexportError as error:
        sys.exit(f"gpu_session.sh: {error}")
    sys.exit(code)


class _Session:
    def __init__(self, call: int, out: Path, dry_run: bool, fresh: bool, started: float, log: Log) -> None:
        self.call, self.out, self.dry_run, self.fresh, self.log = call, out, dry_run, fresh, log
        self.deadline = started + CALL_SECONDS[call] - RESERVE_S
        self.started = started
        self.store = default_store()
        self.outcomes: list[Outcome] = []
        self.gpus = [] if dry_run else [gpu["name"] for gpu in gpus_now()]
        self.interrupted = False

    def run(self) -> int:
        """The exit code: 0 where every step is done and no test failed."""
        title = f"GPU session, call {self.call}{', dry run on the CPU' if self.dry_run else ''}"
        self.log.say(f"{title}; code {code_digest()[:12]}; results in {self.out}")
        device = "cpu" if self.dry_run else "cuda"
        name = f"session-{self.call}.json"
        file = ResultFile(self.out / name, SESSION, {"call": self.call}, device, self.dry_run)
        self._say_what_is_here()
        with_cuda, reasons = self._needs()
        try:
            for step in steps_of(self.call, self.dry_run):
                self.outcomes.append(self._step(step, reasons, with_cuda))
                file.write([asdict(outcome) for outcome in self.outcomes])
                if self.interrupted:
                    break
        except KeyboardInterrupt:
            self.interrupted = True
        if self.interrupted:
            self.log.say("stopped from outside")
        file.write([asdict(outcome) for outcome in self.outcomes], complete=not self.interrupted)
        self._table()
        good = all(outcome.outcome == DONE for outcome in self.outcomes)
        return 0 if good and not self.interrupted else 1

    # ---- what is needed -------------------------------------------------------------------------------------------

    def _needs(self) -> tuple[dict[str, str], dict[str, str]]:
        """(environment of steps with ONNX Runtime, reason by missing need). Each missing need is said at once."""
        reasons: dict[str, str] = {}
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            reasons["packages"] = f"{sys.executable} lacks {', '.join(missing)}"
        if missing := [name for name in TEST_PACKAGES if importlib.util.find_spec(name) is None]:
            reasons["tests"] = f"{sys.executable} lacks {', '.join(missing)}"
        if shutil.which("timeout") is None:
            reasons["packages"] = "no program `timeout` here (GNU coreutils)"
        if not self.dry_run and (why := _why_no_gpu()) is not None:
            reasons["gpu"] = why
        environment: dict[str, str] = {}
        try:
            keep_parts(ROOT, self.store)
            if self.call == 1 and installed() is None and not self.dry_run:
                self.log.say(f"for call 2: {_parts_here(self.store)}")
            if self.call == 2:
                environment = self._onnxruntime()
        except PartsError as error:
            if self.call == 2 and not self.dry_run:
                reasons["onnxruntime"] = str(error)
            else:
                self.log.say(f"for call 2: {error}")
        for reason in reasons.values():
            self.log.say(f"missing: {reason}")
        return environment, reasons

    def _onnxruntime(self) -> dict[str, str]:
        """What makes steps find the CUDA build: nothing where it is installed, else the folder of the parts."""
        version = installed()
        if version is not None:
            self.log.say(f"onnxruntime-gpu {version} is installed")
            return {}
        if self.dry_run:
            self.log.say("dry run: the onnxruntime that is installed, on the CPU")
            return {}
        site = unpacked(self.store)
        self.log.say(f"onnxruntime-gpu: unpacked to {site}")
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))}

    def _say_what_is_here(self) -> None:
        for command in (["nvidia-smi"], ["nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE,POWER"], ["uname", "-a"]):
            if shutil.which(command[0]) is not None:
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
                    self.log.note(done.stdout + done.stderr)
                except subprocess.TimeoutExpired as error:
                    self.log.note(str(error))
        self.log.note(f"python {sys.version}")

    # ---- one step -------------------------------------------------------------------------------------------------

    def _step(self, step: Step, reasons: Mapping[str, str], with_cuda: Mapping[str, str]) -> Outcome:
        result = self.out / f"{step.name}.json"
        if not self.fresh and self._is_done(result):
            return self._finished(step, result, 0.0, "done before")
        needs = [
            "packages",
            "gpu",
            *(["onnxruntime"] if step.onnxruntime else []),
            *(["tests"] if step.is_tests else []),
        ]
        reason = next((reasons[need] for need in needs if need in reasons), None)
        left = int(self.deadline - time.monotonic())
        if reason is None and left < min(LEAST_S, step.limit_s):
            reason = f"no time left of the call's {CALL_SECONDS[self.call]} s; give the line again"
        if reason is not None:
            return Outcome(step.name, SKIPPED, text=reason)
        limit = min(step.limit_s, left)
        self.log.say(f"== {step.name} (at most {limit} s)")
        result.unlink(missing_ok=True)
        began = time.monotonic()
        code = self._run(step, result, limit, with_cuda if step.onnxruntime else {})
        seconds = time.monotonic() - began
        if not result.exists():
            return Outcome(step.name, FAILED, seconds, f"exit code {code} and no result; see session-{self.call}.log")
        return self._finished(step, result, seconds, "", code)

    def _run(self, step: Step, result: Path, limit: int, more: Mapping[str, str]) -> int:
        """Exit code; 124 where the limit was reached. What it prints goes to the log, its last lines to the console."""
        environment = os.environ | dict(step.environment) | dict(more)
        command = [sys.executable, *step.command]
        if step.is_tests:
            environment["BDEXPORT_GPU_RESULTS"] = str(result)
        else:
            command += ["--json", str(result)]
        self.log.note(" ".join(command))
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        with subprocess.Popen(
            ["timeout", "-s", "INT", "-k", str(GRACE_S), str(limit), *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    self.log.note(line.rstrip("\n"))
                    tail.append(line.rstrip("\n"))
                return process.wait()
            except KeyboardInterrupt:
                self.interrupted = True
                process.send_signal(signal.SIGINT)  # timeout passes it on, and kills the step that stays
                return process.wait()
            except BaseException:
                process.send_signal(signal.SIGINT)
                raise
            finally:
                for line in tail:
                    print(f"   {line[:160]}", flush=True)

    def _is_done(self, result: Path) -> bool:
        """Whether a complete result of this code and GPU is here, or kept from an earlier call; it is brought here."""
        for place in (result, STATE / result.name, RESULTS / result.name):
            data = _read(place)
            same = data.get("code") == code_digest() and bool(data.get("dry_run")) == self.dry_run
            if data.get("complete") and same and _gave_something(data) and _gpu_names(data) == self.gpus:
                if place != result:
                    shutil.copyfile(place, result)
                return True
        return False

    def _finished(self, step: Step, result: Path, seconds: float, note: str, code: int = 0) -> Outcome:
        """From the result file, whole or cut; a whole one that has something is kept for the next call."""
        data = _read(result)
        headline = headline_of(data) if data else "a result that cannot be read"
        if data.get("complete"):
            failed = step.is_tests and any(row["outcome"] == "failed" for row in data["results"])
            outcome = DONE if _gave_something(data) and not failed else FAILED
            if _gave_something(data):
                self._keep(result)
        else:
            outcome = CUT if code in CUT_CODES or self.interrupted else FAILED
        return Outcome(step.name, outcome, seconds, f"{headline}{f' ({note})' if note else ''}")

    def _keep(self, result: Path) -> None:
        try:
            STATE.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(result, STATE / result.name)
        except OSError as error:  # it is in --out all the same
            self.log.say(f"{STATE}: {result.name} cannot be kept there ({error.strerror})")

    def _table(self) -> None:
        width = max(len(outcome.step) for outcome in self.outcomes) if self.outcomes else 0
        self.log.say(f"\ncall {self.call}: {time.monotonic() - self.started:.0f} s")
        for found in self.outcomes:
            self.log.say(f"{found.step:{width}}  {found.outcome:8} {found.seconds:5.0f} s  {found.text}")


def _claim(file: IO[str], out: Path) -> None:
    """Empty the log, unless another session writes to it. Raises SystemExit."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"gpu_session.sh: another session writes to {out}")
    except OSError:
        pass  # a file system without locks
    file.truncate(0)


def _gave_something(data: Mapping[str, Any]) -> bool:
    """Whether a result has figures; of tests, one that was not skipped."""
    return any(not isinstance(row, dict) or row.get("outcome") != "skipped" for row in data["results"])


def _gpu_names(data: Mapping[str, Any]) -> list[str]:
    return [gpu["name"] for gpu in data.get("gpus") or []]


def _why_no_gpu() -> str | None:
    """In one line; None where nvidia-smi lists a GPU."""
    from bdexport.hardware import gpu_report

    report = gpu_report()
    return None if report.gpus else f"no NVIDIA GPU ({report.reason})"


def _parts_here(store: Path) -> str:
    """What has come of ONNX Runtime's parts."""
    try:
        return f"{len(checked_parts(store))} parts of onnxruntime-gpu are here, all of them"
    except PartsError as error:
        return f"{len(list(store.glob('ort.part.*')))} of the parts kept so far; {error}"


def _read(path: Path) -> dict[str, Any]:
    """A result; empty where there is none that can be read."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        return {}
    try:
        headline_of(data)
        _gpu_names(data)
        return data if isinstance(data["results"], list) else {}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return {}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_session.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", type=int, choices=sorted(CALL_SECONDS), help="which of the two calls")
    where = "default: $OUT where it is set, else benchmarks/results/gpu (--dry-run: build/gpu-dry-run)"
    parser.add_argument("--out", type=Path, help=where)
    parser.add_argument("--dry-run", action="store_true", help="the CPU in the GPU's place: shows that every step runs")
    parser.add_argument("--fresh", action="store_true", help="run steps again that are complete")
    parser.add_argument("--commit", help="recorded with the results where there is no .git; default: what git says")
    arguments = parser.parse_args()
    if arguments.out is None:
        arguments.out = Path(os.environ.get("OUT") or (DRY_OUT if arguments.dry_run else RESULTS))
    return arguments


if __name__ == "__main__":
    main()
