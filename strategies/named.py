"""The strategies by name, for existing apps.

    strategy = AlphaNormEC(alpha=1.0, beta=0.1, server_lr=0.5, num_clients=100, privacy=Privacy(epsilon=8.0))
    strategy.start(grid, arrays, num_rounds=50)

with `ClientApp(mods=[private_mod])` on the client side. A method's hyperparameters are keyword arguments; each method
in `fedpriv.methods` describes its own.
"""

from inspect import signature
from typing import Any, ClassVar

from fedpriv.deploy.parties import HelperNames, named_helpers
from fedpriv.errors import UserError
from fedpriv.experiment.schema import field_names, read_table
from fedpriv.flower.server.arguments import refuse_arguments, refuse_values
from fedpriv.flower.server.promise import Privacy, refuse_unused
from fedpriv.flower.trained import digest_of
from fedpriv.methods import METHODS, AdaptiveBound, Method, ServerOptimizer, optimized, with_side_values
from fedpriv.privacy import Everyone, NoiseChoice, Sampling
from fedpriv.rounds import Agreement, make_agreement
from fedpriv.streams import SeededStreams, SystemStreams

from .method_strategy import MethodStrategy

__all__ = [
    "AlphaNormEC",
    "CenteredClip",
    "Clip21",
    "Clip21SGD2M",
    "DPFedAvg",
    "FedAlphaNormEC",
    "NamedStrategy",
    "NormalizedSGD",
    "Privacy",
]


_OWN = ("privacy", "noise", "adaptive", "server_optimizer", "cohort", "seed", "helpers", "out")
_NETWORK = [name for name, given in signature(MethodStrategy).parameters.items() if given.kind is given.KEYWORD_ONLY]


class NamedStrategy(MethodStrategy):
    """A strategy for a method by name. It makes its agreement at the start of the run.

    Args:
        privacy: The privacy guarantee; None for a run without privacy, which its log states.
        noise: The noise over rounds, such as `NoiseChoice(kind="banded")` of `fedpriv.privacy`; None for independent.
        adaptive: How the bound of messages follows a quantile: `AdaptiveBound()` of `fedpriv.methods`; None for a
            fixed bound.
        server_optimizer: Transforms the method's direction on the server, such as `Adam()` of
            `fedpriv.methods.server_optimizers`.
        cohort: The sampling of participants, such as `Poisson(population=100, probability=0.1)`; None for everyone.
        num_clients: Number of clients; None for the cohort's population, or the number that have joined.
        seed: Makes a simulation reproducible. None takes noise and cohorts from the operating system's entropy, which
            runs with real people need. Runs that differ in anything but the app and its data share no noise.
        helpers: The helpers of secure aggregation, for real nodes: their identity keys, or the folder `admin` of a
            deployment (`fedpriv.deploy.parties.named_helpers`). None for other trusts, and for a simulation.
        options: The method's hyperparameters, and further arguments of `MethodStrategy`: `evaluate`, `join_timeout`,
            `max_failures`, `trainable`, `frozen`, `heads` and `round_seconds`; and `out`, the run directory or a
            `RunFolder`; an unfinished run in it is resumed.

    Raises:
        UserError: If an option is unknown or out of range.
    """

    method_name: ClassVar[str]

    def __init__(
        self,
        *,
        privacy: Privacy | None = None,
        noise: NoiseChoice | None = None,
        adaptive: AdaptiveBound | None = None,
        server_optimizer: ServerOptimizer | None = None,
        cohort: Sampling | None = None,
        num_clients: int | None = None,
        seed: int | None = None,
        helpers: HelperNames | None = None,
        **options: Any,
    ) -> None:
        self.out, given = options.pop("out", None), {"privacy": privacy, "noise": noise, "adaptive": adaptive}
        more = {"server_optimizer": server_optimizer, "cohort": cohort, "seed": seed, "out": self.out}
        refuse_values({**given, **more})
        if cohort is not None and num_clients not in (None, cohort.population):
            raise UserError("num_clients", f"the cohort's population {cohort.population}", num_clients, "Omit it")
        kind, name = METHODS[self.method_name], type(self).__name__
        refuse_arguments(options, [*field_names(kind), *_OWN, *_NETWORK], name)
        network = {key: options.pop(key) for key in _NETWORK if key in options}
        self.method: Method = optimized(with_side_values(read_table(kind, options, name), adaptive), server_optimizer)
        self.helpers = None if helpers is None else named_helpers(helpers)
        refuse_unused(noise, privacy)
        self.privacy, self.noise = privacy, noise
        self.cohort = cohort
        self.streams = SystemStreams() if seed is None else SeededStreams(seed)
        super().__init__(self._make, num_clients=num_clients if cohort is None else cohort.population, **network)

    def _make(self, population: int, rounds: int) -> Agreement:
        sampling = self.cohort or Everyone(population)
        given = (self.method, sampling, rounds, self._layout.layout.size, self._helpers_in_plan)
        plan = None if self.privacy is None else self.privacy.plan(*given, self.noise)
        if isinstance(self.streams, SeededStreams):  # different experiments with one seed must not share noise
            begun = self._settings, digest_of(self._initial)
            done = (self.method, sampling, plan, rounds, self.arrays.trained, *begun)
            self.streams = SeededStreams(self.streams.seed, repr(done))
        return make_agreement(self.method, sampling, plan, self.streams)


class AlphaNormEC(NamedStrategy):
    """Smoothed normalization with error feedback: `fedpriv.methods.AlphaNormEC`."""

    method_name = "alpha-normec"


class FedAlphaNormEC(NamedStrategy):
    """alpha-NormEC for apps that train in local steps: `fedpriv.methods.FedAlphaNormEC`.

    The mod does not know the app's learning rate eta, so it does not divide x - x_local by it. Give alpha times eta and
    beta times eta for the paper's alpha and beta: with server normalization, the default, the result is the same.
    """

    method_name = "fed-alpha-normec"


class NormalizedSGD(NamedStrategy):
    """Smoothed normalization without memory: `fedpriv.methods.NormalizedSGD`."""

    method_name = "normalized-sgd"


class CenteredClip(NamedStrategy):
    """Signals bounded around a memory that the server broadcasts: `fedpriv.methods.CenteredClip`."""

    method_name = "centered-clip"


class Clip21(NamedStrategy):
    """Clipping with error feedback: `fedpriv.methods.Clip21`."""

    method_name = "clip21"


class Clip21SGD2M(NamedStrategy):
    """Clipping with error feedback and momentum: `fedpriv.methods.Clip21SGD2M`."""

    method_name = "clip21-sgd2m"


class DPFedAvg(NamedStrategy):
    """Clipped updates, averaged: `fedpriv.methods.DPFedAvg`."""

    method_name = "dp-fedavg"
