"""``bdexport train`` as a command: what it prints where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdexport.checkpoint import load_checkpoint
from bdexport.cli.main import main
from bdexport.files import sha256_file

TINY = [
    *("train", "--arch", "resnet8", "--dataset", "digits", "--preset", "smoke", "--base-only", "--device", "cpu"),
    *("--pretrain-epochs", "1", "--batch", "256", "--set", "validation_share=0.5"),
]


def test_json_on_stdout_is_nothing_but_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: json.loads takes the whole of stdout; the lines for a person are on stderr."""
    assert main([*TINY, "--out", str(tmp_path / "run"), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["schema"] == "bdexport.train/1"
    assert "pretrain 1" in err
    assert "validation accuracy" in err
    # Of the 1,437 digits that are not test, the asked-for half is held out.
    assert result["training"]["dataset"]["validation"] in range(700, 915)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "pretrain.batch: got 0, expected at least 1"),
        (["--set", "preset=paper"], "--preset"),
        (["--base", "nowhere.th"], "nowhere.th: no such file"),
        (["--arch", "resnet9"], "unknown architecture"),
    ],
)
def test_a_wrong_request_leaves_no_run(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one line on stderr, exit code 1 or 2, and no folder."""
    assert main([*TINY, "--out", str(tmp_path / "run"), *words]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--mask", "101"], "--method fixed"),
        (["--kept", "2"], "--method fixed"),
        (["--method", "fixed", "--mask", "110", "--kept", "1"], "leave --kept out"),
        (["--fresh-policy"], "leave it out"),
        (["--method", "act", "--estimator", "marginal"], "leave it out"),
        (["--method", "act"], "two blocks or more"),  # ResNet-8 has one a stage
        (["--method", "fixed", "--mask", "000"], "at least one block"),
        (["--method", "fixed", "--mask", "first-k", "--kept", "0"], "pass --kept"),
        (
            ["--arch", "resnet20", "--method", "fixed", "--base", "zoo:resnet20-digits", "--fresh-policy"],
            "--fresh-policy has no effect",
        ),
        (["--set", "halting.margin=0.4"], "--set halting.margin has no effect with method blockdrop"),
    ],
)
def test_options_without_effect_are_refused(
    words: list[str], remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2, the remedy, and nothing written."""
    out = tmp_path / "run"
    line = ["train", "--arch", "resnet8", "--dataset", "digits", "--preset", "smoke", "--out", str(out), *words]
    assert main(line) == 2
    assert remedy in capsys.readouterr().err
    assert not out.exists()


def test_json_replaces_no_file_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the bytes that were there; an older result is replaced."""
    result = tmp_path / "model.safetensors"
    result.write_bytes(b"\x10\x00 a model")
    assert main(["zoo", "--json", str(result)]) == 1
    assert "holds no JSON" in capsys.readouterr().err
    assert result.read_bytes() == b"\x10\x00 a model"
    result.write_text("[section]\nname = 1\n")
    assert main(["zoo", "--json", str(result)]) == 1
    result.write_text("{}\n")
    assert main(["zoo", "--json", str(result)]) == 0
    assert json.loads(result.read_text())["schema"]


def test_the_record_says_which_files_base_and_teacher_were(tmp_path: Path) -> None:
    """Oracle: the file's own hash, in what a resumed run must agree with and in the model's record."""
    assert main([*TINY, "--out", str(tmp_path / "base")]) == 0
    line = ["train", "--base", str(tmp_path / "base"), "--dataset", "digits", "--preset", "smoke", "--device", "cpu"]
    line += ["--method", "fixed", "--mask", "101", "--adapt-epochs", "0", "--finetune-epochs", "1", "--batch", "256"]
    line += ["--teacher", str(tmp_path / "base")]
    assert main([*line, "--out", str(tmp_path / "run")]) == 0
    expected = sha256_file(tmp_path / "base" / "model.safetensors")
    for record in (
        json.loads((tmp_path / "run" / "run.json").read_text()),
        load_checkpoint(tmp_path / "run").training,
    ):
        assert (record["base_sha256"], record["teachers_sha256"]) == (expected, [expected])
        assert record["fresh_policy"] is False
