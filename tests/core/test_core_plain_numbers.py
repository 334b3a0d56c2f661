"""Settings hold Python numbers: arithmetic with numpy ones would be as coarse as they are, and so would an epsilon."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fedpriv
from fedpriv.analytics.heavy.oracles import OLH
from fedpriv.analytics.queries import Histogram, Quantiles
from fedpriv.bounding import Clip, SmoothedNormalization
from fedpriv.mechanisms.controllers import LinearDecay, SignalToNoise
from fedpriv.methods.side_values import AdaptiveBound, PrivateMetrics
from fedpriv.privacy.aggregation import Aggregation
from fedpriv.privacy.correlation import Banded, FadingNoise
from fedpriv.privacy.sampling import Everyone, FixedSize, Poisson, Scheduled
from fedpriv.privacy.tuning import NegativeBinomialTrials, PoissonTrials, ScoreNoise

SETTINGS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "clip": (Clip, {"clip_norm": 0.3}),
    "normalization": (SmoothedNormalization, {"alpha": 0.3}),
    "adaptive": (AdaptiveBound, {"quantile": 0.3, "rate": 0.3, "share": 0.3}),
    "metrics": (PrivateMetrics, {"share": 0.3, "max_loss": 0.3}),
    "decay": (LinearDecay, {"ratio": 0.3}),
    "signal": (SignalToNoise, {"target": 0.3, "least": 0.3}),
    "trials": (NegativeBinomialTrials, {"expected": 3.3, "eta": 0.3}),
    "poisson trials": (PoissonTrials, {"expected": 3.3}),
    "score": (ScoreNoise, {"multiplier": 0.3}),
    "histogram": (Histogram, {"name": "h", "low": 0.3, "high": 3.3, "bins": 3}),
    "quantiles": (Quantiles, {"name": "q", "low": 0.3, "high": 3.3, "at": (0.3,)}),
    "everyone": (Everyone, {"population": 300}),
    "poisson": (Poisson, {"population": 300, "probability": 0.3}),
    "fixed size": (FixedSize, {"population": 300, "size": 30}),
    "scheduled": (
        Scheduled,
        {"population": 300, "expected_size": 3.3, "scheme": "fedbuff", "squares": (0.3,), "sent": (3,)},
    ),
    "banded": (Banded, {"coefficients": (1.0, 0.3), "rounds": 3, "damping": 0.3}),
    "fading": (FadingNoise, {"damping": 0.3, "rounds": 3}),
    "aggregation": (Aggregation, {"helpers": 1, "least_survivors": 30, "colluders": 3, "most": 300, "size": 300}),
    "privacy": (fedpriv.Privacy, {"epsilon": 3.3, "delta": 0.003}),
    "oracle": (OLH, {"epsilon": 0.3, "size": 300}),
}


def as_numpy(value: Any, kind: type[np.floating]) -> Any:
    if isinstance(value, tuple):
        return tuple(as_numpy(part, kind) for part in value)
    return kind(value) if isinstance(value, float) else np.int32(value) if isinstance(value, int) else value


def as_python(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(as_python(part) for part in value)
    return value.item() if isinstance(value, np.number) else value


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_hold_numbers_of_python(name: str, kind: type[np.floating]) -> None:
    make, given = SETTINGS[name]
    numbers = {key: as_numpy(value, kind) for key, value in given.items()}
    made = make(**numbers)
    for key, value in numbers.items():
        held = getattr(made, key)
        assert held == as_python(value)
        assert type(held) is type(as_python(value))
        assert not isinstance(held, tuple) or {type(part) for part in held} <= {int, float}


def test_a_clip_norm_of_float16_leaves_room_for_rounding() -> None:
    clip = Clip(clip_norm=np.float16(0.3))  # pyright: ignore[reportArgumentType]
    assert clip.coefficients[0] < clip.l2_bound
