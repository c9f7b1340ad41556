"""BlockDrop-seq: decisions between the blocks, learned as BlockDrop's are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from tiny import SIZE, tiny_checkpoint, tiny_model
from torch import Tensor
from torch.distributions import Bernoulli
from torch.nn import functional as F
from training_cases import CONFIG, CutError, Recorder, request, weights_of

from bdexport.architecture import GateSpec, ResNetSpec
from bdexport.build import build_bundle
from bdexport.checkpoint import Checkpoint, build_model, describe, load_checkpoint, save_checkpoint
from bdexport.cli.main import main
from bdexport.errors import CheckpointError, UsageError
from bdexport.evaluate import run_decided
from bdexport.export_gated import export_gated
from bdexport.models.flops import count_flops
from bdexport.models.gates import PooledUnit
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import ROW_MULTIPLE, Block
from bdexport.models.sequential import SequentialGates, Walk, greedy
from bdexport.preprocess import Preprocess
from bdexport.train.data import Batch
from bdexport.train.phases import Setting
from bdexport.train.pipeline import train
from bdexport.train.prepare import training_data
from bdexport.train.reward import reward
from bdexport.train.sequential import SequentialCurriculum, SequentialFinetune
from bdexport.train.state import generator_for

SEQUENTIAL = GateSpec("sequential")
RUN = replace(
    CONFIG,
    method="sequential",
    curriculum=replace(CONFIG.curriculum, learning_rate=0.02),
    finetune=replace(CONFIG.finetune, policy_learning_rate=0.03),
    policy=replace(CONFIG.policy, initial_keep_logit=0.5),
)


def undecided_model(**options: Any) -> BlockDropNet:
    """A tiny network whose gates keep some blocks and drop others, depending on the image."""
    model = tiny_model(**options)
    torch.manual_seed(3)
    gates = model.set_gates(SEQUENTIAL)
    with torch.no_grad():
        for unit in gates.units.values():
            assert isinstance(unit, PooledUnit)
            unit.fc.weight.normal_(0, 2)
    x = varied_images(64)
    for index in range(model.network.spec.num_blocks):  # each bias at the median: half of the images keep the block
        with torch.no_grad():
            p = walk_one_by_one(model, x)[2][:, index]
            gates.start_from(-float((p / (1 - p)).log().median()), index)
    return model


def varied_images(count: int) -> Tensor:
    """Noise of another contrast and colour for each image, so that pooled features differ between images."""
    contrast, colour = torch.rand(count, 1, 1, 1), torch.randn(count, 3, 1, 1)
    return torch.randn(count, 3, *SIZE) * 2 * contrast + colour


def walk_one_by_one(model: BlockDropNet, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, image by image and block by block: logits, masks, probabilities."""
    assert model.gates is not None
    rows = []
    for image in images:
        x, mask, probabilities = model.network.stem(image[None]), [], []
        for index, block in enumerate(model.network.blocks):
            assert isinstance(block, Block)
            unit = model.gates.units[str(index)]
            assert isinstance(unit, PooledUnit)
            z = float((x.mean(dim=(2, 3))[0] * unit.fc.weight[0]).sum() + unit.fc.bias[0])
            p = float(np.exp(z) / (np.exp(z) + np.exp(0.0)))  # softmax over (keep, drop)
            shortcut = block.shortcut(x)
            if p >= 0.5:
                x = F.relu(shortcut + block.branch(x))
            else:
                x = F.relu(shortcut) if block.relu_when_dropped else shortcut
            mask.append(p >= 0.5)
            probabilities.append(p)
        rows.append((model.network.head(x)[0], torch.tensor(mask), torch.tensor(probabilities)))
    logits, masks, chances = (torch.stack(column) for column in zip(*rows, strict=True))
    return logits, masks, chances


# ---- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["option_a", "conv"])
@torch.no_grad()
def test_a_batch_equals_the_definition(shortcut: str) -> None:
    """Oracle: a plain loop over images and blocks; the masks differ between images."""
    model = undecided_model(shortcut=shortcut, rule="shortcut_relu", stages=(2, 2))
    assert isinstance(model.gates, SequentialGates)
    images = varied_images(ROW_MULTIPLE + 5)
    logits, masks, probabilities = walk_one_by_one(model, images)
    walk = model.gates.walk(model.network, images, greedy)
    assert len(torch.unique(masks, dim=0)) > 3
    assert torch.equal(walk.masks, masks)
    assert torch.allclose(walk.probabilities, probabilities, atol=1e-5)
    assert torch.allclose(walk.logits, logits, atol=1e-4), (walk.logits - logits).abs().max()
    assert torch.equal(model.masks(images), masks)
    assert torch.equal(model(images)[0], walk.logits)


def test_the_policy_gradient_stops_at_the_gates() -> None:
    """Oracle: gradients of the probabilities reach every gate and no weight of the network."""
    model = undecided_model()
    assert isinstance(model.gates, SequentialGates)
    walk = model.gates.walk(model.network, varied_images(8), greedy, learn_network=True)
    walk.probabilities.sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.gates.parameters())
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_flops_by_hand() -> None:
    """Oracle: multiply-accumulates written out for 24x32 images, channels 4 and 8, one linear layer per gate."""
    model = undecided_model(stages=(1, 2))
    table = count_flops(model, SIZE)
    assert table.gates == (2 * 4, 2 * 4, 2 * 8)
    assert table.gate_positions == (0, 0, 0)
    stem = 2 * 24 * 32 * 9 * 3 * 4
    first = 2 * 24 * 32 * 9 * 4 * 4 * 2
    second = 2 * 12 * 16 * 9 * (4 * 8 + 8 * 8)
    third = 2 * 12 * 16 * 9 * 8 * 8 * 2
    head = 2 * 8 * 3
    images = varied_images(50)
    outcome = run_decided(model, [(images, torch.zeros(50, dtype=torch.int64))])
    assert outcome.unique_masks > 1
    by_hand = stem + head + 2 * (4 + 4 + 8) + outcome.masks @ np.array([first, second, third])
    assert outcome.shares is not None
    assert outcome.shares.flops(table).tolist() == by_hand.tolist()
    figures = outcome.to_json(table, with_policy=False)
    assert figures["flops"]["mean"] == pytest.approx(by_hand.mean())
    assert figures["blocks_used"]["mean"] == pytest.approx(outcome.masks.sum(axis=1).mean())


# ---- learning ------------------------------------------------------------------------------------------------------


def setting(model: BlockDropNet, **policy: Any) -> Setting:
    config = replace(RUN, distillation_weight=0.0, policy=replace(RUN.policy, **policy))
    return Setting(model, [], None, config, "cpu", False, generator_for(0, 0, 0, "cpu"))


def test_closed_blocks_and_forced_images_keep_everything() -> None:
    """Oracle: Algorithm 1, ``s[1:K-t] = 1``, and the share of a batch that runs every block."""
    phase = SequentialCurriculum(setting(undecided_model(stages=(2, 2))))
    phase.now_open = 2
    images = varied_images(200)
    sampled, best = phase._sampled_walk(images, forced=7), phase._greedy_walk(images)
    assert sampled.masks[:, :2].all()
    assert best.masks[:, :2].all()
    assert sampled.masks[:7].all()
    assert not sampled.masks[7:, 2:].all()
    assert not best.masks[:, 2:].all()


@pytest.mark.parametrize("estimator", ["self_critical", "leave_one_out"])
def test_policy_loss_is_equation_6(estimator: str) -> None:
    """Oracle: rewards, advantages and torch's Bernoulli, combined by hand over two samples of the open blocks."""
    model = undecided_model()
    phase = SequentialCurriculum(setting(model, estimator=estimator, samples=2, target_blocks=None, reward="correct"))
    phase.now_open, phase.exploration_bound = 2, 0.8
    images, labels = varied_images(12), torch.randint(0, 3, (12,))
    walks, best = [phase._sampled_walk(images) for _ in range(2)], phase._greedy_walk(images)
    rewards, loss = phase._walks_loss(walks, best, labels)

    def judged(walk: Walk) -> Tensor:
        return reward(walk.logits, labels, walk.masks, RUN.policy.wrong_prediction_penalty, "correct")

    first, second = map(judged, walks)
    baselines = [judged(best)] * 2 if estimator == "self_critical" else [second, first]
    expected = torch.zeros(())
    for walk, gained, baseline in zip(walks, (first, second), baselines, strict=True):
        s = 0.8 * walk.probabilities + 0.2 * (1 - walk.probabilities)
        logs = Bernoulli(s).log_prob(walk.masks.float())[:, 1:].sum(dim=1)  # type: ignore[no-untyped-call]
        expected = expected - ((gained - baseline) * logs).mean() / 2
    assert torch.equal(rewards, torch.stack([first, second]))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_budget_moves_the_greedy_path_towards_the_target() -> None:
    """Oracle: with rewards that are all equal, only the budget is left; usage approaches it from either side."""
    for target, start in ((1.0, 3.0), (3.0, -3.0)):
        model = undecided_model()
        assert model.gates is not None
        model.gates.start_from(start)
        phase = SequentialCurriculum(setting(model, target_blocks=target, wrong_prediction_penalty=0.0))
        phase.start()
        phase.optimisers[0].param_groups[0]["lr"] = 0.3
        images = varied_images(8)
        before = model.masks(images).float().sum(dim=1).mean().item()
        for _ in range(15):
            best = phase._greedy_walk(images)
            phase._learn(phase._regularised(best.probabilities.new_zeros(()), best.probabilities))
        after = model.masks(images).float().sum(dim=1).mean().item()
        assert abs(after - target) < abs(before - target)


def test_a_finetuning_step_teaches_network_and_gates_and_leaves_one_trace_in_batch_norm() -> None:
    """Oracle: both change; the statistics are updated by the sampled walk alone, not by the greedy baseline."""
    model = undecided_model()
    phase = SequentialFinetune(setting(model))
    phase.start()
    phase.at(0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    figures = phase.step(Batch(varied_images(32), torch.randint(0, 3, (32,)), torch.arange(32)))
    after = model.state_dict()
    assert {"loss", "reward", "accuracy", "blocks_used"} == figures.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("gates.") for name in changed)
    assert any(name.startswith("network.") for name in changed)
    assert not any(name.startswith("policy.") for name in changed)
    assert after["network.stem.bn.num_batches_tracked"] == before["network.stem.bn.num_batches_tracked"] + 1


def test_gates_may_start_in_the_blocks_order_of_importance(digits_base: Checkpoint, tmp_path: Path) -> None:
    """Oracle: the order that the note tells; biases rise evenly from the first block to drop to the last."""
    model = build_model(digits_base, with_policy=False)
    model.set_gates(SEQUENTIAL)
    phase = SequentialCurriculum(setting(model, order_images=50, order_spread=2.0, initial_keep_logit=0.5))
    notes: list[str] = []
    phase.begin(training_data(request(tmp_path), "cpu"), notes.append)
    order = json.loads(notes[0].rpartition(": ")[2])
    assert sorted(order) == [0, 1, 2]
    biases = [phase.decider().units[str(index)].get_parameter("fc.bias").item() for index in order]
    assert biases == pytest.approx([-1.5, 0.5, 2.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": replace(RUN.policy, estimator="nested")}, "self_critical or leave_one_out"),
        ({"finetune": replace(RUN.finetune, level_share=0.2)}, "level_share"),
    ],
)
def test_what_needs_all_probabilities_at_once_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Oracle: UsageError that says what instead, and no run."""
    with pytest.raises(UsageError, match=message):
        train(request(tmp_path / "run"), replace(RUN, **change), Recorder())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def straight(digits_base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A run from start to end."""
    out = tmp_path_factory.mktemp("straight") / "run"
    recorder = Recorder()
    train(request(out, initial=digits_base), RUN, recorder)
    return out, recorder


def test_it_learns(straight: tuple[Path, Recorder]) -> None:
    """Oracle: chance is 10 %; the gates drop blocks, and the record says so."""
    out, recorder = straight
    found = load_checkpoint(out)
    gates = found.training["validation"]["gates"]
    assert [row["phase"] for row in recorder.rows] == ["adapt"] + ["curriculum"] * 2 + ["finetune"] * 2
    assert found.gates == SEQUENTIAL
    assert found.policy is None
    assert gates["kind"] == "sequential"
    assert gates["accuracy"] > 18  # of 180 images: chance and three and a half standard deviations
    assert 0 < gates["blocks_used"]["mean"] < 3
    assert sum(mask["count"] for mask in found.training["policy_statistics"]["masks"]) == 180


@pytest.mark.parametrize("phase", ["curriculum 2", "finetune 2"])
def test_a_run_cut_off_in_mid_epoch_ends_the_same(
    phase: str, straight: tuple[Path, Recorder], digits_base: Checkpoint, tmp_path: Path
) -> None:
    """Oracle: the uninterrupted run's weights, bit for bit."""
    with pytest.raises(CutError):
        train(request(tmp_path / "run", initial=digits_base), RUN, Recorder(cut_in=(phase, 2)))
    train(request(tmp_path / "run", initial=digits_base), RUN, Recorder())
    expected, got = weights_of(straight[0]), weights_of(tmp_path / "run")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_its_network_serves_as_a_base_and_its_gates_go_on_learning(
    straight: tuple[Path, Recorder], tmp_path: Path
) -> None:
    """Oracle: without a step of training, the same method keeps the base's gates; blockdrop leaves them out."""
    base = load_checkpoint(straight[0])
    still = replace(
        RUN,
        recalibrate_images=0,
        **{name: replace(getattr(RUN, name), epochs=0) for name in ("adapt", "curriculum", "finetune")},
    )
    again = train(request(tmp_path / "again", initial=base, base="base"), still, Recorder())
    other = train(
        request(tmp_path / "other", initial=base, base="base"), replace(still, method="blockdrop"), Recorder()
    )
    assert all(torch.equal(base.state[name], weight) for name, weight in weights_of(again).items())
    assert load_checkpoint(other).gates is None
    assert not any(name.startswith("gates.") for name in weights_of(other))


def test_evaluate_reports_it(straight: tuple[Path, Recorder], capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the definition, image by image, gives what the command reports; its FLOPs are the table's."""
    words = [str(straight[0]), "--dataset", "digits", "--split", "validation", "--images", "60", "--json", "-"]
    assert main(["evaluate", *words]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    gates = result["gates"]
    assert gates["kind"] == "sequential"
    assert "sequential" in err
    assert "no policy" not in err
    found = load_checkpoint(straight[0])
    split = request(Path()).validation
    pixels = torch.from_numpy(found.preprocess.normalise(split.arrays(found.preprocess)[:60]))
    model = build_model(found, with_policy=False)
    with torch.no_grad():
        logits, masks, _ = walk_one_by_one(model, pixels)
    correct = logits.argmax(dim=1).numpy() == split.labels[:60]
    assert gates["accuracy"] == pytest.approx(100 * correct.mean(), abs=2)
    assert gates["blocks_used"]["mean"] == pytest.approx(masks.sum(dim=1).float().mean().item(), abs=0.1)
    table = count_flops(model, (12, 12))
    by_hand = table.of_masks(masks.numpy(), with_policy=False) + sum(table.gates)
    assert gates["flops"]["mean"] == pytest.approx(by_hand.mean(), rel=0.02)


# ---- files ---------------------------------------------------------------------------------------------------------


def gated_checkpoint(model: BlockDropNet) -> Checkpoint:
    assert model.gates is not None
    plain = tiny_checkpoint(model)
    state = {name: tensor for name, tensor in plain.state.items() if not name.startswith("policy.")}
    return replace(plain, policy=None, gates=model.gates.spec, state=state)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    """Oracle: what was saved; the model decides as it did."""
    model = undecided_model()
    save_checkpoint(tmp_path / "m.safetensors", gated_checkpoint(model))
    found = load_checkpoint(tmp_path / "m.safetensors")
    assert found.gates == SEQUENTIAL
    assert describe(found)["gates"] == {"kind": "sequential", "margin": None}
    images = varied_images(6)
    with torch.no_grad():
        expected, got = model(images), build_model(found, with_policy=False)(images)
    assert torch.equal(expected[0], got[0])
    assert torch.equal(expected[1], got[1])


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"kind": "lstm", "margin": None}, r"gates\.kind.*one of sequential"),
        ({"kind": "sequential", "margin": 0.01}, r"gates\.margin.*null"),
        ({"kind": "act", "margin": 2}, r"gates\.margin"),
        ({"kind": "sequential"}, "missing margin"),
        (None, "gates"),
    ],
)
def test_a_wrong_gate_field_is_named(gates: Any, message: str, tmp_path: Path) -> None:
    """Oracle: CheckpointError with the field."""
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, gated_checkpoint(undecided_model()))
    tensors = safetensors.torch.load(path.read_bytes())
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["bdexport"])
    header["gates"] = gates
    path.write_bytes(safetensors.torch.save(tensors, {"bdexport": json.dumps(header)}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_gates_beside_a_policy_are_refused(tmp_path: Path) -> None:
    """Oracle: CheckpointError: nothing says which of the two decides."""
    with pytest.raises(CheckpointError, match="gates beside a policy"):
        save_checkpoint(tmp_path / "m.safetensors", replace(tiny_checkpoint(undecided_model()), gates=SEQUENTIAL))


def test_gates_of_another_network_do_not_fit(tmp_path: Path) -> None:
    """Oracle: CheckpointError that names the keys."""
    ckpt = gated_checkpoint(undecided_model())
    state = {name: tensor for name, tensor in ckpt.state.items() if not name.startswith("gates.units.1.")}
    with pytest.raises(CheckpointError, match=r"2 keys missing \(gates\.units\.1\.fc\.weight"):
        save_checkpoint(tmp_path / "m.safetensors", replace(ckpt, state=state))


def test_there_is_no_bundle_of_it(tmp_path: Path) -> None:
    """Oracle: CheckpointError before anything is built, that says why and what instead."""
    save_checkpoint(tmp_path / "m.safetensors", gated_checkpoint(undecided_model()))
    with pytest.raises(CheckpointError, match=r"inside the network \(sequential\).*--method blockdrop"):
        build_bundle(tmp_path / "m.safetensors", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_exported_parts_decide_and_compute_as_torch_does(tmp_path: Path) -> None:
    """Oracle: torch, against ONNX Runtime asking a gate and running its block or not, image by image."""
    model = undecided_model(stages=(2, 2))
    files = export_gated(model, Preprocess(size=SIZE), tmp_path)
    sessions = {
        part: onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for part, path in files.items()
    }
    images = varied_images(12)
    with torch.no_grad():
        logits, masks = model(images)
    for image, expected, mask in zip(images.numpy(), logits.numpy(), masks.tolist(), strict=True):
        (x,) = sessions["stem"].run(["y"], {"x": image[None]})
        for index, keep in enumerate(mask):
            (p,) = sessions[f"gate_{index:02d}"].run(["y"], {"x": x})
            assert (p.item() >= 0.5) == keep
            part = f"block_{index:02d}" if keep else f"shortcut_{index:02d}"
            if part in sessions:
                (x,) = sessions[part].run(["y"], {"x": x})
        (got,) = sessions["head"].run(["y"], {"x": x})
        assert np.abs(got[0] - expected).max() < 1e-4


def test_the_command_exports_gates_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the files; FLOPs of a gate by hand."""
    save_checkpoint(tmp_path / "m.safetensors", gated_checkpoint(undecided_model()))
    assert main(["export", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "graphs"), "--json", "-"]) == 0
    rows = {row["part"]: row for row in json.loads(capsys.readouterr().out)["parts"]}
    assert "policy" not in rows
    assert rows["gate_02"]["flops"] == 2 * 8
    assert sorted(row["file"] for row in rows.values()) == sorted(file.name for file in (tmp_path / "graphs").iterdir())


def test_spec_names_every_block() -> None:
    """Oracle: one gate in front of each block, with the channels that arrive there."""
    spec = ResNetSpec("imagenet", "bottleneck", (1, 2), (4, 8), "conv", 3)
    gates = BlockDropNet(spec, gates=SEQUENTIAL).gates
    assert gates is not None
    units = [unit for unit in gates.units.values() if isinstance(unit, PooledUnit)]
    assert [unit.fc.in_features for unit in units] == [4, 16, 32]
