"""Real server and client apps of a deployment with Flower's messages, in one process and without a network."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flower_in_process import RUN_ID, InProcessGrid, inside_a_run
from flwr.app import Context, Message, RecordDict

from clients.client_app import app
from fedpriv.deploy.helper.folder import (
    CLIENTS_TOML,
    HELPER_TOML,
    IDENTITY_FILE,
    SIGNING_FILE,
    make_signing_key,
    read_signing_key,
)
from fedpriv.deploy.helper.messages import HELPER_HOME
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
[aggregation]
helpers = {helpers}
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
        hook: See `InProcessGrid`; helpers have the places after the clients.
        helpers: Number of helpers, whom all clients pin.
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
        helpers: int = 0,
    ) -> None:
        super().__init__(app, population + helpers, run_config, hook=hook, simulated=False)
        self._waiting: dict[str, Message] = {}
        self.helpers = [folder / f"helper-{j}" for j in range(helpers)]
        pinned = [make_helper(home, folder, population) for home in self.helpers]
        for node, home, identity in zip(self.order[population:], self.helpers, pinned, strict=True):
            config = self.contexts[node].node_config
            config.clear()
            config.update({HELPER_HOME: str(home), "fedpriv-helper": identity})
        self.parties = {"helpers": ",".join(pinned), "enrolled": str(folder / "helper-0" / CLIENTS_TOML)}
        for partition, node in enumerate(self.order[:population]):
            home = folder / f"node-{partition}"
            home.mkdir(parents=True, exist_ok=True)
            file = own and f"{own}-{partition}.npz"
            policy = POLICY.format(trust=trust, epsilon=epsilon, own=file, helpers=pinned)
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


def make_helper(home: Path, folder: Path, clients: int) -> str:
    """Make the folder of a helper, and the keys of the clients in its list; return its identity key."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / IDENTITY_FILE).exists():
        make_signing_key(home / IDENTITY_FILE)
    (home / HELPER_TOML).write_text('superlink = "localhost:9092"\nmin-clients = 2\n')
    rows = []
    for client in range(clients):
        path = folder / f"node-{client}" / SIGNING_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        key = read_signing_key(path) if path.exists() else make_signing_key(path)
        rows.append(f'{client} = "{key.public_key().public_bytes_raw().hex()}"')
    (home / CLIENTS_TOML).write_text("\n".join(["[clients]", *rows]))
    return read_signing_key(home / IDENTITY_FILE).public_key().public_bytes_raw().hex()


def run_server(grid: DeploymentGrid, toml: str, out: Path, **more: Any) -> None:
    """Call the ServerApp's main like Flower; `more` are keys of the run config, with underscores."""
    config = {
        "config-toml": toml,
        "out": str(out),
        "deployed": True,
        **(grid.parties if grid.helpers else {}),
        **{k.replace("_", "-"): v for k, v in more.items()},
    }
    for context in grid.contexts.values():
        context.run_config = dict(config)
    context = Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))
    with inside_a_run():
        main(grid, context)
