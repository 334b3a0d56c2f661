"""Heavy hitters: trees, one report of each user, levels as one Gaussian mechanism, and configs."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tomli_w
import torch
from support.said import SAID, said_tables, write_said

from fedpriv.analytics.heavy import OUE, local
from fedpriv.analytics.heavy.local import NO_ITEM, ask_users, levels_of_users
from fedpriv.analytics.heavy.prefixes import children, encoded, is_whole, of_length, read, written
from fedpriv.analytics.heavy.scores import f1_score, normalized_cumulative_rank, true_items
from fedpriv.analytics.heavy.tree import Estimates, HeavyHitters, Tally
from fedpriv.analytics.queries import Prefixes
from fedpriv.cli import main
from fedpriv.data.text.words import Words, symbols_of
from fedpriv.errors import UserError
from fedpriv.experiment.analyses.heavy import HeavyAnalysis, drawn_words
from fedpriv.experiment.build import make_federation
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.run import run_experiment
from fedpriv.privacy.gaussian import gaussian_epsilon
from fedpriv.report.spent import spent_below
from fedpriv.streams import Purpose, SeededStreams

CLIENTS = 40
ASKED = HeavyHitters(top=2, length=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_said(tmp_path_factory.mktemp("words"), CLIENTS)


def tables(**change: Any) -> dict[str, Any]:
    made = said_tables(4, trust="central", epsilon=3.0, delta=1e-5)
    for key, value in change.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return {key: value for key, value in made.items() if value is not None}


def local_tables(**change: Any) -> dict[str, Any]:
    made = tables(**change)
    made["privacy"] = {"trust": "local", "epsilon": 3.0, **change.get("privacy", {})}
    return made


def ask(config: Config, out: Path, data: Path) -> dict[str, Any]:
    run_experiment(config, out, engine="loop", data_root=data)
    return json.loads((out / "analysis.json").read_text())


def run(made: dict[str, Any], out: Path, data: Path, **options: Any) -> dict[str, Any]:
    return HeavyAnalysis(made).run(out, lambda config, at: ask(config, at, data), data_root=data, **options)


def items_of(*words: str, length: int = 4) -> np.ndarray:
    return encoded(symbols_of(words)[:, :length])


def test_prefixes_are_written_and_read_and_divide_all_words() -> None:
    words = ["the", "then", "there", "a", "can't", "zzzzzz"]
    items = items_of(*words)
    assert [written(int(item), 4) for item in items] == ["the$", "then", "ther", "a$", "can'", "zzzz"]
    np.testing.assert_array_equal(read([written(int(item), 4) for item in items], 4), items)
    assert is_whole(items).tolist() == [True, False, False, True, False, False]
    level = ASKED.candidates(0)
    assert len(level) == 27 * 28
    assert np.isin(of_length(items, 4, 2), level).all()
    below = children(level, 2)
    assert (np.diff(below) > 0).all()
    assert np.isin(items, below).all()
    assert len(children(read(["a$"], 2), 1)) == 1


@pytest.mark.parametrize("prefixes", [["th", "the"], ["th", "th"], ["t$h"], ["TH"], [""], ["$"], [], ["a" * 13]])
def test_prefixes_of_other_forms_are_refused(prefixes: list[str]) -> None:
    with pytest.raises(UserError, match=r"analysis\.p\.prefixes: expected different prefixes of one length"):
        Prefixes(name="p", prefixes=tuple(prefixes))


def test_a_word_is_in_at_most_one_prefix_whatever_the_inputs_are() -> None:
    query = Prefixes(name="p", prefixes=("the$", "then", "a$", "zzzz"))
    inputs = torch.as_tensor(symbols_of(["the", "then", "thenc", "a", "an", "zzzzz"])).float()
    wild = torch.tensor([[1e30] * 12, [math.nan] * 12, [-5.0] * 12, [27.9] * 12])
    found = query.entries(torch.cat([inputs, wild]))
    phi = torch.zeros(10, 4).scatter_add_(1, found.places, found.values)
    assert phi[:6].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0] * 4, [0, 0, 0, 1]]
    assert float(phi.norm(dim=1).max()) == 1.0


def test_every_user_reports_exactly_once() -> None:
    items = np.concatenate([items_of(*SAID[0].split()).repeat(40), np.full(13, NO_ITEM)])
    for keys in ({}, {"parties": 3, "shared": 1}, {"parties": 3, "prune": True, "oracle": "k-rr"}):
        answer = ask_users(HeavyHitters(top=2, length=4, **keys), items, 1.0, SeededStreams(2))  # type: ignore[arg-type]
        assert set(answer.reports) == {1}


class Recorder(OUE):
    """An oracle that records what it is asked."""

    seen: ClassVar[list[Any]] = []

    def reports(self, values: np.ndarray, source: Any) -> np.ndarray:
        found = super().reports(values, source)
        self.seen.append((self.size, values.copy(), found.copy()))
        return found


@pytest.mark.parametrize("keys", [{}, {"parties": 2, "shared": 1, "prune": True}], ids=str)
def test_what_a_user_is_asked_depends_on_the_reports_of_others_alone(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another item of one user changes one value in one question, and no question or report before it."""
    monkeypatch.setitem(local.ORACLES, "oue", Recorder)
    asked, items, visible = HeavyHitters(top=2, length=4, **keys), items_of(*(["the", "of", "a", "cat"] * 30)), 0
    before = asked_of(asked, items, monkeypatch)
    for changed in range(0, 120, 9):
        held = items.copy()
        held[changed] = items_of("zebra")[0]
        visible += changes_one_answer(before, asked_of(asked, held, monkeypatch))
    assert visible > 3


def asked_of(asked: HeavyHitters, items: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(Recorder, "seen", [])
    ask_users(asked, items, 2.0, SeededStreams(9))
    return Recorder.seen


def changes_one_answer(before: list[Any], after: list[Any]) -> bool:
    """Assert that two walks are the same up to one answer; return False if no answer differs."""
    pairs = list(zip(before, after, strict=True))
    differing = [not np.array_equal(ours[1], theirs[1]) or ours[0] != theirs[0] for ours, theirs in pairs]
    if not any(differing):
        return False
    first = differing.index(True)
    for (size, _, reports), (other_size, _, others) in pairs[:first]:
        assert size == other_size
        np.testing.assert_array_equal(reports, others)
    (size, ours, _), (other_size, theirs, _) = pairs[first]
    assert size == other_size  # the candidates follow from the reports before
    assert (ours != theirs).sum() == 1
    assert all(len(one[1]) == len(two[1]) for one, two in pairs[first + 1 :])  # the same users, all of them others
    return True


def test_levels_are_dealt_evenly_and_without_a_look_at_the_data() -> None:
    parties = np.repeat([0, 1], [10, 7])
    found = levels_of_users(parties, 3, SeededStreams(1).source(Purpose.GROUP))
    assert np.bincount(found[:10]).tolist() == [4, 3, 3]
    assert np.bincount(found[10:]).tolist() == [3, 2, 2]
    with pytest.raises(UserError, match="at least 3 clients in each party"):
        ask_users(ASKED, items_of("a", "b"), 1.0, SeededStreams(1))


@pytest.mark.parametrize("oracle", ["k-rr", "oue", "olh"])
def test_clear_words_are_found_by_every_oracle(oracle: str) -> None:
    items = items_of(*(["the"] * 500 + ["cat's"] * 300 + ["of"] * 200))
    asked = HeavyHitters(top=3, length=4, oracle=oracle)
    answer = ask_users(asked, items, 10.0, SeededStreams(3))
    assert [written(one.item, 4) for one in answer.found] == ["the$", "cat'", "of$"]
    for one, share in zip(answer.found, (0.5, 0.3, 0.2), strict=True):
        assert abs(one.share - share) < 6.0 * one.stddev + 0.1


def test_parties_that_prune_ask_about_fewer_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(local.ORACLES, "oue", Recorder)
    items, sizes = items_of(*(["the", "of"] * 150)), {}
    for prune in (False, True):
        monkeypatch.setattr(Recorder, "seen", [])
        ask_users(HeavyHitters(top=2, length=4, parties=2, prune=prune), items, 6.0, SeededStreams(9))
        sizes[prune] = [size for size, _, _ in Recorder.seen]
    assert sizes[True][0] == sizes[False][0] == 27 * 28 + 1
    assert sizes[True][1] < sizes[False][1] / 2


def test_the_extension_follows_the_noise() -> None:
    prefixes, shares = np.arange(10), np.array([0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01, 0.0, 0.0, -0.1])
    kept = {stddev: len(ASKED.extended(Estimates(prefixes, shares, stddev))) for stddev in (0.001, 0.04, 0.2, 1.0)}
    assert kept == {0.001: 7, 0.04: 5, 0.2: 2, 1.0: 2}
    fixed = HeavyHitters(top=2, length=4, extension="fixed")
    assert fixed.extended(Estimates(prefixes, shares, 1.0)).tolist() == [0, 1, 2, 3]


def test_words_that_end_early_are_averaged_over_levels_by_their_variances() -> None:
    tally, whole, other = Tally(ASKED), read(["a$"], 2), read(["th"], 2)
    tally.add(0, Estimates(np.concatenate([whole, other]), np.array([0.4, 0.9]), 0.2))
    tally.add(1, Estimates(read(["a$", "the"], 3), np.array([0.1, 0.8]), 0.1))
    tally.add(2, Estimates(read(["a$", "ther"], 4), np.array([0.3, 0.7]), 0.1))
    (first, second) = tally.all()
    assert (written(first.item, 4), first.share) == ("ther", pytest.approx(0.7))
    assert second.share == pytest.approx((0.4 * 25 + 0.1 * 100 + 0.3 * 100) / 225)
    assert second.stddev == pytest.approx(math.sqrt(1 / 225))


def test_scores_by_hand() -> None:
    assert f1_score([1, 2, 9], [1, 2, 3]) == pytest.approx(2.0 / 3.0)
    assert normalized_cumulative_rank([2, 9, 1], [1, 2, 3]) == pytest.approx((3 + 2) / 6)
    items, owners = np.array([5, 5, 7, 7, 7, 7, 8]), np.array([0, 0, 1, 1, 1, 2, 2])
    assert true_items(items, owners, 4, 2) == [7, 5]  # shares 1.5 and 1, although 8 has half a client


# Configs.


def test_the_words_of_a_table_are_read_and_one_is_drawn_of_each_client(data: Path) -> None:
    found = Words(file="said.csv", client="who").load(data)
    assert found.natural_population == CLIENTS
    config = load_config(tables(analysis={"frequent": {"kind": "prefixes", "prefixes": ["th"]}}))
    federation = make_federation(config, data)
    drawn = drawn_words(federation, 4, SeededStreams(1))
    for client, item in enumerate(drawn.tolist()):
        own = SAID[client % len(SAID)].split()
        assert item in (items_of(*own).tolist() if own else [NO_ITEM])
    assert len(set(drawn[::6].tolist())) == 2  # "the" and "a"


@pytest.mark.parametrize(
    ("adjacency", "given"),
    [
        ("add-or-remove", {"epsilon": 3.0}),
        ("replace", {"noise_multiplier": 2.0}),
        ("replace", {"unit": "example", "epsilon": 3.0}),
        pytest.param("add-or-remove", {"unit": "example", "epsilon": 3.0}, marks=pytest.mark.slow),
    ],
)
def test_levels_are_together_one_gaussian_of_the_target(
    adjacency: str, given: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    made = tables(privacy={"adjacency": adjacency})
    made["privacy"].pop("epsilon")
    made["privacy"] |= given
    made["analysis"] = {**made["analysis"], **({"records": 3} if given.get("unit") else {})}
    found = run(made, tmp_path / "out", data)
    wanted = given.get("epsilon", gaussian_epsilon(0.5, 1e-5))
    assert found["epsilon"] == pytest.approx(wanted, rel=0.01)
    assert found["epsilon"] <= wanted * (1 + 1e-9)
    assert gaussian_epsilon(found["mu"], 1e-5) == pytest.approx(found["epsilon"], rel=1e-6)
    assert HeavyAnalysis(made).promise(data)[0]["epsilon"] == found["epsilon"]
    levels = [json.loads((tmp_path / "out" / f"level-{n}" / "privacy.json").read_text()) for n in (1, 2, 3)]
    assert math.fsum(level["gaussian_dp_mu"] ** 2 for level in levels) == pytest.approx(found["mu"] ** 2)
    assert levels[2]["with_analyses"]["epsilon"] == pytest.approx(found["epsilon"], rel=1e-6)
    (group,) = spent_below(tmp_path / "out")
    assert group.total.epsilon == pytest.approx(found["epsilon"], rel=1e-6)


def test_without_noise_the_true_words_are_found_and_nothing_is_promised(data: Path, tmp_path: Path) -> None:
    found = run(tables(privacy=None), tmp_path, data)
    assert found["private"] is False
    assert found["answers"]["frequent"]["items"] == ["the", "cat'"]
    assert found["answers"]["frequent"]["cut"] == [False, True]
    held = [SAID[client % len(SAID)].split() for client in range(CLIENTS)]
    shares = [sum(words.count(word) / len(words) for words in held if words) / CLIENTS for word in ("the", "cat's")]
    assert found["answers"]["frequent"]["value"] == pytest.approx(shares, abs=1e-6)


def test_the_folder_of_levels_is_refused_like_that_of_a_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "words"
    found = run(tables(), out, data)
    with pytest.raises(
        UserError, match=rf"{out}: expected a folder without a run, .*started or finished\. Add --resume"
    ):
        run(tables(), out, data)
    level = out / "level-1"
    promise = (level / "privacy.json").read_bytes()
    with pytest.raises(UserError, match="level-1: expected a folder without a run, got a folder with one"):
        run(tables(), level, data)
    assert (level / "privacy.json").read_bytes() == promise
    again = HeavyAnalysis(tables()).run(
        out, lambda _, at: json.loads((at / "analysis.json").read_text()), data_root=data, resume=True
    )
    assert again == found


@pytest.mark.parametrize("fails", [False, True])
def test_ray_starts_once_for_all_levels_and_ends(
    fails: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, cluster = pytest.importorskip("ray"), pytest.importorskip("fedpriv.engines.ray.cluster")
    happened = list[str]()
    monkeypatch.setattr(ray, "is_initialized", lambda: happened.count("start") > happened.count("end"))
    monkeypatch.setattr(ray, "init", lambda **_: happened.append("start"))
    monkeypatch.setattr(ray, "shutdown", lambda: happened.append("end"))

    def ask_on_ray(config: Config, out: Path) -> dict[str, Any]:
        connection = cluster.connect(None)
        try:
            happened.append("level")
            if fails:
                raise KeyboardInterrupt
            return ask(config, out, data)
        finally:
            connection.close()

    analysis = HeavyAnalysis(tables())
    levels = 1 if fails else len(analysis.asked.lengths)
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        analysis.run(tmp_path / "words", ask_on_ray, data_root=data)
    assert happened == ["start", *(["level"] * levels), "end"]
    cluster.connect(None).close()
    assert happened[-2:] == ["start", "end"]


def test_reports_promise_a_pure_epsilon_for_each_client(data: Path, tmp_path: Path) -> None:
    found = run(local_tables(), tmp_path / "out", data)
    promise = {key: found[key] for key in ("private", "epsilon", "delta", "unit", "trust", "adjacency")}
    assert promise == {
        "private": True,
        "epsilon": 3.0,
        "delta": 0.0,
        "unit": "client",
        "trust": "local",
        "adjacency": "replace",
    }
    assert len(found["answers"]["frequent"]["items"]) == 2
    statement = " ".join((tmp_path / "out" / "privacy.txt").read_text().split())
    assert "epsilon-differentially private with epsilon = 3 and delta = 0, for each client" in statement
    assert "sends one randomized report (oue)" in statement
    assert run(local_tables(), tmp_path / "out", data, resume=True) == found
    with pytest.raises(UserError, match="Add --resume"):
        run(local_tables(), tmp_path / "out", data)


def test_repeated_reports_and_trainings_add_up(data: Path, tmp_path: Path) -> None:
    run(local_tables(), tmp_path / "one", data)
    run(local_tables(seed=5, privacy={"epsilon": 1.0}), tmp_path / "two", data)
    (group,) = spent_below(tmp_path)
    assert (group.total.epsilon, group.total.delta, group.total.composition) == (4.0, 0.0, "basic")
    gaussian = tables(analysis={"frequent": {"kind": "prefixes", "prefixes": ["th"]}})
    gaussian["privacy"] = {"trust": "local", "epsilon": 2.0, "delta": 1e-6}
    ask(load_config(gaussian), tmp_path / "three", data)
    (group,) = spent_below(tmp_path)
    assert group.total.epsilon == pytest.approx(6.0)
    assert group.total.delta == 1e-6


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (local_tables(privacy={"delta": 1e-5}), r"privacy\.delta: .*delta = 0"),
        (local_tables(privacy={"adjacency": "add-or-remove"}), r"privacy\.adjacency: expected \"replace\""),
        (local_tables(privacy={"unit": "example"}), r"privacy\.unit: expected \"client\""),
        (local_tables(analysis={"records": 3}), r"analysis\.records: .*one of its words"),
        (local_tables(privacy={"epsilon": 40.0}), r"privacy\.epsilon: expected from 1e-6 to 30"),
        (tables(cohort={"sampling": "poisson", "probability": 0.5}), r"cohort\.sampling: expected \"everyone\""),
        (tables(data={"name": "digits", "file": None}), r"data\.file"),
        (tables(analysis={"frequent": {"kind": "heavy-hitters", "oracle": "olh"}}), r"frequent\.oracle: .*\"local\""),
        (tables(analysis={"others": {"kind": "labels"}}), r"\[analysis\]: expected heavy hitters alone"),
        (tables(analysis={"frequent": {"kind": "heavy-hitters", "tops": 3}}), r"Did you mean 'top'"),
        (tables(analysis={"frequent": {"kind": "heavy-hitters", "steps": [1, 2]}}), r"frequent\.steps: .*sum 6"),
        (tables(analysis={"frequent": {"kind": "heavy-hitters", "length": 13}}), r"frequent\.length: .*2 to 12"),
        (local_tables(analysis={"frequent": {"kind": "heavy-hitters", "oracle": "rr"}}), r"frequent\.oracle"),
        (local_tables(analysis={"frequent": {"kind": "heavy-hitters", "parties": 20}}), r"parties: .*in each party"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_a_line(made: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(made, tmp_path, data)


def test_the_commands_answer_or_refuse(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.toml").write_text(tomli_w.dumps(local_tables()))

    def command(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--data-root", str(data)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    code, said = command("analyze", "ask.toml")
    assert code == 0
    assert "epsilon     3 at delta = 0 for all answers together, replace adjacency" in said
    code, said = command("privacy", "ask.toml", "--json")
    assert json.loads(said)["mechanism"] == "randomized reports"
    for words, said in (
        (["--engine", "flower"], "auto or loop for randomized reports"),
        (["--deploy", "x"], "a simulation"),
    ):
        code, refused = command("analyze", "ask.toml", *words)
        assert (code, said in refused) == (2, True)
    for words in (["run", "ask.toml"], ["check", "ask.toml"]):
        code, said = command(*words)
        assert (code, "Use fedpriv analyze" in said) == (2, True)


@pytest.mark.parametrize("trust", ["central", "aggregator"])
def test_engines_agree_on_prefixes(trust: str, data: Path, tmp_path: Path) -> None:
    config = load_config(
        tables(
            privacy={"trust": trust}, analysis={"frequent": {"kind": "prefixes", "prefixes": ["the$", "cat'", "a$"]}}
        )
    )
    found = []
    for engine in ("loop", "vectorized"):
        run_experiment(config, tmp_path / engine, engine=engine, data_root=data)  # type: ignore[arg-type]
        found.append(json.loads((tmp_path / engine / "analysis.json").read_text())["answers"])
    assert found[0]["frequent"]["value"] == pytest.approx(found[1]["frequent"]["value"], abs=1e-6)
