"""What terminals show: lines of 80 columns that break between words, many runs, many clients."""

import logging
import sys
from pathlib import Path

import pytest

from fedpriv.cli import main
from fedpriv.cli.print_compare import print_comparison
from fedpriv.cli.print_data import show_clients
from fedpriv.cli.terminal import fitted, log_to_terminal, say, unwrapped
from fedpriv.experiment.build import assemble_clients
from fedpriv.experiment.config import load_config
from fedpriv.privacy import privacy_statement

QUICKSTART = Path(__file__).parents[2] / "sim_configs" / "quickstart.toml"
ADVERSARY = (
    "adversary   anyone who sees the models (after every round) and knows all others; the server itself is trusted"
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("fedpriv.cli.terminal.is_terminal", lambda _: True)


def test_lines_break_between_words_below_their_text() -> None:
    assert fitted(ADVERSARY, 80).split("\n") == [
        "adversary   anyone who sees the models (after every round) and knows all others;",
        "            the server itself is trusted",
    ]
    assert fitted(f"short\n{ADVERSARY}", 200) == f"short\n{ADVERSARY}"
    path = "statement   /home/someone/" + "long/" * 20 + "privacy.txt"
    assert path.split()[1] in fitted(path, 80).split()
    listed = fitted("* the time that a client takes, and whether it answers at all", 30).split("\n")
    assert listed[0].startswith("* the time")
    assert all(line.startswith("  ") for line in listed[1:])


@pytest.mark.parametrize("columns", [40, 60, 80, 99])
def test_a_statement_is_filled_again_for_narrow_terminals(columns: int) -> None:
    config = load_config(QUICKSTART)
    plan = config.plan(config.cohort.of(100))
    statement = privacy_statement(plan, method="alpha-normec", randomness="seeded", recorded=True, size=650)
    joined = unwrapped(statement)
    shown = fitted(joined, columns)
    assert shown.split() == statement.split()
    assert max(len(line) for line in shown.split("\n")) <= columns
    bullets = [line.startswith("* ") for line in statement.split("\n")].count(True)
    assert [line.startswith("* ") for line in joined.split("\n")].count(True) == bullets
    paragraphs = [part for part in statement.split("\n\n") if "\n*" not in part]
    assert all(" ".join(part.split()) in joined for part in paragraphs if "Not covered" not in part)


def test_files_get_lines_whole_and_terminals_do_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(ADVERSARY)
    assert capsys.readouterr().out == f"{ADVERSARY}\n"
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    say(ADVERSARY)
    assert capsys.readouterr().out == f"{fitted(ADVERSARY, 80)}\n"


@pytest.mark.usefixtures("terminal")
def test_errors_and_warnings_of_a_terminal_are_broken_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", str(QUICKSTART), "-s", "method.alpha=-1.0"])
    log_to_terminal()
    logging.getLogger("fedpriv").warning("The noise is %s.", "far more than a model of this size can bear " * 3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("fedpriv: method.alpha")
    assert sum(line.startswith("warning     The noise") for line in lines) == 1
    assert max(map(len, lines)) <= 80


def comparison(runs: int) -> dict[str, dict[str, str]]:
    common = {"epsilon": "8.0", "trust": "central", "method": "dp-fedavg"}
    return {
        f"runs/sweep/trials/{number:012x}": {
            "method.beta": f"{0.0464158883361 * number:.4g}",
            "data.partition": "[1] of several texts",
            "test_accuracy": f"{0.5 + 0.001 * number:.6g}",
            **common,
            "not_covered": "test_accuracy, test_loss, validation_accuracy, validation_loss" if number % 2 else "",
        }
        for number in range(runs)
    }


@pytest.mark.usefixtures("terminal")
def test_fifteen_runs_are_lines_of_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(comparison(15))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[:3] == ["run", "test_accuracy", "beta"]
    (row,) = [line.split() for line in lines if line.startswith("00000000000e")][:1]
    assert row[1:3] == ["0.514", "0.6498"]
    same = " ".join(lines).split("same  ")[1].split()
    assert " ".join(same) == "data.partition [1] of several texts, epsilon 8.0, trust central, method dp-fedavg"


def test_few_runs_are_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_comparison(comparison(2) | {})
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split() == list(comparison(2))
    assert [row.split()[0] for row in rows] == list(next(iter(comparison(1).values())))


def test_clients_are_a_summary_and_a_histogram_and_a_table_if_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpriv.cli.print_data.has_extra", lambda _: False)
    config, found = load_config(QUICKSTART), []
    federation = assemble_clients(config).federation
    for whole in (False, True):
        show_clients(config, federation, tmp_path, whole=whole)
        found.append(capsys.readouterr().out)
    short, long = found
    assert "examples    1,442; 1 to 43, median 12 a client" in short
    counts = [int(line.split()[-1]) for line in short.splitlines() if " to " in line and line[0].isdigit()]
    assert sum(counts) == 100
    assert "label_9" not in short
    assert "label_9" in long
    assert len(long.splitlines()) == len(short.splitlines()) + 102
