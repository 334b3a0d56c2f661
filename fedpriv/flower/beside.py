"""The packages beside fedpriv under a name that no app can have: `fedpriv.flower.beside.strategies` is `strategies`.

A process that gets a pickled function of them finds it by that name, too.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2])]
