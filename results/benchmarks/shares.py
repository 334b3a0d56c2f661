"""Cost of a client's integer share of noise (trust aggregator) against its own noise (trust local).

    python results/benchmarks/shares.py

prints, for several model sizes, the milliseconds per message of both, and their ratio: the best of twenty, one thread.
"""

import time
from collections.abc import Callable

import torch

from fedpriv.methods import NormalizedSGD
from fedpriv.privacy import Aggregation, Everyone, make_plan
from fedpriv.rounds import ClientRules, agree
from fedpriv.streams import SeededStreams

CLIENTS, SIZES = 100, (1_000, 62_000, 1_000_000)


def rules_of(trust: str, size: int) -> ClientRules:
    """Return the clients' rules for a plan at epsilon 8 over 100 rounds."""
    method, sampling = NormalizedSGD(), Everyone(CLIENTS)
    terms = Aggregation(helpers=1, least_survivors=80, colluders=0, most=CLIENTS, size=size)
    plan = make_plan(
        trust=terms if trust == "aggregator" else trust,
        sampling=sampling,
        rounds=100,
        delta=1e-5,
        l2_bound=method.bounded.l2_bound,
        epsilon=8.0,
    )
    return agree(method, sampling, plan, SeededStreams(1)).client


def milliseconds(work: Callable[[int], object]) -> float:
    """Return the time of the fastest of twenty calls."""
    best = float("inf")
    for client in range(20):
        began = time.perf_counter()
        work(client)
        best = min(best, time.perf_counter() - began)
    return 1e3 * best


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| parameters | local, ms | aggregator, ms | ratio |\n|---|---|---|---|")
    for size in SIZES:
        message, found = torch.full((size,), size**-0.5), []
        for trust in ("local", "aggregator"):
            rules = rules_of(trust, size)

            def send(client: int, rules: ClientRules = rules, message: torch.Tensor = message) -> object:
                release = rules.release(1, client)
                return None if release is None else release(message)

            found.append(milliseconds(send))
        print(f"| {size:,} | {found[0]:.3f} | {found[1]:.3f} | {found[1] / found[0]:.2f} |")


if __name__ == "__main__":
    main()
