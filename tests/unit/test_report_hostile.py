"""Documents that a report reads, mutated: each is refused in one line, skipped, or gives a page; nothing else."""

from __future__ import annotations

import copy
import json
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_cases import epoch
from test_report_benchmarks import ROWS, result
from tiny import tiny_checkpoint_file

from bdexport import zoo
from bdexport.build import build_bundle
from bdexport.cli.inspect import _overview, _policy
from bdexport.cli.main import main
from bdexport.config import BuildConfig, ReportConfig
from bdexport.errors import BdexportError, BundleError, ReportError
from bdexport.json_text import MalformedError, parse_json
from bdexport.manifest import manifest_from_json
from bdexport.report.collect import Report, collect
from bdexport.report.document import document, drawings
from bdexport.report.page import markdown_page
from bdexport.report.sources import read_sources
from bdexport.report.style import styled
from bdexport.zoo import zoo_card

Place = tuple[str | int, ...]
FIGURES = {"accuracy": 60.0, "flops": {"mean": 5e6, "std": 1e6}, "blocks_used": {"mean": 2.0, "std": 0.5}}
OUTCOME: dict[str, Any] = FIGURES | {"unique_masks": 3}
EVALUATION: dict[str, Any] = {
    "schema": "bdexport.evaluate/1",
    "checkpoint": "runs/a/model.safetensors",
    "architecture": "resnet32",
    "num_blocks": 15,
    "dataset": {"name": "cifar10", "split": "test", "images": 100},
    "trained": {"method": "blockdrop", "finetuned": True, "mask": "first-k 2"},
    "base": {"name": "b", "accuracy": 61.0, "how": "measured now", "here": True},
    "full": {"accuracy": 62.0, "flops": 1e7},
    "policy": OUTCOME,
    "fixed": {"first-k 2": OUTCOME, "random-k 3": OUTCOME},
}
GATES = {key: value for key, value in EVALUATION.items() if key != "policy"} | {"gates": OUTCOME | {"kind": "act"}}
POINT = {"label": "p", "method": "act", "accuracy": 70, "flops": {"mean": 1e7, "std": 1e5}, "blocks": 3, "images": 9}
POINTS = {"schema": "bdexport.report.points/1", "dataset": "cifar10", "split": "test", "points": [POINT, POINT]}
LATENCY = {"latency_ms": {"mean": 1.5}}
BENCH: dict[str, Any] = {"schema": "bdexport.bench/1", "batch": 1, "threads": 2, "bundle": "engines/a"}
BENCH |= {"architecture": "resnet32", "dataset": {"name": "cifar10"}, "backend": "null", "precision": "fp32"}
BENCH |= {"device": "cpu", "machine": {"cpu": "a CPU"}, "full": LATENCY, "dynamic": LATENCY}
RESULTS: dict[str, Any] = {
    "evaluate": EVALUATION,
    "gates": GATES,
    "points": POINTS,
    "bench": BENCH,
    "quickstart": {"schema": "bdexport.quickstart/1", "bench": BENCH},
    **{f"benchmark-{kind}": result(kind) for kind in ROWS},
}
ROWS_OF_A_RUN = [epoch("prime", 10.0, 2.0, [1.0, 10.0]), epoch("finetune", 50.0, 2.0, [1.0, 50.0])]
RUN: dict[str, Any] = {
    "run": {"settings": {"method": "fixed", "fixed": {"mask": "first-k"}, "finetune": {"epochs": 2}}, "base": "b.th"},
    "rows": ROWS_OF_A_RUN,
}
ODD = [  # as JSON has them, and some that JSON does not have
    *(
        "null",
        "true",
        "false",
        '""',
        '"1"',
        '"nan"',
        "[]",
        "{}",
        "[[[]]]",
        "-1",
        "0",
        "1e308",
        "-1e308",
        "1e400",
        "5e-324",
    ),
    *("NaN", "Infinity", "-Infinity", "1" * 380, "1" * 5000, "-" + "9" * 309, "1.5", "2147483648", "[1, 2, 3]"),
    *('"\\ud800"', '"\\u001b[31m"', '"\\u202e"', '"$\\\\frac$"', '"a\\nb|c"', '{"mean": 1}', '"' + "x" * 3000 + '"'),
]
REPORTED = ReportConfig()


def leaves(value: Any, place: Place = ()) -> Iterator[Place]:
    """The place of every value within a document, the containers included."""
    if place:
        yield place
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from leaves(item, (*place, key))


def mutated(document: Any, place: Place, odd: str | None) -> str:
    """The document as JSON text with ``odd`` at the place; None: without what stands there."""
    changed = copy.deepcopy(document)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if odd is None:
        del parent[place[-1]]
        return json.dumps(changed)
    parent[place[-1]] = "@odd@"
    return json.dumps(changed).replace('"@odd@"', odd)


def shown_of(path: Path, draw: bool) -> tuple[Report, str]:
    """The report on one source and its page; the plots are made (not saved) where ``draw`` says so."""
    made = collect(read_sources([path]), None, REPORTED, "bdexport report", lambda _, batches, __: iter(batches))
    elements = document(made, REPORTED)
    json.dumps(made.to_json(), allow_nan=False)
    if draw:
        with styled(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of glyphs that a font lacks
            for drawing in drawings(elements):
                drawing.make().canvas.draw()
    return made, markdown_page(elements)


def attempt(path: Path, draw: bool = False) -> str:
    """``refused`` or ``page``; every other exception ends the test."""
    try:
        _, page = shown_of(path, draw)
    except BdexportError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert path.name in said
        assert "\n" not in said
        assert len(said) < 1500
        return "refused"
    assert not any(ord(character) < 32 and character != "\n" for character in page)
    return "page"


def cases(seed: int, share: float) -> list[tuple[str, Place, str | None]]:
    """A seeded share of (document, place, what stands there)."""
    documents = RESULTS | {"folder": RUN}
    every = [(name, place, odd) for name in documents for place in leaves(documents[name]) for odd in [*ODD, None]]
    return random.Random(seed).sample(every, max(1, round(share * len(every))))


def write(folder: Path, name: str, text: str) -> Path:
    """A result file; or a run folder from the text of both of its documents."""
    if name != "folder":
        (folder / "hostile.json").write_text(text)
        return folder / "hostile.json"
    run = folder / "hostile"
    run.mkdir(exist_ok=True)
    head, _, tail = text.partition('"rows": ')
    (run / "run.json").write_text(head.removeprefix('{"run": ').removesuffix(", ") or "")
    (run / "metrics.jsonl").write_text(
        tail.removeprefix("[").removesuffix("}").removesuffix("]").replace('}, {"ph', '}\n{"ph')
    )
    return run


def campaign(folder: Path, seed: int, share: float, drawn: float) -> dict[str, int]:
    counts = {"refused": 0, "page": 0}
    rng = random.Random(seed)
    for name, place, odd in cases(seed, share):
        documents = RESULTS | {"folder": RUN}
        path = write(folder, name, mutated(documents[name], place, odd))
        try:
            counts[attempt(path, rng.random() < drawn)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {name}, {place}, {str(odd)[:60]}: {error!r}") from error
    return counts


def test_the_documents_are_right_as_they_are(tmp_path: Path) -> None:
    """Oracle: without a mutation every document gives a page (a session's benchmark has nothing to show)."""
    for name, data in (RESULTS | {"folder": RUN}).items():
        if name != "benchmark-session":
            assert attempt(write(tmp_path, name, json.dumps(data)), draw=True) == "page", name


def test_a_mutated_document_is_refused_in_a_line_or_shown(tmp_path: Path) -> None:
    """Oracle: BdexportError naming the file, or a page; both happen."""
    counts = campaign(tmp_path, seed=19, share=0.05, drawn=0.01)
    assert min(counts.values()) > 50, counts


@pytest.mark.long
def test_every_mutated_document_is_refused_in_a_line_or_shown(tmp_path: Path) -> None:
    """The same with every mutation."""
    campaign(tmp_path, seed=20, share=1.0, drawn=0.02)


def test_long_files_and_texts_end_soon(tmp_path: Path) -> None:
    """Oracle: a generous limit of time; what is too much is refused in words."""
    began = time.monotonic()
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").write_text((json.dumps(epoch("prime", 1.0, 2.0)) + "\n") * 20_000)
    assert shown_of(run, draw=True)[0].curves[0].epochs == 20_000
    for text, match in (
        (json.dumps(RUN["run"] | {"base": "x" * 10_000_000}), "a text of 10000000 characters"),
        ("[" * 100_000, "nested|object"),
        ('{"a":' * 5_000 + "1" + "}" * 5_000, "nested"),
    ):
        (run / "run.json").write_text(text)
        with pytest.raises(ReportError, match=match):
            read_sources([run])
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(epoch(f"phase {index}", 1.0)) + "\n" for index in range(1_000))
    )
    with pytest.raises(ReportError, match="phase changes more than"):
        read_sources([run])
    many = tmp_path / "many.json"
    many.write_text(json.dumps(POINTS | {"points": [POINT] * 5_000}))
    with pytest.raises(ReportError, match="at most"):
        read_sources([many])
    assert time.monotonic() - began < 60


def test_a_mutated_card_of_the_zoo_is_named_or_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 0, or 1 with one line that names the card."""
    card = zoo_card("resnet20-digits")
    path = tmp_path / "resnet20-digits.json"
    monkeypatch.setattr(zoo, "zoo_folder", lambda: tmp_path)
    rng = random.Random(21)
    codes = set()
    for place in rng.sample(list(leaves(card)), 40):
        path.write_text(mutated(card, place, rng.choice([*ODD, None])))
        for words in (["zoo", "zoo:resnet20-digits"], ["zoo"]):
            code = main(words)
            said = capsys.readouterr().err
            assert code == 0 or ("resnet20-digits.json" in said and "internal" not in said), (place, said)
            assert said.count("\n") == code
            codes.add(code)
    assert codes == {0, 1}


def test_a_mutated_record_in_a_manifest_is_refused_or_shown(tmp_path: Path) -> None:
    """Oracle: `inspect` gives its tables, or BundleError names the rule."""
    built = build_bundle(
        tiny_checkpoint_file(tmp_path / "tiny.safetensors"),
        tmp_path / "bundle",
        config=BuildConfig("null"),
        cache_dir=tmp_path / "cache",
    )
    data = json.loads((built.path / "manifest.json").read_text())
    data |= {"verification": {"ok": True, "reference": "torch"}, "executor": {"choice": "chain", "reason": "fast"}}
    data["extra"] = {"fixed_mask": "101", "loading": ["a note"]}
    data["training"] = {"settings": {"preset": "p", "seed": 1}, "validation": {"policy": OUTCOME}, "accuracy": 1.0}
    free = [place for place in leaves(data) if place[0] in ("verification", "executor", "extra", "training")]
    others = random.Random(22).sample([place for place in leaves(data) if place not in free], 8)
    refused = 0
    for place in (*free, *others):
        for odd in [*ODD, None]:
            try:
                manifest = manifest_from_json(parse_json(mutated(data, place, odd).encode()))
            except (BundleError, MalformedError):
                refused += 1
                continue
            for table in (_overview(manifest, False), _overview(manifest, True), _policy(manifest)):
                assert len(table.columns) > 0
    assert refused > 100
