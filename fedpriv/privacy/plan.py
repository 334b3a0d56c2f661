import math
from dataclasses import dataclass
from fedpriv.privacy.sampling import Sampling
from fedpriv.privacy.accounting import calibrate, epsilon_spent, least_bound
from fedpriv.errors import UserError
@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    trust: str; adjacency: str; sampling: Sampling; rounds: int; delta: float; l2_bound: float; noise_multiplier: float; unit: str = "client"
    @property
    def l2_sensitivity(self): return self.l2_bound * (2.0 if self.adjacency == "replace" else 1.0)
    @property
    def noise_stddev(self): return self.noise_multiplier * self.l2_sensitivity
    @property
    def accountant(self): return "PLD"
    @property
    def epsilon(self): return self.epsilon_after(self.rounds)
    def epsilon_after(self, k): return epsilon_spent(trust=self.trust, adjacency=self.adjacency, sampling=self.sampling, noise_multiplier=self.noise_multiplier, rounds=k, delta=self.delta, horizon=max(self.rounds,1))
    def epsilon_of_participations(self, k): return self.epsilon_after(k)
    def as_dict(self): return dict(private=True, epsilon=self.epsilon, delta=self.delta, noise_multiplier=self.noise_multiplier, noise_stddev=self.noise_stddev, l2_sensitivity=self.l2_sensitivity, trust=self.trust, adjacency=self.adjacency, accountant="PLD", adversary="x")
def make_plan(*, trust, adjacency=None, sampling, rounds, delta, l2_bound, epsilon=None, noise_multiplier=None, unit="client"):
    adjacency = adjacency or ("replace" if trust == "local" else "add-or-remove")
    if noise_multiplier is None: noise_multiplier = calibrate(trust=trust, adjacency=adjacency, sampling=sampling, rounds=rounds, delta=delta, epsilon=epsilon)
    return PrivacyPlan(trust=trust, adjacency=adjacency, sampling=sampling, rounds=rounds, delta=delta, l2_bound=l2_bound, noise_multiplier=noise_multiplier)
def privacy_statement(plan, *, method, randomness): return "tmp"
