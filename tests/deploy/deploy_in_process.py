"""Real server and client apps of a deployment with Flower's messages, in one process and without a network."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flower_in_process import RUN_ID, InProcessGrid, inside_a_run
from flwr.app import Context, Message, RecordDict

from clients.client_app import app
from fedpriv.flower.internals.app import number_message
from strategies.server_app import main

POLICY = """
[accepts]
trust = "{trust}"
[limits]
epsilon = {epsilon}
delta = 1e-5
[data]
own = "{own}"
"""


class DeploymentGrid(InProcessGrid):
    """Grid of nodes with homes, which computes answers when they are requested.

    Args:
        folder: Folder of the homes.
        population: Number of nodes.
        run_config: See `InProcessGrid`.
        trust: Trust in the policies.
        epsilon: Epsilon in the policies.
        own: Data file in the policies.
        hook: See `InProcessGrid`.
    """

    def __init__(
        self,
        folder: Path,
        population: int,
        run_config: dict[str, Any],
        trust: str = "none",
        epsilon: float = 1e6,
        own: str = "",
        hook: Callable[[int, Message], bool] = lambda *_: True,
    ) -> None:
        super().__init__(app, population, run_config, hook=hook, simulated=False)
        self._waiting: dict[str, Message] = {}
        for partition, node in enumerate(self.order):
            home = folder / f"node-{partition}"
            home.mkdir(parents=True, exist_ok=True)
            policy = POLICY.format(trust=trust, epsilon=epsilon, own=own and f"{own}-{partition}.npz")
            (home / "fedpriv-client.toml").write_text(policy)
            self.contexts[node].node_config["fedpriv-home"] = str(home)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._sent += 1
            number_message(message, f"message-{self._sent}")
            ids.append(message.metadata.message_id)
            self.seen.append(message)
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [self._waiting.pop(i) for i in message_ids if i in self._waiting]
        answers = [answer for message in asked if (answer := self._play(message)) is not None]
        self._random.shuffle(answers)
        return answers


def run_server(grid: DeploymentGrid, toml: str, out: Path, **more: Any) -> None:
    """Call the ServerApp's main like Flower; `more` are keys of the run config, with underscores."""
    config = {
        "config-toml": toml,
        "out": str(out),
        "deployed": True,
        **{k.replace("_", "-"): v for k, v in more.items()},
    }
    for context in grid.contexts.values():
        context.run_config = dict(config)
    context = Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))
    with inside_a_run():
        main(grid, context)
