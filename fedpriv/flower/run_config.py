"""Run config of `flwr run`: the experiment, its settings, its data and its run directory.

Flower's run config is a flat table of scalars; `[tool.flwr.app.config]` has its keys and defaults.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpriv.engines import Population
from fedpriv.errors import UserError
from fedpriv.experiment.build import Experiment, assemble, assemble_clients, check_device
from fedpriv.experiment.config import Config, load_config, parse_config, read_config_text

__all__ = ["TEST_SEEDED", "RunConfig"]

TEST_SEEDED = "FEDPRIV_TEST_SEEDED"
"""Environment variable that makes the noise of a deployment follow a seed. For tests only."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of one run.

    Args:
        config: TOML file of the experiment; relative paths start at the app's folder, which contains `sim_configs`.
        config_toml: Content of the file, which overrides `config` because other machines do not have the file.
        settings: Overrides of config keys, such as `"training.rounds=5 method.alpha=0.1"`.
        data_root: Folder of the data sets; empty for the environment's choice.
        device: Device for gradients.
        out: Absolute path of the run directory; empty for a new one in the home directory.
    """

    config: str = ""
    config_toml: str = ""
    settings: str = ""
    data_root: str = ""
    device: str = "cpu"
    out: str = ""

    @classmethod
    def of(cls, run_config: Mapping[str, object], node_config: Mapping[str, object] | None = None) -> "RunConfig":
        """Read it from a Flower context; a node may override `data-root` and `device`."""
        both = {**run_config, **{k: v for k, v in (node_config or {}).items() if k in ("data-root", "device")}}
        keys = {key: key.replace("_", "-") for key in cls.__dataclass_fields__}
        return cls(**{key: str(both[name]) for key, name in keys.items() if name in both})

    @classmethod
    def of_device(cls, run_config: Mapping[str, object], node_config: Mapping[str, object]) -> "RunConfig":
        """Read it from the context of a guarded device: only the text of the experiment comes from the server."""
        own = {key.replace("-", "_"): str(node_config[key]) for key in ("data-root", "device") if key in node_config}
        return cls(config_toml=str(run_config.get("config-toml", "")), **own)

    def load(self) -> Config:
        """Return the config of the experiment."""
        if self.config_toml:
            return parse_config(read_config_text(self.config_toml, "the run's config"))
        return load_config(Path(__file__).parents[2] / self.config, shlex.split(self.settings))

    def assemble(self, config: Config) -> Experiment:
        """Return all parts of the experiment.

        Raises:
            UserError: If Flower cannot run the experiment.
        """
        config.check_unclocked()
        check_device(self.device, "device")
        return assemble(config, device=self.device, data_root=Path(self.data_root) if self.data_root else None)

    def assemble_clients(self, config: Config, check_size: Callable[[int], None] | None = None) -> Population:
        """Return the experiment's clients; for `check_size` see `fedpriv.experiment.build.assemble_clients`."""
        check_device(self.device, "device")
        root = Path(self.data_root) if self.data_root else None
        return assemble_clients(config, device=self.device, data_root=root, check_size=check_size)

    def run_directory(self, name: str) -> Path:
        """Return the run directory.

        Args:
            name: Name of a new directory.

        Raises:
            UserError: If the path is relative, because Flower's processes do not run in the user's folder.
        """
        if not self.out:
            return Path.home() / "fedpriv-runs" / name
        if not Path(self.out).is_absolute():
            raise UserError("run config out", "an absolute path", repr(self.out), 'Set out="$PWD/runs/NAME"')
        return Path(self.out)
