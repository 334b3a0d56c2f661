"""Facts of a turn under secure aggregation, which server and clients derive from the same instructions and model."""

import hashlib
import json

import torch
from torch import Tensor

from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.methods import message_size
from fedpriv.privacy import PrivacyPlan
from fedpriv.secure import RoundFacts

__all__ = ["facts_of", "order_digest"]

# The instructions' entries that differ between clients, and the seed, which a device never follows.
_OF_ONE_CLIENT = ("client", "last_round", "seed")


def facts_of(
    instructions: ClientInstructions,
    terms: RunTerms,
    model: Tensor,
    plan: PrivacyPlan,
    shared: Tensor | None = None,
) -> RoundFacts:
    """Return the facts that all clients of a turn sign; the helpers accept a sum only if they are the same for all.

    Args:
        instructions: Instructions to any client of the turn, as they were received.
        terms: Its terms.
        model: x, `[params]`.
        plan: The plan of the terms.
        shared: The vector `[params]` that the method sends beside the model, if there is one.

    Raises:
        ValueError: If the plan has no secure aggregation.
    """
    numbers, sums = plan.aggregation, plan.sums
    if numbers is None or sums is None:
        raise ValueError(f"a plan without secure aggregation: {plan}")
    return RoundFacts(
        run=terms.run,
        round=terms.turn,
        least_survivors=numbers.least_survivors,
        colluders=numbers.colluders,
        share_stddev=instructions.noise_stddev,
        grid=sums.step,
        size=message_size(instructions.method, len(model)),
        digest=order_digest(instructions, terms, model, shared),
    )


def order_digest(
    instructions: ClientInstructions, terms: RunTerms, model: Tensor, shared: Tensor | None = None
) -> bytes:
    """Return SHA-256 of the experiment, the instructions and the model, without the entries that differ by client.

    Args:
        instructions: Instructions to any client of the turn.
        terms: Terms of the run.
        model: The model, `[params]`.
        shared: The vector beside the model, `[params]`; None if the method has none.
    """
    asked = {key: value for key, value in instructions.to_record().items() if key not in _OF_ONE_CLIENT}
    asked |= {f"terms.{key}": value for key, value in terms.to_record().items() if key != "last_turn"}
    hashed = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for sent in (model, shared):
        if sent is not None:
            hashed.update(sent.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return hashed.digest()
