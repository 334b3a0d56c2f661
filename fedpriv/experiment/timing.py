"""An experiment on the virtual clock: its timeline, and its steps on any engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import fsum, nan
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fedpriv.clock import Clock, Fleet, Step, Timeline
from fedpriv.data.federation import Holders
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config
from fedpriv.methods import has_memory
from fedpriv.privacy import Everyone, Sampling, trust_of
from fedpriv.rounds import Broadcast, ServerRules, Total, capacity_of
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import LocalWork, uses_of_batch

if TYPE_CHECKING:
    from fedpriv.engines import Engine

__all__ = [
    "Versions",
    "clock_is_public",
    "clock_row",
    "gradient_examples",
    "lateness_row",
    "make_timeline",
    "sampling_under",
]

# Models and messages are float32.
_BYTES = 4


def make_timeline(config: Config, federation: Holders, parameters: int) -> Timeline | None:
    """Compute all steps of a run from public values: devices, numbers of examples, the model's size, the seed.

    Args:
        config: The experiment.
        federation: Provides the clients' numbers of examples.
        parameters: The model's number of parameters.

    Returns:
        None without `[devices]`, because there is no clock then. Otherwise at least one step, even for a run of zero.

    Raises:
        UserError: If the schedule does not suit the cohort or the method, or no client is ever in time.
    """
    if config.devices is None:
        return None
    streams, sizes, memory = SeededStreams(config.seed), federation.sizes, has_memory(config.method)

    @cache
    def work(examples: int) -> int:
        return gradient_examples(config.local, examples)

    clock = Clock(
        fleet=Fleet(config.devices, federation.population, streams),
        examples=lambda client: work(int(sizes[client])),
        model_bytes=_BYTES * parameters,
        streams=streams,
    )
    sampling = config.cohort.of(federation.population)
    config.rule.check(sampling, memory=memory)
    steps, hidden = max(config.training.rounds, 1), not clock_is_public(config)
    timeline = config.rule.timeline(clock, sampling, steps, memory=memory, hidden=hidden)
    if any(len(step.asked) for step in timeline.steps) and not any(len(step.counted) for step in timeline.steps):
        remedy = "Allow more time in [schedule], or faster [devices]"
        raise UserError("[schedule]", "a message that counts", f"0 in {steps} steps", remedy)
    return timeline


def gradient_examples(work: LocalWork, examples: int) -> int:
    """Return the number of example gradients that a client with `examples` computes in one participation."""
    batches = work.batches(examples, np.random.default_rng(0))
    return uses_of_batch(work) * sum(examples if batch is None else len(batch) for batch in batches)


def clock_is_public(config: Config) -> bool:
    """Return True if the clock and the number of messages may appear among the released values.

    They may not if the account relies on a secret cohort: the duration of a round would show who was in it.
    """
    sampled = config.rule.draws_cohorts and config.cohort.sampling != Everyone.name
    if not sampled or config.privacy is None:
        return True
    everyone_answers = config.aggregation is not None and config.aggregation.everyone_answers
    return not (everyone_answers or trust_of(config.privacy.trust).hides_cohorts)


def sampling_under(config: Config, population: int, timeline: Timeline | None) -> Sampling:
    """Return the sampling to account for: the drawn cohorts, or the timeline."""
    if timeline is None or config.rule.draws_cohorts:
        return config.cohort.of(population)
    return timeline.scheduled()


def clock_row(step: Step | None) -> dict[str, object]:
    """Return the clock after a step, and the totals sent since the run began; None is before the first step."""
    if step is None:
        return {"simulated_seconds": 0.0, "bytes_down": 0, "bytes_up": 0, "counted": 0}
    sent = {"bytes_down": step.bytes_down, "bytes_up": step.bytes_up}
    return {"simulated_seconds": step.seconds, **sent, "counted": len(step.counted)}


def lateness_row(step: Step) -> dict[str, object]:
    """Return how many clients were asked, dropped out or answered too late, and how stale the counted ones were."""
    many = {"asked": len(step.asked), "late": len(step.late), "dropped": len(step.dropped)}
    return {**many, "staleness": step.staleness}


@dataclass
class Versions:
    """The models that clients still work on, by the number of steps before each.

    Args:
        timeline: Determines how long each model is needed.
        kept: The models `[params]`.
    """

    timeline: Timeline
    kept: dict[int, Tensor] = field(default_factory=dict)

    def moved(self, number: int, model: Tensor) -> None:
        """Add the model after a step, and drop those that no client works on any more."""
        self.kept[number] = model
        last = self.timeline.last_use
        self.kept = {start: kept for start, kept in self.kept.items() if last.get(start, 0) > number}

    def older_than(self, number: int) -> Mapping[int, Tensor]:
        """Return the models to save besides the newest one."""
        return {start: model for start, model in self.kept.items() if start < number}

    def total(self, engine: "Engine", server: ServerRules, number: int) -> Total:
        """Return the weighted sum of the messages that count in a step.

        Each group of clients is a broadcast of the model that they started from. A client's noise and batches belong to
        the step in which it counts. Sums on the grid are weighted and added in float64, in the timeline's order. The
        rounding error is about 2^-53 of the sum, far below the slack of bounded maps, and zero if all weights are 1.
        """
        capacity, parts = capacity_of(server.sampling), []
        for part, group in enumerate(self.timeline.step(number).groups):
            broadcast = Broadcast(number, self.kept[group.start], group.clients, capacity, part)
            parts.append((group.weight, engine.sum_messages(broadcast)))
        return _weighed(parts)


def _weighed(parts: list[tuple[float, Total]]) -> Total:
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    sum_ = parts[0][0] * parts[0][1].sum
    for weight, total in parts[1:]:
        sum_ += weight * total.sum
    finite = [total.messages - total.non_finite for _, total in parts]
    norms = [count * total.signal_norm for count, (_, total) in zip(finite, parts, strict=True) if count]
    return Total(
        sum_,
        sum(total.messages for _, total in parts),
        sum(total.non_finite for _, total in parts),
        fsum(norms) / sum(finite) if norms else nan,
    )
