import os
import shutil
from contextlib import nullcontext

import pytest
from deploy_names import HOST

from fedpriv.deploy.operate import party
from fedpriv.deploy.setup.provision import Deployment, init_deployment
from fedpriv.flower.companion import PREPARED, QUIET


@pytest.fixture(autouse=True)
def not_forked(monkeypatch):
    """A node or server in the process of the tests forks nothing, and leaves the environment as it was."""
    monkeypatch.setattr(party, "forked_ahead", lambda *_, **__: nullcontext())
    before = dict(os.environ)
    yield
    for name in (PREPARED, "FLWR_HOME", *QUIET):
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return an unchanged deployment of two nodes."""
    folder = tmp_path_factory.mktemp("made") / "deployment"
    init_deployment(folder, Deployment(host=HOST, nodes=2))
    return folder


@pytest.fixture
def deployment(made, tmp_path):
    """Return a copy of it that tests may change."""
    folder = tmp_path / "deployment"
    shutil.copytree(made, folder)
    config = folder / "admin" / "config.toml"
    config.write_text(config.read_text().replace(str(made), str(folder)))
    return folder
