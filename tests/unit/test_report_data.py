"""What a report says, as data: points, curves, usage, picked images, the paper's tables. No plots."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_cases import CLASSES, LABELS, MASKS, NETWORK, epoch, point

from bdexport.errors import ReportError, UsageError
from bdexport.report import paper
from bdexport.report.curves import PhaseSpan, curves_of, read_metrics
from bdexport.report.frontier import frontier
from bdexport.report.points import (
    Spread,
    comparable,
    method_key,
    points_from_evaluation,
    points_from_file,
    with_training,
    without_repeats,
)
from bdexport.report.samples import easiest_and_hardest, shared_policies
from bdexport.report.sources import read_sources, trained_as, unique_names
from bdexport.report.tables import NOT_MEASURED, NOT_PUBLISHED, table_1, table_2, table_3
from bdexport.report.usage import usage_of_masks, usage_of_statistics

# ---- the paper's figures -------------------------------------------------------------------------------------------


def test_paper_flops_give_the_speedups_that_the_paper_prints() -> None:
    """Oracle: the last column of Tables 3 and 4, which paper.json does not hold, within its rounding."""
    printed = {"cifar10": [37.2, 76.7, 70.1, 64.3], "imagenet": [36.9, 19.9, 5.7]}
    for dataset, savings in printed.items():
        points = paper.table_3(dataset)
        full = {p.architecture: p.flops.mean for p in points if p.method == "full" and p.flops}
        found = [100 * (1 - p.flops.mean / full[p.architecture]) for p in points if p.method == "blockdrop" and p.flops]
        assert found == pytest.approx(savings, abs=0.2)


def test_paper_table_1_agrees_with_the_papers_text() -> None:
    """Oracle: section 4.2: finetuning gains 2.7 and 18.2 points with 2.5 and 3.2 fewer blocks; 31 % of the blocks."""
    rows = {row.architecture: row for row in paper.table_1("cifar10") if row.method == "blockdrop"}
    for architecture, gain, fewer in (("resnet32", 2.7, 2.5), ("resnet110", 18.2, 3.2)):
        row = rows[architecture]
        assert row.finetuned[0] - row.without[0] == pytest.approx(gain)
        assert row.without[1] - row.finetuned[1] == pytest.approx(fewer)
    assert rows["resnet110"].finetuned[1] / 54 == pytest.approx(0.31, abs=0.005)


def test_paper_points_do_not_repeat_what_two_tables_print() -> None:
    """Oracle: invariant: (network, method, accuracy) once; Table 1 adds the six finetuned heuristics on CIFAR-10."""
    points = paper.paper_points("cifar10")
    keys = [(p.architecture, p.method, p.accuracy) for p in points]
    assert len(set(keys)) == len(keys) == 12
    assert sum(p.where == "Table 1" for p in points) == 6
    assert {p.source for p in points} == {"paper"}
    assert paper.paper_points("digits") == []


# ---- points --------------------------------------------------------------------------------------------------------


def test_points_of_the_published_evaluation(repository: Path) -> None:
    """Oracle: the numbers of the file itself, which the README quotes."""
    file = repository / "benchmarks" / "results" / "resnet32_cpu_evaluate.json"
    found = {p.label: p for p in points_from_evaluation(json.loads(file.read_text()), "file")}
    assert set(found) == {
        *("resnet32: full", "resnet32", "resnet32: first-k 8", "resnet32: distribute-k 8", "resnet32: random-k 8")
    }
    policy = found["resnet32"]
    assert (policy.accuracy, policy.unique_masks, policy.num_blocks) == (90.0, 2, 15)
    assert policy.blocks == Spread(7.4383, 0.496178506185022)
    assert found["resnet32: full"].flops == Spread(137725184, 0.0)
    fixed = found["resnet32: first-k 8"]
    assert (fixed.method, fixed.finetuned) == ("first-k", False)
    assert fixed.command == ("bdexport evaluate runs/resnet32 --dataset cifar10 --split test --fixed first-k --kept 8")
    assert fixed.note is not None  # on a network that was trained with a policy


def test_fixed_masks_are_told_apart_by_what_the_network_was_finetuned_under() -> None:
    """Oracle: three results of one network: its own mask is finetuned, another one is marked."""
    outcome = {"accuracy": 50.0, "flops": {"mean": 1.0, "std": 0.0}, "blocks_used": {"mean": 8.0, "std": 0.0}}
    outcome["unique_masks"] = 1
    data = {
        "checkpoint": "runs/static",
        "architecture": "resnet32",
        "num_blocks": 15,
        "dataset": {"name": "cifar10", "split": "test", "images": 10},
        "trained": {"method": "searched", "finetuned": True, "mask": "1" * 8 + "0" * 7},
        "full": {"accuracy": 90.0, "flops": 2},
        "fixed": {"1" * 8 + "0" * 7: outcome, "first-k 8": outcome},
    }
    own, other = points_from_evaluation(data, "file")[1:]
    assert (own.method, own.finetuned, own.note) == ("searched", True, None)
    assert (other.method, other.finetuned) == ("first-k", False)
    assert other.note == "on a network that was finetuned under another mask, 111111110000000"


def test_points_file_round_trip() -> None:
    """Oracle: inverse functions; a shared field holds where a point has none of its own."""
    points = [point("a", note="why", where="there"), point("b", flops=None, unique_masks=4, where="there")]
    data = {"schema": "bdexport.report.points/1", "points": [p.to_json() for p in points]}
    assert points_from_file(json.loads(json.dumps(data)), "x") == points
    shared = {"dataset": "cifar10", "num_blocks": 9, "points": [{"label": "c", "accuracy": 1, "blocks": 3}]}
    (found,) = points_from_file(shared | {"schema": "s"}, "x")
    assert (found.dataset, found.num_blocks, found.blocks) == ("cifar10", 9, Spread(3.0))
    assert (found.source, found.method, found.flops) == ("measured", "blockdrop", None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"accuracy": 1}, "point 1: label"),
        ({"label": "a"}, "point 1: accuracy"),
        ({"label": "a", "accuracy": 101}, "0 to 100"),
        ({"label": "a", "accuracy": True}, "point 1: accuracy"),
        ({"label": "a", "accuracy": float("nan")}, "point 1: accuracy"),
        ({"label": "a", "accuracy": 1, "flop": 3}, "unknown field: got flop"),
        ({"label": "a", "accuracy": 1, "flops": {"std": 3}}, "point 1: flops: got no mean"),
        ({"label": "a", "accuracy": 1, "blocks": "3"}, "point 1: blocks"),
        ({"label": "a", "accuracy": 1, "unique_masks": 1.5}, "whole number"),
        ({"label": "a", "accuracy": 1, "source": "guess"}, "measured or paper"),
        ({"label": "a", "accuracy": 1, "finetuned": 1}, "true, false or null"),
        ({"label": "a", "accuracy": 1, "dataset": 1}, "point 1: dataset"),
        ("a", "an object"),
    ],
)
def test_a_wrong_point_is_named(entry: Any, message: str) -> None:
    """Oracle: the message names the entry and the field."""
    with pytest.raises(ReportError, match=message):
        points_from_file({"points": [entry]}, "file.json")


def test_method_names_have_one_spelling() -> None:
    """Oracle: the spellings that people use."""
    for text in ("DistributeK", "distribute_k", "distribute-k", "Distribute K"):
        assert method_key(text) == "distribute-k"
    assert method_key("BlockDrop-seq") == "blockdrop-seq"
    assert method_key("My_Own") == "my-own"


def test_repeats_are_dropped_and_other_measurements_are_not() -> None:
    """Oracle: one checkpoint measured once and read twice, under two labels; another accuracy is another result."""
    twice = [point("a", checkpoint="runs/a"), point("b", checkpoint="runs/a")]
    other = point("c", checkpoint="runs/a", accuracy=90.1)
    assert without_repeats([*twice, other]) == [twice[0], other]


def test_a_result_learns_from_its_run_how_it_was_trained() -> None:
    """Oracle: the settings of a run; what a result says itself stays."""
    unknown, known = point("a", checkpoint="runs/a", finetuned=None), point("b", checkpoint="runs/a")
    found = with_training([unknown, known], {"runs/a": trained_as({"method": "blockdrop", "finetune": {"epochs": 0}})})
    assert [p.finetuned for p in found] == [False, True]
    assert trained_as({}) == ("blockdrop", None)
    for mask, name in (("search", "searched"), ("distribute-k", "distribute-k"), ("1100", "fixed")):
        settings = {"method": "fixed", "fixed": {"mask": mask}, "finetune": {"epochs": 3}}
        assert trained_as(settings) == (name, True)


# ---- the frontier --------------------------------------------------------------------------------------------------


def test_frontier_marks() -> None:
    """Oracle: hand-made points: what has no FLOPs, is of another split or is far below is treated as said."""
    numbered = [
        ("1", point("far below", accuracy=60.0)),
        ("2", point("cheap", accuracy=90.0, flops=Spread(5e7, 2e6))),
        ("3", point("dominated", accuracy=89.5, flops=Spread(6e7, 0.0))),
        ("4", point("dear", accuracy=92.0, flops=Spread(9e7))),
        ("5", point("validation", split="validation")),
        ("6", point("no flops", flops=None)),
        ("P1", point("theirs", source="paper", accuracy=91.0)),
    ]
    found = frontier(numbered, "flops", span=8.0)
    assert [mark.number for mark in found.marks] == ["1", "2", "3", "4", "P1"]
    assert found.floor == 84.0
    assert [mark.number for mark in found.marks if mark.below] == ["1"]
    assert [(mark.x, mark.x_std) for mark in found.measured[1:]] == [(5e7, 2e6), (6e7, 0.0), (9e7, 0.0)]
    assert [[mark.number for mark in line] for line in found.lines()] == [["2", "4"]]
    assert [mark.number for mark in frontier(numbered, "blocks", span=50.0).measured] == ["1", "2", "3", "4", "6"]
    assert frontier(numbered, "blocks", span=50.0).floor is None


def test_only_the_test_set_is_compared_where_it_was_measured() -> None:
    """Oracle: the rule; without a result on the test set all measured ones stand."""
    test, held_out = point("t"), point("v", split="validation")
    theirs = point("p", source="paper")
    assert comparable([held_out, test, theirs]) == [test]
    assert comparable([held_out, theirs]) == [held_out]


# ---- tables --------------------------------------------------------------------------------------------------------


def test_table_1_has_the_papers_cells_and_ours_beside_them() -> None:
    """Oracle: Table 1 of the paper, row ResNet-32 DistributeK; ours; 'not measured' everywhere else."""
    fixed = {"method": "distribute-k", "blocks": Spread(7.0, 0.0)}
    mine = [point("d", **fixed, accuracy=90.5), point("o", accuracy=91.8, blocks=Spread(6.9, 1.2))]
    mine += [point("d0", **fixed, accuracy=30.0, finetuned=False, note="how"), point("o2", accuracy=91.0)]
    table = table_1(mine, "cifar10")
    rows = {(row[0], row[1]): row[2:] for row in table.rows if row[0]}
    assert rows["ResNet-32", "DistributeK"] == ("23.4", "10", "30.00 [1]", "7", "90.2", "7", "90.50", "7")
    assert table.notes == ["how"]
    assert rows["ResNet-32", "BlockDrop"] == ("88.6", "9.4", NOT_MEASURED, "", "91.3", "6.9", "91.00", "7.0 ± 1.0")
    extra = table.rows[[row[:2] for row in table.rows].index(("ResNet-32", "BlockDrop")) + 1]
    assert extra == ("", "", "", "", "", "", "", "", "91.80", "6.9 ± 1.2")
    assert rows["ResNet-110", "FirstK"] == ("13.3", "21", NOT_MEASURED, "", "71.3", "17", NOT_MEASURED, "")
    assert len(table.rows) == 11  # five methods, two networks, and the second run


def test_table_1_marks_what_is_not_the_papers_split_and_what_it_does_not_know() -> None:
    """Oracle: the footnotes, and a network that the paper does not have."""
    table = table_1([point("a", architecture="resnet56", finetuned=None, split="validation")], "cifar10")
    row = next(row for row in table.rows if row[:2] == ("ResNet-56", "BlockDrop"))
    assert row[2:] == (NOT_PUBLISHED, "", NOT_MEASURED, "", NOT_PUBLISHED, "", "90.00 [1] [2]", "7.0 ± 1.0")
    assert table.notes == [
        "validation split, not the test set",
        "the result does not say whether it was finetuned",
    ]


def test_table_3_computes_savings_against_the_network_of_its_own_source() -> None:
    """Oracle: 7e7 of 1.4e8 is half; the paper's 37.2 % from its own figures; ResNet-110 not measured."""
    full = point("f", method="full", finetuned=None, flops=Spread(1.4e8, 0.0), blocks=Spread(15.0, 0.0), accuracy=92.63)
    rows = table_3([full, point("o"), point("untuned", finetuned=False)], "cifar10").rows
    assert ("BlockDrop-32 (γ=5)", "paper", "8.66e7 ± 1.4e7", "6.9 ± 1.6", "91.3 %", "37.2 %") in rows
    ours = [row for row in rows if row[1] == "ours"]
    assert ours == [
        ("ResNet-32 f", "ours", "1.40e8", "15", "92.63 %", "-"),
        ("ResNet-32 o", "ours", "7.00e7 ± 1.0e6", "7.0 ± 1.0", "90.00 %", "50.0 %"),
        ("ResNet-110", "ours", *[NOT_MEASURED] * 4),
    ]


def test_table_2_from_a_bench_result(repository: Path) -> None:
    """Oracle: the file's own means; the paper's 14.9 % for ResNet-32."""
    found = read_sources([repository / "benchmarks" / "results" / "resnet32_cpu_bench.json"])
    rows = table_2(found.latencies).rows
    assert rows[0][2:] == ("7.71 ms", "6.56 ms", "14.9 %")
    assert rows[1][2:] == ("2.24 ms", "1.45 ms", "35.6 %")


# ---- curves --------------------------------------------------------------------------------------------------------


def test_curves_of_hand_made_epochs() -> None:
    """Oracle: the rows, one by one; the first of two equal scores was chosen, as the training loop chooses."""
    rows = [epoch("pretrain", 50.0), epoch("pretrain", 60.0), epoch("curriculum", 58.0, 4.0)]
    rows += [epoch("finetune", 61.0, 3.0, [0.0, -1.0]), epoch("finetune", 62.0, 2.0, [1.0, 62.0])]
    rows += [epoch("finetune", 62.0, 2.5, [1.0, 62.0])]
    curves = curves_of("run", rows)
    assert curves.phases == (PhaseSpan("pretrain", 1, 2), PhaseSpan("curriculum", 3, 3), PhaseSpan("finetune", 4, 6))
    assert curves.series["validation_accuracy"] == (50.0, 60.0, 58.0, 61.0, 62.0, 62.0)
    assert curves.series["blocks_mean"] == (None, None, 4.0, 3.0, 2.0, 2.5)
    assert curves.series["blocks_std"][2:] == (0.5,) * 4
    assert curves.series["train_accuracy"] == (None,) * 6
    assert curves.chosen == 5
    assert curves_of("run", rows[:3]).chosen is None


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    """Oracle: the number of the line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(epoch("finetune", 1.0)) + "\n{\n")
    with pytest.raises(ReportError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_metrics(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ReportError, match=r"line 1 is damaged \(byte 0 is not UTF-8"):
        read_metrics(path)


# ---- usage and samples ---------------------------------------------------------------------------------------------


def test_usage_of_hand_made_masks() -> None:
    """Oracle: counted by hand from MASKS; a class without images has no row to be believed."""
    usage = usage_of_masks("a", "hand-made", NETWORK, MASKS, LABELS, CLASSES)
    assert usage.histogram.tolist() == pytest.approx([0, 1 / 6, 3 / 6, 1 / 6, 1 / 6])
    assert (usage.mean, usage.unique_masks, usage.transitions) == (14 / 6, 4, (2,))
    assert usage.keep_rate.tolist() == pytest.approx([1, 4 / 6, 2 / 6, 2 / 6])
    assert usage.class_keep_rate is not None
    assert usage.class_keep_rate[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    assert usage.class_images is not None
    assert usage.class_images.tolist() == [3, 0, 3]
    assert usage.masks[0] == ("1100", 0.5)


def test_usage_of_stored_statistics_says_what_it_covers() -> None:
    """Oracle: the same masks as statistics, complete and cut to the most frequent one."""
    from bdexport.evaluate import Outcome, policy_statistics

    outcome = Outcome(MASKS, np.ones(6, dtype=bool))
    whole = usage_of_statistics("a", NETWORK, policy_statistics(outcome, "validation"))
    exact = usage_of_masks("a", "", NETWORK, MASKS, LABELS, CLASSES)
    assert whole is not None
    assert whole.histogram.tolist() == pytest.approx(exact.histogram.tolist())
    assert whole.keep_rate.tolist() == pytest.approx(exact.keep_rate.tolist())
    part = usage_of_statistics("a", NETWORK, policy_statistics(outcome, "validation", most=1))
    assert part is not None
    assert (part.covered, part.unique_masks) == (0.5, 4)
    assert usage_of_statistics("a", NETWORK, {}) is None
    other = replace(NETWORK, stages=(1, 2))
    assert usage_of_statistics("a", other, policy_statistics(outcome, "validation")) is None


def test_shared_policies_of_hand_made_masks() -> None:
    """Oracle: MASKS read by eye: most frequent first, ties as text, rows in order, class without images left out."""
    strips = shared_policies(MASKS, LABELS, CLASSES, classes=10, policies=2, images=1)
    assert [(strip.class_name, strip.mask, strip.rows) for strip in strips] == [
        ("cat", "1100", (0,)),
        ("cat", "1011", (2,)),
        ("newt", "1000", (4,)),
        ("newt", "1100", (5,)),
    ]
    assert strips[0].caption == "2 of 3 images, 2 blocks"
    assert len(shared_policies(MASKS, LABELS, CLASSES, classes=1, policies=9, images=9)) == 2


def test_easiest_and_hardest_of_hand_made_masks() -> None:
    """Oracle: by hand: wrong images never appear, ties go to confidence, no image stands in both strips."""
    correct = np.array([True, True, True, False, True, True])
    confidence = np.array([0.5, 0.9, 0.7, 1.0, 0.6, 0.8], dtype=np.float32)
    strips = easiest_and_hardest(MASKS, LABELS, correct, confidence, CLASSES, classes=10, images=1)
    assert [(strip.class_name, strip.caption, strip.rows) for strip in strips] == [
        ("cat", "fewest blocks: 2", (1,)),
        ("cat", "most blocks: 3", (2,)),
        ("newt", "fewest blocks: 1", (4,)),
        ("newt", "most blocks: 2", (5,)),
    ]
    wide = easiest_and_hardest(MASKS, LABELS, correct, confidence, CLASSES, classes=1, images=8)
    assert [strip.rows for strip in wide] == [(1, 0, 2)]


# ---- sources -------------------------------------------------------------------------------------------------------


def test_names_are_as_short_as_they_can_be_told_apart() -> None:
    """Oracle: by hand."""
    paths = [Path("x/a"), Path("y/a"), Path("z/b/model.safetensors"), Path("c.th")]
    assert list(unique_names(paths).values()) == ["x/a", "y/a", "b", "c.th"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "an object"),
        ("{}", "schema"),
        ('{"schema": "somebody.else/1"}', "schema"),
        ('{"schema": "bdexport.evaluate/1"}', "not a complete result of 'bdexport evaluate"),
        ('{"schema": "bdexport.bench/1", "batch": 1}', "not a complete result of 'bdexport bench"),
        ('{"schema": "bdexport.report.points/1", "points": {}}', "points: got an object, expected a list"),
    ],
)
def test_a_damaged_result_is_named(content: str, message: str, tmp_path: Path) -> None:
    """Oracle: an error that begins with the file's name."""
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=message) as caught:
        read_sources([path])
    assert str(caught.value).startswith(path.as_posix())


def test_other_results_are_skipped_with_the_reason_and_alone_are_refused(repository: Path, tmp_path: Path) -> None:
    """Oracle: the schemas of the files under benchmarks/results."""
    results = repository / "benchmarks" / "results"
    found = read_sources([results / "resnet32_cpu_verify.json", results / "resnet32_cpu_evaluate.json"])
    assert len(found.points) == 5
    assert found.skipped == [
        f"{results.as_posix()}/resnet32_cpu_verify.json: bdexport.verify/1 holds nothing for a report on runs"
    ]
    with pytest.raises(UsageError, match="nothing to report on"):
        read_sources([results / "resnet32_cpu_verify.json"])
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="is a bundle"):
        read_sources([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no run"):
        read_sources([tmp_path / "empty"])
