"""ACT and SACT: stages that halt, per image and per position."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from test_sequential import gated_checkpoint, varied_images
from tiny import SIZE, tiny_model
from torch import Tensor
from torch.nn import functional as F
from training_cases import CONFIG, CutError, Recorder, request, weights_of

from bdexport.architecture import GateKind, GateSpec
from bdexport.build import build_bundle
from bdexport.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from bdexport.cli.main import main
from bdexport.config import HaltingConfig, TrainConfig
from bdexport.errors import CheckpointError, ExportError, UsageError
from bdexport.evaluate import run_decided
from bdexport.export_gated import export_gated
from bdexport.models.flops import count_flops
from bdexport.models.gates import PooledUnit
from bdexport.models.halting import HaltingGates, SpatialUnit
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import ROW_MULTIPLE, Block
from bdexport.preprocess import Preprocess
from bdexport.train.pipeline import train

MARGIN = 0.01
STAGES = (2, 4)
RUN = replace(CONFIG, method="act", finetune=replace(CONFIG.finetune, epochs=3))


def halting_model(
    kind: GateKind, bias: float = -0.5, spread: float = 1.5, stages: tuple[int, ...] = STAGES
) -> BlockDropNet:
    """A tiny network with logits of this mean and deviation over images (positions): stages end at different blocks."""
    model = tiny_model(stages=stages)
    torch.manual_seed(5)
    gates = model.set_gates(GateSpec(kind, MARGIN))
    with torch.no_grad():
        for name, parameter in gates.named_parameters():
            if name.endswith("weight"):
                parameter.normal_()
        x = model.network.stem(varied_images(16))
        for index, block in enumerate(model.network.blocks):
            x = block(x)
            if str(index) in gates.units:
                unit = gates.units[str(index)]
                assert isinstance(unit, PooledUnit)
                scale = spread / unit(x).std()
                for name, parameter in unit.named_parameters():
                    if name.endswith("weight"):
                        parameter.mul_(scale)
                unit.fc.bias.zero_()
                unit.fc.bias.fill_(bias - unit(x).mean())
    return model


def halting_of(model: BlockDropNet) -> HaltingGates:
    assert isinstance(model.gates, HaltingGates)
    return model.gates


def pooled_logit(unit: PooledUnit, y: Tensor) -> float:
    return float(((y.mean(dim=(2, 3))[0] * unit.fc.weight[0]).sum() + unit.fc.bias[0]).detach())


def sigmoid(z: float) -> float:
    return float(1 / (1 + np.exp(-z)))


def halting(scores: list[float]) -> tuple[int, float, list[float]]:
    """N, R and p of Eqns. 6 to 8 from all scores h^1 .. h^L, the last of which is 1."""
    n = next(n for n in range(1, len(scores) + 1) if sum(scores[:n]) >= 1 - MARGIN)
    remainder = 1 - sum(scores[: n - 1])
    return n, remainder, [*scores[: n - 1], remainder, *[0.0] * (len(scores) - n)]


def act_by_hand(model: BlockDropNet, image: Tensor) -> tuple[Tensor, list[bool], float]:
    """The equations, one image, every block run: logits, which blocks ran, ponder cost."""
    gates = halting_of(model)
    x, ran, ponder, index = model.network.stem(image[None]), [], 0.0, 0
    for count in model.network.spec.stages:
        outputs, scores = [], []
        for place in range(count):
            x = model.network.blocks[index](x)
            outputs.append(x)
            unit = gates.units[str(index)] if place < count - 1 else None
            scores.append(1.0 if unit is None else sigmoid(pooled_logit(unit, x)))  # type: ignore[arg-type]
            index += 1
        n, remainder, weights = halting(scores)
        x = torch.stack([p * y for p, y in zip(weights, outputs, strict=True)]).sum(dim=0)
        ran += [place < n for place in range(count)]
        ponder += n + remainder
    return model.network.head(x)[0], ran, ponder


# ---- ACT -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_act_equals_the_equations() -> None:
    """Oracle: the paper's equations in plain Python, image by image; stages end at different blocks."""
    model = halting_model("act")
    images = varied_images(ROW_MULTIPLE + 5)
    decided = model.decided(images)
    assert decided.ponder is not None
    for row, image in enumerate(images):
        logits, ran, ponder = act_by_hand(model, image)
        assert decided.masks[row].tolist() == ran
        assert decided.ponder[row].item() == pytest.approx(ponder, abs=1e-5)
        assert torch.allclose(decided.logits[row], logits, atol=1e-4), (decided.logits[row] - logits).abs().max()
    assert len(torch.unique(decided.masks, dim=0)) > 2
    assert decided.masks[:, [0, 2]].all(), "the first block of each stage always runs"
    assert torch.equal(decided.positions, decided.masks.float())
    assert torch.equal(decided.work, decided.masks.float())


@pytest.mark.parametrize("kind", ["act", "sact"])
@torch.no_grad()
def test_the_ends_of_the_scale(kind: GateKind) -> None:
    """Oracle: scores of 0 leave all weight with the last block, the plain network; scores of 1 with the first."""
    images = varied_images(4)
    never = halting_model(kind, bias=-40.0, spread=0.0)
    decided = never.decided(images)
    assert decided.masks.all()
    assert torch.allclose(decided.logits, never.network(images), atol=1e-5)
    at_once = halting_model(kind, bias=40.0, spread=0.0).decided(images)
    assert at_once.masks.tolist() == [[True, False, True, False, False, False]] * 4
    assert at_once.ponder is not None
    assert at_once.ponder.tolist() == [4.0] * 4, "N = 1 and R = 1 in both stages"


def test_gradient_of_the_ponder_cost() -> None:
    """Oracle: d(N + R)/dh = -1 for each score before N and 0 behind (section 3.1), through the sigmoid by hand."""
    model = halting_model("act")
    gates = halting_of(model)
    for image in varied_images(6):
        model.zero_grad()
        decided = model.decided(image[None])
        assert decided.ponder is not None
        decided.ponder.sum().backward()  # type: ignore[no-untyped-call]
        expected, got = {}, {}
        x, index = model.network.stem(image[None]), 0
        for count in STAGES:
            before = model.network.blocks[index](x)
            outputs = [before]
            for place in range(1, count):
                outputs.append(model.network.blocks[index + place](outputs[-1]))
            units = [gates.units[str(index + place)] for place in range(count - 1)]
            scores = [sigmoid(pooled_logit(u, y)) for u, y in zip(units, outputs, strict=False)]  # type: ignore[arg-type]
            n, _, weights = halting([*scores, 1.0])
            for place, score in enumerate(scores):
                # A score moves the cost by itself; the units behind read its image, not its score.
                expected[index + place] = -score * (1 - score) if place < n - 1 else 0.0
            x = torch.stack([p * y for p, y in zip(weights, outputs, strict=True)]).sum(dim=0)
            index += count
        for key, unit in gates.units.items():
            assert isinstance(unit, PooledUnit)
            got[int(key)] = 0.0 if unit.fc.bias.grad is None else unit.fc.bias.grad.item()
        # Scores of the first stage also reach the second through its input.
        assert {k: got[k] for k in got if k >= 2} == pytest.approx({k: expected[k] for k in got if k >= 2}, abs=1e-6)


def test_gradients_reach_network_and_units() -> None:
    """Oracle: the classification loss alone moves the units that a stage asked, and the blocks that ran."""
    model = halting_model("act", bias=-3.0, spread=0.3)
    F.cross_entropy(model.decided(varied_images(4)).logits, torch.arange(4) % 3).backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in [*halting_of(model).parameters(), *model.network.parameters()]]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@torch.no_grad()
def test_act_flops_by_hand() -> None:
    """Oracle: multiply-accumulates written out; a unit costs 2 C where its block ran, the last of a stage has none."""
    model = halting_model("act")
    table = count_flops(model, SIZE)
    assert table.gates == (2 * 4, 0, 2 * 8, 2 * 8, 2 * 8, 0)
    early, late = 2 * 24 * 32 * 9 * 4 * 4 * 2, 2 * 12 * 16 * 9 * 8 * 8 * 2
    blocks = np.array([early, early, 2 * 12 * 16 * 9 * (4 * 8 + 8 * 8), late, late, late]) + np.array(table.gates)
    fixed = 2 * 24 * 32 * 9 * 3 * 4 + 2 * 8 * 3
    images = varied_images(20)
    outcome = run_decided(model, [(images, torch.zeros(20, dtype=torch.int64))])
    assert outcome.shares is not None
    assert outcome.shares.flops(table).tolist() == (fixed + outcome.masks @ blocks).tolist()
    assert outcome.to_json(table, with_policy=False)["blocks_used"]["max"] == outcome.masks.sum(axis=1).max()


# ---- SACT ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sact_equals_the_equations_at_each_position() -> None:
    """Oracle: a loop over images, positions and blocks; work counted position by position with its neighbours."""
    model = halting_model("sact")
    images = varied_images(3)
    decided = model.decided(images)
    assert decided.ponder is not None
    for row, image in enumerate(images):
        x, index, ponder = model.network.stem(image[None]), 0, 0.0
        for count in STAGES:
            x, cost = sact_stage(model, x, index, count, decided.positions[row], decided.work[row])
            ponder += cost
            index += count
        logits = model.network.head(x)[0]
        assert decided.ponder[row].item() == pytest.approx(ponder, abs=1e-3)
        assert torch.allclose(decided.logits[row], logits, atol=1e-3), (decided.logits[row] - logits).abs().max()
    assert (decided.work >= decided.positions).all()
    assert ((decided.positions > 0) & (decided.positions < 1)).any()


def sact_stage(
    model: BlockDropNet, x: Tensor, first: int, count: int, positions: Tensor, work: Tensor
) -> tuple[Tensor, float]:
    """One stage of one image; checks the shares and returns its output and its ponder cost."""
    gates, cost, out = halting_of(model), 0.0, None
    active: list[list[bool]] = []
    summed = before = None
    for index in range(first, first + count):
        block = model.network.blocks[index]
        assert isinstance(block, Block)
        y = block(x)
        height, width = y.shape[2:]
        if index == first:
            active = [[True] * width for _ in range(height)]
            summed, out = torch.zeros(height, width), torch.zeros_like(y)
        else:
            for i, j in np.ndindex(height, width):
                if not active[i][j]:
                    y[0, :, i, j] = x[0, :, i, j]
        assert summed is not None
        assert out is not None
        whole = sum(layer.weight.numel() for layer in (block.branch.conv1, block.branch.conv2))
        near = [[any(active[a][b] for a, b in neighbours(i, j, active)) for j in range(width)] for i in range(height)]
        share = np.mean(active)
        done = block.branch.conv1.weight.numel() * np.mean(near) + block.branch.conv2.weight.numel() * share
        assert positions[index].item() == pytest.approx(share)
        assert work[index].item() == pytest.approx(done / whole, rel=1e-5)
        logits = None
        if index < first + count - 1:
            unit = gates.units[str(index)]
            assert isinstance(unit, SpatialUnit)
            logits = F.conv2d(y, unit.conv.weight, padding=1)[0, 0] + pooled_logit(unit, y)
        before = summed.clone()
        for i, j in np.ndindex(height, width):
            if not active[i][j]:
                continue
            score = 1.0 if logits is None else sigmoid(float(logits[i, j]))
            halts = before[i, j] + score >= 1 - MARGIN
            weight = 1 - before[i, j] if halts else score
            out[0, :, i, j] += weight * y[0, :, i, j]
            cost += 1 + (float(1 - before[i, j]) if halts else 0.0)
            summed[i, j] += score
            active[i][j] = not halts
        x = y
    assert out is not None
    return out, cost / out[0, 0].numel()


def neighbours(i: int, j: int, grid: list[list[bool]]) -> list[tuple[int, int]]:
    rows, columns = range(len(grid)), range(len(grid[0]))
    return [(a, b) for a in (i - 1, i, i + 1) for b in (j - 1, j, j + 1) if a in rows and b in columns]


@torch.no_grad()
def test_sact_flops_by_hand() -> None:
    """Oracle: the shares times multiply-accumulates written out; a unit's 3x3 convolution runs where its block does."""
    model = halting_model("sact")
    table = count_flops(model, SIZE)
    assert table.gates == (2 * 4, 0, 2 * 8, 2 * 8, 2 * 8, 0)
    assert table.gate_positions == (2 * 9 * 4 * 24 * 32, 0, *[2 * 9 * 8 * 12 * 16] * 3, 0)
    early, late = 2 * 24 * 32 * 9 * 4 * 4 * 2, 2 * 12 * 16 * 9 * 8 * 8 * 2
    branches = np.array([early, early, 2 * 12 * 16 * 9 * (4 * 8 + 8 * 8), late, late, late])
    images = varied_images(5)
    outcome, decided = run_decided(model, [(images, torch.zeros(5, dtype=torch.int64))]), model.decided(images)
    work, positions = decided.work.numpy().astype(float), decided.positions.numpy().astype(float)
    expected = 2 * 24 * 32 * 9 * 3 * 4 + 2 * 8 * 3 + work @ branches + positions @ np.array(table.gate_positions)
    expected += (positions > 0) @ np.array(table.gates)
    assert outcome.shares is not None
    assert outcome.shares.flops(table) == pytest.approx(expected, rel=1e-6)
    assert outcome.blocks_used == pytest.approx(positions.sum(axis=1))


# ---- learning ------------------------------------------------------------------------------------------------------


def run(out: Path, base: Checkpoint, config: TrainConfig) -> Checkpoint:
    return load_checkpoint(train(request(out, network=base.network, initial=base), config, Recorder()))


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three stages of two blocks, so that every stage has something to leave out."""
    shape = request(Path())
    network = replace(shape.network, stages=(2, 2, 2))
    out = tmp_path_factory.mktemp("deep-base") / "run"
    return load_checkpoint(train(request(out, network=network, base_only=True), CONFIG, Recorder()))


@pytest.fixture(scope="module")
def straight(deep_base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ACT from start to end."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run(out, deep_base, RUN)
    return out


def test_it_learns_and_the_price_decides_how_many_blocks(straight: Path, deep_base: Checkpoint, tmp_path: Path) -> None:
    """Oracle: chance is 10 %; at a low price nearly all blocks run, at a prohibitive one the first of each stage."""
    cheap = load_checkpoint(straight)
    dear = run(
        tmp_path / "dear", deep_base, replace(RUN, halting=HaltingConfig(ponder_weight=30.0), recalibrate_images=0)
    )
    figures, other = cheap.training["validation"]["gates"], dear.training["validation"]["gates"]
    assert cheap.gates == GateSpec("act", MARGIN)
    assert figures["kind"] == "act"
    assert figures["accuracy"] > 18
    assert figures["blocks_used"]["mean"] > 5.5
    assert other["blocks_used"] == {"mean": 3.0, "std": 0.0, "min": 3, "max": 3}
    assert other["flops"]["mean"] < figures["flops"]["mean"]
    assert sum(mask["count"] for mask in cheap.training["policy_statistics"]["masks"]) == 180


def test_a_run_cut_off_in_mid_epoch_ends_the_same(straight: Path, deep_base: Checkpoint, tmp_path: Path) -> None:
    """Oracle: the uninterrupted run's weights, bit for bit, the units' among them."""
    again = request(tmp_path / "run", network=deep_base.network, initial=deep_base)
    with pytest.raises(CutError):
        train(again, RUN, Recorder(cut_in=("finetune_halting 2", 2)))
    recorder = Recorder()
    train(again, RUN, recorder)
    assert [row["phase"] for row in recorder.rows] == ["finetune_halting"] * 2
    assert {"loss", "ponder", "accuracy", "blocks_used"} == recorder.rows[0]["train"].keys()
    expected, got = weights_of(straight), weights_of(tmp_path / "run")
    assert any(name.startswith("gates.") for name in expected)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_sact_learns_too(deep_base: Checkpoint, tmp_path: Path) -> None:
    """Oracle: chance is 10 %; usage in shares of positions, no mask statistics."""
    config = replace(
        RUN, method="sact", finetune=replace(RUN.finetune, epochs=2), halting=HaltingConfig(ponder_weight=0.3)
    )
    found = run(tmp_path / "run", deep_base, config)
    figures = found.training["validation"]["gates"]
    assert found.gates == GateSpec("sact", MARGIN)
    assert figures["kind"] == "sact"
    assert 3 <= figures["blocks_used"]["mean"] <= 6
    assert figures["accuracy"] > 18
    assert "policy_statistics" not in found.training


def test_evaluate_reports_it(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the equations, image by image, on the images that the command evaluated."""
    words = [str(straight), "--dataset", "digits", "--split", "validation", "--images", "40", "--json", "-"]
    assert main(["evaluate", *words]) == 0
    out, err = capsys.readouterr()
    gates = json.loads(out)["gates"]
    assert "act" in err
    found = load_checkpoint(straight)
    split = request(Path()).validation
    pixels = torch.from_numpy(found.preprocess.normalise(split.arrays(found.preprocess)[:40]))
    model = build_model(found, with_policy=False)
    with torch.no_grad():
        rows = [act_by_hand(model, image) for image in pixels]
    correct = [int(logits.argmax()) == label for (logits, _, _), label in zip(rows, split.labels[:40], strict=True)]
    assert gates["accuracy"] == pytest.approx(100 * np.mean(correct), abs=3)
    assert gates["blocks_used"]["mean"] == pytest.approx(np.mean([sum(ran) for _, ran, _ in rows]), abs=0.1)


def test_a_margin_that_no_stage_can_use_is_refused(tmp_path: Path) -> None:
    """Oracle: UsageError with the range, and no run."""
    with pytest.raises(UsageError, match=r"halting\.margin"):
        train(request(tmp_path / "run"), replace(RUN, halting=HaltingConfig(margin=0.9)), Recorder())
    assert not (tmp_path / "run").exists()


# ---- export --------------------------------------------------------------------------------------------------------


def exported(model: BlockDropNet, folder: Path) -> Path:
    return export_gated(model, Preprocess(size=SIZE), folder)["act"]


@pytest.mark.parametrize("stages", [(2, 4), (1, 3)])
@pytest.mark.parametrize("optimised", [False, True])
def test_the_graph_equals_torch(stages: tuple[int, ...], optimised: bool, tmp_path: Path) -> None:
    """Oracle: torch, in batches of 1 and 7, with and without ONNX Runtime's graph optimisations."""
    model = halting_model("act", stages=stages)
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    path = exported(model, tmp_path)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    seen = set()
    for batch in (7, *[1] * 8):
        images = varied_images(batch)
        with torch.no_grad():
            logits, masks = model(images)
        got, ran = session.run(["y", "mask"], {"x": images.numpy()})
        assert ran.tolist() == masks.tolist()
        error = np.abs(got - logits.numpy())
        assert error.max() < 1e-4, f"largest {error.max():.2e}, mean {error.mean():.2e}"
        seen |= {tuple(row) for row in ran.tolist()}
    assert len(seen) > 1


def test_blocks_behind_the_halt_do_not_run(tmp_path: Path) -> None:
    """Oracle: ONNX Runtime's own profile of what it executed, halting at once and never."""
    for bias, expected in ((40.0, {"block_00", "block_02"}), (-40.0, {f"block_{k:02d}" for k in range(6)})):
        folder = tmp_path / str(bias)
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = exported(halting_model("act", bias=bias, spread=0.0), folder)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(["y"], {"x": varied_images(1).numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = {
            part
            for event in events
            for part in expected | {f"block_{k:02d}" for k in range(6)}
            if f"{part}/branch" in event["name"]
        }
        assert ran == expected


def test_the_graph_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    """Oracle: a second export of the same model."""
    first, second = (exported(halting_model("act"), tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second


def test_the_command_exports_act_as_one_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: one file; at most the full network's FLOPs and the units'."""
    model = halting_model("act")
    save_checkpoint(tmp_path / "m.safetensors", gated_checkpoint(model))
    assert main(["export", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "graphs"), "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["parts"]
    table = count_flops(model, SIZE)
    assert (row["part"], row["file"]) == ("act", "act.onnx")
    assert row["flops"] == table.full + 2 * (4 + 8 + 8 + 8)
    assert main(["export", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "more"), "--parts", "stem"]) == 2
    assert "expected some of act" in capsys.readouterr().err


def test_sact_is_refused_where_it_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: ExportError and CheckpointError that say why; nothing is written."""
    model = halting_model("sact")
    with pytest.raises(ExportError, match=r"each position.*FLOPs.*act or blockdrop"):
        export_gated(model, Preprocess(size=SIZE), tmp_path)
    save_checkpoint(tmp_path / "m.safetensors", gated_checkpoint(model))
    with pytest.raises(CheckpointError, match=r"\(sact\)"):
        build_bundle(tmp_path / "m.safetensors", tmp_path / "bundle")
    assert main(["export", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "graphs")]) == 1
    assert "sact" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]


@pytest.mark.parametrize("kind", ["act", "sact"])
def test_a_checkpoint_comes_back(kind: GateKind, tmp_path: Path) -> None:
    """Oracle: what was saved; the model decides as it did."""
    model = halting_model(kind)
    save_checkpoint(tmp_path / "m.safetensors", gated_checkpoint(model))
    found = load_checkpoint(tmp_path / "m.safetensors")
    assert found.gates == GateSpec(kind, MARGIN)
    images = varied_images(4)
    with torch.no_grad():
        expected, got = model.decided(images), build_model(found, with_policy=False).decided(images)
    assert torch.equal(expected.logits, got.logits)
    assert torch.equal(expected.positions, got.positions)
