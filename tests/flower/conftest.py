from pathlib import Path

import pytest
import torch

from strategies.method_strategy import MethodStrategy


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Use one thread: with tiny models, many threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _models_of_ended_runs_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to the test's folder, since a run that ends with an error leaves its model in the current folder."""
    monkeypatch.setattr(MethodStrategy, "rescue_folder", tmp_path)
