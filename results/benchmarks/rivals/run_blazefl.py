"""BlazeFL: its federated averaging, one client after the other or on its pool of processes; 2.0.3, code unpatched.

It asks for Python 3.12 and is installed on 3.11 against that; nothing that is used here needs more. It has no privacy:
clip, sum, noise and step are written into its server handler. Its data loader is one whole batch, without copying. It
forks new processes each round. Late imports of torch are done here first; otherwise each process would spend seconds on
them.
"""

import tempfile
from pathlib import Path

import common
import torch
import torch._dynamo
from blazefl.contrib.fedavg import (
    FedAvgBaseClientTrainer,
    FedAvgBaseServerHandler,
    FedAvgProcessPoolClientTrainer,
    FedAvgUplinkPackage,
)
from blazefl.core import IPCMode, deserialize_model, serialize_model
from workloads import CONSTANT, Job, Workload, flat, one_thread, parse_job, run_rounds


class Loader(list):
    """One whole batch, with the attribute that BlazeFL's workers read."""

    dataset = None


class Data:
    """A partitioned data set in the sense of BlazeFL."""

    def __init__(self, job: Job) -> None:
        self._inputs, self._labels = job.workload.data(job.seed)

    def get_dataset(self, type_, cid):  # noqa: D102
        return None

    def set_dataset(self, type_, cid, dataset) -> None:  # noqa: D102
        pass

    def get_dataloader(self, type_, cid, batch_size, generator):  # noqa: D102
        return Loader([(self._inputs[cid], self._labels[cid])])


class Selector:
    """Makes the model."""

    def __init__(self, work: Workload) -> None:
        self._work = work

    def select_model(self, model_name):  # noqa: D102
        return self._work.module()


class Server(FedAvgBaseServerHandler):
    """BlazeFL's server with a private mean."""

    work: Workload

    def global_update(self, buffer: list[FedAvgUplinkPackage]) -> None:
        """Clip, sum, noise, step, in client order."""
        buffer.sort(key=lambda package: package.cid)
        model = serialize_model(self.model)
        common.private_step([model], ([package.model_parameters] for package in buffer), self.work)
        deserialize_model(self.model, model)


class ConstantTrainer(FedAvgBaseClientTrainer):
    """Clients that compute nothing."""

    def train(self, model_parameters, train_loader, cid):  # noqa: D102
        deserialize_model(self.model, model_parameters)
        return FedAvgUplinkPackage(cid, serialize_model(self.model).sub_(CONSTANT), 1)

    def progress_fn(self, it):  # noqa: D102
        return it


class PoolTrainer(FedAvgProcessPoolClientTrainer):
    """BlazeFL's processes, one thread each, without a progress bar."""

    def progress_fn(self, it):  # noqa: D102
        return it


class ConstantPoolTrainer(PoolTrainer):
    """The same with clients that compute nothing."""

    @staticmethod
    def worker(config, payload, device, stop_event, *, shm_buffer=None):  # noqa: ARG004, D102
        torch.sub(payload.model_parameters, CONSTANT, out=shm_buffer.model_parameters)
        from blazefl.core import SHMHandle

        return type(shm_buffer)(config.cid, SHMHandle(), 1)


def make_trainer(job: Job, data: Data, selector: Selector, folder: Path):  # noqa: D103
    work = job.workload
    shared = {
        "model_selector": selector,
        "model_name": "model",
        "dataset": data,
        "device": "cpu",
        "num_clients": work.clients,
        "epochs": 1,
        "batch_size": work.examples,
        "lr": 1.0,
        "seed": job.seed,
    }
    if job.workers == 1:
        return (FedAvgBaseClientTrainer if work.computes else ConstantTrainer)(**shared)
    kind = PoolTrainer if work.computes else ConstantPoolTrainer
    pool = {"num_parallels": job.workers, "ipc_mode": IPCMode.SHARED_MEMORY}
    return kind(**shared, **pool, share_dir=folder / "share", state_dir=folder / "state")


def main() -> None:
    """Run the job of the command line."""
    job, _ = parse_job()
    one_thread()
    work, data = job.workload, Data(job)
    selector = Selector(work)
    server = Server(selector, "model", data, 10**6, work.clients, work.cohort / work.clients, "cpu", 1, job.seed)
    server.work = work
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, data, selector, Path(folder))

        def one_round() -> None:
            trainer.local_process(server.downlink_package(), server.sample_clients())
            for package in trainer.uplink_package():
                server.load(package)

        run_rounds(job, one_round, lambda: flat(server.model))


if __name__ == "__main__":
    main()
