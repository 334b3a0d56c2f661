import socket
import sys
import types

import pytest

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


def test_another_failure_of_torchvision_is_not_hidden(monkeypatch):
    def broken(_name: str) -> None:
        raise RuntimeError("torchvision is broken")

    monkeypatch.setattr(torchvision_cpu.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="torchvision is broken"):
        torchvision_cpu.torchvision_datasets()
