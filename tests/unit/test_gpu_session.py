"""The GPU session's two calls: what they run, leave, skip and say; here on steps of seconds, and once as a dry run."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = f"cpython-{sys.version_info.major}{sys.version_info.minor}-x86_64-linux-gnu"
ROW = {"outcome": "passed", "test": "a::b", "reason": ""}
# A step of one line: writes a result with these words in front of it, in the form that the scripts write.
WRITES = """
import sys, time
sys.path.insert(0, "benchmarks")
from pathlib import Path
from gpu_common import ResultFile
file = ResultFile(Path(sys.argv[-1]), "probe", {})
file.write([{"what": "half"}])
"""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, repository: Path, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """The session's modules, with their state in the test's folder and a machine without a GPU."""
    if shutil.which("timeout") is None:
        pytest.skip("no program `timeout` here (GNU coreutils)")
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    monkeypatch.delenv("OUT", raising=False)
    session = import_module("gpu_session")
    monkeypatch.setattr(session, "STATE", tmp_path / "state")
    monkeypatch.setattr(session, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(session, "default_store", lambda: tmp_path / "store")
    parts, plan = import_module("gpu_session_parts"), import_module("gpu_session_plan")
    yield SimpleNamespace(session=session, parts=parts, plan=plan)
    for name in [name for name in sys.modules if name.startswith("gpu_") and name not in ("gpu_report", "gpu_cases")]:
        monkeypatch.delitem(sys.modules, name)


def steps(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """The call's steps are these programs; ``slow`` has a limit of 8 s, the others of 60."""
    made = [
        modules.plan.Step(
            name, 8 if name == "slow" else 60, ("-c", WRITES + text), environment={"BDEXPORT_GPU_DRY_RUN": "1"}
        )
        for name, text in programs.items()
    ]
    monkeypatch.setattr(modules.session, "steps_of", lambda call, dry_run: made)


def run(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a call."""
    monkeypatch.setattr(sys, "argv", ["gpu_session.sh", *arguments])
    with pytest.raises(SystemExit) as ended:
        modules.session.main()
    code = ended.value.code
    assert code is None or isinstance(code, int), code
    return code or 0


def rows(out: Path, call: int = 1) -> dict[str, Any]:
    """The outcome of each step, from the session's JSON."""
    data = json.loads((out / f"session-{call}.json").read_text())
    assert data["schema"] == "bdexport.benchmark/1"
    assert (data["kind"], data["complete"]) == ("session", True)
    return {row["step"]: row for row in data["results"]}


COMPLETE = 'file.write([{"what": "whole"}], complete=True)\n'


def test_steps_are_run_cut_and_not_run_again(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a step beyond its limit leaves what it had; what is complete is not run again, unless it is asked for."""
    out = tmp_path / "out"
    mark = tmp_path / "runs"
    count = f"open({str(mark)!r}, 'a').write('x')\n"
    steps(modules, monkeypatch, good=count + COMPLETE, slow="time.sleep(60)\n", broken="raise SystemExit(7)\n")
    assert run(modules, monkeypatch, "1", "--out", str(out), "--dry-run") == 1
    found = rows(out)
    assert [found[name]["outcome"] for name in ("good", "slow", "broken")] == ["done", "cut off", "failed"]
    assert found["slow"]["seconds"] < 50
    half = json.loads((out / "slow.json").read_text())
    assert (half["results"], half["complete"]) == ([{"what": "half"}], False)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-3:]] == ["good", "slow", "broken"]  # the table is the last thing said
    assert len(list(out.iterdir())) <= 8
    assert json.loads((out / "session-1.json").read_text())["dry_run"]

    shutil.rmtree(out)  # as where each call gets an empty folder
    steps(modules, monkeypatch, good=count + COMPLETE, slow=COMPLETE)
    assert run(modules, monkeypatch, "1", "--out", str(out), "--dry-run") == 0
    assert mark.read_text() == "x"
    assert rows(out)["good"]["text"].endswith("(done before)")
    assert json.loads((out / "good.json").read_text())["complete"]
    assert run(modules, monkeypatch, "1", "--out", str(out), "--dry-run", "--fresh") == 0
    assert mark.read_text() == "xx"


def test_results_of_other_code_are_not_taken(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: the step runs again once a source file is another one."""
    out = tmp_path / "out"
    steps(modules, monkeypatch, good=COMPLETE)
    assert run(modules, monkeypatch, "1", "--out", str(out), "--dry-run") == 0
    monkeypatch.setattr(modules.session, "code_digest", lambda: "another")
    assert run(modules, monkeypatch, "1", "--out", str(out), "--dry-run") == 0
    assert "done before" not in rows(out)["good"]["text"]


def test_what_is_missing_is_said_once_and_the_rest_runs(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one line for each need; steps without that need run."""
    out = tmp_path / "out"
    step = modules.plan.Step
    dry = {"BDEXPORT_GPU_DRY_RUN": "1"}
    made = [
        step("free", 60, ("-c", WRITES + COMPLETE), environment=dry),
        step("with-ort", 60, ("-c", WRITES + COMPLETE), True, dry),
    ]
    monkeypatch.setattr(modules.session, "steps_of", lambda call, dry_run: made)
    monkeypatch.setattr(modules.session, "_why_no_gpu", lambda: None)
    monkeypatch.setattr(modules.session, "installed", lambda: None)
    monkeypatch.setattr(modules.session, "keep_parts", lambda checkout, store: None)
    monkeypatch.setattr(modules.session, "_read", lambda path: json.loads(path.read_text()) if path.exists() else {})
    assert run(modules, monkeypatch, "2", "--out", str(out)) == 1
    found = rows(out, 2)
    assert (found["free"]["outcome"], found["with-ort"]["outcome"]) == ("done", "not run")
    assert "no parts of it have come" in found["with-ort"]["text"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing:")]
    assert len(said) == 1


def test_without_a_gpu_nothing_runs(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the reason in one line and at every step; exit code 1."""
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("this machine has an NVIDIA driver")
    out = tmp_path / "out"
    assert run(modules, monkeypatch, "1", "--out", str(out)) == 1
    assert {row["outcome"] for row in rows(out).values()} == {"not run"}
    assert {row["text"] for row in rows(out).values()} == {
        "no NVIDIA GPU (no nvidia-smi: no NVIDIA driver is installed)"
    }
    assert capsys.readouterr().out.count("missing: no NVIDIA GPU") == 1


def test_a_step_without_time_is_not_begun(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: the reason names the call's seconds and what to do."""
    steps(modules, monkeypatch, good=COMPLETE)
    monkeypatch.setattr(modules.session, "CALL_SECONDS", {1: 6, 2: 6})
    assert run(modules, monkeypatch, "1", "--out", str(tmp_path / "out"), "--dry-run") == 1
    assert rows(tmp_path / "out")["good"]["text"] == "no time left of the call's 6 s; give the line again"


def test_a_full_disk_is_said_before_anything_runs(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: one line with both numbers."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7 << 20))
    monkeypatch.setattr(sys, "argv", ["gpu_session.sh", "1", "--out", str(tmp_path / "out"), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        modules.session.main()
    assert str(ended.value.code).endswith("7 MiB are free; 200 are needed")


def test_the_shell_script_names_a_python_that_is_too_old(repository: Path, tmp_path: Path) -> None:
    """Oracle: one line on stderr, exit code 1; also for one that is not there."""
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    for python, expected in ((str(old), "Python 3.9.1 is too old"), ("no-such-python", "no no-such-python here")):
        done = subprocess.run(
            ["bash", "benchmarks/gpu_session.sh", "1"],
            cwd=repository,
            env=os.environ | {"GPU_PYTHON": python},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert expected in done.stderr


def test_a_step_that_gave_nothing_is_no_success_and_runs_again(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: "failed", although the file is complete: tests that were all skipped, and a script without a figure."""
    out = tmp_path / "out"
    skipped = {"test": "a::b", "outcome": "skipped", "reason": "no provider"}
    programs = {"tests": f"file.write([{skipped!r}], complete=True)\n", "script": "file.write([], complete=True)\n"}
    steps(modules, monkeypatch, **programs)
    for _ in range(2):
        assert run(modules, monkeypatch, "1", "--out", str(out), "--dry-run") == 1
        assert {row["outcome"] for row in rows(out).values()} == {"failed"}
        assert not any("done before" in row["text"] for row in rows(out).values())


def test_a_step_that_has_to_be_killed_is_cut_off(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: `timeout` itself dies of SIGKILL with a step that ignores Ctrl-C; what the step had stays."""
    monkeypatch.setattr(modules.session, "GRACE_S", 1)
    steps(modules, monkeypatch, slow="import signal; signal.signal(2, signal.SIG_IGN); time.sleep(60)\n")
    assert run(modules, monkeypatch, "1", "--out", str(tmp_path / "out"), "--dry-run") == 1
    assert rows(tmp_path / "out")["slow"]["outcome"] == "cut off"


def test_results_of_another_gpu_are_not_taken(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: a checkout comes with results of the same code; on a machine without that GPU they are not its own."""
    results = tmp_path / "results"
    steps(modules, monkeypatch, good=COMPLETE)
    assert run(modules, monkeypatch, "1", "--out", str(results), "--dry-run") == 0
    data = json.loads((results / "good.json").read_text())
    other = json.dumps(data | {"gpus": [{"name": "NVIDIA Another"}]})
    for folder in (results, tmp_path / "state"):
        (folder / "good.json").write_text(other)
    assert run(modules, monkeypatch, "1", "--out", str(tmp_path / "out"), "--dry-run") == 0
    assert "done before" not in rows(tmp_path / "out")["good"]["text"]


def test_a_dry_run_replaces_no_results(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: without --out and $OUT, its files are not where results are."""
    monkeypatch.setattr(modules.session, "DRY_OUT", tmp_path / "dry")
    steps(modules, monkeypatch, good=COMPLETE)
    assert run(modules, monkeypatch, "1", "--dry-run") == 0
    assert (tmp_path / "dry" / "good.json").exists()
    assert not (tmp_path / "results").exists()


def test_what_cannot_be_kept_stops_nothing(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: every step is done where the state's folder is a file; the line names it."""
    (tmp_path / "state").touch()
    steps(modules, monkeypatch, first=COMPLETE, second=COMPLETE)
    assert run(modules, monkeypatch, "1", "--out", str(tmp_path / "out"), "--dry-run") == 0
    assert "first.json cannot be kept there" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [{"results": 3}, {"results": [1]}, {"kind": 5, "gpus": 7}, None])
def test_damaged_state_is_not_taken(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: dict[str, Any] | None
) -> None:
    """Oracle: the step runs, although the file says that it is complete and of this code."""
    (tmp_path / "state").mkdir()
    head = {"complete": True, "code": modules.session.code_digest(), "dry_run": True, "kind": "tests", "skipped": {}}
    text = "[" if damage is None else json.dumps(head | {"results": [ROW]} | damage)
    (tmp_path / "state" / "good.json").write_text(text)
    steps(modules, monkeypatch, good=COMPLETE)
    assert run(modules, monkeypatch, "1", "--out", str(tmp_path / "out"), "--dry-run") == 0
    assert "done before" not in rows(tmp_path / "out")["good"]["text"]


def test_two_sessions_do_not_write_to_one_folder(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: one line; the first session's log is as it was."""
    log = tmp_path / "session-1.log"
    with log.open("w") as file:
        file.write("the first session's")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(sys, "argv", ["gpu_session.sh", "1", "--out", str(tmp_path), "--dry-run"])
        with pytest.raises(SystemExit, match="another session writes to"):
            modules.session.main()
    assert log.read_text() == "the first session's"


def test_a_session_that_is_stopped_leaves_its_table(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: SIGTERM in a step: the step has ended and is in the table, later ones have not begun; exit code 1."""
    out = tmp_path / "out"
    steps(
        modules,
        monkeypatch,
        first=f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)\n",
        second=COMPLETE,
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run(modules, monkeypatch, "1", "--out", str(out), "--dry-run") == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    data = json.loads((out / "session-1.json").read_text())
    assert ([row["step"] for row in data["results"]], data["complete"]) == (["first"], False)
    assert data["results"][0]["outcome"] == "cut off"
    assert "stopped from outside" in capsys.readouterr().out
    assert not (out / "second.json").exists()


# ---- the parts of ONNX Runtime ------------------------------------------------------------------------------------


def carried(checkout: Path, tag: str = HERE) -> None:
    """A small archive in the form of the parts, in a checkout's .gpu/."""
    names = ("onnxruntime/__init__.py", f"onnxruntime/capi/onnxruntime_pybind11_state.{tag}.so")
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:xz") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    data, sums = memory.getvalue(), []
    for index, piece in enumerate((data[:100], data[100:])):
        folder = checkout / ".gpu" / f"ort-{index}"
        folder.mkdir(parents=True)
        (folder / f"ort.part.{index:02}").write_bytes(piece)
        sums.append(f"{hashlib.sha256(piece).hexdigest()}  ort.part.{index:02}\n")
    (checkout / ".gpu" / "ort-0" / "ort.SHA256SUMS").write_text("".join(sums))


def test_parts_that_come_one_by_one_are_joined(modules: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the archive's files, although the first part is gone from the checkout when the second comes."""
    checkout, store = tmp_path / "checkout", tmp_path / "store"
    carried(checkout)
    second = checkout / ".gpu" / "ort-1"
    second.rename(tmp_path / "later")
    modules.parts.keep_parts(checkout, store)
    with pytest.raises(
        modules.parts.PartsError, match=r"part ort\.part\.01 has not come; carry its folder \.gpu/ort-1"
    ):
        modules.parts.unpacked(store)
    shutil.rmtree(checkout / ".gpu" / "ort-0")
    (tmp_path / "later").rename(second)
    modules.parts.keep_parts(checkout, store)
    site = modules.parts.unpacked(store)
    assert (site / "onnxruntime" / "__init__.py").read_text() == "onnxruntime/__init__.py"
    assert modules.parts.unpacked(store) == site


def test_parts_that_are_damaged_or_for_another_python_are_named(modules: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the part, or both versions of Python; a damaged part is taken again from the next transfer."""
    checkout, store = tmp_path / "checkout", tmp_path / "store"
    carried(checkout)
    modules.parts.keep_parts(checkout, store)
    part = store / "ort.part.01"
    part.write_bytes(b"?" * part.stat().st_size)
    with pytest.raises(modules.parts.PartsError, match=r"part ort\.part\.01 is damaged"):
        modules.parts.unpacked(store)
    modules.parts.keep_parts(checkout, store)
    modules.parts.unpacked(store)

    other = tmp_path / "other"
    carried(other, "cpython-36m-x86_64-linux-gnu")
    modules.parts.keep_parts(other, tmp_path / "store-2")
    with pytest.raises(
        modules.parts.PartsError, match=rf"are for cpython-36m-\S+, and this is {HERE.split('-x86')[0]}"
    ):
        modules.parts.unpacked(tmp_path / "store-2")


def test_parts_of_another_build_replace_the_old_ones(modules: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the new archive's file, although parts and digests have the sizes of the old ones."""
    checkout, store = tmp_path / "checkout", tmp_path / "store"
    carried(checkout)
    modules.parts.keep_parts(checkout, store)
    site = modules.parts.unpacked(store)
    (site / "onnxruntime" / "__init__.py").write_text("of the build before")
    sums = store / modules.parts.SUMS
    for folder in (store, site):  # as if another build had been kept and unpacked
        name = modules.parts.SUMS if folder == store else ".complete"
        (folder / name).write_text(sums.read_text().translate(str.maketrans("0123456789abcdef", "123456789abcdef0")))
    for part in store.glob("ort.part.*"):
        part.write_bytes(bytes(part.stat().st_size))
    modules.parts.keep_parts(checkout, store)
    assert (modules.parts.unpacked(store) / "onnxruntime" / "__init__.py").read_text() == "onnxruntime/__init__.py"


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"no digest\n", b"0  ort\n"])
def test_damaged_digests_are_named(modules: SimpleNamespace, tmp_path: Path, damage: bytes) -> None:
    """Oracle: the file's name; the next transfer's is kept."""
    checkout, store = tmp_path / "checkout", tmp_path / "store"
    carried(checkout)
    modules.parts.keep_parts(checkout, store)
    (store / modules.parts.SUMS).write_bytes(damage)
    with pytest.raises(modules.parts.PartsError, match="SHA256SUMS is damaged"):
        modules.parts.unpacked(store)
    modules.parts.keep_parts(checkout, store)
    modules.parts.unpacked(store)


def test_another_users_folder_is_not_taken(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: the folder's name stands where everybody can write, and what is in it is run."""
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(modules.parts.os, "getuid", lambda: (tmp_path / "store").stat().st_uid + 1)
    with pytest.raises(modules.parts.PartsError, match="another user's folder"):
        modules.parts.keep_parts(tmp_path, tmp_path / "store")


def test_a_disk_without_room_for_the_package_is_named(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: both numbers."""
    carried(tmp_path / "checkout")
    modules.parts.keep_parts(tmp_path / "checkout", tmp_path / "store")
    monkeypatch.setattr(modules.parts.shutil, "disk_usage", lambda path: SimpleNamespace(free=9 << 20))
    with pytest.raises(modules.parts.PartsError, match="9 MiB are free, and onnxruntime-gpu takes 400"):
        modules.parts.unpacked(tmp_path / "store")


def test_a_probe_that_fails_leaves_what_came_before(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: the rows before the failure, and its reason."""

    def rows_then_failure(rounds: int) -> Iterator[dict[str, Any]]:
        yield {"what": "a launch", "us": {"p50": 1.0, "p99": 2.0}, "us_each": 1.0}
        raise RuntimeError("no mapped memory")

    probe = import_module("gpu_probe")
    monkeypatch.setattr(probe, "driver_probes", rows_then_failure)
    monkeypatch.setattr(probe, "what_is_missing", lambda: None)
    result = tmp_path / "probe.json"
    monkeypatch.setattr(sys, "argv", ["gpu_probe.py", "--only", "driver", "--json", str(result)])
    probe.main()
    data = json.loads(result.read_text())
    assert [row["what"] for row in data["results"]] == ["a launch"]
    assert data["skipped"] == {"driver": "RuntimeError: no mapped memory"}


# ---- the real steps ------------------------------------------------------------------------------------------------


def test_every_step_fits_in_its_call(modules: SimpleNamespace, repository: Path) -> None:
    """Oracle: the files that commands name exist; a call leaves at most eight files, each step one of its own."""
    for call in (1, 2):
        found = modules.plan.steps_of(call, dry_run=False)
        assert len({step.name for step in found}) == len(found) <= 6  # and a log and a JSON of the session
        assert all(step.limit_s < modules.plan.CALL_SECONDS[call] for step in found)
        for step in found:
            files = [word.partition("::")[0] for word in step.command if word.endswith(".py") or ".py::" in word]
            assert files
            assert all((repository / name).is_file() for name in files)


@pytest.mark.slow
def test_a_first_step_as_a_dry_run(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the tests that a real call begins with pass on stand-ins, and their result is one that a report reads."""
    made = [step for step in modules.plan.steps_of(1, dry_run=True) if step.name == "tests-interface"]
    monkeypatch.setattr(modules.session, "steps_of", lambda call, dry_run: made)
    assert run(modules, monkeypatch, "1", "--out", str(tmp_path / "out"), "--dry-run") == 0
    data = json.loads((tmp_path / "out" / "tests-interface.json").read_text())
    assert data["dry_run"]
    assert {row["outcome"] for row in data["results"]} == {"passed"}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("call", [1, 2])
def test_the_whole_of_it_as_a_dry_run(call: int, repository: Path, tmp_path: Path) -> None:
    """Oracle: exit code 0, every step done, within the call's seconds; files as few as come back from a machine."""
    script = repository / "benchmarks" / "gpu_session.sh"
    environment = os.environ | {"GPU_PYTHON": sys.executable, "PYTHONPATH": ""}
    done = subprocess.run(
        ["bash", str(script), str(call), "--out", str(tmp_path), "--dry-run", "--fresh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert {row["outcome"] for row in rows(tmp_path, call).values()} == {"done"}
    assert len(list(tmp_path.iterdir())) <= 8
