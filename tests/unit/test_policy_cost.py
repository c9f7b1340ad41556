"""What a policy costs is said beforehand, and by default it is little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdexport.architecture import PolicySpec, policy_spec, resnet_spec
from bdexport.build import build_bundle
from bdexport.bundle import open_bundle
from bdexport.cli.main import main
from bdexport.config import LARGEST_POLICY_SHARE, BuildConfig, FusedConfig
from bdexport.models.flops import FlopsTable
from bdexport.models.policy_size import ceiling, cost_text, fitting_policy, policy_share
from bdexport.policy_cost import cost_text as bundle_text
from bdexport.policy_cost import policy_cost

TABLE = FlopsTable(policy=230, stem=100, branches=(400, 400), shortcuts=(0, 50), head=50)  # full: 1000


def test_the_ceiling_is_what_is_left_after_the_policy() -> None:
    """Oracle: by hand: with one of two blocks 600 of 1000 FLOPs are run, and 230 of the policy on top."""
    assert ceiling(TABLE, 1) == pytest.approx(1000 / 830)
    text = cost_text(TABLE, 1)
    assert text.startswith("warning: the policy network costs 23.0 %")
    assert "at most 1.20 x fewer FLOPs" in text
    cheap = FlopsTable(policy=40, stem=100, branches=(400, 400), shortcuts=(0, 50), head=50)
    assert not cost_text(cheap, 1).startswith("warning")
    assert "at most" not in cost_text(cheap, None)


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 64), ("resnet18", 112), ("resnet18", 224), ("resnet34", 96), ("resnet50", 112)]
)
def test_the_default_policy_of_small_imagenet_networks_is_cheap(name: str, side: int) -> None:
    """Oracle: the share of FLOPs, counted anew; the paper's policy costs more than 5 % of all but the largest."""
    network = resnet_spec(name)
    chosen = fitting_policy(network, (side, side))
    share = policy_share(network, chosen, (side, side))
    assert 0.01 < share <= LARGEST_POLICY_SHARE
    assert policy_share(network, policy_spec(network), (side, side)) > share


def test_the_largest_that_fits_is_taken() -> None:
    """Oracle: a network so large that the paper's own policy fits gets it, or a dearer one."""
    network = resnet_spec("resnet152")
    chosen = fitting_policy(network, (64, 64))
    paper = policy_spec(network)
    assert isinstance(chosen, PolicySpec)
    assert policy_share(network, chosen, (64, 64)) >= policy_share(network, paper, (64, 64))


def test_build_says_what_the_policy_costs_in_flops_and_in_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the manifest's FLOPs and masks; the shares of time from the two times that are given beside them."""
    written = tmp_path / "build.json"
    assert main(["build", "zoo:resnet20-digits", "--out", str(tmp_path / "b"), "--json", str(written)]) == 0
    result = json.loads(written.read_text())
    cost, manifest = result["policy_cost"], open_bundle(tmp_path / "b").manifest
    full = manifest.parts["full"].flops
    assert cost["flops_share"] == pytest.approx(manifest.parts["policy"].flops / full)
    assert cost["time_share"] == pytest.approx(cost["policy_ms"] / cost["full_ms"])
    assert 1 < cost["flops_ceiling"] < full / manifest.parts["policy"].flops
    assert any(note.startswith("warning: the policy network costs 7.5 %") for note in result["notes"])
    assert (
        "costs 7.5 % of the full network's FLOPs: at 3.8 of 9 blocks"
        in capsys.readouterr().err.partition("exporting")[0]
    )
    path = 1 / cost["flops_ceiling"] - cost["flops_share"]
    assert cost["time_ceiling"] == pytest.approx(1 / (cost["time_share"] + path))


def test_without_measuring_and_without_masks_less_is_said(tmp_path: Path) -> None:
    """Property: what is not known is left out."""
    config = BuildConfig(fused=FusedConfig(measure=False))
    built = build_bundle("zoo:resnet20-digits", tmp_path / "b", config=config)
    assert "time_share" not in built.policy_cost
    built.manifest.policy_statistics.clear()
    bare = policy_cost(built.manifest, None)
    assert bare["flops_ceiling"] is None
    assert "at most" not in bundle_text(bare)
