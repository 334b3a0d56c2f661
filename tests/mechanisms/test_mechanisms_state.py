"""Mechanisms with a state: a small one in the three functions of a round and in a checkpoint."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.helpers import same
from torch import Tensor

import fedpriv.rounds
from fedpriv.experiment.config import load_config
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.watching import StopRun
from fedpriv.mechanisms.noise import Gaussian, release_sum
from fedpriv.methods import AlphaNormEC, DPFedAvg, Method, optimized
from fedpriv.methods.server_optimizers import Adam
from fedpriv.privacy import Everyone, Poisson, make_plan
from fedpriv.rounds import Agreement, ServerRules, begin_round, client_round, finish_round, make_agreement
from fedpriv.streams import SeededStreams, Streams

SIZE = 40
QUICKSTART = Path(__file__).parents[2] / "sim_configs" / "quickstart.toml"


class LastNoise(NamedTuple):
    noise_last: Tensor


@dataclass(frozen=True)
class TakesBack:
    """First-order correlated noise: each round subtracts a share of the previous round's noise."""

    stddev: float
    share: float = 1.0

    def init(self, size: int) -> LastNoise:
        return LastNoise(torch.zeros(size, dtype=torch.float64))

    def noise(self, state: LastNoise, total: Tensor, streams: Streams, round: int) -> tuple[Tensor, LastNoise]:
        fresh = release_sum(streams, self.stddev, torch.zeros_like(total), round)
        return total + fresh - self.share * state.noise_last, LastNoise(fresh)

    def sensitivity(self, moved: float, rounds: float) -> float:
        """Releases are (1 - share L)^-1 times the values that fresh noise hides; L shifts to the next round."""
        reached = [sum(self.share**j for j in range(k + 1)) for k in range(int(rounds))]
        return moved * math.hypot(*reached)

    def event(self, moved: float, rounds: float) -> float:
        return self.sensitivity(moved, rounds) / self.stddev


def agreed(method: Method, mechanism: type = TakesBack) -> Agreement:
    plan = make_plan(
        trust="central",
        sampling=Everyone(4),
        rounds=9,
        delta=1e-5,
        l2_bound=method.bounded.l2_bound,
        noise_multiplier=2.0,
    )
    rules = make_agreement(method, Everyone(4), plan, SeededStreams(3))
    return rules._replace(server=replace(rules.server, mechanism=mechanism(rules.server.noise_stddev)))


def played(rules: Agreement, state: Any, clients: list[Any], first: int, last: int) -> Any:
    """Run rounds `first` to `last` of clients with fixed signals."""
    for number in range(first, last + 1):
        broadcast = begin_round(rules.server, state, number)
        total = torch.zeros(SIZE, dtype=torch.float64)
        for client in broadcast.cohort.tolist():
            signal = torch.sin(torch.arange(SIZE) * (client + 1.0))
            message, clients[client] = client_round(rules.client, client, clients[client], signal, number)
            total += message.double()
        state = finish_round(rules.server, state, number, total)
    return state


def test_what_it_remembers_goes_from_round_to_round() -> None:
    """All noise except the last round's is subtracted: the models end one draw from the noiseless one."""
    method = DPFedAvg(clip_norm=1.0, server_lr=1.0)
    rules, quiet = agreed(method), agreed(method, lambda _: Gaussian(0.0))  # type: ignore[arg-type]
    ends = [
        played(one, one.server.init(torch.zeros(SIZE)), [method.init_client(SIZE) for _ in range(4)], 1, 9)
        for one in (rules, quiet)
    ]
    drawn = release_sum(rules.server.streams, rules.server.noise_stddev, torch.zeros(SIZE, dtype=torch.float64), 9)
    assert rules.server.noise_stddev > 0.0
    assert torch.allclose(ends[0].model, ends[1].model - drawn.float() / 4.0, atol=1e-5)
    assert torch.equal(ends[0].noise_last, drawn)
    assert "noise_last" not in ends[1]._fields


@pytest.mark.parametrize("method", [AlphaNormEC(), optimized(AlphaNormEC(), Adam())])
def test_its_state_stands_beside_the_methods_and_stays_when_memories_are_reset(method: Method) -> None:
    rules = agreed(method)
    state: Any = played(rules, rules.server.init(torch.ones(SIZE)), [method.init_client(SIZE) for _ in range(4)], 1, 3)
    assert state._fields == (*method.init_server(torch.ones(1))._fields, "noise_last")
    assert float(state.memory.abs().sum()) > 0.0
    anew: Any = rules.server.reset_memories(state)
    assert float(anew.memory.abs().sum()) == 0.0
    assert same(anew.model, state.model)
    assert same(anew.noise_last, state.noise_last)
    assert not torch.equal(anew.model, torch.ones(SIZE))


def test_a_state_without_the_mechanisms_part_is_refused_by_name() -> None:
    method = DPFedAvg(clip_norm=1.0)
    rules = agreed(method)
    for use in (rules.server.voids, rules.server.reset_memories, lambda state: begin_round(rules.server, state, 1)):
        with pytest.raises(ValueError, match=r"fields model, noise_last, got model: use ServerRules\.init"):
            use(method.init_server(torch.zeros(SIZE)))


def test_a_mechanism_without_a_state_leaves_the_methods_own() -> None:
    method = AlphaNormEC()
    rules = ServerRules(method=method, sampling=Poisson(4, 0.5), mechanism=Gaussian(1.0), streams=SeededStreams(0))
    state = rules.init(torch.ones(3))
    assert type(state) is type(method.init_server(torch.ones(3)))
    after = finish_round(rules, state, 1, torch.zeros(3))
    assert type(after) is type(state) is type(rules.reset_memories(after))


def test_a_run_goes_on_from_its_checkpoint_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedpriv.rounds, "Gaussian", TakesBack)
    config = load_config(QUICKSTART, ["data.clients=12", "training.rounds=6"])

    def stop(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["round"] == 3:
            raise StopRun("enough")

    run_experiment(config, tmp_path / "whole", engine="loop")
    with pytest.raises(StopRun):
        run_experiment(config, tmp_path / "parts", engine="loop", watch=stop)
    saved = (tmp_path / "parts" / "checkpoint.safetensors").read_bytes()
    assert b"server.noise_last" in saved
    run_experiment(config, tmp_path / "parts", engine="loop", resume=True)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]
    assert RunDirectory(tmp_path / "parts").rows("rounds.jsonl")[-1]["round"] == 6
    monkeypatch.setattr(fedpriv.rounds, "Gaussian", lambda stddev: TakesBack(stddev, share=0.0))
    run_experiment(config, tmp_path / "fresh", engine="loop")
    assert (tmp_path / "fresh" / "model.safetensors").read_bytes() != models[0]


def test_what_it_says_of_itself_is_what_accounting_asks() -> None:
    """With fresh noise, rounds are orthogonal. Subtracted noise hides less: one message then stays forever."""
    fresh, correlated = Gaussian(2.0), TakesBack(2.0)
    assert fresh.sensitivity(3.0, 4) == 6.0
    assert fresh.event(3.0, 4) == 3.0
    assert fresh.event(3.0, 0) == 0.0
    assert Gaussian(0.0).event(3.0, 0) == 0.0
    assert Gaussian(0.0).event(3.0, 1) == math.inf
    assert TakesBack(2.0, share=0.0).event(3.0, 4) == fresh.event(3.0, 4)
    assert correlated.sensitivity(1.0, 2) == pytest.approx(math.sqrt(1.0 + 4.0))
    assert correlated.event(3.0, 4) > fresh.event(3.0, 4)
