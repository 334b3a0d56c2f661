"""Public names for making a Flower app private.

    from fedpriv.flower import private_mod                    # in the ClientApp
    from fedpriv.flower import AlphaNormEC, Privacy           # in the ServerApp

The strategies and the mod are in the packages `strategies` and `clients` next to fedpriv. If an app has packages of the
same names, ours are imported under other names (`fedpriv.flower.beside`).
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fedpriv.errors import require_extra

if TYPE_CHECKING:
    from clients import private_mod
    from fedpriv.flower.legacy import legacy_mod
    from fedpriv.flower.legacy_server import PrivateServer
    from fedpriv.flower.server.run_record import RunFolder
    from strategies import (
        Agreement,
        AlphaNormEC,
        CenteredClip,
        Clip21,
        Clip21SGD2M,
        DPFedAvg,
        FedAlphaNormEC,
        MethodStrategy,
        NormalizedSGD,
        Privacy,
        frozen_arrays,
    )

__all__ = [
    "Agreement",
    "AlphaNormEC",
    "CenteredClip",
    "Clip21",
    "Clip21SGD2M",
    "DPFedAvg",
    "FedAlphaNormEC",
    "MethodStrategy",
    "NormalizedSGD",
    "Privacy",
    "PrivateServer",
    "RunFolder",
    "frozen_arrays",
    "legacy_mod",
    "private_mod",
]


_ELSEWHERE = {
    "PrivateServer": "fedpriv.flower.legacy_server",
    "RunFolder": "fedpriv.flower.server.run_record",
    "legacy_mod": "fedpriv.flower.legacy",
}


def __getattr__(name: str) -> Any:
    """Import a name on first access: processes that only transfer messages need no strategy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_extra(f"from {__name__} import {name}", "flower", ["flwr"])
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    return getattr(_ours("clients" if name == "private_mod" else "strategies"), name)


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return sorted({*globals(), *__all__})


def _ours(package: str) -> ModuleType:
    """Return the package next to fedpriv, even if an app has a package of the same name."""
    file = Path(__file__).parents[2] / package / "__init__.py"
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file.resolve():
        return importlib.import_module(package)
    return importlib.import_module(f"fedpriv.flower.beside.{package}")
