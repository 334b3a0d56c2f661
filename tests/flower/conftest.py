from pathlib import Path

import pytest
import torch

from strategies.method_strategy import MethodStrategy


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models only wait for each other on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _models_of_ended_runs_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends with an error leaves its model in the current folder: here in the test's."""
    monkeypatch.setattr(MethodStrategy, "rescue_folder", tmp_path)
