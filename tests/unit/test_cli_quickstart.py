"""The quickstart: its steps are commands, and what it leaves is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdexport.bundle import open_bundle
from bdexport.cli import quickstart as command
from bdexport.cli.main import main
from bdexport.config import QuickstartConfig

TINY = QuickstartConfig(
    arch="resnet8",
    settings=("pretrain.epochs=1", "adapt.epochs=0", "curriculum.epochs=1", "finetune.epochs=0"),
)


@pytest.mark.slow
def test_leaves_a_run_a_bundle_and_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the files that the last table names open; --json - leaves stdout to JSON; a second call agrees."""
    monkeypatch.setattr(command, "DEFAULT", TINY)
    out = tmp_path / "quick"
    assert main(["quickstart", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for line in command.training_plan(out, None, TINY.threads).lines:
        assert f"$ bdexport {line[0]}" in shown
    result = json.loads((out / command.RESULT).read_text())
    assert str(out / command.RESULT) in "".join(shown.replace("│", " ").split())  # wherever its lines are broken
    assert result["schema"] == "bdexport.quickstart/1"
    assert result["bench"]["batch"] == 1
    assert result["verify"]["ok"] is True
    manifest = open_bundle(out / "bundle").manifest
    assert manifest.architecture == "resnet8"

    assert main(["quickstart", "--out", str(out), "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["bench"]["dynamic"]["accuracy"] == result["bench"]["dynamic"]["accuracy"]
    assert open_bundle(out / "bundle").manifest.checkpoint == manifest.checkpoint


def test_a_failing_step_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the failing command's own exit code and line."""
    assert main(["quickstart", "--out", str(tmp_path), "--preset", "nonsense"]) == 2
    assert "preset" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
