"""Runs with correlated noise: configs, engines, resumption, files, statements and refusals."""

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fedpriv.cli import main
from fedpriv.engines import LoopEngine
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config, PrivacyChoice, load_config, parse_config
from fedpriv.experiment.in_python import Experiment
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.watching import StopRun
from fedpriv.flower.privacy_terms import PrivacyTerms, promised
from fedpriv.mechanisms.coefficients import optimal_coefficients
from fedpriv.mechanisms.gaussian import release_grid, rounded_noise
from fedpriv.methods import DPFedAvg
from fedpriv.privacy import Everyone, NoiseChoice, Separated, privacy_statement
from fedpriv.rounds import begin_round, finish_round
from fedpriv.streams import Purpose

ROUNDS = 8
TURNS = {"sampling": "separated", "min_separation": 3}
SHIPPED = Path(__file__).parents[2] / "sim_configs" / "correlated-noise.toml"


def tables(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "name": "turns",
        "seed": 3,
        "data": {"name": "digits", "clients": 12, "partition": "iid"},
        "model": {"name": "softmax"},
        "cohort": TURNS,
        "method": {"name": "alpha-normec", "beta": 0.1, "server_normalization": False, "damping": 0.1},
        "privacy": {"epsilon": 8.0, "delta": 1e-5},
        "noise": {"kind": "banded"},
        "training": {"rounds": ROUNDS, "evaluate_every": ROUNDS},
    }
    return {name: table for name, table in (given | changes).items() if table is not None}


def config(**changes: Any) -> Config:
    return parse_config(tables(**changes))


KINDS: dict[str, dict[str, Any]] = {
    "banded": {},
    "cyclic-banded": {"cohort": {**TURNS, "probability": 0.2}, "noise": {"kind": "cyclic-banded", "bands": 2}},
    "geometric-schedule": {"cohort": None, "noise": {"kind": "geometric-schedule"}},
    "independent, in turns": {"noise": None},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled
def test_engines_agree_to_the_bit_and_runs_resume_to_the_bit(kind: str, tmp_path: Path) -> None:
    made = config(**KINDS[kind])

    def stop(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["round"] == 5:
            raise StopRun("enough")

    run_experiment(made, tmp_path / "loop", engine="loop")
    run_experiment(made, tmp_path / "vectorized", engine="vectorized")
    with pytest.raises(StopRun):
        run_experiment(made, tmp_path / "parts", engine="loop", watch=stop)
    kept = tmp_path / "parts" / "checkpoint.safetensors"
    with safe_open(str(kept), framework="pt") as file:
        has_past = "server.noise_earlier" in file.keys()  # noqa: SIM118
        past = file.get_tensor("server.noise_earlier") if has_past else None
    if kind in ("banded", "cyclic-banded"):
        assert past is not None
        assert past.dtype == torch.float64
        assert past.shape == (2 if kind == "banded" else 1, 650)
        assert float(past.abs().mean()) > 0.5
    else:
        assert past is None
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    run_experiment(made, tmp_path / "parts", engine="loop", resume=True)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("loop", "vectorized", "parts")]
    assert models[0] == models[2]
    first, second = (_vector(tmp_path / name) for name in ("loop", "vectorized"))
    assert torch.allclose(first, second, atol=1e-4)
    assert not kept.exists()
    left = {file.name for file in (tmp_path / "loop").iterdir()}
    assert not any(b"noise_earlier" in (tmp_path / "loop" / name).read_bytes() for name in left)
    table = json.loads((tmp_path / "loop" / "privacy.json").read_text())
    assert table["epsilon"] == pytest.approx(8.0, rel=0.01)
    assert ("noise" in table) == (kind != "independent, in turns")


def _vector(folder: Path) -> torch.Tensor:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return torch.cat([file.get_tensor(name).flatten() for name in sorted(file.keys())])


def test_a_run_equals_an_independent_reference_in_float64() -> None:
    """Sums from the engine; noise, memory and model again from the definitions, with another loop."""
    made = config(method={"name": "dp-fedavg", "clip_norm": 0.5, "server_lr": 2.0})
    experiment = assemble(made)
    plan = experiment.plan
    assert plan is not None
    engine, state = LoopEngine(experiment.population), experiment.server.init(experiment.initial_model)
    c = optimal_coefficients(0.0, ROUNDS, 3, 3)
    model = experiment.initial_model.double().numpy()
    grid, noise = release_grid(plan.noise_stddev), np.zeros((ROUNDS, len(model)))
    for k in range(1, ROUNDS + 1):
        total = engine.sum_messages(begin_round(experiment.server, state, k)).sum
        state = finish_round(experiment.server, state, k, total)
        taken = sum((c[j] * noise[k - 1 - j] for j in range(1, min(k, 3))), np.zeros(len(model)))
        words = made.streams.source(Purpose.SERVER_NOISE, k)
        noise[k - 1] = rounded_noise(total.numpy() - taken, plan.noise_stddev, words) * grid - total.numpy()
        model = model - 2.0 * (total.numpy() + noise[k - 1]) / 4.0
        assert np.allclose(state.model.numpy(), model, atol=1e-4 * max(1.0, abs(model).max()))
    squares = 2 * sum(x * x for x in c) + sum(x * x for x in c[:2])  # turns in rounds 1, 4 and 7, of 8
    assert plan.noise_multiplier == pytest.approx(plan.noise_stddev / 0.5)
    assert plan.gaussian_dp_mu == pytest.approx(squares**0.5 / plan.noise_multiplier, rel=2e-5)
    engine.close()


def test_a_table_of_independent_noise_is_no_table() -> None:
    with_table, without = config(noise={"kind": "independent"}), config(noise=None)
    assert with_table.digest == without.digest
    assert with_table.noise_id == without.noise_id
    assert "noise" not in with_table.tables
    assert config().digest != without.digest
    assert config().noise_id != without.noise_id
    assert parse_config(config().tables) == config()


def test_an_experiment_in_python_is_that_of_the_file() -> None:
    rng = np.random.default_rng(0)
    clients = [(rng.standard_normal((4, 3), dtype=np.float32), rng.integers(2, size=4)) for _ in range(6)]
    made = Experiment(
        model=torch.nn.Linear(3, 2),
        data=clients,
        method=DPFedAvg(clip_norm=1.0),
        rounds=ROUNDS,
        privacy=PrivacyChoice(epsilon=8.0),
        cohort=Separated(6, 3),
        noise=NoiseChoice(kind="banded"),
    )
    assert made.config.tables["noise"] == {"kind": "banded"}
    assert made.config.tables["cohort"] == {"sampling": "separated", "min_separation": 3}
    plan, file = made.plan(), config(method={"name": "dp-fedavg", "clip_norm": 1.0}).plan(Separated(6, 3))
    assert plan is not None
    assert plan == file
    assert replace(made, noise=NoiseChoice(kind="independent")).config.noise is None


def test_the_noise_follows_the_methods_damping() -> None:
    found = []
    for method in (
        {"name": "alpha-normec", "server_normalization": False, "damping": 0.3},
        {"name": "alpha-normec", "server_normalization": False},
        {"name": "dp-fedavg", "clip_norm": 1.0},
    ):
        plan = config(method=method).plan(Separated(12, 3))
        assert plan is not None
        assert plan.noise is not None
        found.append(plan.noise.as_dict())
    assert [one["damping"] for one in found] == [0.3, 0.0, 0.0]
    assert found[0]["coefficients"] != found[1]["coefficients"] == found[2]["coefficients"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no privacy": ({"privacy": None}, r"\[noise\]: expected no such table without \[privacy\]"),
    "everyone": ({"cohort": None}, r"cohort\.sampling: .*1\.225"),
    "poisson": ({"cohort": {"sampling": "poisson", "probability": 0.1}}, r"cohort\.sampling: .*1\.225"),
    "local": ({"privacy": {"trust": "local", "epsilon": 8.0}}, r"cohort\.sampling: .*own noise cannot return"),
    "aggregator": ({"privacy": {"trust": "aggregator", "epsilon": 8.0}}, r"clients|cohort\.sampling"),
    "examples": (
        {"privacy": {"unit": "example", "example_clip": 1.0, "epsilon": 8.0}},
        r'cohort\.sampling: expected no such value with privacy\.unit = "example"',
    ),
    "clock": (
        {"devices": {"kind": "same", "speed": 10.0, "download": 1e6, "upload": 1e6}},
        r"cohort\.sampling: expected no such value with \[devices\]",
    ),
    "bands": ({"noise": {"kind": "banded", "bands": 4}}, r"noise\.bands: expected at most 3"),
    "unknown": ({"noise": {"kind": "bandit"}}, r"noise\.kind: expected a known name.*banded"),
    "key": ({"noise": {"kind": "banded", "band": 4}}, r"noise\.band: expected a known key"),
    "damping": (
        {"cohort": None, "noise": {"kind": "geometric-schedule"}, "method": {"name": "dp-fedavg", "clip_norm": 1.0}},
        r"method\.damping: expected above 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_offered_is_refused_with_the_reason(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        config(**changes)


SAMPLED = {
    "banded": Separated(12, 3),
    "cyclic-banded": Separated(12, 3, 0.2),
    "geometric-schedule": Everyone(12),
    "independent, in turns": Separated(12, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_terms_say_what_the_plan_says(kind: str) -> None:
    """A client computes the server's epsilon from the terms, for any bound of messages."""
    made = config(**KINDS[kind])
    made.check_deployable()
    plan = made.plan(SAMPLED[kind])
    assert plan is not None
    terms = PrivacyTerms(**promised(plan, plan.sampling, ROUNDS))
    assert terms.plan(plan.l2_bound) == plan
    assert terms.in_turns
    assert replace(terms, separation=1, noise="").in_turns is False


WRONG_TERMS: dict[str, dict[str, Any]] = {
    "no JSON": {"noise": "{"},
    "a list": {"noise": "[]"},
    "deep": {"noise": "[" * 100_000},
    "another kind": {"noise": '{"kind": "magic", "rounds": 8, "damping": 0.0}'},
    "fewer rounds": {"noise": '{"kind": "banded", "rounds": 7, "damping": 0.0, "coefficients": [1.0]}'},
    "more rounds": {"noise": '{"kind": "banded", "rounds": 9, "damping": 0.0, "coefficients": [1.0]}'},
    "a share above one": {"noise": '{"kind": "geometric-schedule", "rounds": 8, "damping": 1.5}'},
    "no first": {"noise": '{"kind": "banded", "rounds": 8, "damping": 0.0, "coefficients": []}'},
    "a small first": {"noise": '{"kind": "banded", "rounds": 8, "damping": 0.0, "coefficients": [0.5]}'},
    "rising": {"noise": '{"kind": "banded", "rounds": 8, "damping": 0.0, "coefficients": [1.0, 0.2, 0.3]}'},
    "negative": {"noise": '{"kind": "banded", "rounds": 8, "damping": 0.0, "coefficients": [1.0, -0.2]}'},
    "no number": {"noise": '{"kind": "banded", "rounds": 8, "damping": 0.0, "coefficients": [1.0, NaN]}'},
    "words": {"noise": '{"kind": "banded", "rounds": 8, "damping": 0.0, "coefficients": "1"}'},
    "huge": {
        "noise": f'{{"kind": "banded", "rounds": 8, "damping": 0.0, "coefficients": {json.dumps([1.0] * 10_001)}}}'
    },
    "windows that overlap": {
        "noise": '{"kind": "cyclic-banded", "rounds": 8, "damping": 0.0, "coefficients": [1.0, 0.5, 0.5, 0.5]}'
    },
    "no gap": {"separation": 0},
    "a gap that is not counted": {"sampling": "everyone", "probability": 1.0},
    "too many coins": {"probability": 0.5},
    "an unknown sampling": {"sampling": "balls"},
    "another trust": {"trust": "local"},
}


@pytest.mark.parametrize("case", WRONG_TERMS)
def test_terms_that_are_none_are_refused(case: str) -> None:
    plan = config().plan(Separated(12, 3))
    assert plan is not None
    terms = replace(PrivacyTerms(**promised(plan, plan.sampling, ROUNDS)), **WRONG_TERMS[case])
    with pytest.raises(UserError):
        terms.plan(1.0)


def test_the_shipped_config_says_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    made = load_config(SHIPPED)
    assert made.noise is not None
    with pytest.raises(SystemExit, match="0"):
        main(["privacy", str(SHIPPED)])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "banded matrix factorization, 20 bands",
        "at least 20 rounds apart and at most 5",
        "the server keeps it in its checkpoint alone",
        "each group has its turn in every 20th round, in which all of it take part",
        "charged as one release of that sensitivity",
    ):
        assert words in said
    with pytest.raises(SystemExit, match="0"):
        main(["privacy", str(SHIPPED), "--json"])
    table = json.loads(capsys.readouterr().out)
    assert table["noise"]["bands"] == 20
    assert table["sampling"]["min_separation"] == 20
    assert table["amplification"] is False


@pytest.mark.parametrize("kind", ["cyclic-banded", "geometric-schedule"])
def test_statements_of_the_other_kinds(kind: str) -> None:
    made = config(**KINDS[kind])
    sampling = made.cohort.of(12) if kind == "cyclic-banded" else Everyone(12)
    said = " ".join(privacy_statement(made.plan(sampling), method="m", randomness="seeded").split())
    words = {
        "cyclic-banded": "each is charged as one release of a client that a secret coin hides",
        "geometric-schedule": "All rounds together are one Gaussian release",
    }
    assert words[kind] in said
    assert ("Epsilon relies on the adversary not knowing who took part." in said) == (kind == "cyclic-banded")
