import shutil

import pytest
from deploy_names import HOST

from fedpriv.deploy.setup.provision import Deployment, init_deployment


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
