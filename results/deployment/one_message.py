"""One client's process for one message, without the network; `make.py` times it.

    python results/deployment/one_message.py fedpriv|plain FOLDER

Prints the CPU seconds of the whole process, Python's start and all imports included.
"""

import sys
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict

from fedpriv.flower.internals.app import inside_a_run

HERE = Path(__file__).parent
CONFIG = """
name = "overhead"
seed = 7
[data]
name = "digits"
clients = 4
[model]
name = "softmax"
[method]
name = "alpha-normec"
[privacy]
trust = "local"
noise_multiplier = 1.0
[training]
rounds = 9
"""


def fedpriv_message(folder: Path) -> tuple[RecordDict, dict[str, object], dict[str, object]]:
    """Content, node config and run config of an order."""
    import torch

    from fedpriv.experiment.config import parse_config, read_config_text
    from fedpriv.flower.messages import ARRAYS, FEDPRIV, TERMS, ClientInstructions, RunTerms
    from fedpriv.flower.messages import CONFIG as CONFIG_RECORD
    from fedpriv.methods import AlphaNormEC

    digest = parse_config(read_config_text(CONFIG, "config")).digest
    instructions = ClientInstructions(method=AlphaNormEC(), round=1, client=0, noise_stddev=2.0)
    terms = RunTerms(
        run="r",
        turn=1,
        last_turn=0,
        epoch=0,
        trust="local",
        adjacency="replace",
        delta=1e-5,
        noise_multiplier=1.0,
        rounds=9,
        sampling="everyone",
        population=4,
        probability=1.0,
        cohort_size=0,
        digest=digest,
    )
    (folder / "fedpriv-client.toml").write_text("[limits]\nepsilon = 100.0\ndelta = 1e-5\n")
    records = {ARRAYS: ArrayRecord({ARRAYS: torch.zeros(650)}), CONFIG_RECORD: ConfigRecord({"experiment": digest})}
    content = RecordDict({**records, FEDPRIV: instructions.to_record(), TERMS: terms.to_record()})
    return content, {"partition-id": 0, "num-partitions": 4, "fedpriv-home": str(folder)}, {"config-toml": CONFIG}


def plain_message() -> tuple[RecordDict, dict[str, object], dict[str, object]]:
    """Return the same of the plain app."""
    import torch

    arrays = ArrayRecord({"weight": torch.zeros(10, 64), "bias": torch.zeros(10)})
    return RecordDict({"arrays": arrays}), {"partition-id": 0, "num-partitions": 4}, {}


def main() -> None:
    """Answer one message."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    with inside_a_run(1, 1):
        if name == "fedpriv":
            from clients.client_app import app

            content, node, run = fedpriv_message(folder)
        else:
            sys.path.insert(0, str(HERE / "plain"))
            from plain_client import app

            content, node, run = plain_message()
        context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
        answer = app(Message(content, 1, MessageType.TRAIN), context)
        assert "arrays" in answer.content, answer.content
    print(time.process_time())


if __name__ == "__main__":
    main()
