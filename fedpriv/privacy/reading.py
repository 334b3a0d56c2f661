"""Reads a privacy plan from its record."""

from collections.abc import Mapping
from typing import Any

from fedpriv.errors import UserError
from fedpriv.privacy.aggregation import Aggregation
from fedpriv.privacy.correlation import read_matrix
from fedpriv.privacy.plan import PrivacyPlan
from fedpriv.privacy.records import RecordBound
from fedpriv.privacy.sampling import read_sampling

__all__ = ["read_plan"]


def read_plan(table: Mapping[str, Any], where: str) -> PrivacyPlan | None:
    """Return the plan with the record `table` (`PrivacyPlan.as_dict`), written by this version or an earlier one.

    A record holds only a timeline's total. Every step is charged as the whole timeline, which is never too little.

    Args:
        table: The content of a run's `privacy.json`.
        where: The file, for errors.

    Returns:
        None if the run had no guarantee.

    Raises:
        UserError: If the table is not such a record.
    """
    try:
        if table["trust"] is None:
            return None
        rounds = int(table["rounds"])
        return PrivacyPlan(
            trust=table["trust"],
            adjacency=table["adjacency"],
            sampling=read_sampling(table["sampling"], rounds),
            rounds=rounds,
            delta=table["delta"],
            l2_bound=table["l2_bound"],
            noise_multiplier=table["noise_multiplier"],
            client_memory=table.get("client_memory", True),
            unit=table.get("unit", "client"),
            record=RecordBound.read(table["record"]) if "record" in table else None,
            aggregation=Aggregation(**table["aggregation"]) if "aggregation" in table else None,
            noise=read_matrix(table["noise"]) if "noise" in table else None,
            filtered=table.get("filtered", False),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        remedy = "Restore the file, or move the run to another folder"
        raise UserError(where, "the record of a privacy plan", repr(error), remedy) from None
