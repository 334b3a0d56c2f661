"""Privacy plans, the accounting behind them, and the statement of a run's guarantee."""

from fedpriv.privacy.aggregation import Aggregation, AggregationChoice
from fedpriv.privacy.correlation import NoiseChoice, NoiseMatrix
from fedpriv.privacy.plan import ADJACENCIES, NOT_PROMISED, REPLACE_FACTOR, PrivacyPlan, correlated, make_plan
from fedpriv.privacy.reading import read_plan
from fedpriv.privacy.records import ExampleTerms, RecordBound
from fedpriv.privacy.released import DataFacts
from fedpriv.privacy.sampling import SAMPLINGS, Everyone, FixedSize, Poisson, Sampling, Scheduled, Separated
from fedpriv.privacy.statement import Simulated, files_in_words, privacy_statement, quoted, rounded_up, with_analyses
from fedpriv.privacy.trust import (
    TRUSTS,
    Aggregator,
    Central,
    Local,
    Shares,
    Trust,
    TrustName,
    by_reliance,
    trust_name,
    trust_of,
)
from fedpriv.privacy.unit import UNITS, Adjacency, Unit, UnitName, adjacency_of, unit_name, unit_of
from fedpriv.privacy.warning import delta_warning, noise_against_signal, signal_warning

__all__ = [
    "ADJACENCIES",
    "NOT_PROMISED",
    "REPLACE_FACTOR",
    "SAMPLINGS",
    "TRUSTS",
    "UNITS",
    "Adjacency",
    "Aggregation",
    "AggregationChoice",
    "Aggregator",
    "Central",
    "DataFacts",
    "Everyone",
    "ExampleTerms",
    "FixedSize",
    "Local",
    "NoiseChoice",
    "NoiseMatrix",
    "Poisson",
    "PrivacyPlan",
    "RecordBound",
    "Sampling",
    "Scheduled",
    "Separated",
    "Shares",
    "Simulated",
    "Trust",
    "TrustName",
    "Unit",
    "UnitName",
    "adjacency_of",
    "by_reliance",
    "correlated",
    "delta_warning",
    "files_in_words",
    "make_plan",
    "noise_against_signal",
    "privacy_statement",
    "quoted",
    "read_plan",
    "rounded_up",
    "signal_warning",
    "trust_name",
    "trust_of",
    "unit_name",
    "unit_of",
    "with_analyses",
]
