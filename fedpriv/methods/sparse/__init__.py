"""Sparse linear regression under local privacy: sequential here, non-interactive in `fedpriv.analytics.moments`.

After Zhu, Ding, Aggarwal, Xu, Wang 2023, "Improved Analysis of Sparse Linear Regression in Local Differential Privacy
Model", arXiv 2310.07367, of which only the abstract was read. It states, for n users, d parameters of which k are not
zero, and up to logarithms, orders of the estimation error in the l2 norm:

| model | lower bound | upper bound |
|---|---|---|
| non-interactive | sqrt(d k log d) / (sqrt(n) epsilon) | d sqrt(k) / (sqrt(n) epsilon) |
| sequential | sqrt(d k) / (sqrt(n) epsilon) | k sqrt(d) / (sqrt(n) epsilon) |

Ours: both algorithms in detail. They bound l2 norms and add Gaussian noise, with the accounting of all other methods,
for (epsilon, delta); the paper states its orders for other algorithms.
"""

from fedpriv.methods.sparse.private_iht import PrivateIHT
from fedpriv.methods.sparse.threshold import hard_threshold

__all__ = ["PrivateIHT", "hard_threshold"]
