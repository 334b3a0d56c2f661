"""A client's part of secure aggregation: it masks its noised integers for the helpers that its policy pins."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from fedpriv.deploy.device.policy import Policy
from fedpriv.deploy.facts import facts_of
from fedpriv.deploy.helper.folder import SIGNING_FILE, read_signing_key
from fedpriv.errors import UserError
from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.flower.refusals import Refusal
from fedpriv.privacy import PrivacyPlan
from fedpriv.secure import HelperKey, RoundFacts, mask_message
from fedpriv.secure.messages import require_pinned

__all__ = ["Masks", "masks_of"]


@dataclass(frozen=True)
class Masks:
    """Masks for one message.

    Args:
        facts: Facts of the turn.
        client: Number of the client.
        signer: The client's key; helpers have its public half in their lists.
        helpers: Keys of the helpers for the run.
        pinned: Identity keys of the helpers, from the client's policy.
    """

    facts: RoundFacts
    client: int
    signer: Ed25519PrivateKey
    helpers: tuple[HelperKey, ...]
    pinned: frozenset[bytes]

    def mask(self, message: Tensor) -> Tensor:
        """Return the bytes of the masked message, uint8 `[bytes]`; every call draws new masks.

        Args:
            message: Rounded message with the client's share of the noise: multiples of the grid, float64 `[params]`.
        """
        values = (message.double() / self.facts.grid).cpu().numpy().astype(np.int64)
        masked = mask_message(values, self.facts, self.client, self.signer, self.helpers, self.pinned)
        return torch.frombuffer(bytearray(masked.to_bytes()), dtype=torch.uint8)


def masks_of(
    policy: Policy,
    home: Path,
    instructions: ClientInstructions,
    terms: RunTerms,
    model: Tensor,
    plan: PrivacyPlan | None,
    shared: Tensor | None = None,
    settings: str = "",
) -> Masks | None:
    """Return the masks for the message of some instructions that the policy accepts; None for other trusts.

    Args:
        policy: The client's policy, with the helpers that it pins.
        home: Folder of the node, with the client's signing key.
        instructions: The instructions.
        terms: Terms of the run, with the helpers' keys.
        model: The model, `[params]`.
        plan: Plan of the terms; None without privacy.
        shared: The vector beside the model, `[params]`; None if the method has none.
        settings: Digest of everything else in the message that an app may read; see `facts_of`.

    Raises:
        Refusal: If the helpers are not those that the policy pins.
        UserError: If the client's signing key cannot be read.
    """
    if plan is None or plan.aggregation is None:
        return None
    pinned = policy.aggregation.identities
    try:
        helpers = tuple(HelperKey.from_bytes(bytes.fromhex(key)) for key in terms.helpers)
        require_pinned(helpers, pinned, terms.run)
    except (UserError, ValueError) as error:
        remedy = "Compare [aggregation] helpers in this client's policy with the helpers' operators"
        expected = "one signed key from each helper that the policy pins"
        raise Refusal("policy", "helpers", expected, f"different ones ({error})", remedy) from None
    facts = facts_of(instructions, terms, model, plan, shared, settings)
    return Masks(facts, instructions.client, read_signing_key(home / SIGNING_FILE), helpers, pinned)
