"""Adapters are trained, all else stays frozen, and both survive the run."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpriv import load_config, load_module, run_experiment
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config
from fedpriv.experiment.execution import EngineName
from fedpriv.experiment.watching import StopRun
from fedpriv.tasks.adapters import ADAPTERS, AdaptedModule, FedSvd, FfaLora, Head, Lora, lora_layers, merged, svd_step
from fedpriv.tasks.adapters.factors import lora_weight
from fedpriv.tasks.adapters.kept import KeptActivations, KeptStore
from fedpriv.tasks.models import Cnn
from fedpriv.tasks.per_example import PerExample, cross_entropies
from fedpriv.tasks.per_example.rows import gradient_rows
from fedpriv.tasks.task import Task
from fedpriv.trained.export import export_model
from fedpriv.vectors import Layout, trainable

NET = """
from torch import nn


def net(input_shape, classes):
    body = [nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh()]
    return nn.Sequential(*body, nn.Linear(10, classes))
"""
LAYERS = ["3"]
pytestmark = pytest.mark.xdist_group("peft")  # its import takes seconds: by one worker alone
needs_peft = pytest.mark.usefixtures("peft")


@pytest.fixture(scope="module")
def peft() -> None:
    pytest.importorskip("peft")


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 6), nn.ReLU()]
    return nn.Sequential(*body, nn.Linear(6, 3))


def adapted(kind: type[Lora] = Lora, **options: int) -> AdaptedModule:
    return kind(targets=["2", "4"], rank=2, train=["6"], **options).adapted(convolutional(), (1, 7, 7), 0)


def some_examples(count: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 7, 7, generator=draw), torch.arange(count) % 3


def moved(module: AdaptedModule) -> AdaptedModule:
    """Train for a few steps of gradient descent, so that no factor is zero."""
    inputs, labels = some_examples()
    for _ in range(3):
        module.zero_grad()
        nn.functional.cross_entropy(module(inputs), labels).backward()
        with torch.no_grad():
            for parameter in trainable(module).values():
                parameter -= 0.5 * parameter.grad  # pyright: ignore[reportOperatorIssue]
    return module


def factors(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    layers = lora_layers(module).values()
    pairs = [(lora_weight(layer, "lora_B"), lora_weight(layer, "lora_A")) for layer in layers]
    return [(b.detach().flatten(1).clone(), a.detach().flatten(1).clone()) for b, a in pairs]


def own_config(folder: Path, *settings: str, kind: str = "lora", net: str = NET) -> Config:
    (folder / "net.py").write_text(net)
    tables = {
        "name": "own",
        "seed": 3,
        "data": {"name": "digits", "clients": 30},
        "model": {"name": f"{folder}/net.py:net"},
        "adapter": {"kind": kind, "targets": LAYERS, "rank": 2, "train": ["5"]},
        "local": {"work": "local-epochs", "epochs": 1, "batch_size": 20, "client_lr": 0.3},
        "cohort": {"sampling": "poisson", "probability": 0.3},
        "method": {"name": "dp-fedavg", "clip_norm": 1.0},
        "training": {"rounds": 3},
    }
    return load_config(tables, settings)


@needs_peft
def test_factors_and_the_named_layers_are_trained_and_nothing_else() -> None:
    plain = {"inner.6.weight", "inner.6.bias"}
    b = {f"inner.{layer}.lora_B.default.weight" for layer in (2, 4)}
    a = {f"inner.{layer}.lora_A.default.weight" for layer in (2, 4)}
    assert set(trainable(adapted())) == plain | b | a
    assert set(trainable(adapted(FfaLora))) == set(trainable(adapted(FedSvd))) == plain | b


@needs_peft
@pytest.mark.parametrize("kind", [Lora, FfaLora, FedSvd])
def test_training_moves_the_adapters_and_leaves_frozen_weights_to_the_bit(kind: type[Lora]) -> None:
    module = adapted(kind)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    learned = set(trainable(moved(module)))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in learned), name


@needs_peft
def test_the_adapted_model_begins_as_the_model_and_equals_its_formula() -> None:
    inputs, _ = some_examples()
    module = adapted(alpha=3)
    plain = convolutional()
    torch.testing.assert_close(module(inputs), plain(inputs))
    moved(module)
    (b, a), _ = factors(module)
    with torch.no_grad():
        weight = plain.get_parameter("2.weight")
        weight += 1.5 * (b @ a).reshape(weight.shape)
    images = inputs.repeat(1, 4, 1, 1)
    torch.testing.assert_close(module.inner.get_submodule("2")(images), plain.get_submodule("2")(images))


@needs_peft
def test_convolutions_of_the_model_cnn_get_adapters_of_the_formula() -> None:
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    module = Lora(targets=["0", "3"], rank=2, alpha=3.0).adapted(Cnn().build((3, 16, 16), 10, 0), (3, 16, 16), 0)
    plain = Cnn().build((3, 16, 16), 10, 0)
    with torch.no_grad():
        for parameter in trainable(module).values():
            parameter += 0.1
    for name, (b, a) in zip(("0", "3"), factors(module), strict=True):
        with torch.no_grad():
            weight = plain.get_parameter(f"{name}.weight")
            weight += 1.5 * (b @ a).reshape(weight.shape)
    torch.testing.assert_close(module(images), plain(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged(module)(images), plain(images), rtol=1e-4, atol=1e-5)


@needs_peft
def test_merged_equals_unmerged_under_the_names_of_the_model() -> None:
    module, (inputs, _) = moved(adapted()), some_examples()
    made = merged(module)
    torch.testing.assert_close(made(inputs), module(inputs))
    assert list(made.state_dict()) == list(convolutional().state_dict())
    assert not torch.allclose(made(inputs), convolutional()(inputs))
    assert lora_layers(module)  # a copy was merged


@pytest.mark.parametrize(("out", "rank", "zero"), [(7, 3, False), (2, 3, False), (7, 3, True)])
def test_the_svd_step_keeps_the_product_and_makes_the_rows_orthonormal(out: int, rank: int, zero: bool) -> None:
    draw = torch.Generator().manual_seed(2)
    b, a = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((out, rank), (rank, 11)))
    b = 0.0 * b if zero else b
    left, right = svd_step(b, a)
    torch.testing.assert_close(left @ right, b @ a)
    torch.testing.assert_close(right @ right.T, torch.eye(rank, dtype=torch.float64))
    gram = left.T @ left
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()))
    assert torch.linalg.matrix_rank(torch.cat([a, right])) == rank  # the row space is the same


def test_a_server_that_decomposes_every_round_learns_what_fixed_orthonormal_rows_learn() -> None:
    """The claim of `factors`: rounds of clipped steps, with noise that is turned with the coordinates."""
    draw = torch.Generator().manual_seed(3)
    data, wanted = (torch.randn(40, width, generator=draw, dtype=torch.float64) for width in (9, 5))
    frozen = torch.linalg.qr(torch.randn(9, 3, generator=draw, dtype=torch.float64))[0].T
    fixed, (b, a) = torch.zeros(5, 3, dtype=torch.float64), (torch.zeros(5, 3, dtype=torch.float64), frozen)

    def clipped_sum(b: Tensor, a: Tensor) -> Tensor:
        total = torch.zeros_like(b)
        for client in range(4):
            x, y = data[client::4], wanted[client::4]
            move = ((x @ a.T @ b.T - y).T @ x @ a.T) / 10.0
            total += move / max(1.0, float(move.norm()) / 0.3)
        return total

    for _ in range(6):
        noise = 0.1 * torch.randn(5, 3, generator=draw, dtype=torch.float64)
        turned = noise @ frozen @ a.T  # the noise on the same products B A
        fixed = fixed - 0.5 * (clipped_sum(fixed, frozen) + noise)
        b, a = svd_step(b - 0.5 * (clipped_sum(b, a) + turned), a)
        torch.testing.assert_close(b @ a, fixed @ frozen)
    assert float((a - frozen).norm()) > 0.1


@needs_peft
def test_fed_svd_begins_with_orthonormal_rows_in_the_space_of_ffa_lora() -> None:
    for (_, one), (_, other) in zip(factors(adapted(FedSvd)), factors(adapted(FfaLora)), strict=True):
        torch.testing.assert_close(one @ one.T, torch.eye(2))
        assert torch.linalg.matrix_rank(torch.cat([one, other])) == 2


@needs_peft
def test_the_random_start_follows_from_the_seed_alone() -> None:
    module = convolutional()
    state = torch.get_rng_state()
    lora = Lora(targets=["4"], rank=2)
    lora.adapted(module, (1, 7, 7), 1)
    assert torch.equal(state, torch.get_rng_state())
    one, two, other = (lora.adapted(convolutional(), (1, 7, 7), seed).state_dict() for seed in (1, 1, 2))
    name = "inner.4.lora_A.default.weight"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], other[name])


@needs_peft
def test_gradients_of_single_examples_are_those_of_one_example_at_a_time() -> None:
    module, (inputs, labels) = moved(adapted()), some_examples()
    rows = PerExample(module, Layout.of_module(module), cross_entropies)
    assert rows.is_fast(inputs, labels)
    torch.testing.assert_close(rows.rows(inputs, labels), gradient_rows(module, cross_entropies, inputs, labels))


@needs_peft
def test_kept_activations_take_the_place_of_inputs() -> None:
    module, (inputs, labels) = moved(adapted()), some_examples()
    task = Task(module)
    assert task.kept_floats == 4 * 5 * 5
    kept = task.lower(inputs)
    model = task.initial_model()
    assert not kept.requires_grad
    assert torch.equal(task.gradient(model, kept, labels), task.gradient(model, inputs, labels))
    rows = PerExample(module, Layout.of_module(module), cross_entropies)
    torch.testing.assert_close(rows.rows(kept, labels), rows.rows(inputs, labels))


class Center(nn.Module):
    """A layer that mixes examples."""

    def forward(self, values: Tensor) -> Tensor:
        return values - values.mean(0, keepdim=True)


def test_activations_that_mix_examples_are_not_kept() -> None:
    """Otherwise the check of single examples would not see the lower layers."""
    lower = nn.Linear(4, 6)
    mixed = Head(train=["2"]).adapted(nn.Sequential(lower, Center(), nn.Linear(6, 3)), (4,), 0)
    plain = Head(train=["2"]).adapted(nn.Sequential(lower, nn.Tanh(), nn.Linear(6, 3)), (4,), 0)
    assert (mixed.kept_floats, plain.kept_floats) == (0, 6)


def test_activations_are_computed_once_for_each_client_that_fits() -> None:
    task = Task(Head(train=["6"]).adapted(convolutional(), (1, 7, 7), 0))
    inputs, _ = some_examples()
    kept = KeptActivations(task, limit=5 * 6, store=KeptStore())
    first, second = kept.of(0, inputs), kept.of(1, inputs + 1.0)
    assert first.shape == (5, 6)
    assert kept.of(0, inputs) is first
    assert torch.equal(kept.of(1, inputs + 1.0), second)
    assert kept.of(1, inputs + 1.0) is not second
    plain = Task(convolutional())
    assert KeptActivations(plain).of(0, inputs) is inputs


def test_runs_share_the_activations_of_equal_frozen_layers_and_inputs() -> None:
    def task(bias: float = 0.0, *, double: bool = False) -> Task:
        made = convolutional()
        with torch.no_grad():
            made.get_parameter("0.bias").add_(bias)
        if double:
            cast(nn.Sequential, made)[1] = nn.LeakyReLU(0.5)
        return Task(Head(train=["6"]).adapted(made, (1, 7, 7), 0))

    store, (inputs, _) = KeptStore(), some_examples()
    first = KeptActivations(task(), store=store).of(0, inputs)
    assert KeptActivations(task(), store=store).of(4, inputs.clone()) is first
    for other, given in ((task(bias=0.5), inputs), (task(double=True), inputs), (task(), inputs + 1.0)):
        found = KeptActivations(other, store=store).of(0, given)
        assert torch.equal(found, other.lower(given))
        assert not torch.equal(found, first)


def test_a_full_store_forgets_earlier_runs_but_nothing_of_the_present_one() -> None:
    store, (inputs, _) = KeptStore(), some_examples()
    task = Task(Head(train=["6"]).adapted(convolutional(), (1, 7, 7), 0))
    before = KeptActivations(task, limit=2 * 5 * 6, store=store)
    now = KeptActivations(task, limit=2 * 5 * 6, store=store)
    old = [before.of(client, inputs + client) for client in (0, 1)]
    kept = now.of(2, inputs + 2)
    assert now.of(3, inputs + 3) is now.of(3, inputs + 3)
    assert now.of(2, inputs + 2) is kept
    assert now.of(4, inputs + 4) is not now.of(4, inputs + 4)
    assert torch.equal(before.of(0, inputs), old[0])
    assert before.of(0, inputs) is not old[0]


def test_a_run_with_other_frozen_weights_is_not_loaded(tmp_path: Path) -> None:
    tables = ("adapter.targets=", "adapter.rank=", "training.rounds=1")
    out = tmp_path / "out"
    run_experiment(own_config(tmp_path, *tables, kind="head"), out, engine="loop")
    load_module(out)
    facts = json.loads((out / "model.json").read_text())
    (out / "model.json").write_text(json.dumps({**facts, "frozen_sha256": "0" * 64}))
    with pytest.raises(UserError, match="the frozen weights of the run"):
        load_module(out)


def test_a_run_is_not_resumed_with_other_frozen_weights(tmp_path: Path) -> None:
    def stop(released: Any, _: Any) -> None:
        if released["round"] == 1:
            raise StopRun

    file, out = tmp_path / "body.pt", tmp_path / "out"
    net = NET.replace("    return", f"    body[1].load_state_dict(torch.load({str(file)!r}))\n    return")
    tables = ("adapter.targets=", "adapter.rank=", "training.rounds=2")
    config = own_config(tmp_path, *tables, kind="head", net=f"import torch\n{net}")
    weights = nn.Linear(64, 12).state_dict()
    torch.save(weights, file)
    with pytest.raises(StopRun):
        run_experiment(config, out, engine="loop", watch=stop)
    torch.save({name: tensor + 0.001 for name, tensor in weights.items()}, file)
    with pytest.raises(UserError, match=r"the same privacy terms and data .*frozen weights"):
        run_experiment(config, out, engine="loop", resume=True)
    torch.save(weights, file)
    run_experiment(config, out, engine="loop", resume=True)


def test_stages_with_other_outputs_are_refused() -> None:
    class Wrong(nn.Sequential):
        @property
        def stages(self) -> tuple[nn.Module, ...]:
            return (self[1], self[0])

    with pytest.raises(UserError, match="stages with the outputs of the whole model"):
        Head(train=["1"]).adapted(Wrong(nn.Linear(3, 3), nn.Linear(3, 3)), (3,), 0)


@pytest.mark.parametrize("train", [None, ["6"]])
def test_a_head_alone_needs_no_adapters(train: list[str] | None) -> None:
    module: nn.Module = convolutional()
    if train is None:
        module = nn.Sequential()
        module.add_module("body", nn.Linear(4, 5))
        module.add_module("head", nn.Linear(5, 2))
    made = Head(train=train).adapted(module, (4,) if train is None else (1, 7, 7), 0)
    assert len(trainable(made)) == 2
    assert made.kept_floats == (5 if train is None else 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["nope"]}, "adapter.targets: expected the name of a Linear or Conv layer, got 'nope'"),
        ({"targets": []}, "adapter.targets: expected names of layers"),
        ({"targets": "query"}, r"adapter.targets: expected a list of names of layers, got 'query'. Write \['query'\]"),
        ({"targets": ["4"], "train": "6"}, "adapter.train: expected a list of names of layers, got '6'"),
        ({"targets": ["4"], "rank": 0}, "adapter.rank"),
        ({"targets": ["4"], "rank": 7}, "adapter.rank: expected at most 6, the number of outputs of '4', got 7"),
        ({"targets": ["0"], "rank": 5}, "adapter.rank: expected at most 4, the number of outputs of '0', got 5"),
        ({"targets": ["4"], "train": ["7"]}, "adapter.train: expected the name of a layer of the model, got '7'"),
        ({"targets": ["6"], "train": ["6"]}, "layers that are not trained as a whole, got '6'"),
    ],
)
def test_wrong_settings_are_one_line(options: dict[str, list[str]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Lora(**options).adapted(convolutional(), (1, 7, 7), 0)  # pyright: ignore[reportArgumentType]


def test_more_orthonormal_rows_than_inputs_are_refused() -> None:
    with pytest.raises(UserError, match=r"adapter.rank: expected at most 3, the number of inputs of '0', got 4"):
        FedSvd(targets=["0"], rank=4).adapted(nn.Sequential(nn.Linear(3, 9)), (3,), 0)


def test_fed_svd_refuses_optimizers_of_single_coordinates(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'server.optimizer: expected no optimizer but "momentum"'):
        own_config(tmp_path, "server.optimizer=adam", kind="fed-svd")
    own_config(tmp_path, "server.optimizer=momentum", kind="fed-svd")
    own_config(tmp_path, "server.optimizer=adam", kind="ffa-lora")


@needs_peft
@pytest.mark.sampled
@pytest.mark.parametrize("kind", sorted(set(ADAPTERS) - {"head"}))
def test_a_run_sends_adapters_alone_and_leaves_a_module_and_its_parts(tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    config = own_config(tmp_path, kind=kind)
    size = 10 * 2 + (12 * 2 if kind == "lora" else 0) + 110
    assert assemble(config).initial_model.shape == (size,)
    out = tmp_path / "out"
    run_experiment(config, out, engine="loop")
    assert sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values()) == size
    net, whole = load_module(out), load_module(out, merge=True)
    inputs = torch.randn(6, 8, 8)
    torch.testing.assert_close(whole(inputs), net(inputs))
    assert not lora_layers(whole)
    file = export_model(out, "safetensors", tmp_path / "merged")
    torch.testing.assert_close(dict(load_file(file)), dict(whole.state_dict()))
    folder = export_model(out, "peft", tmp_path / "peft").parent
    base = config.model.build((8, 8), 10, 0)
    frozen = {name.replace(".base_layer", ""): tensor for name, tensor in net.inner.state_dict().items()}  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    base.load_state_dict({name: tensor for name, tensor in frozen.items() if "lora" not in name})
    again = PeftModel.from_pretrained(base, str(folder)).eval()
    torch.testing.assert_close(again(inputs), net(inputs))
    if kind == "fed-svd":
        a = load_file(folder / "adapter_model.safetensors")["base_model.model.3.lora_A.weight"]
        torch.testing.assert_close(a @ a.T, torch.eye(2))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert f"They are adapters, `{kind}(" in (folder / "README.md").read_text()


@needs_peft
@pytest.mark.slow
def test_engines_and_kept_activations_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = own_config(tmp_path, "local.work=full-gradient", "local.epochs=", "local.batch_size=", "local.client_lr=")
    found = []
    cases: tuple[tuple[str, EngineName, int], ...] = (
        ("a", "loop", 2**20),
        ("b", "vectorized", 2**20),
        ("c", "loop", 0),
    )
    for name, engine, limit in cases:
        monkeypatch.setattr("fedpriv.tasks.adapters.kept.MAX_KEPT_FLOATS", limit)
        monkeypatch.setattr("fedpriv.tasks.adapters.kept._STORE", KeptStore())
        run_experiment(config, tmp_path / name, engine=engine)
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "fed-svd"])
def test_single_examples_are_protected_with_adapters(tmp_path: Path, kind: str) -> None:
    config = own_config(
        tmp_path,
        *("local.work=full-gradient", "local.epochs=", "local.batch_size=", "local.client_lr="),
        *("privacy.unit=example", "privacy.epsilon=8.0", "privacy.delta=1e-5", "privacy.adjacency=replace"),
        *("privacy.example_clip=1.0", "cohort.sampling=everyone", "cohort.probability=", "method.name=alpha-normec"),
        *("method.clip_norm=", "method.alpha=1.0", "method.beta=0.5", "method.server_lr=0.1", "training.rounds=2"),
        kind=kind,
    )
    summary = run_experiment(config, tmp_path / "out", engine="loop")
    assert summary is not None
    assert summary["private"]


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "ffa-lora", "fed-svd"])
def test_ray_and_flower_train_the_same_adapters_as_the_loop(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("flwr")
    config = own_config(tmp_path, "training.rounds=2", "privacy.epsilon=8.0", "privacy.delta=1e-5", kind=kind)
    engines: tuple[EngineName, ...] = ("loop", "ray", "flower")
    for engine in engines:
        run_experiment(config, tmp_path / engine, engine=engine)
    loop, *others = [load_file(tmp_path / engine / "model.safetensors") for engine in engines]
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in loop.items())
    assert not torch.equal(loop["model"], load_file(tmp_path / "loop" / "initial.safetensors")["model"])
