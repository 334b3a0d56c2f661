"""Engines, which run the clients of a round: the loop (reference) and the vectorized engine."""

from fedpriv.engines.base import Engine, Population, one_thread, with_metrics
from fedpriv.engines.loop import LoopEngine
from fedpriv.engines.states import StateStore
from fedpriv.engines.vectorized import VectorizedEngine

__all__ = ["Engine", "LoopEngine", "Population", "StateStore", "VectorizedEngine", "one_thread", "with_metrics"]
