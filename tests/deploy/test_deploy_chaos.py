"""Error feedback on a network and disks that fail: at least sixty turns, for thousands of seeds."""

import os
from pathlib import Path

import pytest
from chaos import World

from fedpriv.deploy.device.policy import AcceptedTrust
from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg

METHODS = {
    "alpha-normec": AlphaNormEC(alpha=1.0, beta=0.2, server_lr=0.1),
    "damped": AlphaNormEC(alpha=1.0, beta=0.2, server_lr=0.1, damping=0.1),
    "clip21": Clip21(clip_norm=1.0, server_lr=0.1),
    "dp-fedavg": DPFedAvg(clip_norm=1.0, server_lr=0.1),
}
SENT = AlphaNormEC(alpha=1.0, beta=0.2, server_lr=0.1, memory="sent")
# More seeds than in continuous integration: FEDPRIV_CHAOS=100 pytest tests/deploy/test_deploy_chaos.py
SEEDS = range(2 * int(os.environ.get("FEDPRIV_CHAOS", "1")))


@pytest.mark.parametrize("trust", ["none", "central", "local", "aggregator"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.sampled
def test_memories_agree_and_nothing_is_noised_twice(name: str, trust: AcceptedTrust, tmp_path: Path) -> None:
    for seed in SEEDS:
        World(tmp_path / str(seed), METHODS[name], trust, seed).run()


@pytest.mark.parametrize("name", ["dp-fedavg", "clip21"])
@pytest.mark.parametrize("apart", [2, 3])
@pytest.mark.sampled
def test_memories_agree_with_noise_that_returns_and_answers_are_far_enough_apart(
    name: str, apart: int, tmp_path: Path
) -> None:
    for seed in SEEDS:
        world = World(tmp_path / str(seed), METHODS[name], "central", seed, apart=apart)
        world.run()
        assert {"applied", "too few"} <= {outcome.happened for outcome in world.outcomes}


def test_sent_memories_agree(tmp_path: Path) -> None:
    for seed in SEEDS:
        World(tmp_path / str(seed), SENT, "local", seed).run()
