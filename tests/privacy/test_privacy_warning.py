"""The warning before training if noise drowns the signal, with possible remedies."""

import math

import pytest

from fedpriv.privacy import (
    Everyone,
    FixedSize,
    Poisson,
    PrivacyPlan,
    Sampling,
    TrustName,
    make_plan,
    noise_against_signal,
    privacy_statement,
    signal_warning,
)

SAMPLINGS: dict[str, Sampling] = {
    "everyone": Everyone(10),
    "poisson": Poisson(100, 0.1),
    "fixed": FixedSize(100, 10),
}


def plan_of(sampling: Sampling, trust: TrustName = "central", epsilon: float = 8.0, rounds: int = 50) -> PrivacyPlan:
    return make_plan(trust=trust, sampling=sampling, rounds=rounds, delta=1e-5, l2_bound=1.0, epsilon=epsilon)


@pytest.mark.parametrize("trust", ["central", "local"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_ratio_is_the_expected_length_of_the_noise_on_the_mean_over_the_bound(name: str, trust: TrustName) -> None:
    made, size = plan_of(SAMPLINGS[name], trust), 10_000
    on_sum = made.noise_stddev * (1.0 if trust == "central" else math.sqrt(10.0))
    assert noise_against_signal(made, size).ratio == pytest.approx(on_sum * math.sqrt(size) / 10.0)


@pytest.mark.parametrize("trust", ["central", "local"])
def test_with_the_clients_or_the_epsilon_that_it_names_there_is_no_warning(trust: TrustName) -> None:
    size = 1_000
    found = noise_against_signal(plan_of(Everyone(10), trust), size)
    assert found.clients is not None
    assert found.epsilon is not None
    assert signal_warning(plan_of(Everyone(found.clients), trust), size) is None
    assert signal_warning(plan_of(Everyone(10), trust, found.epsilon * 1.02), size) is None
    assert signal_warning(plan_of(Everyone(found.clients * 3 // 4), trust), size) is not None
    assert signal_warning(plan_of(Everyone(10), trust, found.epsilon * 0.7), size) is not None


def test_the_quickstart_is_not_warned_of_and_ten_clients_with_its_model_are() -> None:
    assert signal_warning(plan_of(Everyone(100), rounds=100), 650) is None
    warning = signal_warning(plan_of(Everyone(10), rounds=100), 650)
    assert warning is not None
    assert "times its bound" in warning
    assert "clients" in warning


def test_nothing_is_said_of_noise_where_there_is_none_or_next_to_none() -> None:
    made = make_plan(trust="central", sampling=Everyone(2), rounds=9, delta=1e-5, l2_bound=1.0, noise_multiplier=0.0)
    assert signal_warning(made, 10**6) is None


def test_the_statement_says_it_too() -> None:
    made = plan_of(Everyone(10))
    drowned = privacy_statement(made, method="a method", randomness="seeded", size=10**5)
    assert "Use: The noise on the mean message is" in drowned
    assert "Use:" not in privacy_statement(made, method="a method", randomness="seeded", size=1)
    assert "Use:" not in privacy_statement(made, method="a method", randomness="seeded")
