"""The Flower app that `run_flower.py` submits, as a user would write it, with Flower's own privacy.

Flower's federated averaging inside its wrapper for central privacy with fixed clipping at the server. The client keeps
module and data from one message to the next, and takes one SGD step of length 1 on all its examples.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workloads import CLIP_NORM, CONSTANT, WORKLOADS, Clock, Job, flat, one_thread, probe

server = ServerApp()
client = ClientApp()


def job_of(context: Context) -> Job:
    """Return the job that was submitted."""
    found = context.run_config
    workload = WORKLOADS[str(found["workload"])]
    check = bool(found["check"])
    rounds = int(found["rounds"]) or None
    return Job(
        workload=workload.checked() if check else workload,
        workers=0,
        rounds=rounds,
        seed=int(found["seed"]),
        check=check,
    )


class Timer:
    """Flower calls it with the first model and after every round; it writes the answer when enough is measured."""

    def __init__(self, job: Job, module: nn.Module, out: Path) -> None:
        self._job, self._module, self._out = job, module, out
        self._start, self._clock, self._done = flat(module), Clock(job), False

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Mark the end of a round."""
        self._clock.tick()
        if self._clock.done() and not self._done:
            self._done = True
            self._module.load_state_dict(arrays.to_torch_state_dict())
            answer = {"seconds": self._clock.seconds}
            if self._job.check:
                answer = {"probe": probe(flat(self._module) - self._start)}
            draft = self._out.with_suffix(".part")
            draft.write_text(json.dumps(answer))
            draft.rename(self._out)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run rounds; the process that submitted the app ends it once there is an answer."""
    job = job_of(context)
    work, module = job.workload, job.workload.module()
    share = work.cohort / work.clients
    averaging = FedAvg(fraction_train=share, fraction_evaluate=0.0, min_available_nodes=work.clients)
    strategy = DifferentialPrivacyServerSideFixedClipping(averaging, work.noise_multiplier, CLIP_NORM, work.cohort)
    strategy.start(
        grid,
        ArrayRecord(module.state_dict()),
        num_rounds=1 if job.check else 10**5,
        evaluate_fn=Timer(job, module, Path(str(context.run_config["out"]))),
    )


@lru_cache(maxsize=1)
def _material(name: str, check: bool, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return module and data, once in a process."""
    one_thread()
    workload = WORKLOADS[name].checked() if check else WORKLOADS[name]
    return workload.module(), *workload.data(seed)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Take one step, or none if clients compute nothing."""
    job = job_of(context)
    module, inputs, labels = _material(job.workload.name, job.check, job.seed)
    received = message.content["arrays"].to_torch_state_dict()
    if job.workload.computes:
        module.load_state_dict(received)
        number = int(context.node_config["partition-id"])
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        optimizer.zero_grad()
        cross_entropy(module(inputs[number]), labels[number]).backward()
        optimizer.step()
        answer = module.state_dict()
    else:
        answer = {name: value.sub_(CONSTANT) for name, value in received.items()}
    metrics = MetricRecord({"num-examples": job.workload.examples})
    return Message(RecordDict({"arrays": ArrayRecord(answer), "metrics": metrics}), reply_to=message)
