"""How much a policy could gain: the shares of levels, against trying all of them."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ceiling

BLOCKS = np.array([1, 3, 4])


def best_by_trying(correct: np.ndarray, budget: float) -> float:
    """The greatest number of right answers, by running through every place at which levels can begin."""
    images, best = correct.shape[1], -1.0
    for inner in combinations_with_replacement(range(images + 1), len(BLOCKS) - 1):
        level = np.repeat(np.arange(len(BLOCKS)), np.diff([0, *inner, images]))
        if BLOCKS[level].mean() <= budget:
            best = max(best, correct[level, np.arange(images)].sum())
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1.0, 1.7, 2.5, 4.0])
def test_the_shares_are_the_best_there_are(seed: int, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: all ways are tried on 20 images, so few that a piece can be one image."""
    monkeypatch.setattr(ceiling, "PIECES", 20)
    correct = np.random.default_rng(seed).random((3, 20)) < np.array([[0.4], [0.6], [0.8]])
    starts = ceiling.best_shares(correct, BLOCKS, budget)
    accuracy, used = ceiling.decided(correct, BLOCKS, starts)
    assert used <= budget + 1e-9
    assert accuracy == pytest.approx(100 * best_by_trying(correct, budget) / 20)


def test_a_score_gains_only_by_what_it_knows() -> None:
    """Oracle: by construction the cheap level is right on the first half alone, the dear one everywhere."""
    images = 2000
    hard = (np.arange(images) % 2).astype(np.float64)
    hard = np.random.default_rng(0).permutation(hard)
    correct = np.stack([hard == 0, np.ones(images, bool)])
    blocks = np.array([1, 3])
    assert ceiling.judged(correct, blocks, hard, 2.0) == pytest.approx((100.0, 2.0), abs=1.5)
    blind, used = ceiling.judged(correct, blocks, np.random.default_rng(1).random(images), 2.0)
    assert blind == pytest.approx(75.0, abs=3)
    assert used == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("arguments", [["zoo:nope"], ["zoo:resnet20-digits", "--images", "1"], ["nowhere.pt"]])
def test_bad_arguments_are_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the exit code, and a message in place of a traceback."""
    monkeypatch.setattr("sys.argv", ["ceiling.py", *arguments, "--dataset", "digits"])
    with pytest.raises(SystemExit) as caught:
        ceiling.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_few_images_have_as_many_pieces_as_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Oracle: accuracies are percentages, and nobody has more blocks than the policy, up to one image a half."""
    target = tmp_path / "out.json"
    line = ["ceiling.py", "zoo:resnet20-digits", "--dataset", "digits", "--images", "30", "--json", str(target)]
    monkeypatch.setattr("sys.argv", line)
    ceiling.main()
    rows = json.loads(target.read_text())["rows"]
    own = next(row["blocks"] for row in rows if row["decider"] == "the policy as it is")
    scored = [row for row in rows if row["decider"].startswith("score: ")]
    assert len(scored) > 2
    assert all(0 <= row["accuracy"] <= 100 for row in rows)
    assert all(row["blocks"] <= own + 9 / 15 for row in scored)
