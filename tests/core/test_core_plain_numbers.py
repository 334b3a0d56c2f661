"""Settings hold Python numbers: arithmetic with numpy ones would be as coarse as they are, and so would an epsilon."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedpriv.analytics.heavy.oracles import OLH
from fedpriv.analytics.queries import Histogram, Quantiles
from fedpriv.bounding import Clip, SmoothedNormalization
from fedpriv.mechanisms.controllers import LinearDecay, SignalToNoise
from fedpriv.methods.side_values import AdaptiveBound, PrivateMetrics
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
        assert not isinstance(held, tuple) or [type(part) for part in held] == [float]


def test_a_clip_norm_of_float16_leaves_room_for_rounding() -> None:
    clip = Clip(clip_norm=np.float16(0.3))  # pyright: ignore[reportArgumentType]
    assert clip.coefficients[0] < clip.l2_bound
