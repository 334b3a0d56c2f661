"""Templates, in `templates/`, of the files that `fedpriv deploy init` writes: `$name` for a value, `$$` for a `$`."""

from importlib.resources import files
from string import Template

from fedpriv.deploy.device.policy import POLICY_TEXT as POLICY

__all__ = [
    "ADMIN_CONFIG",
    "COMPOSE_TEXT",
    "DOCKERFILE",
    "DOCKERIGNORE",
    "HELPER_TOML_TEXT",
    "NODE_TOML_TEXT",
    "POLICY",
    "README",
    "REGISTER",
    "SERVER_TOML_TEXT",
    "SERVICE",
    "START",
]


def _template(name: str) -> Template:
    return Template((files("fedpriv.deploy.setup") / "templates" / name).read_text(encoding="utf-8"))


ADMIN_CONFIG = _template("config.toml")
COMPOSE_TEXT = _template("compose.yaml")
DOCKERFILE = _template("Dockerfile")
DOCKERIGNORE = _template("dockerignore")
HELPER_TOML_TEXT = _template("helper.toml")
NODE_TOML_TEXT = _template("node.toml")
README = _template("README.md")
REGISTER = _template("register.sh")
SERVER_TOML_TEXT = _template("server.toml")
SERVICE = _template("fedpriv.service")
START = _template("start.sh")
