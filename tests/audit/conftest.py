"""Audits in tests check the null distribution with fewer directions."""

import pytest


@pytest.fixture(autouse=True)
def few_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpriv.audit.evidence._UNSEEN", 1000)
