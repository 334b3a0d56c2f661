"""What is promised, to whom, and why it holds."""

from fedpriv.privacy.plan import ADVERSARIES, NOT_PROMISED, REPLACE_FACTOR, PrivacyPlan, make_plan
from fedpriv.privacy.reading import read_plan
from fedpriv.privacy.released import DataFacts
from fedpriv.privacy.sampling import SAMPLINGS, Everyone, FixedSize, Poisson, Sampling, Scheduled
from fedpriv.privacy.statement import privacy_statement, rounded_up
from fedpriv.privacy.warning import noise_against_signal, signal_warning

__all__ = [
    "ADVERSARIES",
    "NOT_PROMISED",
    "REPLACE_FACTOR",
    "SAMPLINGS",
    "DataFacts",
    "Everyone",
    "FixedSize",
    "Poisson",
    "PrivacyPlan",
    "Sampling",
    "Scheduled",
    "make_plan",
    "noise_against_signal",
    "privacy_statement",
    "read_plan",
    "rounded_up",
    "signal_warning",
]
