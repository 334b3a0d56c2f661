"""Strict TOML: each mistake is one line that names the key and the nearest known one."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from fedpriv.errors import UserError
from fedpriv.experiment.analyses.heavy import HeavyAnalysis, asks_heavy_hitters
from fedpriv.experiment.build import sampling_of
from fedpriv.experiment.config import apply_settings, load_config, parse_config, read_tables
from fedpriv.methods import SERVER_OPTIMIZERS, optimized
from fedpriv.methods.server_optimizers import Adam

QUICKSTART = Path(__file__).parents[2] / "sim_configs" / "quickstart.toml"


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path):
    config = load_config(QUICKSTART)
    again = tmp_path / "again.toml"
    again.write_text(config.to_toml())
    assert load_config(again) == config
    assert load_config(again).digest == config.digest


def test_defaults_are_spelled_out_and_do_not_change_the_digest():
    config = load_config(QUICKSTART)
    assert config.tables["method"]["memory"] == "noiseless"
    assert load_config(QUICKSTART, ["method.memory=noiseless"]).digest == config.digest


@pytest.mark.parametrize(
    "setting",
    [
        "seed=8",
        "training.rounds=41",
        "method.beta=0.11",
        "privacy.epsilon=7.9",
        "data.clients=99",
        "cohort.sampling=poisson",
    ],
)
def test_every_change_of_the_experiment_changes_the_digest(setting: str):
    settings = [setting, "cohort.probability=0.5"] if "poisson" in setting else [setting]
    assert load_config(QUICKSTART, settings).digest != load_config(QUICKSTART).digest


DIGESTS = {
    "cifar10-resnet20": "fcf340eff8b11f221826cc5111f44c713835f74fb54b294dc73766355fd35932",
    "devices": "162be8b7f434cb55f12edbb04ca67eb1759563c568e72095fad40f3f6864afff",
    "federated-averaging": "4065224c3b5fdb46654fe4073d7bbf177ec60b096c5b04bb24b735360b9ac00b",
    "local-trust": "ed6dbc29a09ab587461db8d0ffa911921c4565ae4007a9072d13c6e4a7c7afb0",
    "million-clients": "51d641adb444581d6452b52af84f0b9d6818a038d55406f627d6532cc8ab0f58",
    "mnist-by-writer": "c583f5d978016fef7b305ba6537e04bee7e0567f2271f5ec46e7341d340f142e",
    "quickstart": "c6be5563fe98f125b46d6a4b56f4d77901f12e04a35f4a999b2fb3358ff5cd86",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_an_experiment_keeps_its_digest_when_configs_learn_new_keys(name: str):
    """Otherwise runs could not be resumed, or compared with new ones. A new digest here is a changed experiment."""
    assert load_config(QUICKSTART.parent / f"{name}.toml").digest == DIGESTS[name]


def test_a_server_optimiser_is_a_part_of_the_experiment_and_none_is_none():
    plain, adam = load_config(QUICKSTART), load_config(QUICKSTART, ["server.optimizer=adam"])
    assert "server" not in plain.tables
    assert plain.method == adam.method.client_part
    assert adam.method == optimized(plain.method, Adam())
    assert adam.tables["server"] == {"optimizer": "adam", **dataclasses.asdict(Adam())}
    assert adam.method_name == plain.method_name == "alpha-normec"
    assert parse_config(adam.tables) == adam
    changed = load_config(QUICKSTART, ["server.optimizer=adam", "server.tau=0.1"])
    assert len({plain.digest, adam.digest, changed.digest}) == 3
    assert load_config(QUICKSTART, ["server.optimizer=adam", "server.beta1=0.9"]).digest == adam.digest


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_server_optimiser_costs_no_privacy(name: str):
    for trust in ("central", "local"):
        settings = [f"privacy.trust={trust}", "privacy.adjacency=", "training.rounds=10"]
        plain, with_it = (load_config(QUICKSTART, [*settings, *s]) for s in ([], [f"server.optimizer={name}"]))
        plans = [config.plan(config.cohort.of(100)) for config in (plain, with_it)]
        assert plans[0] == plans[1]
        assert plans[0] is not None
        assert plans[0].epsilon <= 8.0


@pytest.mark.parametrize("kind", ["gradient-sum", "gradient-mean"])
def test_fed_alpha_normec_takes_gradients_and_no_bare_moves(kind: str):
    steps = [
        "method=",
        "method.name=fed-alpha-normec",
        "local.work=local-steps",
        "local.steps=2",
        "local.client_lr=0.1",
    ]
    with pytest.raises(UserError, match=r"^local\.signal: expected .*fed-alpha-normec, which divides by client_lr"):
        load_config(QUICKSTART, steps)
    config = load_config(QUICKSTART, [*steps, f"local.signal={kind}"])
    assert config.tables["local"]["signal"] == kind
    assert parse_config(config.tables) == config
    load_config(QUICKSTART, steps[:2])
    load_config(QUICKSTART, steps[2:])


def test_dp_scaffold_takes_mean_gradients_of_local_steps_or_one_gradient_and_no_clock():
    scaffold = ["method=", "method.name=dp-scaffold"]
    steps = [*scaffold, "local.work=local-steps", "local.steps=2", "local.client_lr=0.1"]
    for kind in ("pseudo-gradient", "gradient-sum"):
        with pytest.raises(UserError, match=r'^local\.signal: expected "gradient-mean" with dp-scaffold'):
            load_config(QUICKSTART, [*steps, f"local.signal={kind}"])
    load_config(QUICKSTART, [*steps, "local.signal=gradient-mean"])
    load_config(QUICKSTART, scaffold)
    with pytest.raises(UserError, match=r"^\[devices\]: expected no such table with dp-scaffold"):
        load_config(QUICKSTART.with_name("devices-sync.toml"), scaffold)


def test_fedspeed_takes_the_moves_of_local_steps():
    speed = ["method=", "method.name=fedspeed"]
    steps = [*speed, "local.work=local-steps", "local.steps=2", "local.client_lr=0.1"]
    for kind in ("gradient-mean", "gradient-sum"):
        with pytest.raises(UserError, match=r'^local\.signal: expected "pseudo-gradient" with fedspeed'):
            load_config(QUICKSTART, [*steps, f"local.signal={kind}"])
    with pytest.raises(UserError, match=r"^local\.work: expected local steps with fedspeed, got 'full-gradient'"):
        load_config(QUICKSTART, speed)
    load_config(QUICKSTART, steps)


def test_changes_of_local_steps_are_keys_that_older_configs_lack():
    steps = ["local.work=local-epochs", "local.epochs=2", "local.client_lr=0.1"]
    plain = load_config(QUICKSTART, steps)
    assert set(plain.tables["local"]) == {"work", "epochs", "client_lr", "order", "signal"}
    for setting in ("local.prox=0.1", "local.ascent=0.1", "local.order=by-loss"):
        changed = load_config(QUICKSTART, [*steps, setting])
        assert changed.digest != plain.digest
        assert parse_config(changed.tables) == changed
    assert load_config(QUICKSTART, [*steps, "local.prox=0.0", "local.ascent=0.0"]).digest == plain.digest


@pytest.mark.parametrize("name", ["by-loss", "power-of-choice"])
def test_choosing_clients_by_their_loss_is_refused_with_the_reason(name: str):
    with pytest.raises(UserError, match=r"^cohort\.sampling: expected a draw that depends on no data: .*losses"):
        load_config(QUICKSTART, [f"cohort.sampling={name}"])


def test_one_client_may_be_reset_only_where_what_it_lost_fades():
    load_config(QUICKSTART, ["method.damping=0.1", "deployment.lost_memory=reset-one"])
    with pytest.raises(UserError, match=r'^deployment\.lost_memory: .*got "reset-one"\. Choose "reset-all"'):
        load_config(QUICKSTART, ["method.damping=0", "deployment.lost_memory=reset-one"])


MISTAKES = [
    ("server.optimizer=adan", "server.optimizer", "adam"),
    ("method.beta=1e39", "method.beta", "1e+39"),
    ("method.server_lr=1e-46", "method.server_lr", "1e-20"),
    ("training.rounds=10000000000", "training.rounds", "1,000,000,000"),
    ("server.beta1=0.5", "server.optimizer", "Add optimizer to [server]"),
    ("method.bta=1", "method.bta", "beta"),
    ("method.name=alpha-normek", "method.name", "alpha-normec"),
    ("data.name=digit", "data.name", "digits"),
    ("data.partition=dirichlett", "data.partition", "dirichlet"),
    ("data.concentraton=1", "data.concentraton", "concentration"),
    ("data.clients=0", "data.clients", "at least 1"),
    ("data.clients=2.5", "data.clients", "whole number"),
    ("data.concentration=-1", "data.concentration", "-1"),
    ("model.name=softmx", "model.name", "softmax"),
    ("local.work=full-gradients", "local.work", "full-gradient"),
    ("local.work=minibatch-gradient", "local.batch_size", "Add batch_size"),
    ("cohort.sampling=poison", "cohort.sampling", "poisson"),
    ("cohort.size=3", "cohort.size", "unknown"),
    ("cohort.sampling=fixed", "cohort.size", "Add size"),
    ("privacy.epsilom=3", "privacy.epsilom", "epsilon"),
    ("privacy.trust=centrall", "privacy.trust", "central"),
    ("privacy.epsilon=nan", "privacy.epsilon", "nan"),
    ("privacy.epsilon=inf", "privacy.epsilon", "inf"),
    ("privacy.epsilon=-1", "privacy.epsilon", "-1"),
    ("privacy.delta=0", "privacy.delta", "0"),
    ("privacy.delta=1.5", "privacy.delta", "1.5"),
    ("privacy.noise_multiplier=1", "privacy", "noise_multiplier"),
    ("privacy.unit=examples", "privacy.unit", "example"),
    ("privacy.trust=aggregator", "privacy.trust", "central"),
    ("training.rounds=-1", "training.rounds", "-1"),
    ("training.rounds=many", "training.rounds", "many"),
    ("training.evaluate_every=0", "training.evaluate_every", "0"),
    ("trainning.rounds=1", "trainning", "training"),
    ("method.alpha=0", "method.alpha", "0"),
    ("method.beta=true", "method.beta", "True"),
    ("method.damping=1.0", "method.damping", "1.0"),
    ("method.memory=sentt", "method.memory", "sent"),
    ("seed=-1", "seed", "-1"),
    ("seed=x", "seed", "whole number"),
    ("name=a/b", "name", "a/b"),
    ("training=3", "training", "table"),
    ("training.=3", "-s training.=3", "table.key=value"),
    ("rounds", "-s rounds", "table.key=value"),
    ("training.rounds.most=3", "training.rounds.most", "Use -s training.rounds=value"),
    ("data.numeric.age=3", "data.numeric", "unknown"),
    ("analysys.sex.kind=labels", "analysys", "Did you mean 'analysis'"),
]


def test_a_setting_reaches_a_table_within_a_table_and_leaves_the_original() -> None:
    tables = {"analysis": {"age": {"kind": "moments", "low": 0}}, "name": "a"}
    changed = apply_settings(tables, ["analysis.age.low=5", "analysis.age.kind=", "analysis.sex.kind=labels"])
    assert changed == {"analysis": {"age": {"low": 5}, "sex": {"kind": "labels"}}, "name": "a"}
    assert tables == {"analysis": {"age": {"kind": "moments", "low": 0}}, "name": "a"}


def plan_of(setting: str) -> None:
    config = load_config(QUICKSTART, [setting])
    config.plan(config.cohort.of(config.data.clients or 1))


@pytest.mark.parametrize(("setting", "where", "says"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(setting: str, where: str, says: str):
    with pytest.raises(UserError) as caught:
        plan_of(setting)
    line = str(caught.value)
    assert where in line
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            "privacy.trust=locall",
            "expected a known name, got 'locall'. Did you mean 'local'? Known: aggregator, central, local.",
        ),
        ("privacy.trust=3", "expected a quoted string, got 3. Change privacy.trust."),
        (
            "privacy.adjacency=replce",
            "expected a known name, got 'replce'. Did you mean 'replace'? Known: add-or-remove, replace.",
        ),
        ("privacy.adjacency=true", "expected a quoted string, got True. Change privacy.adjacency."),
        (
            "privacy.unit=examples",
            "expected a known name, got 'examples'. Did you mean 'example'? Known: client, example.",
        ),
    ],
)
def test_a_closed_word_suggests_the_nearest_before_any_data_are_read(setting: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [setting])
    assert str(caught.value) == f"{setting.partition('=')[0]}: {line}"


@pytest.mark.parametrize("table", ["data", "model", "method", "training"])
def test_a_missing_table_is_named(table: str):
    tables = {key: value for key, value in load_config(QUICKSTART).tables.items() if key != table}
    with pytest.raises(UserError, match=rf"\[{table}\]"):
        parse_config(tables)


def test_an_empty_value_removes_a_key_and_a_table():
    config = load_config(QUICKSTART, ["privacy.epsilon=", "privacy.noise_multiplier=1.5"])
    plan = config.plan(config.cohort.of(100))
    assert plan is not None
    assert plan.noise_multiplier == 1.5
    assert load_config(QUICKSTART, ["privacy="]).privacy is None


def test_a_broken_file_is_one_line(tmp_path: Path):
    for name, content in (("broken.toml", b"a = ["), ("bytes.toml", b"\xff\xfe")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_config(path)
    with pytest.raises(UserError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(UserError):
        load_config(tmp_path)


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path):
    tables = read_tables(path, ())
    if asks_heavy_hitters(tables):
        HeavyAnalysis(tables)  # one config for each level
        return
    config = load_config(path)
    if config.data.clients is not None:
        config.plan(sampling_of(config), size=1000)


def test_old_words_are_read_and_leave_an_experiment_as_it_was() -> None:
    """The digest is that of `signal = "move"`, as older versions wrote it, and so is the noise."""
    epochs = ["local.work=local-epochs", "local.epochs=1", "local.client_lr=0.1"]
    old = load_config(QUICKSTART, [*epochs, "local.signal=move", "deployment.lost_memory=re-base"])
    new = load_config(QUICKSTART, [*epochs, "local.signal=pseudo-gradient", "deployment.lost_memory=reset-all"])
    assert old.tables == new.tables
    assert (old.digest, old.noise_id) == (new.digest, new.noise_id)
    assert old.tables["local"]["signal"] == "pseudo-gradient"
    written = {**old.tables, "local": {**old.tables["local"], "signal": "move"}}
    del written["deployment"]
    assert old.digest == hashlib.sha256(json.dumps(written, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
