"""Cost of secure aggregation: bytes and time on the processor of a client, the server and a helper, for one round.

    python results/benchmarks/secure.py [--clients 10 100 1000] [--secagg 10 100 1000] [--repeats 3]

Contenders, on the same vectors of 61,794 numbers, on one thread of one process, without dropouts:

* `plain`: no secure aggregation; a client sends 32-bit numbers, and the server adds them up.
* `1 helper`, `2 helpers`: `fedpriv.secure`, with signatures checked by the server and the helpers, and with the records
  of the helpers on the disk.
* `SecAgg+`: Flower's own `SecAggPlusWorkflow` and `secaggplus_mod`, the legacy app's, behind a grid that hands messages
  over in memory. Up to 31 clients, everyone is a neighbor of everyone; beyond, each client has 30 neighbors. Half of
  the shares reconstruct a key.

Noise, training and the network are in none of them, and neither is the model that clients receive. Bytes are those of
the messages' encodings (for Flower, of its protobuf records). Writes `secure.csv` beside this file and fills the page.
"""

import argparse
import csv
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from page import fill, table

from fedpriv.secure import Answer, Closed, Collector, Helper, Masked, Query, RoundFacts, mask_message

HERE = Path(__file__).parent
SIZE = 61_794
GRID = 2.0**-20
NEIGHBORS = 31  # with the client itself
WEIGHT = 1000  # the largest, which is rounded least
MS, KB = 1e3, 1e-3

T = TypeVar("T")


@dataclass
class Cost:
    """Seconds on the processor and bytes of one round; of clients and helpers, for each of them."""

    client: list[float] = field(default_factory=list)
    server: float = 0.0
    helper: list[float] = field(default_factory=list)
    client_sends: list[int] = field(default_factory=list)
    client_gets: list[int] = field(default_factory=list)
    helper_sends: list[int] = field(default_factory=list)
    helper_gets: list[int] = field(default_factory=list)
    messages: int = 1

    def row(self) -> dict[str, float]:
        """Return means in milliseconds and kilobytes."""
        return {
            "client_ms": MS * _mean(self.client),
            "server_ms": MS * self.server,
            "helper_ms": MS * _mean(self.helper),
            "client_sends_kb": KB * _mean(self.client_sends),
            "client_gets_kb": KB * _mean(self.client_gets),
            "helper_sends_kb": KB * _mean(self.helper_sends),
            "helper_gets_kb": KB * _mean(self.helper_gets),
            "messages": self.messages,
        }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values) or [0.0]))


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return a result and its seconds on the processor."""
    began = time.process_time()
    return work(), time.process_time() - began


def vector(client: int) -> np.ndarray:
    """Return the bounded message of a client."""
    drawn = np.random.default_rng(client).standard_normal(SIZE)
    return drawn / np.linalg.norm(drawn)


def plain(clients: int) -> Cost:
    """Send 32-bit numbers and add them up."""
    cost, total = Cost(), np.zeros(SIZE)
    for client in range(clients):
        values = vector(client).astype(np.float32)
        content, seconds = timed(values.tobytes)
        cost.client.append(seconds)
        cost.client_sends.append(len(content))
        _, seconds = timed(lambda c=content: np.add(total, np.frombuffer(c, dtype=np.float32), out=total))
        cost.server += seconds
    return cost


def with_helpers(clients: int, count: int) -> Cost:
    """Mask, collect, ask the helpers, subtract."""
    signers = [Ed25519PrivateKey.generate() for _ in range(clients)]
    enrolled = {client: signer.public_key().public_bytes_raw() for client, signer in enumerate(signers)}
    least = clients // 2 + 1
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        helpers = [Helper(Path(folder) / str(j), Ed25519PrivateKey.generate(), enrolled, least) for j in range(count)]
        return _round(signers, enrolled, helpers)


def _round(signers: list[Ed25519PrivateKey], enrolled: dict[int, bytes], helpers: list[Helper]) -> Cost:
    facts = RoundFacts(
        run="benchmark",
        round=1,
        least_survivors=len(signers) // 2 + 1,
        colluders=0,
        share_stddev=0.01,
        grid=GRID,
        size=SIZE,
        digest=hashlib.sha256(b"model").digest(),
    )
    keys = [helper.key(facts.run) for helper in helpers]
    pinned = [key.identity for key in keys]
    cost, expected = Cost(), np.zeros(SIZE, dtype=np.int64)
    collector, seconds = timed(lambda: Collector(facts, keys, pinned, enrolled))
    cost.server += seconds
    for client, signer in enumerate(signers):
        values = np.rint(vector(client) / GRID).astype(np.int64)
        expected += values
        content, seconds = timed(
            lambda c=client, s=signer, v=values: mask_message(v, facts, c, s, keys, pinned).to_bytes()
        )
        cost.client.append(seconds)
        cost.client_sends.append(len(content))
        cost.client_gets.append(sum(len(key.to_bytes()) for key in keys))
        cost.server += timed(lambda c=content: collector.add(Masked.from_bytes(c)))[1]
    closed, seconds = timed(lambda: Closed.from_bytes(collector.close()))
    cost.server += seconds
    answers = []
    for query in closed.queries:
        asked, seconds = timed(query.to_bytes)
        cost.server += seconds
        helper = next(helper for helper, key in zip(helpers, keys, strict=True) if key.identity == query.identity)
        given, seconds = timed(lambda h=helper, a=asked: h.answer(Query.from_bytes(a)).to_bytes())
        cost.helper.append(seconds)
        cost.helper_gets.append(len(asked))
        cost.helper_sends.append(len(given))
        answers.append(given)
    total, seconds = timed(lambda: closed.total([Answer.from_bytes(given) for given in answers], 2**31 - 1))
    cost.server += seconds
    if not np.array_equal(total, expected):
        raise SystemExit("The sum is wrong")
    return cost


def secagg(clients: int) -> Cost:
    """Run Flower's workflow and mod, with messages handed over in memory."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.client.mod import secaggplus_mod
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.common.serde import recorddict_to_proto
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server.client_manager import SimpleClientManager
    from flwr.server.client_proxy import ClientProxy
    from flwr.server.compat.legacy_context import LegacyContext
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import SecAggPlusWorkflow

    from fedpriv.flower.internals.app import inside_a_run

    logging.getLogger("flwr").setLevel(logging.ERROR)
    cost = Cost(messages=4)
    sent, got = dict.fromkeys(range(clients), 0), dict.fromkeys(range(clients), 0)
    spent = dict.fromkeys(range(clients), 0.0)

    def context(node: int) -> Context:
        return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={}, series_id=1)

    contexts = {client: context(client) for client in range(clients)}
    trained = {
        client: FitRes(Status(Code.OK, ""), ndarrays_to_parameters([vector(client)]), WEIGHT, {})
        for client in range(clients)
    }

    def train(message: Message, _context: Context) -> Message:
        content = compat.fitres_to_recorddict(trained[message.metadata.dst_node_id], True)
        return Message(content, reply_to=message)

    def size_of(content: RecordDict) -> int:
        return len(recorddict_to_proto(content).SerializeToString())

    class MemoryGrid:
        """A grid with all clients in this process."""

        def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
            """Return the replies."""
            return [self.reply(message) for message in messages]

        def reply(self, message: Message) -> Message:
            """Return the reply of the client of a message; the client may change the message."""
            client = message.metadata.dst_node_id
            configs = RecordDict(
                {name: ConfigRecord(dict(one)) for name, one in message.content.config_records.items()}
            )
            got[client] += size_of(configs)
            message = Message(configs, dst_node_id=client, message_type="train", group_id="1")
            with inside_a_run(1, client):
                reply, seconds = timed(lambda: secaggplus_mod(message, contexts[client], train))
            spent[client] += seconds
            sent[client] += size_of(reply.content)
            return reply

    class Proxy(ClientProxy):
        """A client in the strategy's list."""

        def __init__(self, client: int) -> None:
            super().__init__(str(client))
            self.node_id = client

        get_properties = get_parameters = fit = evaluate = reconnect = lambda *_: None  # type: ignore[assignment]

    manager, found = SimpleClientManager(), []
    for client in range(clients):
        manager.register(Proxy(client))

    class Keep(FedAvg):
        """A strategy that keeps the mean."""

        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            """Return the parameters, which the workflow has averaged."""
            found.append(parameters_to_ndarrays(results[0][1].parameters)[0])
            return results[0][1].parameters, {}

    strategy = Keep(min_fit_clients=clients, min_available_clients=clients)
    server = LegacyContext(context(clients), strategy=strategy, client_manager=manager)
    server.state.config_records["config"] = ConfigRecord({"current_round": 1})
    server.state.array_records["parameters"] = ArrayRecord([np.zeros(SIZE)])
    shares = min(clients, NEIGHBORS)
    workflow = SecAggPlusWorkflow(num_shares=1.0 if shares == clients else shares, reconstruction_threshold=0.5)
    with inside_a_run(1, clients):
        _, seconds = timed(lambda: workflow(MemoryGrid(), server))  # type: ignore[arg-type]
    mean = sum(vector(client) for client in range(clients)) / clients
    if not found or np.abs(found[0] - mean).max() > 1e-4:
        raise SystemExit("SecAgg+ gave another mean")
    cost.client, cost.client_sends, cost.client_gets = list(spent.values()), list(sent.values()), list(got.values())
    cost.server = seconds - sum(spent.values())
    return cost


CONTENDERS: dict[str, Callable[[int], Cost]] = {
    "plain": plain,
    "1 helper": lambda clients: with_helpers(clients, 1),
    "2 helpers": lambda clients: with_helpers(clients, 2),
    "SecAgg+": secagg,
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the page."""
    head = (
        "clients", "contender", "client, ms", "server, ms", "helper, ms",
        "client sends, kB", "client gets, kB", "helper gets, kB", "helper sends, kB", "messages of a client",
    )  # fmt: skip
    names = (
        "client_ms",
        "server_ms",
        "helper_ms",
        "client_sends_kb",
        "client_gets_kb",
        "helper_gets_kb",
        "helper_sends_kb",
    )
    lines = [
        [
            row["clients"],
            row["contender"],
            *(f"{row[name]:,.3g}" if row[name] < 1000 else f"{row[name]:,.0f}" for name in names),
            row["messages"],
        ]
        for row in rows
    ]
    return table(head, lines)


def main() -> None:
    """Measure, write, fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--secagg", type=int, nargs="*", default=[10, 100], help="numbers of clients with SecAgg+ too")
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds of each contender but SecAgg+; the median counts"
    )
    parser.add_argument("--out", type=Path, default=HERE)
    found = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for clients in found.clients:
        for name, contender in CONTENDERS.items():
            if name == "SecAgg+" and clients not in found.secagg:
                continue
            costs = [contender(clients).row() for _ in range(1 if name == "SecAgg+" else found.repeats)]
            rows.append(
                {"clients": clients, "contender": name, **{key: median(c[key] for c in costs) for key in costs[0]}}
            )
            print(rows[-1], flush=True)
    with (found.out / "secure.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(markdown(rows))
    if found.out == HERE:
        fill("secure", markdown(rows))


if __name__ == "__main__":
    main()
