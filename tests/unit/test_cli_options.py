"""Options that a command would not use: all commands, one table."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from bdexport.cli.app import build_app
from bdexport.cli.main import main
from bdexport.cli.options import refuse_threads
from bdexport.errors import UsageError

ZOO = "zoo:resnet20-digits"
BUILD = f"build {ZOO} --out {{tmp}}/made"
TRAIN = "train --dataset digits --preset smoke --device cpu --out {tmp}/made"
FRESH, ON_ZOO = f"{TRAIN} --arch resnet8", f"{TRAIN} --base {ZOO}"
SAMPLES = "--dataset cifar10-samples"

IGNORED = [  # a line, and the option in it that nothing would read
    # a folder for data sets that are installed
    (f"{BUILD} --dataset digits --data {{tmp}}", "--data"),
    (f"bench {{tmp}} {SAMPLES} --data {{tmp}}", "--data"),
    (f"evaluate {ZOO} --dataset digits --data {{tmp}}", "--data"),
    (f"calibrate {ZOO} --dataset digits --data {{tmp}}", "--data"),
    (f"calibrate {ZOO} --list {{list}} --data {{tmp}}", "--data"),
    (f"retarget {ZOO} --target-blocks 3 --dataset digits --data {{tmp}} --out {{tmp}}/made", "--data"),
    (f"report {ZOO} --dataset digits --data {{tmp}} --out {{tmp}}/made", "--data"),
    (f"{FRESH} --data {{tmp}}", "--data"),
    # build
    (f"{BUILD} --mask-images 5", "--mask-images"),
    (f"{BUILD} --mask-images 2000", "--mask-images"),  # the default, and still asked for
    (f"{BUILD} --images 5", "--images"),
    (f"{BUILD} --max-drop 0.5", "--max-drop"),
    (f"{BUILD} --data {{tmp}}", "--data"),
    (f"{BUILD} --quantise-masks cover", "--quantise-masks"),
    (f"{BUILD} --calibration {{list}}", "--calibration"),
    (f"{BUILD} --dataset digits --calibration-images 9", "--calibration-images"),
    (f"{BUILD} --precision int8 --calibration-images 9", "--calibration-images"),
    (
        f"{BUILD} --precision int8 --dataset digits --calibration {{list}} --calibration-images 9",
        "--calibration-images",
    ),
    (f"{BUILD} --backend torch --dataset digits --mask-images 5", "--mask-images"),
    # verify, profile, report, calibrate
    ("verify {tmp} --data {tmp}", "--data"),
    ("verify {tmp} --split test", "--split"),
    ("verify {tmp} --images 5", "--images"),
    ("verify {tmp} --max-drop 1", "--max-drop"),
    ("profile {tmp} --data {tmp}", "--data"),
    ("profile {tmp} --split test", "--split"),
    (f"report {ZOO} --out {{tmp}}/made --split validation", "--split"),
    (f"report {ZOO} --out {{tmp}}/made --batch 5", "--batch"),
    (f"report {ZOO} --out {{tmp}}/made --images 5", "--images"),
    (f"calibrate {ZOO} --list {{list}} --images 5", "--images"),
    (f"calibrate {ZOO} --list {{list}} --split train", "--split"),
    (f"calibrate {ZOO} --list {{list}} --dataset digits", "--dataset"),
    (f"calibrate {ZOO} --list {{list}} --out {{tmp}}/made", "--out"),
    # evaluate
    (f"evaluate {ZOO} --dataset digits --kept 4", "--kept"),
    (f"evaluate {ZOO} --dataset digits --fixed 111111111 --kept 4", "--kept"),
    (f"evaluate {ZOO} --dataset digits --seed 4", "--seed"),
    (f"evaluate {ZOO} --dataset digits --fixed first-k --seed 4", "--seed"),
    # train
    (f"{FRESH} --base-only --gamma 3", "--gamma"),
    (f"{FRESH} --base-only --method fixed", "--method"),
    (f"{FRESH} --base-only --curriculum-epochs 3", "--curriculum-epochs"),
    (f"{FRESH} --base-only --teacher {ZOO}", "--teacher"),
    (f"{FRESH} --base-only --distillation 1", "--distillation"),
    (f"{FRESH} --method fixed --mask 110 --gamma 3", "--gamma"),
    (f"{FRESH} --method fixed --mask 110 --curriculum-epochs 3", "--curriculum-epochs"),
    (f"{FRESH} --method act --target-blocks 2", "--target-blocks"),
    (f"{FRESH} --method act --adapt-epochs 2", "--adapt-epochs"),
    (f"{FRESH} --method sact --samples 2", "--samples"),
    (f"{FRESH} --method sequential --prime-epochs 2", "--prime-epochs"),
    (f"{FRESH} --estimator marginal --gamma 2", "--gamma"),
    (f"{FRESH} --estimator nested --samples 2", "--samples"),
    (f"{ON_ZOO} --pretrain-epochs 2", "--pretrain-epochs"),
    (f"{ON_ZOO} --prime-epochs 2", "--prime-epochs"),
    (f"{ON_ZOO} --teacher {ZOO} --distillation 0", "--teacher"),
]


@pytest.mark.parametrize(("line", "option"), IGNORED, ids=[line for line, _ in IGNORED])
def test_an_option_without_effect_is_refused(
    line: str, option: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2; one line that names the option and what to do about it; nothing is written."""
    words = line.format(tmp=tmp_path, list=repository / "calibration" / "digits.json").split()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert f"error: {option} has no effect" in err
    assert "leave" in err or "pass" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_phase_of_no_epochs_may_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: what is asked for is what the method does; the refusal is of another option, later in the line."""
    line = f"{FRESH} --method act --adapt-epochs 0 --curriculum-epochs 0 --gamma 1".format(tmp=tmp_path)
    assert main(line.split()) == 2
    assert "--gamma has no effect with method act" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "refused"), [("cuda", True), ("cuda:1", True), ("cpu", False)])
@pytest.mark.parametrize("words", [["bundle", "image", "--threads", "2"], ["bundle", "image"]])
def test_threads_of_a_gpu(device: str, refused: bool, words: list[str]) -> None:
    """Oracle: refused where a GPU computes and the option was given."""
    group = typer.main.get_group(build_app("run"))
    context = group.commands["run"].make_context("run", list(words))
    if refused and "--threads" in words:
        with pytest.raises(UsageError, match="--threads has no effect on device cuda"):
            refuse_threads(context, device)  # type: ignore[arg-type]
    else:
        refuse_threads(context, device)  # type: ignore[arg-type]


COMMANDS_WITH_JSON = (
    f"bench {ZOO} {SAMPLES}",
    BUILD,
    f"calibrate {ZOO} --dataset digits",
    f"evaluate {ZOO} --dataset digits",
    f"export {ZOO} --out {{tmp}}/made",
    f"retarget {ZOO} --target-blocks 3 --dataset digits --out {{tmp}}/made",
    f"{TRAIN} --arch resnet8",
    "verify {tmp}",
)


@pytest.mark.parametrize("line", COMMANDS_WITH_JSON)
def test_a_result_that_could_not_be_written_is_refused_before_the_work(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a folder cannot be a file; nothing else was made, and no other fault of the line was looked for."""
    (tmp_path / "folder").mkdir()
    words = [word.format(tmp=tmp_path) for word in line.split()]
    assert main([*words, "--json", str(tmp_path / "folder")]) == 1
    assert "folder: cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
