"""The run config of `flwr run`: which experiment, with which settings, on which data, written where.

Flower's run config is a flat table of scalars; its keys and their defaults stand in `[tool.flwr.app.config]`.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpriv.engines import Population
from fedpriv.errors import UserError
from fedpriv.experiment.build import Experiment, assemble, assemble_clients
from fedpriv.experiment.config import Config, load_config, parse_config, read_config_text

__all__ = ["TEST_SEEDED", "RunConfig"]

TEST_SEEDED = "FEDPRIV_TEST_SEEDED"
"""The environment variable that lets a seed decide the noise of a deployment: for tests, never for people."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run's settings.

    Args:
        config: The experiment's TOML file; a relative path starts at the app, where `sim_configs` lies.
        config_toml: The file's content, which goes before `config`: other machines do not have the file.
        settings: Changes to it, `"training.rounds=5 method.alpha=0.1"`.
        data_root: Where data sets lie; empty for the environment's choice.
        device: Where gradients are computed.
        out: The run directory, an absolute path; empty for a new one in the home directory.
    """

    config: str = ""
    config_toml: str = ""
    settings: str = ""
    data_root: str = ""
    device: str = "cpu"
    out: str = ""

    @classmethod
    def of(cls, run_config: Mapping[str, Any], node_config: Mapping[str, Any] | None = None) -> "RunConfig":
        """From a Flower context; a node may have its own `data-root` and `device`."""
        both = {**run_config, **{k: v for k, v in (node_config or {}).items() if k in ("data-root", "device")}}
        keys = {key: key.replace("_", "-") for key in cls.__dataclass_fields__}
        return cls(**{key: str(both[name]) for key, name in keys.items() if name in both})

    @classmethod
    def of_device(cls, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> "RunConfig":
        """From the context of a device that guards itself: the experiment's text, and nothing else, is the server's."""
        own = {key.replace("-", "_"): str(node_config[key]) for key in ("data-root", "device") if key in node_config}
        return cls(config_toml=str(run_config.get("config-toml", "")), **own)

    def load(self) -> Config:
        """The experiment."""
        if self.config_toml:
            return parse_config(read_config_text(self.config_toml, "the run's config"))
        return load_config(Path(__file__).parents[2] / self.config, shlex.split(self.settings))

    def assemble(self, config: Config) -> Experiment:
        """Everything that a run of the experiment needs; a `UserError` for one that Flower cannot run."""
        config.check_unclocked()
        return assemble(config, device=self.device, data_root=Path(self.data_root) if self.data_root else None)

    def assemble_clients(self, config: Config, check_size: Callable[[int], None] | None = None) -> Population:
        """What a client needs of it; `check_size` as in `fedpriv.experiment.build.assemble_clients`."""
        root = Path(self.data_root) if self.data_root else None
        return assemble_clients(config, device=self.device, data_root=root, check_size=check_size)

    def run_directory(self, name: str) -> Path:
        """Where the server writes.

        Args:
            name: What a new directory is called.

        Raises:
            UserError: If the path is relative: Flower's processes do not work in the user's folder.
        """
        if not self.out:
            return Path.home() / "fedpriv-runs" / name
        if not Path(self.out).is_absolute():
            raise UserError("run config out", "an absolute path", repr(self.out), 'Write out="$PWD/runs/NAME"')
        return Path(self.out)
