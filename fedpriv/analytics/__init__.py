"""Federated analytics: questions about the clients' data, answered by one ordinary round with ordinary noise.

An analysis is one step of gradient descent on a linear loss. A record r has the bounded vector phi(r), which joins the
vectors of all queries, and the loss -<x, phi(r)>. Its gradient does not depend on x, so from x = 0, with step size 1,

    x = mean over clients of (mean over the client's records of phi) + noise.

The released model therefore *is* the noised statistic. Bounds, noise, plans, engines, ledgers and policies are those of
training; nothing here draws noise or accounts for it. `queries` has phi and reads the answers from x; `statistics` is
the model and its loss.

`moments` is another one-round question, of linear regression with few parameters.
"""

from fedpriv.analytics.moments import SparseMoments

__all__ = ["SparseMoments"]
