"""A private training run in forty lines, without a config or an engine.

    python examples/private_round.py

A hundred clients each hold ten points around their own center. The server learns the mean of all points; the
models that it releases protect each client's points.
"""

import torch

from fedpriv.methods import DPFedAvg, Method
from fedpriv.privacy import Everyone, make_plan, privacy_statement
from fedpriv.rounds import begin_round, client_round, finish_round, make_agreement
from fedpriv.streams import SystemStreams

CLIENTS, ROUNDS = 100, 20
points = torch.randn(CLIENTS, 10, 2) + torch.randn(CLIENTS, 1, 2) + torch.tensor([1.0, -2.0])

# The method bounds every message; the plan turns the bound and the target epsilon into noise.
method: Method = DPFedAvg(clip_norm=2.0, server_lr=0.5)
cohorts = Everyone(CLIENTS)
plan = make_plan(
    trust="central",
    sampling=cohorts,
    rounds=ROUNDS,
    l2_bound=method.bounded.l2_bound,
    epsilon=8.0,
    delta=1e-5,
    client_memory=False,  # DP-FedAvg's clients keep nothing between rounds
)
rules = make_agreement(method, cohorts, plan, SystemStreams())  # noise from the operating system

server = rules.server.init(torch.zeros(2))
clients = [method.init_client(2) for _ in range(CLIENTS)]
for number in range(1, ROUNDS + 1):
    broadcast = begin_round(rules.server, server, number)
    total = broadcast.empty_sum(rules.client)
    for i in broadcast.cohort:
        signal = broadcast.model - points[i].mean(dim=0)  # the gradient of half the squared distance
        message, clients[i] = client_round(rules.client, int(i), clients[i], signal, number)
        total.add(message)
    server = finish_round(rules.server, server, number, total.value)

print(f"found {server.model.tolist()}, exactly {points.mean(dim=(0, 1)).tolist()}")
print(privacy_statement(plan, method="dp-fedavg", randomness="system"))
