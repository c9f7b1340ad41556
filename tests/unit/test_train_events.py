"""A run's figures for TensorBoard: what is left out is said."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from bdexport.train.events import EVENTS_FOLDER, EventLog


def test_a_folder_that_tensorboard_cannot_open_is_said(tmp_path: Path) -> None:
    """Oracle: a note and no files under a name that is no UTF-8; none, and files, under another."""
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    for name, noted in ((b"r\xff", True), (b"run", False)):
        run = tmp_path / os.fsdecode(name)
        run.mkdir()
        log = EventLog(run, 0)
        log.add({"phase": "pretrain", "epoch": 1, "loss": 2.0}, 1)
        log.close()
        assert (log.note is not None) == noted
        assert (run / EVENTS_FOLDER).exists() != noted
