"""Heavy hitters: the most frequent items of a large domain, by a tree of prefixes.

`oracles` has the randomized reports of local privacy, `prefixes` the items and their prefixes, `tree` the rules by
which a tree grows, `local` the rounds in which every user reports once, and `scores` compares with the true items.
"""

from fedpriv.analytics.heavy.oracles import OLH, ORACLES, OUE, KRandomizedResponse, Oracle

__all__ = ["OLH", "ORACLES", "OUE", "KRandomizedResponse", "Oracle"]
