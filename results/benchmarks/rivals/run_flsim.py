"""FLSim 0.1.0: its synchronous trainer with its server for client-level privacy; one process; patched to run.

The patch, at run time: Python 3.11 refuses its configs, because their defaults are instances of other configs.
Therefore its classes are made hashable while it is imported. Its accounting after every round stays on, because it has
no switch.
"""

# ruff: noqa: E402 - the patch must come first

import dataclasses
import functools
import os
import sys

import common
import torch
from torch.nn.functional import cross_entropy
from workloads import CLIP_NORM, CONSTANT, SERVER_LR, Clock, Job, flat, one_thread, parse_job, report

_dataclass = dataclasses.dataclass


def _hashable(cls=None, /, **options):
    """Do as `dataclass`, and make FLSim's classes hashable."""
    if cls is None:
        return functools.partial(_hashable, **options)
    more = {"unsafe_hash": True} if cls.__module__.startswith("flsim") else {}
    return _dataclass(cls, **more, **options)


dataclasses.dataclass = _hashable
from flsim.clients.base_client import Client, ClientConfig
from flsim.data.data_provider import FLDataProviderFromList
from flsim.interfaces.model import IFLModel
from flsim.optimizers.local_optimizers import LocalOptimizerSGDConfig
from flsim.optimizers.server_optimizers import FedAvgWithLROptimizerConfig
from flsim.privacy.common import PrivacySetting
from flsim.servers.sync_dp_servers import SyncDPSGDServerConfig
from flsim.trainers.sync_trainer import SyncTrainer, SyncTrainerConfig
from flsim.utils.simple_batch_metrics import FLBatchMetrics
from omegaconf import OmegaConf

dataclasses.dataclass = _dataclass


class Model(IFLModel):
    """The workload's module with the methods that FLSim calls."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def fl_forward(self, batch):  # noqa: D102
        inputs, labels = batch
        logits = self.module(inputs)
        loss = cross_entropy(logits, labels)
        return FLBatchMetrics(
            loss=loss, num_examples=len(labels), predictions=logits.detach(), targets=labels, model_inputs=[]
        )

    def fl_create_training_batch(self, batch=None, **_):  # noqa: D102
        return batch

    def fl_get_module(self):  # noqa: D102
        return self.module

    def fl_cuda(self) -> None:  # noqa: D102
        pass

    def get_eval_metrics(self, batch):  # noqa: D102
        with torch.no_grad():
            return self.fl_forward(batch)

    def get_num_examples(self, batch) -> int:  # noqa: D102
        return len(batch[1])


def _constant_train(self, model, optim, optim_scheduler, metrics_reporter, epochs):  # noqa: ARG001
    """Move a client's model by a constant, instead of training."""
    with torch.no_grad():
        torch._foreach_sub_([p.data for p in model.fl_get_module().parameters()], CONSTANT)
    return model, float(self.dataset.num_train_examples())


class Trainer(SyncTrainer):
    """FLSim's trainer with a clock."""

    clock: Clock
    last = None

    def stop_fl_training(self, *, epoch, round, num_rounds_in_epoch) -> bool:
        """Mark the end of each round, and leave when enough is measured; called twice at the end of an epoch."""
        if (epoch, round) != self.last:
            self.last = (epoch, round)
            self.clock.tick()
        if self.clock.done():
            raise common.Enough
        return False


def make_trainer(job: Job, model: Model) -> Trainer:
    """FLSim's trainer for the job."""
    work = job.workload
    privacy = PrivacySetting(noise_multiplier=work.noise_multiplier, clipping_value=CLIP_NORM, noise_seed=job.seed)
    config = SyncTrainerConfig(
        server=SyncDPSGDServerConfig(
            privacy_setting=privacy, server_optimizer=FedAvgWithLROptimizerConfig(lr=SERVER_LR, momentum=0.0)
        ),
        client=ClientConfig(epochs=1, optimizer=LocalOptimizerSGDConfig(lr=1.0)),
        users_per_round=work.cohort,
        epochs=10**6,
        do_eval=False,
        always_keep_trained_model=True,
        report_train_metrics=False,
    )
    return Trainer(model=model, cuda_enabled=False, **OmegaConf.structured(config))


def run(job: Job) -> None:
    """Run and report."""
    work, clock = job.workload, Clock(job)
    if not work.computes:
        Client.train = _constant_train
    inputs, labels = work.data(job.seed)
    users = [[pair] for pair in zip(inputs, labels, strict=True)]
    model = Model(work.module())
    data = FLDataProviderFromList(users, [], [], model)
    trainer = make_trainer(job, model)
    trainer.clock = clock
    start = flat(model.module)
    clock.tick()
    try:
        trainer.train(data, None, num_total_users=work.clients, distributed_world_size=1)
    except common.Enough:
        report(job, clock.seconds, flat(trainer.global_model().fl_get_module()) - start)


def main() -> None:
    """Run the job of the command line."""
    job, _ = parse_job()
    if job.workers != 1:
        raise SystemExit("absent: several processes need its distributed launcher, which is not part of the package")
    one_thread()
    sys.stderr = open(os.devnull, "w", encoding="utf-8") if not job.check else sys.stderr  # noqa: PTH123, SIM115
    run(job)


if __name__ == "__main__":
    main()
