"""Damaged JSON that people hand around: every error is one sentence of ours with a remedy, never a word of Python's."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint_file

from bdexport.build import build_bundle
from bdexport.bundle import manifest_from_json, read_manifest
from bdexport.calibrate import Scales, _read_cache
from bdexport.calibration_list import AGAIN, SCHEMA, read_list
from bdexport.config import BuildConfig
from bdexport.errors import BdexportError, BundleError, CalibrationError, ReportError
from bdexport.fused import fused_from_json
from bdexport.json_text import MalformedError, json_kind, parse_json, shown, why
from bdexport.mask_map import mapping_from_json
from bdexport.report.sources import read_sources
from bdexport.samples import samples_from_json, samples_to_json
from bdexport.verify_comparison import kept_samples

# Names of exceptions and types, and how CPython 3.11 to 3.14 begins the sentences that its own readers raise.
OF_PYTHON = re.compile(
    r"[A-Z]\w+Error\b|Traceback|NoneType|'(int|str|list|dict|float|bool)'|codec|Expecting|\bchar \d|subscript|iterable"
    r"|invalid literal|unsupported|not supported|argument|unhashable|unexpected|reshape|could not convert|set_int_max|"
    r"\bPython\b|Odd-length|padding|Incorrect|unpack|overflow|Extra data|attribute"
)
WRONG: list[Any] = [None, True, -1, 0, 10**30, 1e308, 2.5, "", "x", "1", [], [[]], [None], ["x"], [-1], {}, {"a": 1}]
SIZE, K = (6, 5), 3

LIST = {
    "schema": SCHEMA,
    "dataset": "digits",
    "split": "train",
    "shape": [8, 8, 3],
    "rows": [1, 2, 3],
    "files": None,
    "sha256": "0" * 64,
}
FUSED = {
    "split": "validation",
    "images": 100,
    "coverage": 0.9,
    "stored": "linked",
    "paths": [{"mask": "000", "share": 0.3}, {"mask": "010", "share": 0.2}],
}
MAPPING = {"rule": "budget", "targets": ["000", "111"], "seen": {"010": "000"}, "facts": {"accuracy": 90.1}}
SAMPLES = samples_to_json(np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8))
SCALES = Scales({"stem": {"x": (-1.0, 2.0)}}, {"stem": 3}, ("a note",), {"dataset": "digits"}).to_json("key")
BENCH = {
    "schema": "bdexport.bench/1",
    "batch": 1,
    "threads": 1,
    "bundle": "engines/mine",
    "architecture": "resnet32",
    "dataset": {"name": "cifar10"},
    "backend": "onnxruntime",
    "precision": "fp32",
    "device": "cpu",
    "machine": {"cpu": "some"},
    "full": {"latency_ms": {"mean": 1.0}},
    "dynamic": {"latency_ms": {"mean": 0.5}},
}


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a document stands, the document itself included."""
    yield path
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from places(document[key], (*path, key))


def damaged(document: Any) -> Iterator[Any]:
    """Every value replaced by every wrong one, every key left out, every list and object given one more."""
    for path in places(document):
        for wrong in WRONG:
            yield with_value(document, path, wrong)
        value = at(document, path)
        if isinstance(value, list):
            yield with_value(document, path, [*value, 7])
        if path and isinstance(path[-1], str):
            changed = copy.deepcopy(document)
            del at(changed, path[:-1])[path[-1]]
            yield changed


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    at(changed, path[:-1])[path[-1]] = value
    return changed


def judge(read: Callable[[Any], object], document: Any, damage: str) -> bool:
    """Whether the reader refuses, and then in one line of ours that says what to do."""
    try:
        read(document)
    except BdexportError as error:
        text = str(error)
        assert not OF_PYTHON.search(text), f"{damage[:200]}: {text}"
        assert "; " in text, f"no remedy: {text}"
        assert "\n" not in text
        assert len(text) < 1500
        return True
    return False


def in_file(read: Callable[[Path], object], path: Path) -> Callable[[Any], object]:
    """A reader of a file as one of documents."""

    def written(document: Any) -> object:
        path.write_text(json.dumps(document))
        return read(path)

    return written


READERS: dict[str, tuple[Any, Callable[[Path], Callable[[Any], object]]]] = {
    "calibration list": (LIST, lambda folder: in_file(read_list, folder / "list.json")),
    "scales": (SCALES, lambda folder: in_file(lambda path: _read_cache(path, "key"), folder / "key.cache")),
    "fused paths": (FUSED, lambda _: lambda data: fused_from_json(data, K, "manifest.json")),
    "mask mapping": (MAPPING, lambda _: lambda data: mapping_from_json(data, K, "manifest.json")),
    "samples": (SAMPLES, lambda _: lambda data: samples_from_json(data, SIZE)),
    "bench result": (BENCH, lambda folder: in_file(lambda path: read_sources([path]), folder / "bench.json")),
}


@pytest.mark.parametrize("name", READERS)
def test_wrong_values(name: str, tmp_path: Path) -> None:
    """Property: whatever stands where in the document, its reader takes it or refuses it in words of ours."""
    document, make = READERS[name]
    read = make(tmp_path)
    assert not judge(read, document, "untouched")
    refused = [judge(read, changed, shown(changed)) for changed in damaged(document)]
    assert sum(refused) > len(refused) / 4  # or the reader looks at nothing


@pytest.mark.parametrize("name", ["calibration list", "scales", "bench result"])
def test_changed_bytes(name: str, tmp_path: Path) -> None:
    """Property: the same for files with some bytes changed, cut off, or repeated."""
    document, _ = READERS[name]
    path = tmp_path / "key.json"
    readers: dict[str, Callable[[Path], object]] = {
        "calibration list": read_list,
        "scales": lambda file: _read_cache(file, "key"),
        "bench result": lambda file: read_sources([file]),
    }
    text, chance, refused = json.dumps(document).encode(), random.Random(0), 0
    for _ in range(300):
        data = bytearray(text)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.2:
            data = data[: chance.randrange(len(data))]
        path.write_bytes(data)
        refused += judge(readers[name], path, repr(bytes(data)))
    assert refused > 75  # or the reader looks at nothing


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("good")
    built = build_bundle(
        tiny_checkpoint_file(folder / "tiny.safetensors"),
        folder / "bundle",
        config=BuildConfig("null"),
        cache_dir=folder / "cache",
    )
    return read_manifest(built.path).to_json() | {"fused": FUSED, "mask_mapping": MAPPING}


def test_wrong_values_in_a_manifest(manifest: dict[str, Any]) -> None:
    """Property: as above, for a whole manifest with fused paths and a mask mapping."""
    small = manifest | {"training": {}}
    refused = 0
    for path in places(small):
        if path[:1] == ("parts",) and len(path) > 1 and path[1] not in (0, 3):  # the other parts are like these
            continue
        for wrong in WRONG:
            refused += judge(manifest_from_json, with_value(small, path, wrong), f"{path}: {wrong!r}")
    assert refused > 1000


@pytest.mark.parametrize("wrong", [5, [], "x", None, {"samples": 5}, {"samples": None}, {"samples": SAMPLES}])
def test_samples_of_a_manifest(manifest: dict[str, Any], wrong: Any) -> None:
    """Oracle: the key is named; samples of another size than the network's are among them."""
    read = manifest_from_json(manifest | {"extra": {"calibration": wrong}})
    with pytest.raises(BundleError, match=r"manifest\.json: extra\.calibration.*rebuild it"):
        kept_samples(read)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rows", None, "rows: got null, expected a list of row numbers"),
        ("rows", [1, -2], "rows: got [1, -2], expected a list of row numbers"),
        ("shape", [8, 8], "shape: got [8, 8], expected [h, w, 3], or null"),
        ("files", ["a"], "files: got 1 names, expected 3, one for each row"),
        ("schema", "other", f'schema: got "other", expected {SCHEMA}'),
    ],
)
def test_what_a_list_is_told(key: str, value: Any, said: str, tmp_path: Path) -> None:
    """Oracle: the sentence: key, what it holds, what it should, and the command that makes the list again."""
    path = tmp_path / "list.json"
    path.write_text(json.dumps(LIST | {key: value}))
    with pytest.raises(CalibrationError) as caught:
        read_list(path)
    assert str(caught.value) == f"{path}: no calibration list: {said}; {AGAIN}"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b'{"a": \xff}', "byte 6 is not UTF-8"),
        (b'{"a": 1', "line 1, column 8 is not JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1e999}', "beyond the range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": 1, "a": 2}', 'key "a" occurs twice'),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b"[" * 100 + b"]" * 100, "nested more than 64 deep"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'"' + b"[" * 100 + b'\\"' + b"[" * 100, "line 1, column 1 is not JSON"),
        (b'{"a": "\\udc00"}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_json(data: bytes, said: str) -> None:
    """Oracle: RFC 8259, and the sentence."""
    with pytest.raises(MalformedError, match=re.escape(said)):
        parse_json(data)


def test_words() -> None:
    """Oracle: JSON's own names; a missing key by its name, an error of ours as it is."""
    values: list[Any] = [{}, [], "", 1, 1.5, None, True]
    assert [json_kind(value) for value in values] == [
        *("an object", "a list", "a string", "a number", "a number", "null", "true")
    ]
    assert why(KeyError("rows")) == "rows is missing"
    assert why(ReportError("what", remedy="do")) == "what; do"
    assert why(EOFError("Compressed file ended")) == "damaged"
    assert parse_json('{"ä": [1, -2.5, true, null]}'.encode()) == {"ä": [1, -2.5, True, None]}
    in_texts = "[" * 100 + '\\"' + "{" * 100
    assert parse_json(json.dumps([in_texts, "]", "\U0001f600"]).encode()) == [in_texts, "]", "\U0001f600"]
