"""Grid of nodes like in a deployment: random ids, late joiners, answers in any order, dead nodes."""

import copy
import pickle
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedpriv.flower.internals import app as flower_internals
from fedpriv.flower.internals.app import Run, empty_run, number_message
from fedpriv.flower.simulation import playing_clients

RUN_ID = 1
DEAD_NODE_ID = 1


def inside_a_run() -> AbstractContextManager[None]:
    """Allow the creation of a `Message`, as in a ServerApp's process."""
    return flower_internals.inside_a_run(RUN_ID, node_id=0)


class NodeError(Exception):
    """Error for a dead node: Flower answers in its place."""


class InProcessGrid(Grid):
    """Grid of `population` nodes with random ids that join one after the other and answer in random order.

    Args:
        app: App of every node.
        population: Number of nodes.
        run_config: Run config, as in pyproject.toml.
        partition_ids: Partition id of each node; None for nodes without one.
        hook: Called with partition id and message before the app; returns False for a node that never answers,
            raises `NodeError` for a dead one.
        simulated: True if the nodes know that they are simulated, unlike those of a deployment.
    """

    def __init__(
        self,
        app: ClientApp,
        population: int,
        run_config: dict[str, Any] | None = None,
        partition_ids: bool = True,
        hook: Callable[[int, Message], bool] = lambda *_: True,
        simulated: bool = True,
    ) -> None:
        self.app = app
        self.simulated = simulated
        self.hook = hook
        self.contexts: dict[int, Context] = {}
        self.order: list[int] = []
        self.seen: list[Message] = []
        self.answers: list[Message] = []
        self._random = random.Random(5)
        self._joined = 0
        self._sent = 0
        for partition in range(population):
            node = self._random.getrandbits(60)
            config: dict[str, Any] = {"partition-id": partition, "num-partitions": population} if partition_ids else {}
            self.contexts[node] = Context(
                run_id=RUN_ID, node_id=node, node_config=config, state=RecordDict(), run_config=run_config or {}
            )
            self.order.append(node)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return empty_run(RUN_ID)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        self._joined = min(self._joined + 2, len(self.order))
        return self._random.sample(self.order[: self._joined], self._joined)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = list(messages)
        for message in asked:
            self._sent += 1
            number_message(message, f"message-{self._sent}")
        self.seen += asked
        answers = [answer for message in asked if (answer := self._play(message)) is not None]
        self._random.shuffle(answers)
        self.answers += answers
        return answers

    def _play(self, message: Message) -> Message | None:
        """Return the answer of a node; message and state are copied like on the way to a Ray actor and back."""
        node = message.metadata.dst_node_id
        partition = self.order.index(node)
        try:
            if not self.hook(partition, message):
                return None
            sent, context = pickle.loads(pickle.dumps((message, self.contexts[node])))
            with playing_clients() if self.simulated else nullcontext():
                answer = self.app(sent, context)
            self.contexts[node] = pickle.loads(pickle.dumps(context))
        except NodeError as error:
            dead = Message(Error(code=1, reason=str(error)), reply_to=message)
            dead.metadata.__dict__["_src_node_id"] = DEAD_NODE_ID
            return dead
        except Exception as error:
            text = f"ray::ClientAppActor.run()\n  File x\nException ClientAppException occurred. Message: {error}"
            return Message(Error(code=2, reason=f"<class 'ClientAppException'>:<'{text}'>"), reply_to=message)
        return copy.copy(answer)
