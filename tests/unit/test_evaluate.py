"""Fixed masks and the figures of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bdexport.architecture import ResNetSpec
from bdexport.errors import UsageError
from bdexport.evaluate import (
    Outcome,
    distribute_k_mask,
    evaluate_model,
    first_k_mask,
    policy_statistics,
    random_k,
)
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet

TINY = ResNetSpec("cifar", "basic", (2, 2, 2), (4, 4, 8), "option_a", 10)


def test_first_k() -> None:
    """Oracle: the definition."""
    assert first_k_mask(5, 2).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(("kept", "expected"), [(0, "000000"), (3, "101010"), (4, "111010"), (6, "111111")])
def test_distribute_k_gives_each_stage_its_share(kept: int, expected: str) -> None:
    """Oracle: by hand, two blocks in each of three stages."""
    mask = distribute_k_mask(6, kept, (2, 2, 2))
    assert "".join("1" if keep else "0" for keep in mask) == expected


def test_distribute_k_with_a_short_stage() -> None:
    """Oracle: a stage cannot keep more blocks than it has."""
    assert distribute_k_mask(5, 4, (1, 4)).tolist() == [True, True, True, True, False]


def test_random_k_keeps_k_blocks_and_differs_between_images() -> None:
    """Oracle: row sums, and more than one distinct mask."""
    masks = random_k(15, 6, seed=1)(torch.zeros(50, 3, 1, 1))
    assert set(masks.sum(dim=1).tolist()) == {6}
    assert len(torch.unique(masks, dim=0)) > 10


@pytest.mark.parametrize("size", [1, 2, 3])
def test_random_k_of_several_processes_is_that_of_one(size: int) -> None:
    """Oracle: one pass over 11 images at once; each of ``size`` processes sees every size-th, in batches of two."""
    whole = random_k(7, 3, seed=5)(torch.zeros(11, 3, 1, 1))
    for rank in range(size):
        places = slice(rank, None, size)
        strategy = random_k(7, 3, 5, places)
        expected = whole[places]
        shard = torch.zeros(len(expected), 3, 1, 1)
        got = torch.cat([strategy(shard[start : start + 2]) for start in range(0, len(shard), 2)])
        assert torch.equal(got, expected)


def test_too_many_blocks() -> None:
    """Oracle: the error names the range."""
    with pytest.raises(UsageError, match="0 to 5"):
        first_k_mask(5, 6)


def test_outcome_figures() -> None:
    """Oracle: numpy on the masks themselves, and the FLOPs table by hand."""
    table = count_flops(BlockDropNet(TINY), (16, 16))
    masks = np.array([[True] * 6, [False] * 6, [False] * 6])
    figures = Outcome(masks, np.array([True, False, True])).to_json(table, with_policy=False)
    assert figures["accuracy"] == pytest.approx(200 / 3)
    assert figures["blocks_used"] == {"mean": 2.0, "std": pytest.approx(8**0.5), "min": 0, "max": 6}
    assert figures["unique_masks"] == 2
    assert figures["flops"]["mean"] == pytest.approx(table.full - sum(table.branches) * 2 / 3)


def test_statistics_order_masks_by_frequency() -> None:
    """Oracle: counted by hand."""
    masks = np.array([[True, False], [False, True], [False, True]])
    stats = policy_statistics(Outcome(masks, np.ones(3, dtype=bool)), "validation")
    assert stats["masks"] == [
        {"mask": "01", "count": 2, "share": pytest.approx(2 / 3)},
        {"mask": "10", "count": 1, "share": pytest.approx(1 / 3)},
    ]
    assert stats["keep_rate"] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]


def test_evaluate_model_agrees_with_running_it() -> None:
    """Oracle: predictions of the same model, called directly."""
    torch.manual_seed(0)
    model = BlockDropNet(TINY).eval()
    images, labels = torch.randn(20, 3, 16, 16), torch.randint(0, 10, (20,))
    result = evaluate_model(
        model,
        lambda _title: [(images[:15], labels[:15]), (images[15:], labels[15:])],
        (16, 16),
        has_policy=True,
        fixed=["first-k", "110000"],
        kept=None,
        seed=0,
    )
    with torch.no_grad():
        logits, masks = model(images)
        full = model.network(images)
    assert result["full"]["accuracy"] == pytest.approx(100 * (full.argmax(1) == labels).float().mean().item())
    assert result["policy"]["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert result["policy"]["blocks_used"]["mean"] == pytest.approx(masks.sum(1).float().mean().item())
    assert result["fixed"]["110000"]["blocks_used"]["mean"] == 2.0


@pytest.mark.parametrize(("name", "kept"), [("median-k", 3), ("first-k", None), ("101", None), ("000000", None)])
def test_fixed_masks_that_make_no_sense(name: str, kept: int | None) -> None:
    """Oracle: UsageError, not a guess."""
    batches = [(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(UsageError):
        evaluate_model(
            BlockDropNet(TINY), lambda _title: batches, (16, 16), has_policy=False, fixed=[name], kept=kept, seed=0
        )
