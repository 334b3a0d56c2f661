"""How far each message shows a canary: the lengths of pushes, from the batches that the auditor knows.

The gradients are those of `fedpriv.audit.gradients`; the lengths are `Canaries.weights`:

| client | a push in round k, in units of the longest of one example |
|---|---|
| full gradients | 1 |
| secret batches | 1 if the example is in the batch, otherwise 0 |
| `dp-sgd` | the number of batches with the example; each of them is charged |
| `diff2`, `private-spiderboost` | 1, and `restart_weight` at restarts |
| `dice-sgd` | what its own bound lets through, and what the residual returns from earlier rounds |

With `dice-sgd` the claim is that of the canaries' own pushes under the plan's noise. It is below the plan's, which
covers clients whose other examples hold a part back for many rounds and release it at once.
"""

from dataclasses import replace

import numpy as np

from fedpriv.audit.canaries import BATCHES, Canaries, generator
from fedpriv.audit.gradients import canary_examples
from fedpriv.experiment.build import Experiment
from fedpriv.methods import own_signal_of
from fedpriv.privacy.records import ExampleTerms
from fedpriv.tasks.local_work import DPSGD, PoissonGradient, batches_of

__all__ = ["with_weights"]


def with_weights(canaries: Canaries, experiment: Experiment) -> Canaries:
    """Return the canaries with the lengths of their pushes in messages; see the module."""
    people = experiment.population
    terms, own = people.rules.examples, own_signal_of(people.rules.method)
    weights = np.ones(canaries.signs.shape)
    if own is not None:
        rule, bound = own.example_rule, float(people.rules.method.bounded.l2_bound)
        if rule.period is not None:
            weights[:, :: rule.period] = rule.restart_weight
            weights /= bound if terms is None else 1.0
        if rule.clip_norm is not None and rule.feedback_clip is not None:
            share = 1.0 if terms is None else 1.0 / terms.examples
            clips = share * rule.clip_norm, rule.feedback_clip, share * (rule.example_clip - rule.clip_norm)
            weights = _with_residuals(canaries, *clips) / (bound if terms is None else terms.alone)
    if terms is None or not isinstance(people.work, PoissonGradient | DPSGD):
        return canaries if own is None else replace(canaries, weights=weights)
    used = _uses(canaries, experiment, terms)
    return replace(canaries, weights=weights * used, charged=used if terms.steps else None, batched=terms.rate < 1.0)


def _with_residuals(canaries: Canaries, clip: float, feedback_clip: float, cut: float) -> np.ndarray:
    """Return the lengths of pushes if clients return parts that were cut off, `[candidates, rounds]`.

    Args:
        canaries: The canaries.
        clip: Length of a push in its own round.
        feedback_clip: The most that returns in a round.
        cut: Length of the part of a push that is cut off.
    """
    lengths, residual = np.zeros(canaries.signs.shape), np.zeros(len(canaries.signs))
    for k in range(canaries.signs.shape[1]):
        present, signs = canaries.takes_part[:, k], canaries.signs[:, k]
        returned = np.clip(residual, -feedback_clip, feedback_clip)
        lengths[:, k] = (clip * signs + returned) * signs
        residual = np.where(present, residual - returned + cut * signs, residual)
    return lengths


def _uses(canaries: Canaries, experiment: Experiment, terms: ExampleTerms) -> np.ndarray:
    """Return in how many batches of a round each candidate is, `[candidates, rounds]`.

    The batches of canary clients are those that they draw themselves; other candidates have none, and get a draw alike.
    """
    people, (_, labels) = experiment.population, canary_examples(terms)
    each, streams = max(terms.steps, 1), people.rules.streams
    used = generator(canaries.seed, BATCHES).binomial(each, terms.rate, canaries.signs.shape).astype(np.float64)
    for position, candidate in enumerate(canaries.planted.tolist()):
        client = people.federation.population + position
        for k in np.flatnonzero(canaries.takes_part[candidate]).tolist():
            batches = batches_of(people.work, streams, len(labels), k + 1, client)
            used[candidate, k] = sum(batch is None or 0 in batch for batch in batches)
    return used
