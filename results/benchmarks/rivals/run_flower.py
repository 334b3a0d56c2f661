"""Flower's simulation (`flwr run`, Ray) of the app in `flower_app.py`; the version that fedpriv itself runs with.

`--workers` is the number of its actors. Rounds are timed in its ServerApp, so that its start is not counted.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common  # noqa: F401
import tomli_w
from workloads import Job, parse_job

from fedpriv.flower.launch import FlowerRun

HERE = Path(__file__).parent
PATIENCE = 900.0


class BenchmarkRun(FlowerRun):
    """The processes of one simulation, with the benchmark's app and as many actors as asked for."""

    workers: int = 1

    def write_app(self, run_config: dict[str, Any]) -> None:
        """See `FlowerRun.write_app`."""
        for folder in ("app", "work"):
            (self.home / folder).mkdir()
        components = {"serverapp": "bench_server:server", "clientapp": "bench_client:client"}
        tables = {
            "project": {"name": "bench", "version": "1.0.0", "license": "Apache-2.0", "description": "One run"},
            "tool": {"flwr": {"app": {"publisher": "fedpriv", "components": components, "config": run_config}}},
        }
        (self.home / "app" / "pyproject.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
        for part in ("server", "client"):
            text = f"from flower_app import {part}\n\n__all__ = ['{part}']\n"
            (self.home / "app" / f"bench_{part}.py").write_text(text, encoding="utf-8")

    def _resources(self) -> str:
        return (
            f"num-supernodes={self.population} client-resources-num-cpus=1 "
            f"client-resources-num-gpus=0.0 init-args-num-cpus={self.workers}"
        )


def run(job: Job, home: Path) -> str:
    """Return the answer of a whole `flwr run`; no process of it is left."""
    out = home / "answer.json"
    config = {
        "workload": job.workload.name,
        "check": job.check,
        "rounds": job.rounds or 0,
        "seed": job.seed,
        "out": str(out),
    }
    flower = BenchmarkRun(home, job.workload.clients, "cpu", home / "flower.log")
    flower.workers = job.workers
    flower.write_app(config)
    until = time.monotonic() + PATIENCE
    with flower.running():
        while flower.alive() and not out.exists() and time.monotonic() < until:
            time.sleep(0.2)
    if not out.exists():
        raise SystemExit(f"absent: {flower.first_error() or 'the run ended without an answer'}")
    return out.read_text()


def main() -> None:
    """Run the job of the command line."""
    job, _ = parse_job()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(prefix="fp-bench-") as home:
        answer = run(job, Path(home))
    sys.stdout.write("\n" + answer + "\n")


if __name__ == "__main__":
    main()
