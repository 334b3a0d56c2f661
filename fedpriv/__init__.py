"""Differentially private federated learning: write a method once, and run it in simulation, on Ray or on Flower."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fedpriv import torchvision_import
from fedpriv.errors import UserError as UserError
from fedpriv.errors import require_extra
from fedpriv.version import __version__ as __version__

if TYPE_CHECKING:
    from fedpriv.experiment.config import PrivacyChoice as Privacy
    from fedpriv.experiment.config import load_config
    from fedpriv.experiment.execution import Execution
    from fedpriv.experiment.in_python import Experiment
    from fedpriv.experiment.results import load_model, load_results
    from fedpriv.report.write import write_report
    from fedpriv.runners import run_experiment
    from fedpriv.tracking.trackers import track
    from fedpriv.trained.export import export_model
    from fedpriv.trained.module import load_module

__all__ = [
    "Execution",
    "Experiment",
    "Privacy",
    "UserError",
    "export_model",
    "load_config",
    "load_model",
    "load_module",
    "load_results",
    "run_experiment",
    "track",
    "write_report",
]

_HOMES = {
    "Execution": "fedpriv.experiment.execution",
    "Experiment": "fedpriv.experiment.in_python",
    "Privacy": "fedpriv.experiment.config",
    "export_model": "fedpriv.trained.export",
    "load_config": "fedpriv.experiment.config",
    "load_model": "fedpriv.experiment.results",
    "load_module": "fedpriv.trained.module",
    "load_results": "fedpriv.experiment.results",
    "run_experiment": "fedpriv.runners",
    "track": "fedpriv.tracking.trackers",
    "write_report": "fedpriv.report.write",
}
_ALIASES = {"Privacy": "PrivacyChoice"}
_EXTRAS = {"write_report": "report"}

torchvision_import.install()


def __getattr__(name: str) -> Any:
    """Import a public function on first use, so that `import fedpriv` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedpriv' has no attribute {name!r}")
    if name in _EXTRAS:
        require_extra(f"fedpriv.{name}", _EXTRAS[name])
    return getattr(import_module(_HOMES[name]), _ALIASES.get(name, name))


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    modules = {name for name, value in globals().items() if isinstance(value, ModuleType) or name.startswith("__")}
    return sorted(modules.union(__all__))
