"""The paper's published figures, from ``paper.json``: the one place where they stand, as its tables print them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bdexport.report.points import BLOCKDROP, FULL, Point, Spread, method_name


@dataclass(frozen=True)
class Heuristic:
    """One row of Table 1 for one data set: accuracy in percent and K, without and with joint finetuning."""

    dataset: str
    architecture: str
    method: str
    without: tuple[float, float]
    finetuned: tuple[float, float]


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(files("bdexport.report").joinpath("paper.json").read_text(encoding="utf-8"))
    return data


def citation() -> str:
    """Authors, title, year."""
    return str(_data()["citation"])


def remarks(dataset: str, with_latency: bool = True) -> list[str]:
    """What a reader must know about the paper's figures for a data set, with or without those of Table 2."""
    return [
        str(remark["text"])
        for remark in _data()["remarks"]
        if dataset in remark["datasets"] and (with_latency or remark["where"] != "Table 2")
    ]


def table_1(dataset: str) -> list[Heuristic]:
    """Learned policies against heuristics (Table 1), in its order. Empty for a data set that is not in it."""
    return [
        Heuristic(
            dataset,
            row["architecture"],
            row["method"],
            (row["without_finetuning"]["accuracy"], row["without_finetuning"]["blocks"]),
            (row["with_finetuning"]["accuracy"], row["with_finetuning"]["blocks"]),
        )
        for row in _data()["table_1"]
        if row["dataset"] == dataset
    ]


def table_2(architecture: str) -> dict[str, float]:
    """Latency of one image in milliseconds by method, on the paper's GPU (Table 2)."""
    return {row["method"]: row["latency_ms"] for row in _data()["table_2"] if row["architecture"] == architecture}


def table_3(dataset: str) -> list[Point]:
    """Results by architecture and gamma: Table 3 (CIFAR-10), Table 4 (ImageNet)."""
    return [
        _detailed(row, where)
        for where, key in (("Table 3", "table_3"), ("Table 4", "table_4"))
        for row in _data()[key]
        if row["dataset"] == dataset
    ]


def _detailed(row: dict[str, Any], where: str) -> Point:
    gamma = "" if row["gamma"] is None else f" (γ={row['gamma']})"
    return Point(
        label=f"{row['label']}{gamma}",
        source="paper",
        method=row["method"],
        finetuned=True if row["method"] == BLOCKDROP else None,
        accuracy=row["accuracy"],
        flops=Spread(**row["flops"]),
        blocks=Spread(**row["blocks"]),
        num_blocks=row["num_blocks"],
        architecture=row["architecture"],
        dataset=row["dataset"],
        split="test",
        where=where,
    )


def paper_points(dataset: str) -> list[Point]:
    """Everything finetuned or full that the paper prints for a data set: Table 3 or 4, and what only Table 1 has."""
    detailed = table_3(dataset)
    known = {(point.architecture, point.method, point.accuracy) for point in detailed}
    blocks = {row["architecture"]: row["num_blocks"] for row in _data()["table_1"]}
    others = [
        Point(
            label=f"{architecture_name(row.architecture)} {method_name(row.method)}",
            source="paper",
            method=row.method,
            finetuned=None if row.method == FULL else True,
            accuracy=row.finetuned[0],
            blocks=Spread(row.finetuned[1]),
            num_blocks=blocks[row.architecture],
            architecture=row.architecture,
            dataset=dataset,
            split="test",
            where="Table 1",
        )
        for row in table_1(dataset)
        if (row.architecture, row.method, row.finetuned[0]) not in known
    ]
    return detailed + others


def architecture_name(architecture: str | None) -> str:
    """``ResNet-32`` for ``resnet32``."""
    if architecture is None:
        return "?"
    depth = architecture.removeprefix("resnet")
    return f"ResNet-{depth}" if depth.isdigit() else architecture
