"""The campaign of faults: it notices every sort of failure, is drawn from its seed, and a share of it runs here."""

from __future__ import annotations

import json
import pickletools
from pathlib import Path
from random import Random

import pytest
from campaign.__main__ import main
from campaign.kinds import KINDS, SELF_TEST, kind_of
from campaign.mutations import damaged, odd_text
from campaign.pickles import hostile_pickle
from campaign.runner import Findings, Worker, collect
from campaign.selftest import WAYS, SelfTest

SIGNS = {  # what the campaign says of each way to fail
    "wrong": "other logits",
    "traceback": "ValueError: traceback",
    "hang": "no answer within 2 s",
    "death": "the process died",
    "memory": "at most 60 MB",
    "code": "foreign code ran",
}


def drawn(number: int, seed: int = 0) -> str:
    """What the self-test draws for a case, as the worker seeds it."""
    return Random(f"{SELF_TEST} {seed} {number}").choice(WAYS)


@pytest.fixture(autouse=True)
def found_by_workers(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    """Workers import the campaign as this process does."""
    monkeypatch.setenv("PYTHONPATH", f"{repository / 'tests'}:{repository / 'tests' / 'unit'}:{repository}")


def test_every_way_to_fail_is_noticed(tmp_path: Path) -> None:
    """Oracle: the ways that were drawn. After a hang and a death the next case runs in a new process."""
    numbers = [next(number for number in range(1000) if drawn(number) == way) for way in WAYS]
    worker = Worker(SELF_TEST, tmp_path / SELF_TEST)
    try:
        for way, number in zip(WAYS, numbers, strict=True):
            found = Findings(SELF_TEST)
            collect(found, worker, SelfTest, 0, number)
            assert found.tried == 1 + (way == "memory"), way  # its value is right, the memory that it took is not
            assert (found.right, found.refused) == (way in ("right", "memory"), way == "refused")
            assert [SIGNS[way] in failure["what"] for failure in found.failures] == [True] * (way in SIGNS), way
    finally:
        worker.close()


def test_a_failure_is_reported_and_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a way that fails, run again by what the report says."""
    number = next(number for number in range(1000) if drawn(number, 7) == "traceback")
    assert main(["--replay", SELF_TEST, "7", str(number), "--json", str(tmp_path / "found.json")]) == 1
    (kind,) = json.loads((tmp_path / "found.json").read_text())["kinds"]
    assert (kind["tried"], kind["failed"]) == (1, 1)
    (failure,) = kind["failures"]
    assert failure["again"] == f"make campaign REPLAY='{SELF_TEST} 7 {number}'"
    assert failure["again"] in capsys.readouterr().out


def test_the_same_seed_draws_the_same() -> None:
    """Oracle: equal bytes from equal seeds, others from others."""
    document = {"a": [1, 2.5, "text"], "b": {"c": None}}
    for draw in (lambda r: damaged(b"content" * 9, r), lambda r: odd_text(document, r), hostile_pickle):
        first, again, other = ([draw(Random(seed * 100 + n)) for n in range(30)] for seed in (1, 1, 2))
        assert first == again != other


def test_hostile_pickles_ask_for_code_and_for_memory() -> None:
    """Oracle: Python's own disassembler: among them are calls, and memo numbers and lengths without content."""
    names = set()
    drawn = (hostile_pickle(Random(number)) for number in range(200))
    for content in (content for content in drawn if len(content) < 1000):  # the long ones repeat one opcode
        try:
            names |= {opcode.name for opcode, _, _ in pickletools.genops(content)}
        except (ValueError, EOFError):
            continue
    assert {"REDUCE", "GLOBAL", "STACK_GLOBAL", "LONG_BINPUT", "BUILD"} <= names


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_five_minutes_of_everything(tmp_path: Path) -> None:
    """Oracle: nothing fails, and every kind tried something."""
    out = tmp_path / "campaign.json"
    code = main(["--minutes", "5", "--seed", "20", "--json", str(out)])
    found = json.loads(out.read_text())
    assert code == 0, [failure for kind in found["kinds"] for failure in kind["failures"]]
    assert all(kind["tried"] > 0 for kind in found["kinds"])
    assert len(found["kinds"]) == len(KINDS) == len({kind_of(name) for name in KINDS})
