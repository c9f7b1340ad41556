"""What a checkpoint does not say itself: shown by every command that loads one, corrected by the same options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from foreign_networks import AuthorsPolicy, AuthorsResNet, PublicResNet, lived_in
from PIL import Image
from torch import Tensor

from bdexport.bundle import open_bundle
from bdexport.checkpoint import load_checkpoint
from bdexport.cli.app import build_app
from bdexport.cli.main import main

STAGES, WIDTHS = (1, 1, 1), (4, 8, 16)
CLASSES = tuple(
    sorted(("crop", "forest", "grass", "highway", "industry", "lake", "orchard", "pasture", "river", "sea"))
)
MEAN, STD = ["--mean", ".4914,.4822,.4465"], ["--std", ".2023,.1994,.2010"]
OPTIONS = ("--shortcut", "--dropped-transition", "--mean", "--std", "--size", "--resize-short", "--class-names")
ZOO = "zoo:resnet20-digits"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes that are not CIFAR-10's, a few noisy images each."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def with_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Network and policy, 10 classes, as the authors' scripts save them."""
    torch.manual_seed(0)
    network = lived_in(AuthorsResNet(STAGES, WIDTHS, 10, imagenet=False))
    policy = lived_in(AuthorsPolicy((1, 1, 1), (4, 8, 16), 3, imagenet=False), seed=1)
    path = tmp_path_factory.mktemp("foreign") / "agent.t7"
    torch.save({"resnet": network.state_dict(), "agent": policy.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A public CIFAR network of 10 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("foreign") / "plain.pth"
    torch.save(lived_in(PublicResNet(STAGES, WIDTHS, 10)).state_dict(), path)
    return path


def names_file(path: Path, names: tuple[str, ...]) -> Path:
    path.write_text("\n".join(names) + "\n")
    return path


def ran(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


# ---- names that were never said are no contract --------------------------------------------------------------------


def test_a_file_of_ten_classes_on_other_data(
    with_policy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 0 of each command on data whose classes are not CIFAR-10's, and the data's names afterwards."""
    on = ["--dataset", "folder", "--data", data]
    bundle = tmp_path / "bundle"
    ran("calibrate", with_policy, *on, "--images", 20, "--folder", tmp_path / "scales", "--out", tmp_path / "list.json")
    ran("retarget", with_policy, *on, "--target-blocks", 2, "--out", tmp_path / "shifted.safetensors")
    assert load_checkpoint(tmp_path / "shifted.safetensors").class_names == CLASSES
    ran("report", with_policy, *on, "--out", tmp_path / "report")
    ran("build", with_policy, *on, "--out", bundle, "--no-measure", "--max-drop", 100)
    assert open_bundle(bundle).manifest.class_names == CLASSES
    ran("verify", bundle, *on, "--masks", 2, "--max-drop", 100)
    ran("bench", bundle, *on, "--images", 10, "--threads", 1)
    ran("profile", bundle, *on, "--images", 10, "--threads", 1)
    capsys.readouterr()
    ran("run", bundle, data / "test" / "sea" / "0.png")
    said = capsys.readouterr().out
    assert any(f"0.png: {name} (" in said for name in CLASSES)


def test_without_names_classes_are_numbers(
    with_policy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: no data set and no file of names: the class is an index, and data of any names may be measured on."""
    bundle = tmp_path / "bundle"
    ran("build", with_policy, "--out", bundle, "--no-measure")
    assert open_bundle(bundle).manifest.class_names == tuple("0123456789")
    ran("bench", bundle, "--dataset", "folder", "--data", data, "--images", 10, "--threads", 1)
    result = tmp_path / "run.json"
    ran("run", bundle, data / "test" / "sea" / "0.png", "--json", result)
    entry = json.loads(result.read_text())["images"][0]
    assert entry["class"] == str(entry["label"])


def test_names_of_a_file_are_a_contract(
    with_policy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the bundle has the file's names; data of the same names in another order are refused."""
    names = names_file(tmp_path / "names.txt", CLASSES)
    ran("build", with_policy, "--out", tmp_path / "bundle", "--no-measure", "--class-names", names)
    assert open_bundle(tmp_path / "bundle").manifest.class_names == CLASSES
    on = ["--dataset", "folder", "--data", str(data)]
    ran("evaluate", with_policy, *on, "--class-names", names)
    other = names_file(tmp_path / "other.txt", CLASSES[::-1])
    assert main(["evaluate", str(with_policy), *on, "--class-names", str(other)]) == 1
    assert "label 0 is 'crop', expected 'sea'" in capsys.readouterr().err
    few = names_file(tmp_path / "few.txt", CLASSES[:3])
    assert main(["evaluate", str(with_policy), *on, "--class-names", str(few)]) == 1
    assert "got 3 names, expected 10" in capsys.readouterr().err


def test_training_takes_the_names_of_the_data(
    plain: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: from a foreign base and teacher: the data's names, the stated preprocessing, a record of the notes."""
    out = tmp_path / "run"
    line = ["train", "--base", plain, "--teacher", plain, "--dataset", "folder", "--data", data, "--out", out]
    settings = ["--preset", "smoke", "--device", "cpu", "--batch", 40, "--finetune-epochs", 1, "--curriculum-epochs", 1]
    ran(*line, *settings, "--adapt-epochs", 0, *MEAN, *STD, "--json", tmp_path / "train.json")
    err = capsys.readouterr().err
    assert err.count("preprocessing:") == 2
    assert "the same as the trained network's" in err
    assert "class names: those of folder, in its order (crop, forest, grass, ..)" in err
    found = load_checkpoint(out)
    assert (found.class_names, found.preprocess.mean) == (CLASSES, (0.4914, 0.4822, 0.4465))
    assert any(note.startswith("preprocessing:") for note in found.training["loaded_with"])
    assert json.loads((tmp_path / "train.json").read_text())["loading"]["preprocess"]["std"] == [0.2023, 0.1994, 0.201]


# ---- what was assumed is shown, and can be corrected ---------------------------------------------------------------

LOADING = {  # the rest of a line that loads {file}, with the data set where it needs one
    "evaluate": "--dataset folder --data {data}",
    "retarget": "--dataset folder --data {data} --target-blocks 2 --out {tmp}/made.safetensors",
    "prune": "--ratio 0.3 --out {tmp}/made.safetensors",
    "export": "--out {tmp}/made",
    "calibrate": "--dataset folder --data {data} --images 20 --folder {tmp}/scales --out {tmp}/list.json",
    "build": "--out {tmp}/made --no-measure",
}


@pytest.mark.parametrize("command", LOADING)
def test_assumptions_are_shown_and_corrected(
    command: str, with_policy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: what the notes of the loaded file say, on stderr and in JSON; what is passed stands there instead."""
    rest = LOADING[command].format(data=data, tmp=tmp_path).split()
    ran(command, with_policy, *rest, "--json", tmp_path / "a.json")
    err = capsys.readouterr().err
    record = json.loads((tmp_path / "a.json").read_text())["loading"]
    assumed = load_checkpoint(with_policy)
    assert record["preprocess"] == assumed.preprocess.to_json()
    for topic in (
        "shortcut avgpool: assumed",
        "dropped transition shortcut: assumed",
        "preprocessing: ",
        "computation:",
    ):
        assert f"agent.t7: {topic}" in err
        assert any(note.startswith(topic) for note in record["notes"])
    assert "class names:" in err
    for path in tmp_path.glob("made*"):
        path.rename(tmp_path / f"old-{path.name}")
    corrections = ["--shortcut", "option_a", "--dropped-transition", "shortcut_relu", "--size", "40", "--mean", "0.5"]
    ran(command, with_policy, *rest, *corrections, *STD, "--json", tmp_path / "b.json")
    err = capsys.readouterr().err
    record = json.loads((tmp_path / "b.json").read_text())["loading"]
    assert (record["shortcut"], record["dropped_transition"]) == ("option_a", "shortcut_relu")
    preprocess = record["preprocess"]
    assert (preprocess["size"], preprocess["mean"], preprocess["std"]) == ([40, 40], [0.5] * 3, [0.2023, 0.1994, 0.201])
    assert err.count("asked for") >= 3
    assert "preprocessing: scaled to 40x40 pixels (bilinear), mean 0.5 0.5 0.5" in err


@pytest.mark.parametrize("command", [*LOADING, "train", "report"])
def test_every_command_that_loads_has_the_options(command: str) -> None:
    """Oracle: one list of options for all of them."""
    group = typer.main.get_group(build_app(command))
    flags = {flag for parameter in group.commands[command].params for flag in parameter.opts}
    assert set(OPTIONS) <= flags


def test_a_report_says_what_it_assumed(
    plain: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the notes of the foreign source only; the command beside its result has the options, the zoo's not."""
    line = ["report", plain, "--dataset", "folder", "--data", data, "--out", tmp_path / "made", "--json", "-"]
    ran(*line, *MEAN, *STD)
    out = capsys.readouterr()
    result = json.loads(out.out)
    assert any(note.startswith("plain.pth: preprocessing:") and "asked for" in note for note in result["notes"])
    assert "--mean .4914" in result["points"][0]["command"]
    assert main(["report", ZOO, "--out", str(tmp_path / "zoo"), *MEAN]) == 2
    assert "--mean has no effect" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()


def test_our_own_form_is_corrected_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: both values stand in the note; a shortcut that the file says otherwise is refused."""
    ran(
        "evaluate", ZOO, "--dataset", "digits", "--images", 20, "--mean", "0.5", "--dropped-transition", "shortcut_relu"
    )
    err = " ".join(capsys.readouterr().err.split())
    assert "mean 0.5 0.5 0.5" in err
    assert "asked for; the checkpoint says scaled to" in err
    assert "dropped transition shortcut_relu: asked for; the checkpoint says shortcut" in err
    assert main(["evaluate", ZOO, "--dataset", "digits", "--images", "20", "--shortcut", "avgpool"]) == 1
    assert "another shortcut than asked for" in capsys.readouterr().err
    ran("evaluate", ZOO, "--dataset", "digits", "--images", 20)
    assert "asked for" not in capsys.readouterr().err


def test_a_new_network_takes_the_options(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: without --base they are the new network's; names are the data's, and --class-names is refused."""
    out = tmp_path / "run"
    line = ["train", "--arch", "resnet8", "--dataset", "folder", "--data", data, "--out", out, "--preset", "smoke"]
    line += [
        "--device",
        "cpu",
        "--base-only",
        "--pretrain-epochs",
        1,
        "--batch",
        40,
        "--size",
        "16x24",
        "--mean",
        "0.4",
    ]
    assert main([*map(str, line), "--class-names", str(names_file(tmp_path / "n.txt", CLASSES))]) == 2
    assert "--class-names has no effect without --base" in capsys.readouterr().err
    ran(*line, "--shortcut", "conv", "--dropped-transition", "shortcut_relu")
    found = load_checkpoint(out)
    assert (found.preprocess.size, found.preprocess.mean) == ((16, 24), (0.4, 0.4, 0.4))
    assert (found.network.shortcut, found.network.dropped_transition) == ("conv", "shortcut_relu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mean", "125.3,123,113.9"], "divide by 255"),
        (["--mean", "0.5,0.5"], "three numbers"),
        (["--std", "0"], "three numbers"),
        (["--std", "a,b,c"], "three numbers"),
        (["--size", "0"], "--size"),
        (["--size", "32,32"], "48x64"),
        (["--shortcut", "zeros"], "unknown shortcut"),
        (["--dropped-transition", "none"], "unknown dropped transition"),
        (["--class-names", "{tmp}/missing.txt"], "cannot be read"),
        (["--class-names", "{tmp}/gap.txt"], "line 2 is empty"),
    ],
)
def test_malformed_options(
    words: list[str], message: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 and one line that names the option and what it should be."""
    (tmp_path / "gap.txt").write_text("cat\n\ndog\n")
    line = ["export", str(plain), "--out", str(tmp_path / "made"), *(word.format(tmp=tmp_path) for word in words)]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_size_keeps_the_share_of_the_picture(tmp_path: Path) -> None:
    """Oracle: 256 to 224 is 8 to 7; --resize-short 0 scales straight to the size."""
    source = PublicResNet((1, 1), (4, 8), 3, imagenet=True, kind="conv", shortcut="downsample", classifier="fc")
    torch.save(source.state_dict(), tmp_path / "m.pth")
    bigger = load_checkpoint(tmp_path / "m.pth", preprocess={"size": (448, 448)}).preprocess
    assert (bigger.size, bigger.resize_short) == ((448, 448), 512)
    ran("export", tmp_path / "m.pth", "--parts", "head", "--out", tmp_path / "made", "--size", 64, "--resize-short", 0,
        "--json", tmp_path / "a.json")  # fmt: skip
    preprocess = json.loads((tmp_path / "a.json").read_text())["loading"]["preprocess"]
    assert (preprocess["size"], preprocess["resize_short"]) == ([64, 64], None)


def test_check_against_on_the_command_line(
    with_policy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the logits of the authors' network; of another shortcut the command fails, and nothing is built."""
    state = torch.load(with_policy, weights_only=True)["resnet"]
    network = AuthorsResNet(STAGES, WIDTHS, 10, imagenet=False).eval()
    network.load_state_dict(state)
    inputs = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        logits: Tensor = network(torch.from_numpy(inputs))
    reference = tmp_path / "logits.npz"
    np.savez(reference, inputs=inputs, logits=logits.numpy())
    lines: list[list[Any]] = [
        ["evaluate", with_policy, "--dataset", "folder", "--data", data],
        ["build", with_policy, "--out", tmp_path / "made", "--no-measure"],
    ]
    for line in lines:
        wrong = [*map(str, line), "--check-against", str(reference), "--shortcut", "option_a"]
        assert main(wrong) == 1
        assert "pass --shortcut avgpool" in capsys.readouterr().err
        assert not (tmp_path / "made").exists()
        ran(*line, "--check-against", reference, "--json", tmp_path / "a.json")
        checked = json.loads((tmp_path / "a.json").read_text())["checked_against"]
        assert checked["max_logit_difference"] < checked["tolerance"]


def test_a_note_follows_what_python_passes(plain: Path) -> None:
    """Oracle: with preprocess= the note says what is used, not what would have been assumed."""
    ckpt = load_checkpoint(plain, preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)})
    (note,) = [note for note in ckpt.notes if note.startswith("preprocessing:")]
    assert "mean 0.5 0.5 0.5, std 0.25 0.25 0.25" in note
    assert "ImageNet" not in note
    named = load_checkpoint(plain, class_names=CLASSES)
    assert [note for note in named.notes if note.startswith("class names:")] == [
        "class names: asked for (crop, forest, grass, ..)"
    ]


def test_public_accuracy_with_its_own_normalisation(shared: Path, tmp_path: Path) -> None:
    """Oracle: the figure that is published for the file (92.6 %), with its publisher's normalisation."""
    path = shared / "checkpoints" / "chenyaofo" / "cifar10_resnet20.pth"
    accuracies = []
    for options in ([], [*MEAN, *STD]):
        ran("evaluate", path, "--dataset", "cifar10-samples", *options, "--json", tmp_path / "a.json")
        accuracies.append(json.loads((tmp_path / "a.json").read_text())["full"]["accuracy"])
    assert accuracies[1] >= max(90, accuracies[0])


def test_a_foreign_reference_of_verify(with_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file that the bundle was built from, with the shortcut it was built with; another differs."""
    bundle = tmp_path / "bundle"
    ran("build", with_policy, "--out", bundle, "--no-measure", "--shortcut", "option_a")
    ran("verify", bundle, "--masks", 2, "--reference", with_policy, "--shortcut", "option_a")
    assert "shortcut option_a: asked for" in capsys.readouterr().err
    assert main(["verify", str(bundle), "--masks", "2", "--reference", str(with_policy)]) == 1
    assert main(["verify", str(bundle), "--shortcut", "option_a"]) == 2
    assert "--shortcut has no effect without a checkpoint" in capsys.readouterr().err


def test_refused_options_say_what_would_be_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: no deviation is zero, so the least one is named; what is no UTF-8 is not mended by another path."""
    names = tmp_path / "names.txt"
    names.write_bytes(b"\xff\xfea")
    for options, said in ((["--std", "0"], "1e-06 to 1"), (["--class-names", str(names)], "UTF-8")):
        assert main(["evaluate", "zoo:resnet20-digits", "--dataset", "digits", *options]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert "check the path" not in printed
