"""An experiment on the virtual clock: its timeline, and its steps run by any engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import fsum, nan
from typing import TYPE_CHECKING, Any

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
from fedpriv.tasks.local_work import LocalWork

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
    """All steps of a run, from what is public: devices, numbers of examples, the model's size, the seed.

    Args:
        config: The experiment.
        federation: Gives the clients' numbers of examples.
        parameters: The model's.

    Returns:
        None without `[devices]`: there is no clock then. Else at least one step, also for a run of none.

    Raises:
        UserError: If the schedule cannot serve the cohort or the method, or nobody is ever in time.
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
        remedy = "Give clients more time in [schedule], or faster [devices]"
        raise UserError("[schedule]", "a client whose message counts", f"none in {steps} steps", remedy)
    return timeline


def gradient_examples(work: LocalWork, examples: int) -> int:
    """How many examples of gradient work a client with so many does in one participation, over all its steps."""
    batches = work.batches(examples, np.random.default_rng(0))
    return sum(examples if batch is None else len(batch) for batch in batches)


def clock_is_public(config: Config) -> bool:
    """Whether the clock and the number of messages may be shown with what is released.

    Not where the account relies on a cohort that nobody knows: how long a round took says who was in it.
    """
    sampled = config.rule.draws_cohorts and config.cohort.sampling != Everyone.name
    return not (sampled and config.privacy is not None and trust_of(config.privacy.trust).hides_cohorts)


def sampling_under(config: Config, population: int, timeline: Timeline | None) -> Sampling:
    """What is accounted: the cohorts that are drawn, or the timeline."""
    if timeline is None or config.rule.draws_cohorts:
        return config.cohort.of(population)
    return timeline.scheduled()


def clock_row(step: Step | None) -> dict[str, Any]:
    """The clock after a step, and what was sent since the run began; None is before the first."""
    if step is None:
        return {"simulated_seconds": 0.0, "bytes_down": 0, "bytes_up": 0, "counted": 0}
    sent = {"bytes_down": step.bytes_down, "bytes_up": step.bytes_up}
    return {"simulated_seconds": step.seconds, **sent, "counted": len(step.counted)}


def lateness_row(step: Step) -> dict[str, Any]:
    """How many were asked, never answered, and answered in vain; and how many steps behind those were who counted."""
    many = {"asked": len(step.asked), "late": len(step.late), "dropped": len(step.dropped)}
    return {**many, "staleness": step.staleness}


@dataclass
class Versions:
    """The models that some message is still to be made from, by the number of steps before them.

    Args:
        timeline: Says until when each is needed.
        kept: The models `[params]`.
    """

    timeline: Timeline
    kept: dict[int, Tensor] = field(default_factory=dict)

    def moved(self, number: int, model: Tensor) -> None:
        """Takes up the model after a step, and forgets those from which nothing is made any more."""
        self.kept[number] = model
        last = self.timeline.last_use
        self.kept = {start: kept for start, kept in self.kept.items() if last.get(start, 0) > number}

    def older_than(self, number: int) -> Mapping[int, Tensor]:
        """What must be saved beside the newest model."""
        return {start: model for start, model in self.kept.items() if start < number}

    def total(self, engine: "Engine", server: ServerRules, number: int) -> Total:
        """The weighted sum of the messages that count in a step.

        Each group of clients is a broadcast of the model that they started from; a client's noise and batches belong
        to the step in which it counts. Sums on the grid are weighed and added in float64, in the timeline's order: what
        that rounds is some 2^-53 of the sum, far below what bounded maps leave free, and nothing where weights are 1.
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
