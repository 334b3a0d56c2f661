"""Client that enforces its own policy: its refusals, its memory and its ledger."""

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import fedpriv.files
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.ledger import Ledger, account_of, in_words, spent, surely_within
from fedpriv.deploy.device.memory import MemoryFile
from fedpriv.deploy.device.policy import Accepts, Limits, Policy, load_policy
from fedpriv.errors import UserError
from fedpriv.flower.messages import ClientInstructions, RunTerms, refusal_record, refused
from fedpriv.flower.refusals import KINDS, Refusal
from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg
from fedpriv.privacy import Everyone, make_plan
from fedpriv.streams import SystemStreams

SIZE = 5
METHOD = AlphaNormEC(alpha=1.0, beta=0.5)
STDDEV = 2.0  # multiplier 1 times the sensitivity 2 under replacement


def policy(**changes: Any) -> Policy:
    accepts = {k: v for k, v in changes.items() if k in Accepts.__dataclass_fields__}
    limits = {"epsilon": 1000.0, "delta": 1e-5} | {k: v for k, v in changes.items() if k not in accepts}
    return Policy(accepts=Accepts(**accepts), limits=Limits(**cast(dict[str, Any], limits)))


def instructions(**changes: Any) -> ClientInstructions:
    return ClientInstructions(**{"method": METHOD, "round": 1, "client": 0, "noise_stddev": STDDEV} | changes)


def terms(**changes: Any) -> RunTerms:
    told = {"run": "r1", "turn": 1, "last_turn": 0, "epoch": 0, "trust": "local", "adjacency": "replace"}
    told |= {"delta": 1e-5, "noise_multiplier": 1.0, "rounds": 9, "sampling": "everyone", "population": 4}
    return RunTerms(**told | {"probability": 1.0, "cohort_size": 0, "digest": "d"} | changes)


def ask(
    device: Device, o: ClientInstructions, t: RunTerms, model: Tensor | None = None, signal: Tensor | None = None
) -> Tensor:
    given = torch.ones(SIZE) if signal is None else signal
    return device.answer(o, t, torch.zeros(SIZE) if model is None else model, lambda: given)


def turn(number: int, last: int) -> tuple[ClientInstructions, RunTerms]:
    return instructions(round=number), terms(turn=number, last_turn=last)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(policy(), tmp_path / "home" / "state")


def test_noise_comes_from_the_operating_system_unless_a_test_says_otherwise(device: Device) -> None:
    assert type(device.streams) is SystemStreams
    with pytest.raises(Refusal, match=r"seed: expected noise from this client's operating system"):
        ask(device, instructions(seed=3), terms())


STRANGERS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ("less noise than promised", {}, {"noise_stddev": 1.0}, {}, "noise: expected a standard deviation of 2"),
    ("no noise at all", {}, {"noise_stddev": 0.0}, {}, "limits.min_noise_multiplier"),
    ("noise below the floor", {"min_noise_multiplier": 1.5}, {}, {}, r"limits.min_noise_multiplier: expected at least"),
    (
        "a huge bound",
        {"max_l2_bound": 10.0},
        {"method": DPFedAvg(clip_norm=1e6)},
        {},
        "limits.max_l2_bound: expected at most",
    ),
    ("a bare message", {}, {"noise_stddev": 0.0}, {"trust": "central"}, "accepts.trust: expected local, got 'central'"),
    ("nothing promised", {"trust": "central"}, {"noise_stddev": 0.0}, {"trust": "none"}, "accepts.trust"),
    ("another method", {"methods": ("clip21",)}, {}, {}, "accepts.methods: expected clip21"),
    ("another model's size", {"max_parameters": 4}, {}, {}, "accepts.max_parameters: expected at most 4, got 5"),
    ("norms of bare signals", {}, {"diagnostics": True}, {}, "diagnostics: expected requests for messages only"),
    (
        "no multiplier that can be",
        {},
        {},
        {"noise_multiplier": float("nan")},
        "noise_multiplier: expected a finite number",
    ),
    ("an unknown trust", {"trust": "none"}, {}, {"trust": "nobody"}, "accepts.trust"),
    ("a sampling that nobody knows", {}, {}, {"sampling": "guess"}, "terms: expected privacy terms"),
    ("a turn out of order", {}, {}, {"turn": 2, "last_turn": 2}, "turn: expected consecutive turns"),
    ("more turns than promised", {}, {}, {"turn": 10}, "turn: expected consecutive turns"),
]


@pytest.mark.parametrize(("limits", "asked", "told", "line"), [s[1:] for s in STRANGERS], ids=[s[0] for s in STRANGERS])
def test_what_was_not_agreed_is_refused_and_nothing_changes(
    limits: dict[str, Any], asked: dict[str, Any], told: dict[str, Any], line: str, tmp_path: Path
) -> None:
    guarded = Device(policy(**limits), tmp_path / "state")
    with pytest.raises(Refusal, match=line) as caught:
        ask(guarded, instructions(**asked), terms(**told))
    assert caught.value.kind in KINDS
    assert not (tmp_path / "state").exists()
    assert refused(refusal_record(caught.value.kind, caught.value.public_line)) == (
        caught.value.kind,
        str(caught.value),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_refused(device: Device, value: float) -> None:
    with pytest.raises(Refusal, match=r"model: expected finite numbers"):
        ask(device, instructions(), terms(), torch.full((SIZE,), value))


def test_a_run_does_not_change_its_model_s_size(device: Device) -> None:
    ask(device, *turn(1, 0))
    with pytest.raises(Refusal, match=r"model: expected a model with memory of the shapes"):
        ask(device, *turn(2, 1), torch.zeros(9), torch.ones(9))


def test_the_same_request_gets_the_same_bytes_and_another_one_none(device: Device) -> None:
    first = ask(device, *turn(1, 0))
    again = ask(Device(device.policy, device.folder), *turn(1, 0), signal=torch.full((SIZE,), 7.0))
    assert torch.equal(first, again)
    assert len(Ledger(device.folder).entries()) == 1
    with pytest.raises(Refusal, match=r"turn: expected a turn after 1, or the same request again"):
        ask(device, *turn(1, 0), torch.ones(SIZE))


def test_memory_moves_only_when_the_server_says_that_the_message_counted(device: Device) -> None:
    record = MemoryFile(device.folder, "r1", 0)
    ask(device, *turn(1, 0))
    ask(device, *turn(2, 1))  # counted
    ask(device, *turn(3, 1))  # the second did not
    kept = record.read()
    assert kept is not None
    assert (kept.committed_turn, kept.pending_turn) == (1, 3)
    wanted, _ = METHOD.client_rule(METHOD.init_client(SIZE), torch.ones(SIZE), None, 1)
    assert torch.allclose(kept.committed["memory"], 0.5 * wanted)


def test_a_late_order_is_not_answered_again(device: Device) -> None:
    ask(device, *turn(1, 0))
    ask(device, *turn(2, 1))
    with pytest.raises(Refusal, match="turn: expected a turn after 2") as caught:
        ask(device, *turn(1, 0))
    assert caught.value.kind == "stale"


def test_a_client_that_lost_its_memory_says_so_and_starts_afresh_when_told(device: Device) -> None:
    ask(device, *turn(1, 0))
    ask(device, *turn(2, 1))
    MemoryFile(device.folder, "r1", 0).path.unlink()
    with pytest.raises(Refusal, match="expected its state after turn 2, got a lost memory") as caught:
        ask(device, *turn(3, 2))
    assert caught.value.kind == "lost"
    ask(device, *turn(4, 0))
    kept = MemoryFile(device.folder, "r1", 0).read()
    assert kept is not None
    assert kept.committed_turn == 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_memory_that_is_not_finite_is_a_lost_one(device: Device, poison: float) -> None:
    """Otherwise every later message would silently be zero; the client is charged for them nevertheless."""
    ask(device, *turn(1, 0))
    memory = MemoryFile(device.folder, "r1", 0)
    record = memory.read()
    assert record is not None
    record.pending["memory"][1] = poison
    memory.prepare(record)
    memory.finish()
    with pytest.raises(Refusal, match=r"memory of client 0: expected finite numbers") as caught:
        ask(device, *turn(2, 1))
    assert caught.value.kind == "lost"
    assert len(Ledger(device.folder).entries()) == 1
    ask(device, *turn(3, 0))


def test_an_update_that_is_not_finite_is_said_in_the_client_s_own_log(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="flwr"):
        ask(device, *turn(1, 0), signal=torch.full((SIZE,), torch.nan))
    assert "client 0: its update is not finite" in caplog.text


def test_a_message_whose_copy_is_lost_is_not_noised_again(device: Device) -> None:
    ask(device, *turn(1, 0))
    MemoryFile(device.folder, "r1", 0).path.unlink()
    with pytest.raises(Refusal, match="no turn is noised twice") as caught:
        ask(device, *turn(1, 0))
    assert caught.value.kind == "stale"


def test_a_method_without_memory_loses_nothing(tmp_path: Path) -> None:
    plain = Device(policy(), tmp_path / "state")
    asked = instructions(method=DPFedAvg(clip_norm=1.0))
    ask(plain, asked, terms())
    MemoryFile(plain.folder, "r1", 0).path.unlink()
    ask(plain, asked, terms(turn=2, last_turn=1))


def test_a_new_epoch_starts_afresh_and_the_old_one_is_over(device: Device) -> None:
    ask(device, *turn(1, 0))
    ask(device, instructions(), terms(turn=2, epoch=1))
    with pytest.raises(Refusal, match="epoch: expected at least 1"):
        ask(device, instructions(), terms(turn=3, last_turn=1))


def test_records_are_private(device: Device) -> None:
    ask(device, *turn(1, 0))
    files = [path for path in device.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"ledger.head", "ledger.jsonl", "lock", "memory"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    folders = [device.folder, *(path for path in device.folder.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


def test_everything_is_on_the_disk_before_the_message_leaves(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        fedpriv.files.os,
        "fsync",
        lambda f: (synced.append(str(Path(f"/proc/self/fd/{f}").readlink())), real(f)),
    )
    ask(device, *turn(1, 0))
    names = [Path(path).name for path in synced]
    assert names[names.index("memory.part") :] == [
        *("memory.part", "ledger.head.part", "ledger.jsonl", "state", "state", "r1-0"),
    ]


@pytest.mark.parametrize("damage", ["flipped", "short", "version", "empty"])
def test_a_damaged_memory_is_never_used(device: Device, damage: str) -> None:
    ask(device, *turn(1, 0))
    path = MemoryFile(device.folder, "r1", 0).path
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    damaged = {"flipped": bytes(content), "short": bytes(content[:-9]), "empty": b""}
    path.write_bytes(damaged.get(damage, content.replace(b"fedpriv-memory 1", b"fedpriv-memory 2")))
    with pytest.raises(Refusal, match="expected an intact memory file") as caught:
        ask(device, *turn(2, 1))
    assert caught.value.kind == "trouble"
    assert len(Ledger(device.folder).entries()) == 1


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_a_full_disk_is_said_and_no_memory_is_lost(
    device: Device, full_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(device, *turn(1, 0))
    before = MemoryFile(device.folder, "r1", 0).path.read_bytes()
    real, calls = os.write, []

    def write(file: int, content: bytes) -> int:
        calls.append(1)
        if len(calls) == full_at + 1:
            raise OSError(28, "No space left on device")
        return real(file, content)

    monkeypatch.setattr(fedpriv.files.os, "write", write)
    with pytest.raises(Refusal, match="no space left") as caught:
        ask(device, *turn(2, 1))
    assert caught.value.kind == "trouble"
    assert MemoryFile(device.folder, "r1", 0).path.read_bytes() == before
    monkeypatch.undo()
    ask(device, *turn(3, 1))


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("full_at", range(3))
def test_a_full_disk_charges_no_message_that_never_left(
    device: Device, full_at: int, torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each of the writes, also half way: the client then answers the same turn as if nothing had happened."""
    ask(device, *turn(1, 0))
    files = {path: path.read_bytes() for path in device.folder.rglob("*") if path.is_file()}
    real, calls = os.write, []

    def write(file: int, content: bytes) -> int:
        calls.append(1)
        if len(calls) > full_at:
            if torn and len(calls) == full_at + 1:
                return real(file, bytes(content)[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return real(file, content)

    monkeypatch.setattr(fedpriv.files.os, "write", write)
    with pytest.raises(Refusal, match="no space left"):
        ask(device, *turn(2, 1))
    assert len(calls) > full_at
    monkeypatch.undo()
    assert len(Ledger(device.folder).entries()) == 1
    assert all(path.read_bytes() == content for path, content in files.items())
    assert not (device.folder / "r1-0" / "memory.part").exists()
    ask(device, *turn(2, 1))
    assert [entry.turn for entry in Ledger(device.folder).entries()] == [1, 2]


class Stopped(BaseException):
    """Error for a machine that stops."""


@pytest.mark.parametrize("stop_at", range(6))
def test_whenever_the_machine_stops_the_turn_is_charged_once_and_its_one_message_is_sent(
    device: Device, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each write, and after each file or line that is certainly on disk."""
    ask(device, *turn(1, 0))
    real, done = os.fsync, []

    def fsync(file: int) -> None:
        real(file)
        done.append(file)
        if len(done) == stop_at + 1:
            raise Stopped

    monkeypatch.setattr(fedpriv.files.os, "fsync", fsync)
    with pytest.raises(Stopped):
        ask(device, *turn(2, 1))
    monkeypatch.undo()
    charged = len(Ledger(device.folder).entries())
    assert charged == (1 if stop_at < 2 else 2)
    again = Device(device.policy, device.folder)
    message = ask(again, *turn(2, 1))
    assert torch.equal(ask(again, *turn(2, 1)), message)
    assert [entry.turn for entry in Ledger(device.folder).entries()] == [1, 2]
    ask(again, *turn(3, 2))


def test_what_lies_beside_a_memory_and_is_not_in_the_ledger_is_not_sent(device: Device) -> None:
    """This happens after a full disk, or if another person put a file there."""
    ask(device, *turn(1, 0))
    path = MemoryFile(device.folder, "r1", 0).path
    before = path.read_bytes()
    other = Device(device.policy, device.folder.parent / "other")
    for number in (1, 2, 3):
        ask(other, *turn(number, number - 1))
    for content in (MemoryFile(other.folder, "r1", 0).path.read_bytes(), before[:-3], b""):
        path.with_name("memory.part").write_bytes(content)
        with pytest.raises(Refusal, match="each turn is answered once"):
            ask(device, *turn(1, 0), torch.ones(SIZE))
        assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["a line is missing", "a number is changed", "not JSON"])
def test_a_ledger_that_was_changed_stops_everything(device: Device, damage: str) -> None:
    for number in (1, 2, 3):
        ask(device, *turn(number, number - 1))
    path = Ledger(device.folder).path
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "a line is missing":
        lines = [lines[0], lines[2]]
    elif damage == "a number is changed":
        lines[1] = lines[1].replace(b'"noise_stddev": 2.0', b'"noise_stddev": 9.0')
    else:
        lines[0] = b"none\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(Refusal, match="expected the original line") as caught:
        ask(device, *turn(4, 3))
    assert caught.value.kind == "trouble"


def test_a_torn_last_line_was_never_sent(device: Device) -> None:
    ask(device, *turn(1, 0))
    path = Ledger(device.folder).path
    with path.open("ab") as file:
        file.write(b'{"run": "r1", "tu')
    ask(device, *turn(2, 1))
    assert [entry.turn for entry in Ledger(device.folder).entries()] == [1, 2]


def test_the_ledger_says_what_the_server_may_claim(device: Device) -> None:
    plan = make_plan(trust="local", sampling=Everyone(4), rounds=9, delta=1e-5, l2_bound=1.0, noise_multiplier=1.0)
    for number in range(1, 5):
        ask(device, *turn(number, number - 1))
        entries = Ledger(device.folder).entries()
        assert spent(entries, 1e-5, "replace") == pytest.approx(plan.epsilon_of_participations(number), rel=1e-9)


def test_the_budget_holds_over_runs_and_ends_with_a_refusal(tmp_path: Path) -> None:
    plan = make_plan(trust="local", sampling=Everyone(4), rounds=9, delta=1e-5, l2_bound=1.0, noise_multiplier=1.0)
    budget = plan.epsilon_of_participations(3) * 1.001
    frugal = Device(policy(epsilon=budget), tmp_path / "state")
    ask(frugal, instructions(), terms(run="one"))
    ask(frugal, instructions(), terms(run="two"))
    ask(frugal, instructions(), terms(run="three"))
    with pytest.raises(Refusal, match=r"epsilon after another message: expected at most") as caught:
        ask(frugal, instructions(), terms(run="four"))
    assert caught.value.kind == "budget"
    assert len(Ledger(frugal.folder).entries()) == 3
    ask(frugal, instructions(), terms(run="one"))  # the same request, the same bytes: nothing new is spent


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("releases", [1, 4])
def test_the_quick_bound_is_never_below_the_accountant_s(device: Device, multiplier: float, releases: int) -> None:
    for number in range(1, releases + 1):
        o, t = turn(number, number - 1)
        ask(device, replace(o, noise_stddev=2.0 * multiplier), replace(t, noise_multiplier=multiplier))
    entries = Ledger(device.folder).entries()
    exact = spent(entries, 1e-5, "replace")
    assert not surely_within(entries, exact * 0.999, 1e-5, "replace")
    assert surely_within(entries, 3.0 * exact, 1e-5, "replace")


def test_different_noises_compose_like_one_gaussian(device: Device) -> None:
    ask(device, instructions(), terms())
    ask(device, instructions(noise_stddev=4.0), terms(run="r2", noise_multiplier=2.0))
    together = make_plan(
        trust="local", sampling=Everyone(1), rounds=1, delta=1e-5, l2_bound=1.0, noise_multiplier=1.25**-0.5
    )
    assert spent(Ledger(device.folder).entries(), 1e-5, "replace") == pytest.approx(together.epsilon, rel=1e-9)


def test_the_account_says_how_runs_without_local_trust_are_added(tmp_path: Path) -> None:
    device, told = Device(policy(trust="central"), tmp_path / "state"), {"trust": "central", "delta": 1e-6}
    words = "added       by basic composition, an upper bound: the epsilons and deltas of "
    ask(device, instructions(noise_stddev=0.0), terms(**told))
    assert words not in account_of(device.folder, 1000.0, 1e-5, "replace")
    ask(device, instructions(noise_stddev=0.0), terms(**told, run="r2"))
    alone = spent(Ledger(device.folder).entries()[:1], 1e-5, "replace")
    assert spent(Ledger(device.folder).entries(), 1e-5, "replace") == pytest.approx(2.0 * alone)
    assert f"{words}each of 2 runs without local trust" in account_of(device.folder, 1000.0, 1e-5, "replace")
    ask(device, instructions(), terms(run="r3"))
    more = ", and of all messages with this client's own noise"
    assert f"{words}each of 2 runs without local trust{more}" in account_of(device.folder, 1000.0, 1e-5, "replace")


def test_the_policy_and_not_the_server_says_what_neighbours_are(device: Device) -> None:
    """A release with an add-or-remove guarantee costs as much as under replacement, with the same minimum of noise."""
    ask(device, instructions(noise_stddev=1.0), terms(adjacency="add-or-remove"))
    ask(device, instructions(), terms(run="r2"))
    together = make_plan(
        trust="local", sampling=Everyone(1), rounds=1, delta=1e-5, l2_bound=1.0, noise_multiplier=5.0**-0.5
    )
    assert spent(Ledger(device.folder).entries(), 1e-5, "replace") == pytest.approx(together.epsilon, rel=1e-9)


def test_a_floor_is_meant_under_the_policy_s_neighbours(tmp_path: Path) -> None:
    strict = Device(policy(min_noise_multiplier=1.0), tmp_path / "state")
    with pytest.raises(Refusal, match=r"limits.min_noise_multiplier: expected at least 1, got 0\.5"):
        ask(strict, instructions(noise_stddev=1.0), terms(adjacency="add-or-remove"))
    lenient = Device(policy(min_noise_multiplier=1.0, adjacency="add-or-remove"), tmp_path / "other")
    ask(lenient, instructions(noise_stddev=1.0), terms(adjacency="add-or-remove"))


ODD = {
    "noise that is no number": ({"noise_stddev": float("nan")}, {}),
    "endless noise": ({"noise_stddev": float("inf")}, {}),
    "negative noise": ({"noise_stddev": -2.0}, {}),
    "a negative client": ({"client": -1}, {}),
    "a negative epoch": ({}, {"epoch": -1}),
    "a probability that is no number": ({}, {"probability": float("nan")}),
    "no noise promised": ({"noise_stddev": 0.0}, {"noise_multiplier": 0.0}),
    "hardly any noise promised": ({"noise_stddev": 2e-200}, {"noise_multiplier": 1e-200}),
    "rounds without end": ({}, {"rounds": 10**7}),
    "a delta that is no number": ({}, {"delta": float("nan")}),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("trust", ["local", "central"])
def test_odd_numbers_get_nothing_and_take_no_time(name: str, trust: str, tmp_path: Path) -> None:
    asked, told = ODD[name]
    bare = {"noise_stddev": 0.0} if trust == "central" and "noise_stddev" not in asked else {}
    guarded = Device(policy(trust="central", epsilon=1e3), tmp_path / "state")
    with pytest.raises(Refusal) as caught:
        ask(guarded, instructions(**{**bare, **asked}), terms(**{"trust": trust, **told}))
    assert caught.value.kind in ("policy", "budget", "model")
    assert not Ledger(guarded.folder).entries()


def test_what_a_refusal_tells_holds_nothing_of_files_or_past_runs() -> None:
    for kind in ("trouble", "budget"):
        told = Refusal.because(kind, "/home/alice/hiv.csv: expected numbers, got 'Alice_Smith'").public_line
        assert "alice" not in told.lower()
        assert KINDS[kind] in told


def test_whatever_goes_wrong_is_a_refusal(device: Device) -> None:
    def fails() -> Tensor:
        raise RuntimeError("out of memory at row 17 of hiv.csv")

    with pytest.raises(Refusal, match="RuntimeError") as caught:
        device.answer(*turn(1, 0), torch.zeros(SIZE), fails)
    assert caught.value.kind == "trouble"
    assert "hiv" not in caught.value.public_line


@pytest.mark.parametrize(
    "damage", ["removed", "shortened", "last line changed", "last newline lost", "all but memory gone"]
)
def test_a_ledger_that_got_shorter_stops_everything(device: Device, damage: str) -> None:
    for number in (1, 2, 3):
        ask(device, *turn(number, number - 1))
    path = Ledger(device.folder).path
    content = path.read_bytes()
    if damage == "shortened":
        path.write_bytes(b"".join(content.splitlines(keepends=True)[:2]))
    elif damage == "last line changed":
        path.write_bytes(content[:-400] + content[-400:].replace(b"2.0", b"9.0"))
    elif damage == "last newline lost":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    if damage == "all but memory gone":
        path.with_name("ledger.head").unlink()
    with pytest.raises(Refusal, match="expected the original line") as caught:
        ask(device, *turn(4, 3))
    assert caught.value.kind == "trouble"


def test_what_was_sent_without_a_promise_is_not_forgotten(tmp_path: Path) -> None:
    """If a policy becomes strict after a run without a guarantee, no budget is left."""
    lenient = Device(policy(trust="none"), tmp_path / "state")
    ask(lenient, instructions(noise_stddev=0.0), terms(trust="none", noise_multiplier=0.0))
    assert "epsilon inf" in account_of(lenient.folder, 8.0, 1e-5, "replace")
    ask(lenient, instructions(), terms(run="r2"))
    with pytest.raises(Refusal, match="got inf") as caught:
        ask(Device(policy(), lenient.folder), instructions(), terms(run="r3"))
    assert caught.value.kind == "budget"


def test_a_new_epoch_does_not_hide_that_the_ledger_is_gone(device: Device) -> None:
    ask(device, *turn(1, 0))
    for name in ("ledger.jsonl", "ledger.head"):
        (device.folder / name).unlink()
    with pytest.raises(Refusal, match="expected the original line"):
        ask(device, instructions(), terms(turn=2, epoch=1))


def test_reading_the_ledger_changes_nothing(device: Device) -> None:
    """This also holds in the middle of an append."""
    ask(device, *turn(1, 0))
    path = Ledger(device.folder).path
    with path.open("ab") as file:
        file.write(b'{"run": "r1"')
    before = path.read_bytes()
    Ledger(device.folder).entries()
    assert "1 message of" in account_of(device.folder, 8.0, 1e-5, "replace")
    assert path.read_bytes() == before


def test_central_runs_cost_their_whole_promise_at_once(tmp_path: Path) -> None:
    trusting = Device(policy(trust="central", delta=2.5e-5), tmp_path / "state")
    bare = instructions(noise_stddev=0.0)
    told = terms(trust="central", adjacency="add-or-remove")
    ask(trusting, bare, told)
    plan = make_plan(trust="central", sampling=Everyone(4), rounds=9, delta=1e-5, l2_bound=1.0, noise_multiplier=1.0)
    assert spent(Ledger(trusting.folder).entries(), 2.5e-5, "replace") == pytest.approx(plan.epsilon)
    ask(trusting, bare, replace(told, run="r2"))
    assert spent(Ledger(trusting.folder).entries(), 2.5e-5, "replace") == pytest.approx(2 * plan.epsilon)
    with pytest.raises(Refusal, match="got 3e-05"):  # a third delta of 1e-5 is more than 2.5e-5
        ask(trusting, bare, replace(told, run="r3"))


def test_a_server_that_lowers_the_noise_in_mid_run_pays_for_both_promises(tmp_path: Path) -> None:
    trusting = Device(policy(trust="central", delta=1e-4, epsilon=1e4), tmp_path / "state")
    bare = instructions(noise_stddev=0.0)
    told = terms(trust="central", adjacency="add-or-remove")
    ask(trusting, bare, told)
    one = spent(Ledger(trusting.folder).entries(), 1e-4, "replace")
    ask(trusting, instructions(noise_stddev=0.0, round=2), replace(told, turn=2, last_turn=1, noise_multiplier=0.5))
    assert spent(Ledger(trusting.folder).entries(), 1e-4, "replace") > 2 * one


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", r"a table \[limits\]"),
        ("[limits]\nepsilon = 1\n", "limits.delta"),
        ("[limits]\nepsilon = 0.0\ndelta = 1e-5", "limits.epsilon"),
        ("[limits]\nepsilon = inf\ndelta = 1e-5", "limits.epsilon"),
        ("[limits]\nepsilon = 1.0\ndelta = 1e-5\nepsilom = 2", "epsilom: expected a known key"),
        ('[accepts]\ntrust = "all"\n[limits]\nepsilon = 1.0\ndelta = 1e-5', "accepts.trust"),
        ('[accepts]\nmethods = ["sgd"]\n[limits]\nepsilon = 1.0\ndelta = 1e-5', "accepts.methods"),
        ("limits = 3", "limits: expected a table"),
        ("[limits", "expected a TOML file"),
    ],
)
def test_a_policy_that_is_not_right_lets_nothing_leave(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "fedpriv-client.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=line):
        load_policy(path)
    with pytest.raises(UserError, match=line):
        Device.at(tmp_path)


def test_clip21_keeps_its_memory_too(tmp_path: Path) -> None:
    kept = Device(policy(), tmp_path / "state")
    asked = instructions(method=Clip21(clip_norm=1.0))
    ask(kept, asked, terms())
    ask(kept, replace(asked, round=2), terms(turn=2, last_turn=1))
    record = MemoryFile(kept.folder, "r1", 0).read()
    assert record is not None
    assert float(record.committed["memory"].norm()) == pytest.approx(1.0, rel=1e-5)


def test_what_was_spent_is_told_rounded_up() -> None:
    assert [in_words(epsilon) for epsilon in (0.0, 1.00001, 7.9999, float("inf"))] == ["0", "1.001", "8", "inf"]
