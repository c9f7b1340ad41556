"""A process that forks after a bundle was loaded: the child answers or refuses, and always ends."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle, pixels, some_masks
from tiny import tiny_model

import bdexport
from bdexport.backends.null import NullBackend
from bdexport.bundle import Bundle
from bdexport.errors import BundleError, UsageError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
BACKENDS = ("onnxruntime", "openvino", "torch")
WAIT_S = 60  # a child that hangs would hang for ever

# The child writes its logits, or the error, and ends as a service does: by sys.exit, with everything it has.
SERVICE = """
import os, sys, warnings
import numpy as np
import bdexport
import bdexport.errors
warnings.simplefilter("ignore")  # Python's own, of forking with threads: this is what is tried
bundle, threads, folder, before, after = sys.argv[1:]
data = np.load(os.path.join(folder, "input.npz"))
orchestrator = bdexport.load(bundle, threads=int(threads), fused=True)
def answer():
    mixed = orchestrator(data["images"], masks=data["masks"])
    return np.stack([mixed.logits, orchestrator(data["images"]).logits, orchestrator.full(data["images"]).logits])
if before == "called":
    np.save(os.path.join(folder, "parent.npy"), answer())
child = os.fork()
if child == 0:
    try:
        if after == "loaded anew":
            orchestrator = bdexport.load(bundle, threads=int(threads), fused=True)
        if after in ("called", "loaded anew"):
            np.save(os.path.join(folder, "child.npy"), answer())
        elif after == "closed":
            orchestrator.close()
    except bdexport.errors.BdexportError as error:
        print(error)
        sys.exit(3)
    sys.exit(0)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forking")
    model = tiny_model()
    for backend in BACKENDS:
        make_bundle(folder / backend, model, backend)
    np.savez(folder / "input.npz", images=pixels(7), masks=some_masks(7, model.network.spec.num_blocks))
    return folder


def serve(folder: Path, backend: str, threads: int, before: str, after: str) -> subprocess.CompletedProcess[str]:
    """The service in a process of its own. Raises TimeoutExpired, with every process gone, where the child hangs."""
    line = [sys.executable, "-c", SERVICE, str(folder / backend), str(threads), str(folder), before, after]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as it:
        try:
            out, err = it.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(it.pid, 9)
            raise
    return subprocess.CompletedProcess(line, it.returncode, out, err)


@pytest.mark.parametrize(
    ("backend", "threads"),
    [("onnxruntime", 1), ("onnxruntime", 2), ("onnxruntime", 3), ("openvino", 1), ("openvino", 2), ("torch", 1)],
)
def test_a_forked_process_gives_the_parents_answers(bundles: Path, backend: str, threads: int) -> None:
    """Oracle: the parent's own logits of mixed, drawn and full masks. With threads, this hung for ever."""
    done = serve(bundles, backend, threads, "called", "called")
    assert done.returncode == 0, done.stdout + done.stderr
    np.testing.assert_allclose(np.load(bundles / "child.npy"), np.load(bundles / "parent.npy"), atol=1e-6)


@pytest.mark.parametrize("after", ["closed", "left alone"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_forked_process_ends(bundles: Path, backend: str, after: str) -> None:
    """Oracle: exit code 0 in time. at exit Python destroys everything, and sessions waited for lost threads."""
    done = serve(bundles, backend, 2, "called", after)
    assert done.returncode == 0, done.stdout + done.stderr


def test_torch_with_threads_refuses_and_says_what_to_do(bundles: Path) -> None:
    """Oracle: the error's text, in place of a hang: torch's pool is one for the process and is not made anew."""
    done = serve(bundles, "torch", 2, "called", "called")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "forked" in done.stdout
    assert "load the bundle in each worker" in done.stdout


def test_torch_refuses_threads_to_a_bundle_that_is_loaded_after_the_fork(bundles: Path) -> None:
    """Oracle: the refusal in the child, where torch would wait for threads for ever; one thread: the same answers."""
    done = serve(bundles, "torch", 2, "called", "loaded anew")
    assert done.returncode == 3, done.stderr
    assert "its pool of 2 threads is not copied" in done.stdout
    done = serve(bundles, "torch", 1, "called", "loaded anew")
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.array_equal(np.load(bundles / "parent.npy"), np.load(bundles / "child.npy"))


@pytest.mark.parametrize(("backend", "threads"), [("onnxruntime", 1), ("onnxruntime", 2), ("openvino", 1)])
def test_a_bundle_that_is_loaded_after_the_fork_answers(bundles: Path, backend: str, threads: int) -> None:
    """Oracle: the parent's logits."""
    done = serve(bundles, backend, threads, "called", "loaded anew")
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.allclose(np.load(bundles / "parent.npy"), np.load(bundles / "child.npy"), atol=1e-5)


def test_openvino_refuses_to_load_after_a_fork_of_threads(bundles: Path) -> None:
    """Oracle: the refusal with the way out; OpenVINO itself would wait for ever."""
    done = serve(bundles, "openvino", 2, "called", "loaded anew")
    assert done.returncode == 3, done.stderr
    assert "load the bundle in each worker, after the fork, before one is loaded in the parent" in done.stdout


def test_a_bundle_that_was_replaced_meanwhile_is_not_taken(tmp_path: Path) -> None:
    """Oracle: the error: a new session would read files that nobody has checked against the manifest."""
    bundle = make_bundle(tmp_path / "bundle", tiny_model())
    with bdexport.load(bundle.path, threads=2) as orchestrator:
        bundle.engine("stem").write_bytes(b"another")
        with pytest.raises(BundleError, match="was replaced meanwhile"):
            orchestrator.session.in_fork()  # type: ignore[attr-defined]


def test_a_session_that_says_nothing_about_forks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the error. A GPU's session is one: its device belongs to the process that opened it."""
    bundle = make_bundle(tmp_path / "bundle", tiny_model(), NullBackend())
    with bdexport.load(bundle.path) as orchestrator:
        monkeypatch.delattr(type(orchestrator.session), "in_fork")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(UsageError, match=r"forked.*load the bundle in each worker"):
            orchestrator(pixels(1))


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_orchestrator_is_not_pickled(tmp_path: Path, copied: object) -> None:
    """Oracle: the error names what a pool of processes is to be given instead."""
    bundle: Bundle = make_bundle(tmp_path / "bundle", tiny_model(), NullBackend())
    with bdexport.load(bundle.path) as orchestrator, pytest.raises(UsageError, match=r"bdexport\.load in the worker"):
        copied(orchestrator)  # type: ignore[operator]


# The other thread stays in its call until the child has ended, whatever the child does.
MEANWHILE = """
import os, sys, threading, time, warnings
import numpy as np
import bdexport
import bdexport.errors
warnings.simplefilter("ignore")
bundle, folder, forks = sys.argv[1:]
images = np.load(os.path.join(folder, "input.npz"))["images"]
orchestrator = bdexport.load(bundle, threads=1)
expected = orchestrator(images).logits
random = np.random.default_rng(0)
ended = []
stop = threading.Event()
def busy():
    while not stop.is_set():
        orchestrator(images)
other = threading.Thread(target=busy)
other.start()
for _ in range(int(forks)):
    time.sleep(random.random() * 0.01)
    child = os.fork()
    if child == 0:
        try:
            right = np.allclose(orchestrator(images).logits, expected, atol=1e-5)
        except bdexport.errors.UsageError as error:
            assert "while another thread was running it" in str(error) and "in each worker" in str(error)
            os._exit(3)
        os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    ended.append(os.waitstatus_to_exitcode(status))
stop.set()
other.join()
print(ended.count(0), ended.count(3), len(ended))
"""


def test_a_fork_while_another_thread_calls_openvino_ends(bundles: Path) -> None:
    """Oracle: every one of 40 children gives the parent's logits or refuses; about one in four hung for ever."""
    line = [sys.executable, "-c", MEANWHILE, str(bundles / "openvino"), str(bundles), "40"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True) as it:
        try:
            out, _ = it.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(it.pid, 9)
            raise
    assert it.returncode == 0
    answered, refused, forks = map(int, out.split())
    assert answered + refused == forks == 40
    assert refused > 0
