"""Facts of a turn under secure aggregation, which server and clients derive from the same instructions and model.

The clients of a Flower app sign everything else in the message that the app may read, too.
"""

import hashlib
import json

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedpriv.deploy.device.heads import HEAD
from fedpriv.flower.messages import FEDPRIV, SHARED, TERMS, ClientInstructions, RunTerms
from fedpriv.methods import message_size
from fedpriv.privacy import PrivacyPlan
from fedpriv.secure import RoundFacts

__all__ = ["facts_of", "order_digest", "settings_digest"]

# The instructions' entries that differ between clients, and the seed, which a device never follows.
_OF_ONE_CLIENT = ("client", "last_round", "seed")


def facts_of(
    instructions: ClientInstructions,
    terms: RunTerms,
    model: Tensor,
    plan: PrivacyPlan,
    shared: Tensor | None = None,
    settings: str = "",
) -> RoundFacts:
    """Return the facts that all clients of a turn sign; the helpers accept a sum only if they are the same for all.

    Args:
        instructions: Instructions to any client of the turn, as they were received.
        terms: Its terms.
        model: x, `[params]`.
        plan: The plan of the terms.
        shared: The vector `[params]` that the method sends beside the model, if there is one.
        settings: Digest of everything else in the message that an app may read; empty for fedpriv's clients.

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
        digest=order_digest(instructions, terms, model, shared, settings),
    )


def order_digest(
    instructions: ClientInstructions,
    terms: RunTerms,
    model: Tensor,
    shared: Tensor | None = None,
    settings: str = "",
) -> bytes:
    """Return SHA-256 of the experiment, the instructions and the model, without the entries that differ by client.

    Args:
        instructions: Instructions to any client of the turn.
        terms: Terms of the run.
        model: The model, `[params]`.
        shared: The vector beside the model, `[params]`; None if the method has none.
        settings: See `facts_of`.
    """
    asked = {key: value for key, value in instructions.to_record().items() if key not in _OF_ONE_CLIENT}
    asked |= {f"terms.{key}": value for key, value in terms.to_record().items() if key != "last_turn"}
    asked |= {"settings": settings} if settings else {}
    hashed = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for sent in (model, shared):
        if sent is not None:
            hashed.update(sent.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return hashed.digest()


def settings_digest(content: RecordDict) -> str:
    """Return a digest of everything in a message that an app may read, except instructions and the second vector.

    It covers the arrays, too: arrays that the app does not train are in no other digest.
    """
    hashed = hashlib.sha256()
    for name, record in sorted((name, record) for name, record in content.items() if name != SHARED):
        if name in content.array_records:
            for key, array in content.array_records[name].items():
                hashed.update(repr((name, key, array.dtype, tuple(array.shape), len(array.data))).encode())
                hashed.update(array.data)
        elif name not in (FEDPRIV, TERMS, HEAD):
            hashed.update(repr((name, sorted(record.items()))).encode())
    return hashed.hexdigest()
