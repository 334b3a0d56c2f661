"""A third trust: one class, as secure aggregation would be."""

import math
from dataclasses import dataclass
from typing import ClassVar

from fedpriv.privacy import Adjacency, Shares

__all__ = ["Pooled"]


@dataclass(frozen=True)
class Pooled:
    """Every client adds its share of the noise, and the server sees the sum alone."""

    name: ClassVar[str] = "pooled"
    adversary: ClassVar[str] = "the server itself, who sees the sum of the messages and who took part"
    seen: ClassVar[str] = "every noised sum"
    noised: ClassVar[str] = "the sum of a round's messages, in equal shares"
    default_adjacency: ClassVar[Adjacency] = "replace"
    reliance: ClassVar[int] = 1
    trusts_server: ClassVar[bool] = False
    clients_add_noise: ClassVar[bool] = True
    shows_messages: ClassVar[bool] = False
    hides_cohorts: ClassVar[bool] = False
    charges_participations: ClassVar[bool] = False
    secure_sums: ClassVar[bool] = False

    def split(self, stddev: float, cohort: float) -> Shares:
        return Shares(server=0.0, client=stddev / math.sqrt(cohort))

    def noises(self, cohort: float) -> float:
        return 1.0

    def more_clients(self, excess: float) -> float:
        return excess

    def who(self, most: str) -> str:
        return f"Adversary: {self.adversary}. Every client adds its share of the noise. {most}"
