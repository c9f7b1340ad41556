"""What classes may be called, and that no run is lost for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_cases import CONFIG, CutError, Recorder, request

from bdexport.calibration_list import list_images, make_list, read_list, write_list
from bdexport.checkpoint import load_checkpoint
from bdexport.class_names import MAX_LENGTH, name_problem, usable_names
from bdexport.cli.main import main
from bdexport.config import CalibrationConfig, PretrainConfig
from bdexport.errors import CheckpointError, DatasetError
from bdexport.files import utf8_name
from bdexport.json_text import parse_json
from bdexport.preprocess import Preprocess
from bdexport.train.pipeline import train

ORDINARY = [
    "\u65e5\u672c\u3000\u8a9e",  # Japanese with an ideographic space
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian with a zero-width non-joiner
    "caf\u00e9\u00a0noir",  # a no-break space
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # an emoji joined of three
    "\u0915\u094d\u200d\u0937",  # Devanagari with a joiner
    "x" * 220,
    "a, b; 'c' \"d\" \\ / %",
]
REFUSED = {
    "tabby\tcat": "a tab",
    "two\nlines": "U+000A",
    "two\u2028lines": "U+2028",
    "red\x1b[31m": "U+001B",
    "caf\udce9": "no UTF-8",
    "turned\u202egnp": "U+202E",
    "": "empty",
    " \u3000": "blank",
    "x" * (MAX_LENGTH + 1): "256 characters",
}
SHORT = replace(CONFIG, pretrain=PretrainConfig(epochs=1, batch=128))


def named(out: Path, names: list[str]) -> Any:
    """A request whose first classes are called ``names``."""
    asked = request(out, base_only=True)
    every = (*names, *asked.train.class_names[len(names) :])
    splits = {split: replace(getattr(asked, split), class_names=every) for split in ("train", "validation")}
    return replace(asked, **splits)


def test_a_run_whose_classes_have_names_of_all_languages_is_saved(tmp_path: Path) -> None:
    """Oracle: the names themselves, read back from the finished model."""
    path = train(named(tmp_path / "run", ORDINARY), SHORT, Recorder())
    assert load_checkpoint(path).class_names[: len(ORDINARY)] == tuple(ORDINARY)


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_cannot_be_stored_is_refused_before_the_first_epoch(name: str, tmp_path: Path) -> None:
    """Oracle: DatasetError with the reason, one printable line, no epoch, no folder."""
    recorder = Recorder()
    with pytest.raises(DatasetError, match="rename the classes' folders") as raised:
        train(named(tmp_path / "run", [name]), SHORT, recorder)
    assert REFUSED[name] in str(raised.value)
    assert str(raised.value).isascii()
    assert "\n" not in str(raised.value)
    assert not recorder.rows
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [*ORDINARY, *REFUSED])
def test_a_name_made_usable_has_no_problem(name: str) -> None:
    """Properties: usable names stay as they are, all others become names without a problem."""
    (usable,) = usable_names([name])
    assert name_problem(usable) is None
    assert (usable == name) is (name in ORDINARY)


def test_a_run_that_an_older_version_finished_is_saved_whatever_its_classes_are_called(tmp_path: Path) -> None:
    """Oracle: the state of a run that has an epoch behind it; its model is written, with '?' for what cannot be."""
    out = tmp_path / "run"
    asked = named(out, ["tabby\tcat"])
    with pytest.MonkeyPatch.context() as patch:  # an older version: it looked at the names only at the end
        patch.setattr("bdexport.train.pipeline.check_can_be_saved", lambda *_: None)
        patch.setattr("bdexport.train.pipeline.finish", _cut)
        with pytest.raises(CutError):
            train(asked, SHORT, Recorder())
    recorder = Recorder()
    path = train(asked, SHORT, recorder)
    assert load_checkpoint(path).class_names[0] == "tabby?cat"
    assert any("class names cannot be stored" in note for note in recorder.notes)
    assert not recorder.rows  # nothing was trained again


def _cut(*_: object) -> None:
    raise CutError


def test_a_record_that_no_header_can_hold_is_refused_at_the_start(tmp_path: Path) -> None:
    """Oracle: the header's own reader refuses half a surrogate pair; the error comes before the first epoch."""
    recorder = Recorder()
    with pytest.raises(CheckpointError):
        train(request(tmp_path / "run", base_only=True, base="caf\udce9.th"), SHORT, recorder)
    assert not (tmp_path / "run").exists()


def test_a_file_name_that_is_no_utf8_is_recorded_in_a_form_that_can_be_read(tmp_path: Path) -> None:
    """Oracle: the run ends, and its record and run.json are read by the strict reader."""
    odd = utf8_name("caf\udce9.th")
    assert odd == "caf\\xe9.th"
    out = tmp_path / "run"
    path = train(request(out, base_only=True, base=odd), SHORT, Recorder())
    assert load_checkpoint(path).training["base"] == parse_json((out / "run.json").read_bytes())["base"] == odd


def test_a_calibration_list_that_is_written_is_read(tmp_path: Path) -> None:
    """Oracle: the same images; among the files are names that are no UTF-8, and a class that is none."""
    folder = tmp_path / "data"
    for label, name in enumerate(("one", "caf\udce9")):
        for number in range(3):
            try:
                (folder / name).mkdir(parents=True, exist_ok=True)
                path = folder / name / f"{number}-\udcff\u3000.png"
                Image.fromarray(np.full((4, 4, 3), 40 * number + label, np.uint8)).save(path)
            except (OSError, UnicodeError):
                pytest.skip("this file system takes no such name")
    chosen = make_list("folder", folder, CalibrationConfig(images=6))
    written = tmp_path / "list.json"
    write_list(written, chosen)
    assert read_list(written) == chosen
    assert len(list_images(read_list(written), folder, Preprocess(size=(4, 4)))) == len(chosen)


@pytest.mark.parametrize(
    "line",
    [
        "retarget zoo:resnet20-digits --target-blocks 3 --dataset digits --out new.pt",
        "prune zoo:resnet20-digits --ratio 0.3 --out new.pt",
        "calibrate zoo:resnet20-digits --dataset digits --out .",
    ],
)
def test_where_a_result_cannot_go_is_found_before_the_work(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the failure although loading the checkpoint, the first of the work, is impossible."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bdexport.checkpoint.load_checkpoint", refused)
    assert main(line.split()) == 1
    err = capsys.readouterr().err
    assert "new.pt: not a checkpoint's name" in err or "cannot be written" in err
