"""Packages next to fedpriv under names that no app can have: `fedpriv.flower.beside.strategies` is `strategies`.

A process that unpickles one of their functions finds it by that name, too.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2])]
