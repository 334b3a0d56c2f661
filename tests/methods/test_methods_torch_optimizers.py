"""PyTorch's optimizers at the server: their steps, their memories, and refused ones."""

import pytest
import torch

from fedpriv import load_config
from fedpriv.errors import UserError
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.run import run_experiment
from fedpriv.methods import SERVER_OPTIMIZERS, DPFedAvg, optimized
from fedpriv.methods.server_optimizers import Adam, Momentum
from fedpriv.methods.torch_optimizers import TorchOptimizer

TABLES = {
    "name": "torch",
    "seed": 1,
    "data": {"name": "digits", "clients": 5},
    "model": {"name": "softmax"},
    "method": {"name": "dp-fedavg", "server_lr": 0.01},
    "privacy": {"noise_multiplier": 1.0},
    "training": {"rounds": 4},
}


def made(name, **options):
    return SERVER_OPTIMIZERS.resolve(f"torch.optim:{name}", "server.optimizer")(**options)


def directions(rounds=6, size=7):
    return torch.randn(rounds, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def steps(optimizer, given):
    state, found = optimizer.init(given[0].float()), []
    for direction in given:
        step, state = optimizer.step(type(state)(*(part.double() for part in state)), direction)
        found.append(step)
    return torch.stack(found), state


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9}),
        ("Adam", {"betas": (0.9, 0.99), "eps": 1e-3}),
        ("NAdam", {}),
        ("RAdam", {}),
        ("Adagrad", {}),
        ("RMSprop", {"momentum": 0.5, "centered": True}),
        ("Adamax", {}),
        ("Rprop", {}),
    ],
)
def test_steps_are_those_of_the_optimizer_itself(name, options):
    given = directions()
    at = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    theirs, expected = getattr(torch.optim, name)([at], lr=1.0, **options), []
    for direction in given:
        before, at.grad = at.detach().clone(), direction.clone()
        theirs.step()
        expected.append(before - at.detach())
    found, _ = steps(made(name, **options), given)
    torch.testing.assert_close(found, torch.stack(expected))


def test_they_agree_with_our_own():
    given = directions()
    for own, theirs in (
        (Momentum(momentum=0.8), made("SGD", momentum=0.8)),
        (Adam(beta1=0.9, beta2=0.99, tau=1e-3), made("Adam", betas=(0.9, 0.99), eps=1e-3)),
    ):
        torch.testing.assert_close(steps(own, given)[0], steps(theirs, given)[0])


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("LBFGS", {}, "an optimizer that steps on directions alone, got one that fails"),
        ("SGD", {"weight_decay": 0.1}, "got one that looks at the parameters"),
        ("AdamW", {}, "got one that looks at the parameters"),
        ("ASGD", {"lambd": 0.1}, "got one that looks at the parameters"),
        ("SGD", {"momentum": -1.0}, "Invalid momentum value: -1.0"),
    ],
)
def test_what_needs_more_than_directions_is_refused(name, options, line):
    with pytest.raises(UserError, match=line) as caught:
        made(name, **options)
    assert "\n" not in str(caught.value)


class LooksAhead(torch.optim.SGD):
    """Every sixth step goes back half the way to the earlier parameters: it looks at them late."""

    def step(self, closure=None):
        loss = super().step(closure)
        (at,) = self.param_groups[0]["params"]
        kept = self.state[at]
        kept["count"] = kept.get("count", torch.zeros(())) + 1
        slow = kept.setdefault("slow", torch.zeros_like(at))
        if kept["count"] % 6 == 0:
            at.data.lerp_(slow, 0.5)
            slow.copy_(at.data)
        return loss


class Random(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        (at,) = self.param_groups[0]["params"]
        at.data.add_(torch.randn_like(at))
        return loss


class Matrix(torch.optim.SGD):
    def step(self, closure=None):
        (at,) = self.param_groups[0]["params"]
        self.state[at]["gram"] = torch.outer(at.data, at.data)
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (LooksAhead, "got one that looks at the parameters"),
        (Random, "got one that draws random numbers"),
        (Matrix, r"keeps a vector or a number, got optimizer_gram of shape \[4, 4\]"),
    ],
)
def test_optimizers_that_depend_on_more_are_found_out(kind, line):
    settings = TorchOptimizer.of(kind, "server.optimizer", "mine:Optimizer")
    with pytest.raises(UserError, match=line):
        settings()


def test_an_optimizer_is_named_in_a_config_and_its_state_survives_a_stop(tmp_path):
    tables = {**TABLES, "server": {"optimizer": "torch.optim:NAdam", "betas": [0.8, 0.9]}}
    config = parse_config(tables)
    assert load_config(config.tables).digest == config.digest
    assert config.sources["server.optimizer"]["module"].startswith("torch.optim")
    whole = run_experiment(config, tmp_path / "whole", engine="loop", checkpoint_every=1)

    class StopError(Exception):
        pass

    def stop(released, _):
        if released["round"] == 2:
            raise StopError

    with pytest.raises(StopError):
        run_experiment(config, tmp_path / "parts", engine="loop", checkpoint_every=1, watch=stop)
    parts = run_experiment(config, tmp_path / "parts", engine="loop", resume=True)
    assert parts["test_loss"] == whole["test_loss"]
    model = "model.safetensors"
    assert (tmp_path / "parts" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


@pytest.mark.parametrize(
    ("server", "line"),
    [
        ({"optimizer": "torch.optim:Adamm"}, "a class that can be imported"),
        ({"optimizer": "torch.nn:Linear"}, r"an optimizer, got 'torch\.nn:Linear'"),
        ({"optimizer": "torch.optim:Adam", "lr": 0.1}, r"^server\.lr: expected a known key"),
        ({"optimizer": "torch.optim:Adam", "betas": 3}, r"^server\.betas"),
    ],
)
def test_what_is_wrong_in_a_config_is_one_line(server, line):
    with pytest.raises(UserError, match=line):
        parse_config({**TABLES, "server": server})


def test_clients_and_privacy_are_the_methods():
    method = DPFedAvg()
    with_optimizer = optimized(method, made("NAdam"))
    assert with_optimizer.bounded == method.bounded
    assert with_optimizer.client_part is method
