"""README.md tells the truth: its commands run, its links and paths exist, and nothing is left in the checkout.

Blocks under ``<!-- test -->`` are executed in order in one folder, on a network of the size they name with random
weights, a small data set in CIFAR-10's own layout, and the settings of SMALLER in place of those that take an hour.
"""

from __future__ import annotations

import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdexport.cli.app import COMMANDS
from bdexport.cli.failures import FAILED, HUNG_UP, INTERRUPTED, TERMINATED, WRONG_USAGE

BLOCK = re.compile(r"^(<!-- test -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Finetuning on noise rightly ends with "the policy has collapsed", hence none here.
SMALLER = {"--preset cpu": "--preset smoke --finetune-epochs 0", "--images 1000": "--images 20"}
PER_BATCH, TEST_IMAGES = 30, 40
GENERATED = {".pytest_cache", ".mypy_cache", ".ruff_cache"}  # by other tools, at any time


@pytest.fixture(scope="module")
def readme() -> str:
    return (Path(__file__).resolve().parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    _write_cifar10(folder / "cifar" / "cifar-10-batches-py", rng)
    _write_checkpoint(folder / "resnet32.th")
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "photo.png")
    return folder


def _write_cifar10(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names, "num_vis": 3072}))
    files = {f"data_batch_{index}": PER_BATCH for index in range(1, 6)} | {"test_batch": TEST_IMAGES}
    for name, count in files.items():
        images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [index % 10 for index in range(count)]
        (folder / name).write_bytes(pickle.dumps({b"data": images, b"labels": labels}))


def _write_checkpoint(path: Path) -> None:
    """The public CIFAR form, option-A shortcuts, from our own network under the names that the form has."""
    import torch

    from bdexport.architecture import resnet_spec
    from bdexport.models.resnet import ResNet

    spec = resnet_spec("resnet32")
    torch.manual_seed(0)
    state = {}
    for name, tensor in ResNet(spec).state_dict().items():
        name = re.sub(r"^stem\.conv", "conv1", name)
        name = re.sub(r"^stem\.bn", "bn1", name)
        name = re.sub(r"^head\.fc", "linear", name)
        name = re.sub(r"^blocks\.(\d+)\.branch", lambda match: _stage_name(int(match[1]), spec.stages), name)
        state[f"module.{name}"] = tensor
    torch.save({"state_dict": state}, path)


def _stage_name(index: int, stages: tuple[int, ...]) -> str:
    for stage, count in enumerate(stages, start=1):
        if index < count:
            return f"layer{stage}.{index}"
        index -= count
    raise AssertionError(index)


def _runnable(readme: str) -> list[tuple[str, str]]:
    """(language, text) of every block that is marked for execution."""
    return [(match[2], match[3]) for match in BLOCK.finditer(readme) if match[1]]


def _run(command: list[str], folder: Path, cache: Path) -> None:
    environment = os.environ | {"BDEXPORT_CACHE": str(cache)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


def _names(repository: Path) -> set[str]:
    """Where a command that mistakes its folder would write: the top of the checkout, engines/ and runs/."""
    found = {path.name for path in repository.iterdir()}
    for folder in ("engines", "runs"):
        if (repository / folder).is_dir():
            found |= {f"{folder}/{path.name}" for path in (repository / folder).iterdir()}
    return found - GENERATED


@pytest.mark.slow
def test_commands_run(readme: str, workplace: Path, own_cache: Path, repository: Path) -> None:
    """Oracle: exit code 0 of every marked block in its order; nothing new in the checkout."""
    before = _names(repository)
    for old, new in SMALLER.items():
        assert old in readme, f"{old}: not in the README any more"
        readme = readme.replace(old, new)
    blocks = _runnable(readme)
    assert len(blocks) >= 4
    for language, text in blocks:
        if language == "python":
            _run([sys.executable, "-c", text], workplace, own_cache)
            continue
        for line in text.splitlines():
            if line.startswith("$ bdexport "):
                _run([sys.executable, "-m", "bdexport", *shlex.split(line)[2:]], workplace, own_cache)
    assert (workplace / "bench.json").is_file()
    assert _names(repository) == before


def test_every_bdexport_command_of_the_readme_is_executed_or_the_quickstart(readme: str) -> None:
    """Oracle: the console lines of the README; only installing and the quickstart itself are exempt."""
    unmarked = [match[3] for match in BLOCK.finditer(readme) if match[2] == "console" and not match[1]]
    commands = {line for text in unmarked for line in text.splitlines() if line.startswith("$ ")}
    assert commands == {"$ make quickstart", "$ pip install '.[build,cpu]'"}


def test_every_command_is_described(readme: str) -> None:
    """Oracle: the table COMMANDS."""
    described = set(re.findall(r"^\| `(\w+)` ", readme, re.MULTILINE))
    assert described == set(COMMANDS)


def test_every_extra_is_described(readme: str, repository: Path) -> None:
    """Oracle: pyproject.toml."""
    import tomllib

    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `\[([\w-]+)\]` ", readme, re.MULTILINE)) == set(extras)


def test_exit_codes_are_those_of_the_code(readme: str) -> None:
    """Oracle: the constants."""
    table = readme[readme.index("| exit code") :].split("\n\n")[0]
    codes = {int(code) for row in re.findall(r"^\| ([\d, ]+)\|", table, re.MULTILINE) for code in row.split(",")}
    assert codes == {0, FAILED, WRONG_USAGE, HUNG_UP, INTERRUPTED, TERMINATED}


def test_links_and_paths_exist(readme: str, repository: Path) -> None:
    """Oracle: the file system."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if "://" not in link]
    tree = readme[readme.index("## The tree") :]
    lines = tree[tree.index("```text\n") + 8 :].split("```")[0].splitlines()
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        assert (repository / path).exists(), link
        titles = re.findall(r"^#+ (.+)$", (repository / path).read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    for line in lines:
        inside = "bdexport/" if line.startswith("    ") else ""
        for name in re.findall(r"\w+(?:/|\.py)", line.split("  ")[2] if inside else line.split(" ")[0]):
            assert (repository / inside / name).exists(), name


def test_make_targets_exist(readme: str, repository: Path) -> None:
    """Oracle: make itself, in a dry run."""
    for target in sorted(set(re.findall(r"make ([a-z-]+)", readme))):
        done = subprocess.run(
            ["make", "-n", target], cwd=repository, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"make {target}: {done.stderr}"
