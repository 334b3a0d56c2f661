"""The Ray engine with real processes: equal to the loop to the bit, for any number of workers and any deaths."""

import errno
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from ray.cluster_utils import Cluster
from support.federations import Setting, advance, models_of, ragged_digits, setting
from support.helpers import EXAMPLES, same
from torch import Tensor

from fedpriv.data.federation import shifted
from fedpriv.data.shifts import Rotation
from fedpriv.engines import Engine, LoopEngine, Population, VectorizedEngine
from fedpriv.engines.ray import host
from fedpriv.engines.ray.cluster import Connection, connect, quiet
from fedpriv.engines.ray.engine import RayEngine
from fedpriv.engines.ray.host import Host, Partial, merged, pack, unpack
from fedpriv.engines.ray.owners import Owners
from fedpriv.engines.ray.snapshots import KeepSnapshots, Snapshots
from fedpriv.engines.secure_sum import SecureSum
from fedpriv.errors import EngineStartError, UserError
from fedpriv.methods import ServerState
from fedpriv.privacy import AggregationChoice, Everyone, FixedSize, Poisson
from fedpriv.rounds import Broadcast, Total, begin_round, finish_round, skip_round
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import LocalEpochs, LocalSteps, MinibatchGradient

pytestmark = pytest.mark.xdist_group("ray")

# Workers cannot import modules of the tests by name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

CLIENTS = 12
STORE_BYTES = 2**27
STEPS = LocalSteps(steps=3, client_lr=0.1, batch_size=20)


_SHARED: list[Connection] = []


def end_ray() -> None:
    while _SHARED:
        _SHARED.pop().close()
    with quiet():
        ray.shutdown()


@pytest.fixture(autouse=True, scope="module")
def nothing_left() -> Iterator[None]:
    yield
    end_ray()


@pytest.fixture
def some_ray() -> None:
    """Start one Ray for all tests that do not need a separate one; engines join it."""
    if not ray.is_initialized():
        _SHARED.append(connect(None, STORE_BYTES))


@pytest.fixture
def no_ray() -> None:
    end_ray()


def loop(population: Population, _: torch.device) -> Engine:
    return LoopEngine(population)


def vectorized(population: Population, _: torch.device) -> Engine:
    return VectorizedEngine(population, chunk=3)


def over_ray(made: Setting, make: Any = loop, workers: int = 2, **options: Any) -> RayEngine:
    if ray.is_initialized():  # the workers of the test before may still be ending
        eventually(lambda: ray.available_resources().get("CPU", 0.0) >= 1.0)
    return RayEngine(made.population, make, workers=workers, cpus_per_worker=1.0 / workers, **options)


def start_of(made: Setting) -> ServerState:
    return made.server.method.init_server(made.initial_model)


def all_same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(same(one, other) for one, other in zip(found, wanted, strict=True))


def same_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


CASES = {
    "memory": setting(EXAMPLES["alpha-normec damped"], trust="central", sampling=Poisson(CLIENTS, 0.4)),
    "everyone": setting(EXAMPLES["clip21"], work=STEPS, sampling=Everyone(CLIENTS)),
    "sent": setting(
        EXAMPLES["alpha-normec sent"],
        work=MinibatchGradient(batch_size=20),
        trust="local",
        sampling=FixedSize(CLIENTS, 4),
    ),
    "no memory": setting(EXAMPLES["dp-fedavg"], work=STEPS, trust="central", sampling=Poisson(CLIENTS, 0.3)),
    "public memory": setting(EXAMPLES["centered-clip"], trust="central", sampling=Poisson(CLIENTS, 0.5)),
    "control variates": setting(
        EXAMPLES["dp-scaffold"],
        work=LocalSteps(steps=3, client_lr=0.1, batch_size=20, signal="gradient-mean"),
        trust="central",
        sampling=Poisson(CLIENTS, 0.5),
    ),
    "moves": setting(
        EXAMPLES["fedspeed"],
        work=LocalEpochs(epochs=1, client_lr=0.1, batch_size=20, order="by-loss", ascent=0.1),
        trust="central",
        sampling=Poisson(CLIENTS, 0.5),
    ),
    "shifted": setting(
        EXAMPLES["clip21"],
        federation=shifted(ragged_digits(CLIENTS), Rotation(), SeededStreams(3)),
        sampling=FixedSize(CLIENTS, 4),
    ),
}


@pytest.mark.parametrize(
    "case",
    ["memory", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "memory")],
)
@pytest.mark.usefixtures("some_ray")
def test_the_loop_inside_workers_is_the_loop_to_the_bit(case: str) -> None:
    """Compare models, states and totals, also after each engine has restored the states of the other."""
    made, alone = CASES[case], LoopEngine(CASES[case].population)
    state, wanted, totals = advance(alone, made.server, start_of(made), 1, 5)
    saved = alone.save()
    _, rest, _ = advance(alone, made.server, state, 6, 8)
    assert float((rest[-1] - made.initial_model).abs().max()) > 1e-3
    with over_ray(made, snapshots=KeepSnapshots(every=2, share=math.inf)) as engine:
        assert engine.save()["clients"].tolist() == []
        state, found, totals_there = advance(engine, made.server, start_of(made), 1, 5)
        assert all_same(found, wanted)
        assert same_states(engine.save(), saved)
        assert all_same(advance(engine, made.server, state, 6, 8)[1], rest)
        engine.restore(saved)
        assert same_states(engine.save(), saved)
        assert all_same(advance(engine, made.server, state, 6, 8)[1], rest)
        engine.restore({"clients": torch.zeros(0, dtype=torch.int64)})
        assert all_same(advance(engine, made.server, start_of(made), 1, 2)[1], wanted[:2])
        seen = np.unique(np.concatenate([_cohort(made, k) for k in (1, 2)])).tolist()
        assert engine.save()["clients"].tolist() == seen
        assert len(seen) < CLIENTS or case in ("everyone", "memory")
    for one, other in zip(totals_there, totals, strict=True):
        assert (one.messages, one.non_finite, one.sum.dtype) == (other.messages, other.non_finite, torch.float64)
        assert same(one.sum, other.sum)
        assert one.signal_norm == pytest.approx(other.signal_norm, rel=1e-12, nan_ok=True)
    assert ray.is_initialized()


def _cohort(made: Setting, round: int) -> np.ndarray:
    from fedpriv.rounds import begin_round

    return begin_round(made.server, start_of(made), round).cohort


@pytest.mark.slow
@pytest.mark.usefixtures("some_ray")
def test_batches_of_classes_are_the_same_bits_for_any_number_of_workers() -> None:
    """They are equal to the loop only up to rounding, which shows that batches are used."""
    made = setting(EXAMPLES["clip21"], work=STEPS, sampling=FixedSize(CLIENTS, 9))
    with over_ray(made, vectorized, unit=3) as engine:
        found = models_of(made, lambda _: engine, 4)
    assert all_same(found, models_of(made, OneWorker, 4))
    reference = models_of(made, rounds=4)
    assert not same(found[-1], reference[-1])
    assert float((found[-1] - reference[-1]).abs().max()) <= 1e-6


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("some_ray")
def test_workers_elsewhere_evaluate_as_this_process_does(kill: bool) -> None:
    """A worker that dies in an evaluation takes no round with it."""
    made = CASES["memory"]
    task, data = made.population.task, made.population.federation.dataset
    inputs, labels = data.train_inputs[:50], data.train_labels[:50]
    model = models_of(made, rounds=1)[-1]
    local = LoopEngine(made.population)
    broadcasts = [Broadcast(round, model, np.arange(4), CLIENTS) for round in (1, 2)]
    expected = [local.sum_messages(broadcast).sum for broadcast in broadcasts]
    with over_ray(made, address="auto") as engine:
        assert engine.forward is not None
        assert same(engine.sum_messages(broadcasts[0]).sum, expected[0])
        if kill:
            ray.kill(engine._hosts[1])
        pieces = list(engine.forward(model, inputs, 7))
        assert [len(piece) for piece in pieces] == [7] * 7 + [1]
        assert all_same(pieces, list(task.outputs(model, inputs, 7)))
        assert task.evaluate(model, inputs, labels, engine.forward) == task.evaluate(model, inputs, labels)
        assert same(engine.sum_messages(broadcasts[1]).sum, expected[1])


@pytest.mark.slow
@pytest.mark.usefixtures("some_ray")
def test_workers_on_the_cores_of_this_machine_leave_evaluations_to_this_process() -> None:
    with over_ray(CASES["memory"]) as engine:
        assert engine.forward is None


class OneWorker(VectorizedEngine):
    """Return the work of a single worker: the classes of three units, one after the other."""

    def __init__(self, population: Population) -> None:
        super().__init__(population, chunk=3)

    def sum_messages(self, broadcast: Broadcast) -> Total:
        cohort, whole = broadcast.cohort, super().sum_messages
        parts = [whole(broadcast._replace(cohort=cohort[cohort % 3 == unit])) for unit in range(3)]
        return parts[0]._replace(sum=sum(part.sum for part in parts), messages=len(cohort))


class Troubled(LoopEngine):
    """A loop engine that calls `trouble(round)` when half of its clients have run."""

    def __init__(self, population: Population, trouble: Callable[[int], None]) -> None:
        super().__init__(population)
        self._trouble = trouble

    def sum_messages(self, broadcast: Broadcast) -> Total:
        half = len(broadcast.cohort) // 2
        one = super().sum_messages(broadcast._replace(cohort=broadcast.cohort[:half]))
        self._trouble(broadcast.round)
        other = super().sum_messages(broadcast._replace(cohort=broadcast.cohort[half:]))
        norms = [t.signal_norm * t.messages for t in (one, other) if t.messages]
        messages = one.messages + other.messages
        return Total(one.sum + other.sum, messages, one.non_finite + other.non_finite, sum(norms) / messages)


def troubled(trouble: Callable[[int], None]) -> Callable[[Population, torch.device], Engine]:
    return lambda population, _: Troubled(population, trouble)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def taken(path: Path) -> bool:
    """Return True if this process is the first to remove the file."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.usefixtures("some_ray")
def test_workers_that_are_killed_in_the_middle_of_rounds_change_nothing(folder: bool, tmp_path: Path) -> None:
    """Workers die before any snapshot, in its round, right after it, and twice in one round; in memory and in files."""
    made, rounds = setting(EXAMPLES["alpha-normec damped"], trust="central", sampling=FixedSize(CLIENTS, 10)), 9
    kept = tmp_path / "snapshots" if folder else None
    mortal = troubled(lambda round: die() if taken(tmp_path / str(round)) else None)
    for number in (2, 7) if folder else (1, 3, 4, 8):
        (tmp_path / str(number)).touch()
    with over_ray(made, mortal, snapshots=KeepSnapshots(every=3, share=math.inf, folder=kept)) as engine:
        _, found, _ = advance(engine, made.server, start_of(made), 1, rounds)
        files = [] if kept is None else [path.name for path in kept.iterdir()]
        states = engine.save()
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    assert all(name.endswith(".safetensors") for name in files)
    assert bool(files) == folder
    assert kept is None or not list(kept.iterdir())
    reference = LoopEngine(made.population)
    assert all_same(found, advance(reference, made.server, start_of(made), 1, rounds)[1])
    assert same_states(states, reference.save())


@pytest.mark.usefixtures("some_ray")
def test_integer_sums_and_void_rounds_are_those_of_the_loop() -> None:
    """Workers take back the third round, with a sum beyond the limit, from a snapshot and the rounds since."""
    made = setting(
        EXAMPLES["alpha-normec damped"], trust="aggregator", aggregation=AggregationChoice(least_survivors=CLIENTS)
    )
    rules = made.population.rules.sums
    assert rules is not None

    def run(engine: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        state, models = made.server.init(made.initial_model), []
        for number in range(1, 6):
            limited = replace(rules, limit=1) if number == 3 else rules
            total = SecureSum(engine, limited, made.population.rules).sum_messages(
                begin_round(made.server, state, number)
            )
            assert total.void == (number == 3)
            void = total.void
            state = skip_round(made.server, state) if void else finish_round(made.server, state, number, total.sum)
            models.append(state.model)
        return models, engine.save()

    with over_ray(made, snapshots=KeepSnapshots(every=2, share=1e9)) as engine:
        found, states = run(engine)
    wanted, expected = run(LoopEngine(made.population))
    assert all_same(found, wanted)
    assert same_states(states, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("some_ray")
def test_without_memory_a_killed_worker_costs_a_round_and_nothing_else(tmp_path: Path) -> None:
    """An empty cohort sums to zero; a cohort without a capacity gets the size of the whole cohort."""
    made = CASES["no memory"]
    mortal = troubled(lambda round: die() if taken(tmp_path / str(round)) else None)
    (tmp_path / "3").touch()
    with over_ray(made, mortal) as engine:
        assert all_same(models_of(made, lambda _: engine, 5), models_of(made, rounds=5))
        nobody = engine.sum_messages(Broadcast(6, made.initial_model, np.arange(0)))
        assert (nobody.messages, nobody.non_finite) == (0, 0)
        assert same(nobody.sum, torch.zeros_like(made.initial_model, dtype=torch.float64))
        assert np.isnan(nobody.signal_norm)
        everyone = Broadcast(6, made.initial_model, np.arange(CLIENTS))
        assert same(engine.sum_messages(everyone).sum, LoopEngine(made.population).sum_messages(everyone).sum)
    assert not (tmp_path / "3").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("some_ray")
def test_workers_that_die_every_time_are_given_up_and_the_run_can_go_on_later(tmp_path: Path) -> None:
    """Three failures end in one line; once the cause is removed, the round equals the undisturbed one."""
    made, cause, log = CASES["everyone"], tmp_path / "cause", tmp_path / "log"
    log.touch()

    def trouble(round: int) -> None:
        if round == 2 and cause.exists():
            with log.open("a") as file:
                file.write("x")
            time.sleep(0.2)
            die()

    with over_ray(made, troubled(trouble), workers=1) as engine:
        state, _, _ = advance(engine, made.server, start_of(made), 1, 1)
        cause.touch()
        with pytest.raises(UserError, match=r"round 2: expected workers that survive it.*3 failures.*its process died"):
            advance(engine, made.server, state, 2, 2)
        assert log.read_text() == "xxx"
        cause.unlink()
        assert all_same(advance(engine, made.server, state, 2, 3)[1], models_of(made, rounds=3)[1:])


@pytest.mark.slow
@pytest.mark.usefixtures("some_ray")
def test_want_of_memory_is_named_and_passes_if_it_was_short(tmp_path: Path) -> None:
    made, always = CASES["everyone"], tmp_path / "always"

    def trouble(round: int) -> None:
        if taken(tmp_path / str(round)) or always.exists():
            raise MemoryError("cannot hold it")

    (tmp_path / "2").touch()
    with over_ray(made, troubled(trouble), workers=1) as engine:
        state, found, _ = advance(engine, made.server, start_of(made), 1, 3)
        assert all_same(found, models_of(made, rounds=3))
        always.touch()
        with pytest.raises(UserError, match=r"out of memory: MemoryError: cannot hold it.*Use fewer --workers"):
            advance(engine, made.server, state, 4, 4)


class OddError(Exception):
    """An exception with a signature that pickle cannot restore."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


@pytest.mark.slow
@pytest.mark.usefixtures("some_ray")
def test_what_clients_raise_comes_out_as_itself_and_is_not_tried_again(tmp_path: Path) -> None:
    made, log = CASES["everyone"], tmp_path / "log"
    log.touch()

    def trouble(round: int) -> None:
        if round < 6 and not (tmp_path / "mended").exists():
            with log.open("a") as file:
                file.write(str(round))
            if round == 2:
                raise UserError("model.width", "a small number", 10**9, "Make it smaller")
            if round == 3:
                raise ZeroDivisionError("by zero")
            if round == 4:
                raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/states")
            if round == 5:
                raise OddError(1, 2)

    with over_ray(made, troubled(trouble), workers=1) as engine:
        state, _, _ = advance(engine, made.server, start_of(made), 1, 1)
        with pytest.raises(UserError) as user:
            advance(engine, made.server, state, 2, 2)
        assert str(user.value) == "model.width: expected a small number, got 1000000000. Make it smaller."
        assert user.value.where == "model.width"
        with pytest.raises(ZeroDivisionError, match="by zero") as bug:
            advance(engine, made.server, state, 3, 3)
        assert "in trouble" in str(bug.value.__cause__)
        with pytest.raises(UserError, match="/somewhere/states: expected room on the disk"):
            advance(engine, made.server, state, 4, 4)
        with pytest.raises(RuntimeError, match="OddError: 1 and 2"):
            advance(engine, made.server, state, 5, 5)
        assert log.read_text() == "12131415"  # going back to the start, round 1 is run again
        (tmp_path / "mended").touch()
        assert all_same(advance(engine, made.server, state, 2, 4)[1], models_of(made, rounds=4)[1:])


@pytest.mark.slow
@pytest.mark.usefixtures("some_ray")
def test_owners_change_when_a_worker_is_slow_and_nothing_else_does(tmp_path: Path) -> None:
    made, mark = setting(EXAMPLES["clip21"], sampling=Everyone(CLIENTS)), tmp_path / "slow"
    mark.touch()

    class Slow(LoopEngine):
        slow: bool | None = None
        seconds = 0.0

        def sum_messages(self, broadcast: Broadcast) -> Total:
            if self.slow is None:
                self.slow = taken(mark)
            self.seconds += (0.02 if self.slow else 0.002) * len(broadcast.cohort)
            host.time = SimpleNamespace(perf_counter=lambda: self.seconds)  # the worker's clock
            with (tmp_path / f"{'slow' if self.slow else 'fast'}-{broadcast.round}").open("a") as file:
                file.write("x" * len(broadcast.cohort))
            return super().sum_messages(broadcast)

    with over_ray(made, lambda population, _: Slow(population)) as engine:
        found = models_of(made, lambda _: engine, 9)
    first, last = ((tmp_path / f"slow-{k}").stat().st_size for k in (1, 9))
    assert last <= first // 2
    assert all_same(found, models_of(made, rounds=9))


@pytest.mark.usefixtures("some_ray")
def test_more_than_there_is_is_refused_with_what_there_is() -> None:
    cpus = ray.cluster_resources()["CPU"]
    population = CASES["everyone"].population
    with pytest.raises(UserError, match=rf"{cpus:g} CPUs and 0 GPUs on 1 machine.*room for 0"):
        RayEngine(population, loop, workers=1, gpus_per_worker=0.5)
    with pytest.raises(UserError, match=rf"room for {cpus + 1:g} workers.*room for {cpus:g}\. Use fewer"):
        RayEngine(population, loop, workers=int(cpus) + 1)
    with pytest.raises(UserError, match="expected 2 numbers, got 3"):
        RayEngine(population, loop, workers=2, gpus_per_worker=[0, 1, 0])
    with pytest.raises(UserError, match="at least 1"):
        RayEngine(population, loop, workers=0)


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_a_machine_that_goes_away_in_the_middle_of_a_round_changes_nothing(tmp_path: Path) -> None:
    made = setting(EXAMPLES["alpha-normec damped"], trust="central", sampling=FixedSize(CLIENTS, 10))
    fast = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    with quiet():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": fast})
        other = cluster.add_node(num_cpus=1)
    handler = signal.getsignal(signal.SIGTERM)

    def trouble(round: int) -> None:
        if round == 4 and not (tmp_path / "gone").exists():
            (tmp_path / f"at-work-{os.getpid()}").touch()
            until = time.monotonic() + 60.0
            while not (tmp_path / "gone").exists() and time.monotonic() < until:
                time.sleep(0.05)

    def remove() -> None:
        while len(list(tmp_path.glob("at-work-*"))) < 2:
            time.sleep(0.05)
        with quiet():
            cluster.remove_node(other, allow_graceful=False)
        (tmp_path / "gone").touch()

    try:
        with RayEngine(made.population, troubled(trouble), workers=2, address=cluster.address) as engine:
            assert len({node["NodeID"] for node in ray.nodes() if node["Alive"]}) == 2
            threading.Thread(target=remove, daemon=True).start()
            _, found, _ = advance(engine, made.server, start_of(made), 1, 6)
            states = engine.save()
        assert not ray.is_initialized()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        with quiet():
            cluster.shutdown()
    reference = LoopEngine(made.population)
    assert all_same(found, advance(reference, made.server, start_of(made), 1, 6)[1])
    assert same_states(states, reference.save())
    assert len(list(tmp_path.glob("at-work-*"))) == 2


@pytest.mark.usefixtures("no_ray")
def test_an_address_where_no_ray_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    population = CASES["everyone"].population
    monkeypatch.setattr("fedpriv.engines.ray.cluster._PROBE_SECONDS", 3.0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"^Ray at {address}: expected a running Ray.*a failed connection"):
            RayEngine(population, loop, workers=1, address=address)
        listening.listen()
        with pytest.raises(UserError, match=rf"^Ray at {address}: expected a running Ray.*not Ray's"):
            RayEngine(population, loop, workers=1, address=address)
    for wrong in ("somewhere", "ray://there:10001", ":6379", "there:port"):
        with pytest.raises(UserError, match="HOST:PORT"):
            RayEngine(population, loop, workers=1, address=wrong)
    assert not ray.is_initialized()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from support.federations import setting
from support.helpers import EXAMPLES
from fedpriv.engines import LoopEngine
from fedpriv.engines.ray.engine import RayEngine
from fedpriv.rounds import Broadcast
import numpy as np

made = setting(EXAMPLES["clip21"])
engine = RayEngine(made.population, lambda population, _: LoopEngine(population), workers=1)
everyone = Broadcast(1, made.initial_model, np.arange(12))
engine.sum_messages(everyone)
if sys.argv[1] == "close":
    engine.close()
    engine.close()
print("here", flush=True)
if sys.argv[1] == "close":
    sys.stdin.readline()
while sys.argv[1] != "close":
    engine.sum_messages(everyone)
raise ValueError("of the caller")
"""


def processes_with(mark: str) -> list[int]:
    """Return processes with `mark` in their environment, except Ray's agents, which survive it for a minute."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes() and b"Agent" not in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def eventually(what: Callable[[], bool], seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.1)
    return what()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a temporary folder with a path short enough for sockets below it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["close", "term", "kill"])
def test_no_process_is_left_behind(way: str, short_folder: Path, tmp_path: Path) -> None:
    """Check this after `close`, SIGTERM and SIGKILL."""
    mark = f"FEDPRIV_TEST_MARK={tmp_path}"
    environment = {**os.environ, "FEDPRIV_TEST_MARK": str(tmp_path), "TMPDIR": str(short_folder)}
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    process = subprocess.Popen(
        [sys.executable, "-c", script, way],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        if way == "close":
            assert eventually(lambda: processes_with(mark) == [process.pid])
            assert not list(short_folder.glob("fedpriv-ray-*"))
        else:
            assert len(processes_with(mark)) > 3
            process.send_signal(signal.SIGKILL if way == "kill" else signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == {"term": 143, "kill": -9}.get(way, 1)
        assert ("of the caller" in errors) == (way == "close")
        assert eventually(lambda: not processes_with(mark))
        assert way == "kill" or not list(short_folder.glob("fedpriv-ray-*"))
    finally:
        process.kill()


def costs_of(sizes: list[float]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda clients: np.array(sizes)[clients]


def loads(shares: dict[int, list[np.ndarray]], sizes: list[float]) -> dict[int, float]:
    return {worker: sum(np.array(sizes)[group].sum() for group in groups) for worker, groups in shares.items()}


def test_every_client_runs_once_in_the_group_of_its_unit() -> None:
    rng = np.random.default_rng(1)
    for unit in ("client", 4):
        owners = Owners(range(3), unit, costs_of([1.0] * 40), stay=True)
        groups_of: dict[tuple[int, ...], set[int]] = {}
        for _ in range(20):
            cohort = np.flatnonzero(rng.random(40) < 0.4)
            shares = owners.shares(cohort)
            assert sorted(np.concatenate([g for groups in shares.values() for g in groups]).tolist()) == cohort.tolist()
            for worker, groups in shares.items():
                for group in groups:
                    assert group.tolist() == sorted(group.tolist())
                    if unit == 4:
                        assert len(set((group % 4).tolist())) == 1
                        assert group.tolist() == cohort[cohort % 4 == group[0] % 4].tolist()
                    for client in group.tolist():
                        groups_of.setdefault((client,), set()).add(worker)
        assert all(len(workers) == 1 for workers in groups_of.values())


def test_work_is_balanced_by_cost_and_by_measured_speed() -> None:
    sizes = [float(1 + (7 * i) % 50) for i in range(60)]
    for stay in (False, True):
        owners = Owners(range(2), "client", costs_of(sizes), stay=stay)
        first = loads(owners.shares(np.arange(30)), sizes)
        assert abs(first[0] - first[1]) <= 5.0
        owners.measured({0: 3.0 * first[0], 1: 1.0 * first[1]})
        second = loads(owners.shares(np.arange(30) if not stay else np.arange(60)), sizes)
        assert second[1] / second[0] == pytest.approx(3.0, rel=0.1)


def test_owners_change_only_after_a_streak_of_uneven_rounds_and_if_it_helps() -> None:
    cohort, sizes = np.arange(20), [1.0] * 20
    owners = Owners(range(2), "client", costs_of(sizes), stay=True)

    def rounds(times: int, seconds: dict[int, float]) -> list[bool]:
        found = []
        for _ in range(times):
            given = loads(owners.shares(cohort), sizes)
            owners.measured({worker: seconds[worker] * given[worker] for worker in given})
            found.append(owners.rebalanced())
        return found

    assert not any(rounds(20, {0: 1.0, 1: 1.1}))
    assert rounds(5, {0: 1.0, 1: 3.0}) == [False] * 4 + [True]
    assert loads(owners.shares(cohort), sizes)[0] > 12
    free = Owners(range(2), "client", costs_of(sizes), stay=False)
    free.shares(cohort)
    for _ in range(9):
        free.measured({0: 1.0, 1: 9.0})
    assert not free.rebalanced()


def test_what_is_shipped_is_shared_and_not_copied() -> None:
    big, small = torch.arange(10**5, dtype=torch.float32), torch.arange(3)
    module = torch.nn.Linear(300, 300)
    shipment = pack({"big": big, "again": big, "small": small, "module": module, "rows": np.arange(10**5)})
    assert len(shipment.content) < 10_000
    assert sum(array.nbytes for array in shipment.arrays) == 4 * 10**5 + 8 * 10**5 + 4 * 300**2
    for array in shipment.arrays:
        array.flags.writeable = False
    back = unpack(shipment)
    assert same(back["big"], big)
    assert back["again"] is back["big"]
    assert back["big"].data_ptr() in {array.ctypes.data for array in shipment.arrays}
    assert same(back["small"], small)
    assert isinstance(back["module"].weight, torch.nn.Parameter)
    assert same(back["module"].weight, module.weight)


def test_states_of_parts_are_merged_in_client_order() -> None:
    parts = [
        {"clients": torch.tensor([1, 7]), "memory": torch.tensor([[1.0], [7.0]])},
        {"clients": torch.zeros(0, dtype=torch.int64)},
        {"clients": torch.tensor([3]), "memory": torch.tensor([[3.0]])},
    ]
    whole = merged(parts)
    assert whole["clients"].tolist() == [1, 3, 7]
    assert whole["memory"].flatten().tolist() == [1.0, 3.0, 7.0]
    assert merged([])["clients"].dtype == torch.int64


def test_a_snapshot_is_due_after_so_many_rounds_or_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = Snapshots(KeepSnapshots(every=3, share=math.inf))
    model = torch.zeros(1000)
    for k in range(1, 4):
        assert not snapshots.due
        snapshots.log(Broadcast(k, model, np.arange(2), 2))
    assert snapshots.due
    model += 1.0
    assert not snapshots.rounds[0].model.any()
    snapshots.keep([])
    assert (snapshots.rounds, snapshots.due) == ([], False)
    monkeypatch.setattr("fedpriv.engines.ray.snapshots._MAX_LOG_BYTES", 4000)
    snapshots.log(Broadcast(1, model, np.arange(2), 2))
    assert snapshots.due


def test_snapshots_that_take_long_are_taken_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("fedpriv.engines.ray.snapshots.time", clock)

    def slow() -> Iterator[dict[str, Tensor]]:
        clock.now += 0.05
        yield merged([])

    for share, due in ((0.1, False), (1e3, True)):
        snapshots = Snapshots(KeepSnapshots(every=1, share=share))
        snapshots.keep(slow())
        snapshots.log(Broadcast(1, torch.zeros(1), np.arange(2), 2))
        clock.now += 0.001
        assert snapshots.due == due


def test_a_full_disk_under_snapshots_is_one_line_and_the_last_snapshot_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = Snapshots(KeepSnapshots(every=3, share=math.inf, folder=tmp_path))
    part = {"clients": torch.tensor([1]), "memory": torch.ones(1, 4)}
    snapshots.keep([part])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        with pytest.raises(UserError, match=r"room for the clients' states, .*No space left"):
            snapshots.keep([part, part])
    (kept,) = snapshots.parts()
    assert same_states(kept, part)
    snapshots.clear()
    assert not list(tmp_path.iterdir())


def test_one_function_starts_and_joins_ray() -> None:
    root = Path(__file__).parents[2]
    files = [path for folder in ("fedpriv", "strategies", "clients") for path in (root / folder).rglob("*.py")]
    starting = {path.relative_to(root).as_posix() for path in files if re.search(r"\bray\.init\b", path.read_text())}
    assert starting == {"fedpriv/engines/ray/cluster.py"}


@pytest.mark.parametrize(("address", "cpus"), [("auto", None), (None, None), (None, 3)])
def test_what_ray_is_asked_for(address: str | None, cpus: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    connection = connect(address, cpus=cpus)
    connection.close()
    (options,) = asked
    if address is None:
        assert (options["address"], options["num_cpus"], options["object_store_memory"]) == ("local", cpus, None)
        assert connection.folder is not None
        assert not Path(connection.folder).exists()
    else:
        assert options["address"] == "auto"
        assert not {"num_cpus", "object_store_memory"} & set(options)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Exception("The current node timed out during startup."), "Ray to start within 30 seconds"),
        (RuntimeError("no port is free"), "a Ray that starts, got RuntimeError: no port is free. Use another engine"),
    ],
)
def test_a_ray_that_does_not_start_is_an_error_of_its_own_type(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", failing)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(EngineStartError, match=line):
        connect(None)
    with pytest.raises(EngineStartError, match=r"no port is free|timed out"):
        connect("auto")


@pytest.mark.parametrize("case", ["control variates", "public memory"])
def test_a_worker_uses_the_vector_that_it_is_sent(case: str) -> None:
    """A host in this process, with arrays that are read-only as in shared memory, is the loop to the bit."""
    made = CASES[case]
    loop, state, host = LoopEngine(made.population), made.server.init(made.initial_model), Host()
    assert host.start(pack((made.population, lambda people, _: LoopEngine(people))), 1, False, []) is None
    snapshots = Snapshots(KeepSnapshots(every=1, share=1e9))
    for k in range(1, 4):
        broadcast = begin_round(made.server, state, k)
        assert broadcast.shared is not None
        model, shared = broadcast.model.numpy().copy(), broadcast.shared.numpy().copy()
        model.flags.writeable = shared.flags.writeable = False
        assert broadcast.capacity is not None
        found = host.run(k, broadcast.turn, model, broadcast.capacity, [broadcast.cohort], shared)
        total = loop.sum_messages(broadcast)
        assert isinstance(found, Partial)
        assert same(torch.from_numpy(found.sum), total.sum)
        snapshots.log(broadcast)
        logged = snapshots.rounds[-1].shared
        assert logged is not None
        assert same(logged, broadcast.shared)
        state = finish_round(made.server, state, k, total.sum)
