"""pfl: federated averaging on its simulated backend, with its central Gaussian mechanism; 0.6.0, unpatched.

A client takes one SGD step of length 1 on all its examples, so that its update is the negative gradient. Several
workers are pfl's own: processes under torchrun that each play their share of the cohort and meet in an all-reduce.
"""

import os
import sys

import common  # noqa: F401
import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from pfl.stats import MappedVectorStatistics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workloads import CLIP_NORM, CONSTANT, SERVER_LR, Clock, Job, flat, one_thread, parse_job, report


class Model(nn.Module):
    """The workload's module with the methods that pfl calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss."""
        return cross_entropy(self.module(inputs), labels)

    def metrics(self, inputs: Tensor, labels: Tensor) -> dict:
        """None: evaluation is off."""
        return {}


class ConstantAveraging(FederatedAveraging):
    """Clients that compute nothing."""

    _update = None

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):  # noqa: D102
        if self._update is None:
            self._update = {name: torch.empty_like(value) for name, value in model.variable_map.items()}
        for value in self._update.values():
            value.fill_(-CONSTANT)
        return MappedVectorStatistics(self._update), Metrics()


class Timer(TrainingProcessCallback):
    """Marks the end of each round, and ends the run."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_begin(self, *, model) -> Metrics:  # noqa: D102
        self._clock.tick()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # noqa: D102
        self._clock.tick()
        return _agreed(self._clock.done()), Metrics()


def _agreed(done: bool) -> bool:
    """Return the decision of the first process, for all."""
    if not torch.distributed.is_initialized():
        return done
    flag = torch.tensor([float(done)])
    torch.distributed.broadcast(flag, src=0)
    return bool(flag)


def run(job: Job) -> None:
    """Run and report."""
    work, clock = job.workload, Clock(job)
    module = Model(work.module())
    optimizer = torch.optim.SGD(module.parameters(), lr=SERVER_LR)
    model = PyTorchModel(module, torch.optim.SGD, optimizer)
    start = flat(module)
    inputs, labels = work.data(job.seed)
    np.random.seed(job.seed)  # noqa: NPY002
    cohorts = _sampler(work.clients, work.cohort, job.seed)
    users = FederatedDataset(lambda user: Dataset((inputs[user], labels[user]), user_id=str(user)), cohorts)
    mechanism = GaussianMechanism(CLIP_NORM, work.noise_multiplier)
    backend = SimulatedBackend(
        training_data=users, val_data=users, postprocessors=[CentrallyAppliedPrivacyMechanism(mechanism)]
    )
    algorithm = (FederatedAveraging if work.computes else ConstantAveraging)()
    algorithm.run(
        NNAlgorithmParams(
            central_num_iterations=10**6,
            evaluation_frequency=10**6,
            train_cohort_size=work.cohort,
            val_cohort_size=None,
        ),
        backend,
        model,
        NNTrainHyperParams(local_learning_rate=1.0, local_num_epochs=1, local_batch_size=None),
        callbacks=[Timer(clock)],
        send_metrics_to_platform=False,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        report(job, clock.seconds, flat(module) - start)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _sampler(clients: int, cohort: int, seed: int):
    """Yield one client after the other, a fresh cohort without replacement each round; the same in every process."""
    generator = np.random.default_rng(seed)

    def stream():
        while True:
            yield from generator.permutation(clients)[:cohort].tolist()

    users = stream()
    return lambda: next(users)


def main() -> None:
    """Run the job of the command line, under torchrun if it is for several workers."""
    job, _ = parse_job()
    if job.workers > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job.workers)]
        os.execv(sys.executable, [sys.executable, *launch, *sys.argv])
    one_thread()
    run(job)


if __name__ == "__main__":
    main()
