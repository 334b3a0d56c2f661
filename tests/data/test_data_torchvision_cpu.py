import importlib
import socket
import sys
import types

import pytest

from fedpriv import torchvision_import
from fedpriv.data import torchvision_cpu


def test_torchvision_datasets_can_be_imported_again_and_again_beside_this_torch():
    one, two = torchvision_cpu.torchvision_datasets(), torchvision_cpu.torchvision_datasets()
    assert one is two
    assert all(hasattr(one, source) for source in torchvision_cpu.DOWNLOADS)


def chatty(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list:
    calls = []

    def fetch(root: str, **options: object) -> None:
        print("downloading")
        print("100%", file=sys.stderr)
        calls.append((root, options, socket.getdefaulttimeout()))
        if error:
            raise error

    module = types.SimpleNamespace(QMNIST=fetch, MNIST=fetch)
    monkeypatch.setattr(torchvision_cpu, "torchvision_datasets", lambda: module)
    return calls


def test_a_download_is_silent_and_has_a_timeout_only_while_it_runs(tmp_path, monkeypatch, capfd):
    calls = chatty(monkeypatch, None)
    torchvision_cpu.download("QMNIST", tmp_path)
    assert calls == [(str(tmp_path), {"download": True, "what": "train"}, torchvision_cpu.CONNECTION_TIMEOUT)]
    assert socket.getdefaulttimeout() is None
    assert capfd.readouterr() == ("", "")


def test_a_failed_download_restores_the_timeout_and_the_output(tmp_path, monkeypatch, capfd):
    chatty(monkeypatch, RuntimeError("no such host"))
    with pytest.raises(RuntimeError, match="no such host"):
        torchvision_cpu.download("MNIST", tmp_path)
    assert socket.getdefaulttimeout() is None
    print("heard")
    assert capfd.readouterr().out == "heard\n"


FAILS_ONCE = """
import sys
sys.tries += 1
if sys.tries == 1:
    import torchvision.part
    raise RuntimeError("{error}")
"""


@pytest.fixture
def fails_once(tmp_path, monkeypatch):
    """A torchvision that cannot be imported the first time, with the given error; its tries and declarations."""
    declared = []
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "tries", 0, raising=False)
    monkeypatch.setattr(torchvision_import, "_declare_operators", lambda: declared.append(vars(sys)["tries"]))

    def write(error: str) -> list[int]:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(FAILS_ONCE.format(error=error))
        (tmp_path / "torchvision" / "part.py").write_text("")
        return declared

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def test_missing_operators_are_declared_and_the_import_is_repeated_for_every_importer(fails_once):
    declared = fails_once("operator torchvision::nms does not exist")
    module = importlib.import_module("torchvision")
    assert (declared, vars(sys)["tries"]) == ([1], 2)
    assert sys.modules["torchvision"] is module
    assert "torchvision.part" not in sys.modules


def test_another_failure_of_torchvision_is_not_hidden(fails_once):
    declared = fails_once("torchvision is broken")
    with pytest.raises(RuntimeError, match="torchvision is broken"):
        torchvision_cpu.torchvision_datasets()
    assert (declared, vars(sys)["tries"]) == ([], 1)


def test_the_finder_is_installed_once_and_looks_for_torchvision_alone():
    before = list(sys.meta_path)
    torchvision_import.install()
    assert sys.meta_path == before
    (finder,) = (finder for finder in before if type(finder).__module__ == torchvision_import.__name__)
    assert finder.find_spec("torchaudio", None) is None
