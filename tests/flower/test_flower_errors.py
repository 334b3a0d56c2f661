"""A client's error is shown with its class, its full text, the client, and the place at which it was raised."""

import logging
import re
from pathlib import Path

import pytest
from flower_in_process import inside_a_run
from flower_plain_app import CLIENT, CLIENTS, LEGACY_CLIENT, LEGACY_SERVER, SERVER, write_app
from flwr.app import Error

from fedpriv.errors import UserError
from fedpriv.flower.apps.run import run_app
from fedpriv.flower.client_errors import place_of, reason_in_short, traceback_of
from fedpriv.flower.internals.app import error_of_exception

LONG = """The answer is of the wrong kind.

    Example
    -------

        model.get_weights(), 10, {"accuracy": 0.95}

"""
IN_ONE_LINE = 'The answer is of the wrong kind. Example ------- model.get_weights(), 10, {"accuracy": 0.95}'


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def chained(handled: bool) -> BaseException:
    try:
        try:
            raise KeyError("the first")
        except KeyError as first:
            if handled:
                raise ValueError(LONG)  # noqa: B904
            raise ValueError(LONG) from first
    except ValueError as caught:
        return caught


EMBEDDED = 'worker died:\nTraceback (most recent call last):\n  File "w.py", line 3, in w\nOSError: remote'


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (raised(ValueError(LONG)), f"ValueError: {IN_ONE_LINE}"),
        (chained(handled=False), f"ValueError: {IN_ONE_LINE}"),
        (chained(handled=True), f"ValueError: {IN_ONE_LINE}"),
        (raised(OSError("the disk is full")), "OSError: the disk is full"),
        (raised(ValueError()), "ValueError"),
        (raised(ValueError("ends with Message: nothing.")), "ValueError: ends with Message: nothing"),
        (raised(RuntimeError(EMBEDDED)), "RuntimeError: " + " ".join(EMBEDDED.split())),
        (raised(SystemExit(3)), "SystemExit: 3"),
    ],
)
def test_an_error_in_short_is_its_class_and_all_of_its_words(error, words):
    found = error_of_exception(error)
    assert reason_in_short(found) == words
    assert traceback_of(found).splitlines()[0] == "Traceback (most recent call last):"
    assert place_of(found, Path(__file__).parent).startswith("test_flower_errors.py, line ")
    assert place_of(found, Path("/elsewhere")).endswith(place_of(found, Path(__file__).parent))


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("<class 'ZeroDivisionError'>:<'division by zero'>", "ZeroDivisionError: division by zero"),
        ("<class 'app.errors.NoData'>:<'none\nat all'>", "NoData: none at all"),
        (
            "private_mod: answer: expected one ArrayRecord, got 0 records.",
            "private_mod: answer: expected one ArrayRecord, got 0 records",
        ),
        ("", "error 7"),
        (None, "error 7"),
        (
            "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'"
            "\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=5)\n"
            '  File "actor.py", line 60, in run\n    app()\n  File "/app/client.py", line 3, in train\n    f()\n'
            "ValueError: no data\n  in this folder\n\n"
            "The above exception was the direct cause of the following exception:\n\n"
            '\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=5)\n  File "actor.py", line 65, in run\n    raise x\n'
            "flwr.clientapp.client_app.ClientAppException: \n"
            "Exception ClientAppException occurred. Message: no data\n  in this folder'>",
            "ValueError: no data in this folder",
        ),
    ],
)
def test_what_flower_makes_of_an_error_elsewhere_is_read_too(reason, words):
    assert reason_in_short(Error(code=7, reason=reason)) == words


def run(tmp_path, monkeypatch, **files):
    monkeypatch.chdir(tmp_path)
    return run_app(write_app(tmp_path / "app", **files), CLIENTS)


def test_the_first_error_is_logged_in_full_with_its_client(tmp_path, monkeypatch, caplog):
    failing = CLIENT.replace(
        "    net, partition, x, y = asked(msg, context)",
        '    if context.node_config["partition-id"] in (2, 4):\n'
        '        raise OSError(f"no file\\n\\n  for {context.node_config}")\n'
        "    net, partition, x, y = asked(msg, context)",
        1,
    )
    with caplog.at_level(logging.WARNING, "flwr"), pytest.raises(UserError):
        run(tmp_path, monkeypatch, client=failing)
    first, *others = [r.getMessage() for r in caplog.records if r.getMessage().startswith("client ")]
    assert re.match(r"client ([24]): OSError: no file for {'partition-id': \1", first)
    assert "Traceback (most recent call last):" in first
    assert 'client.py", line ' in first
    assert others
    assert all(re.match(r"client ([24]): OSError: no file for {'partition-id': \1", line) for line in others)
    assert not any("Traceback" in line for line in others)


def test_the_line_that_ends_a_run_names_the_client_and_the_file(tmp_path, monkeypatch):
    failing = CLIENT.replace("count =", f"raise ValueError({LONG!r}) #")
    with pytest.raises(UserError) as caught:
        run(tmp_path, monkeypatch, client=failing)
    assert f"errors, the first: ValueError: {IN_ONE_LINE} (client " in str(caught.value)
    assert "; plain/client.py, line " in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_an_error_that_no_file_of_the_app_raised_says_where_it_was_raised(tmp_path, monkeypatch):
    nothing = LEGACY_CLIENT.replace("return [array + self.partition for array in parameters], 10, {}", "return None")
    with pytest.raises(UserError, match=r"has no len\(\) \(client \d; flwr/.*numpy_client.py, line \d+\)"):
        run(tmp_path, monkeypatch, client=nothing, server=LEGACY_SERVER)


def test_an_error_of_the_server_that_no_file_of_the_app_raised_says_where(tmp_path, monkeypatch):
    zero = CLIENT.replace('"num-examples": len(x)', '"num-examples": 0')
    with pytest.raises(UserError, match=r"ServerApp .* got ZeroDivisionError: .* \(.*\.py, line \d+\)"):
        run(tmp_path, monkeypatch, client=zero, server=SERVER)


def test_errors_are_made_inside_a_run():
    with inside_a_run():
        assert str(error_of_exception(ValueError("x")).reason).endswith("Message: x'>")
