"""Heavy hitters as an analysis: level by level, the candidates of the next question follow from released answers.

With trust local, every client sends one randomized report, in a simulation in this process (`analytics.heavy.local`).
With trust central or aggregator, each level is an ordinary analysis of one round about `prefixes`, in another
run directory. All clients take part in all levels, and the levels are together one Gaussian mechanism: each has the
noise of a single round times the root of the number of levels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import tomli_w

from fedpriv.analytics.heavy.local import NO_ITEM, ask_users
from fedpriv.analytics.heavy.oracles import MAX_EPSILON
from fedpriv.analytics.heavy.prefixes import encoded, written
from fedpriv.analytics.heavy.tree import Estimates, HeavyHitters, Tally, answer_of
from fedpriv.checks import is_real
from fedpriv.data.federation import Holders
from fedpriv.data.text.words import Words
from fedpriv.engines.ray import one_ray
from fedpriv.errors import UserError
from fedpriv.experiment.analyses.answers_file import ANALYSIS_FILE
from fedpriv.experiment.analyses.clients import clients_of
from fedpriv.experiment.build import make_federation, plan_of, sampling_of
from fedpriv.experiment.config import Config, digest_of_tables, load_config
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.schema import field_names, read_table, refuse_unknown, write_table
from fedpriv.privacy import PrivacyPlan, Simulated, privacy_statement
from fedpriv.privacy.reports import LocalReports, reports_statement
from fedpriv.streams import Purpose, SeededStreams
from fedpriv.tables import Record, Table

__all__ = ["HeavyAnalysis", "RunLevel", "asks_heavy_hitters", "levels_folder"]

RunLevel = Callable[[Config, Path], Record | None]
"""Runs the analysis of one level in its run directory; returns None if that is on another machine."""

_LOCAL_ONLY = ("oracle", "parties", "shared", "prune")


def asks_heavy_hitters(tables: Table) -> bool:
    """Return True if one of the queries of a config asks for heavy hitters."""
    asked = tables.get("analysis")
    queries = asked.values() if isinstance(asked, Mapping) else ()
    return any(isinstance(query, Mapping) and query.get("kind") == HeavyHitters.kind for query in queries)


def levels_folder(directory: Path, level: int) -> Path:
    """Return the run directory of a level, from 0."""
    return directory / f"level-{level + 1}"


class HeavyAnalysis:
    """An analysis that asks for heavy hitters.

    Args:
        tables: The config, with settings applied.

    Raises:
        UserError: If a value is wrong, or the query does not go with the rest of the config.
    """

    def __init__(self, tables: Table) -> None:
        self._tables = tables
        self.asked, self._records = _read(cast(Table, tables["analysis"]))
        self.local = self._privacy.get("trust") == "local"
        first = [written(int(prefix), self.asked.lengths[0]) for prefix in self.asked.candidates(0)]
        self._first = self._level(first)
        self._check()

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._first.name

    @property
    def _privacy(self) -> Table:
        given = self._tables.get("privacy", {})
        return cast(Table, given) if isinstance(given, Mapping) else {}

    def _level(self, prefixes: list[str], **privacy: object) -> Config:
        """Return the config of one level; `privacy` replaces keys of `[privacy]`, and None removes them."""
        query = {"kind": "prefixes", "prefixes": prefixes}
        analysis = {self.asked.name: query, **({} if self._records is None else {"records": self._records})}
        made: dict[str, object] = {**self._tables, "analysis": analysis}
        if "privacy" in made:
            changed = {**self._privacy, **privacy}
            made["privacy"] = {key: value for key, value in changed.items() if value is not None}
        return load_config(made)

    def _check(self) -> None:
        """Raise UserError unless the rest of the config suits the query."""
        if not isinstance(self._first.data.dataset, Words):
            remedy = 'Set data.name = "words"'
            raise UserError(self.asked.key("kind"), 'words, as data.name = "words" has', "data of another kind", remedy)
        if self._first.cohort.sampling != "everyone":
            expected = '"everyone" with heavy hitters: no sampling is credited over their levels'
            raise UserError("cohort.sampling", expected, f'"{self._first.cohort.sampling}"', "Remove [cohort]")
        if not self.local:
            given = cast(Table, cast(Table, self._tables["analysis"])[self.asked.name])
            for key in _LOCAL_ONLY:
                if key in given:
                    remedy = 'Remove it, or set privacy.trust = "local"'
                    expected = 'no such key unless privacy.trust = "local"'
                    raise UserError(self.asked.key(key), expected, repr(given[key]), remedy)
            return
        self._check_local()

    def _check_local(self) -> None:
        if self._records is not None:
            expected = 'no such key with privacy.trust = "local": a client reports one of its words'
            raise UserError("analysis.records", expected, self._records, "Remove it")
        for key, reason in (
            ("delta", "randomized reports have delta = 0"),
            ("noise_multiplier", "randomized reports have an epsilon"),
        ):
            if key in self._privacy:
                remedy = "Remove it" if key == "delta" else "Set privacy.epsilon"
                raise UserError(f"privacy.{key}", f"no such key here: {reason}", self._privacy[key], remedy)
        for key, only in (("unit", "client"), ("adjacency", "replace")):
            if self._privacy.get(key, only) != only:
                expected = f'"{only}" with randomized reports, which hide all data of a client but not its presence'
                raise UserError(f"privacy.{key}", expected, repr(self._privacy[key]), f"Set it to {only}")

    def promise(self, data_root: Path | None = None) -> tuple[dict[str, object], str]:
        """Return the promise of all levels together for JSON, and the statement."""
        if self.local:
            reports = self._reports(sampling_of(self._first, data_root).population)
            return reports.as_dict(), reports_statement(reports, self.asked.about)
        return self._together(self._plan(data_root))

    def _reports(self, clients: int) -> LocalReports:
        epsilon = self._privacy.get("epsilon")
        if not is_real(epsilon, 1e-6, MAX_EPSILON):
            expected = f"from 1e-6 to {MAX_EPSILON:g} for randomized reports"
            raise UserError("privacy.epsilon", expected, epsilon, "Change it")
        return LocalReports(epsilon=float(cast(float, epsilon)), clients=clients, oracle=self.asked.oracle)

    def _plan(self, data_root: Path | None) -> PrivacyPlan | None:
        """Return the plan of all levels: as many rounds, each with the noise of one round times their root.

        So mu of all levels is that of a single round; None without `[privacy]`.
        """
        plan, levels = plan_of(self._first, sampling_of(self._first, data_root), data_root), len(self.asked.steps)
        if plan is None:
            return None
        return replace(plan, rounds=levels, noise_multiplier=plan.noise_multiplier * math.sqrt(levels))

    def _with_noise(self, prefixes: list[str], plan: PrivacyPlan | None, level: int, before: float) -> Config:
        """Return the config of a level, which records mu of the levels before it."""
        if plan is None:
            return self._level(prefixes)
        names = [f"level {number + 1} of {self.name}" for number in range(level)]
        spent = {"analyses": names, "analyses_mu": before} if level and before > 0.0 else {}
        return self._level(prefixes, epsilon=None, noise_multiplier=plan.noise_multiplier, **spent)

    def _together(self, plan: PrivacyPlan | None) -> tuple[dict[str, object], str]:
        facts = replace(self._first.facts, asked=(self.asked.about,))
        statement = privacy_statement(
            plan, method="an analysis", randomness="seeded", simulated=Simulated(), data=facts
        )
        absent: dict[str, object] = {"private": False, "epsilon": None, "delta": None}
        return absent if plan is None else plan.as_dict(), statement

    def run(
        self, out: Path, run_level: RunLevel, *, data_root: Path | None = None, resume: bool = False
    ) -> dict[str, object]:
        """Ask all levels, write the answers, and return them.

        Args:
            out: The run directory.
            run_level: Runs the analysis of a level; not used with trust local.
            data_root: The folder of the data sets; None uses the environment's setting.
            resume: Resume, or return the answers of a finished analysis.
        """
        with one_ray():
            return (self._run_reports if self.local else self._run_levels)(out, run_level, data_root, resume)

    def _run_reports(self, out: Path, run_level: RunLevel, data_root: Path | None, resume: bool) -> dict[str, object]:
        directory = RunDirectory(out)
        tables = self._local_tables()
        digest = digest_of_tables(tables)
        with directory.locked():
            done = directory.claim(tomli_w.dumps(tables), digest, resume=resume)
            if done is not None:
                return directory.read_json(ANALYSIS_FILE)
            federation = make_federation(self._first, data_root)
            streams = SeededStreams(self._first.seed, noise_id=digest)
            items = drawn_words(federation, self.asked.length, streams)
            reports = self._reports(federation.population)
            directory.write_json("privacy.json", reports.as_dict())
            directory.write_text("privacy.txt", reports_statement(reports, self.asked.about))
            answer = ask_users(self.asked, items, reports.epsilon, streams)
            cost = {"share": 1.0, "epsilon_alone": reports.epsilon, "extended": answer.kept}
            found = self._answers(reports.as_dict(), federation.population, answer_of(self.asked, answer.found), cost)
            found["digest"] = digest
            directory.write_json(ANALYSIS_FILE, found)
            directory.write_json("summary.json", {"name": self.name, "digest": digest, "epsilon": reports.epsilon})
        return found

    def _local_tables(self) -> dict[str, object]:
        """Return the resolved tables of an analysis with randomized reports."""
        resolved = self._first.tables
        analysis = {self.asked.name: {"kind": self.asked.kind, **write_table(self.asked, ("name",))}}
        kept: dict[str, object] = {key: resolved[key] for key in ("name", "seed", "data", "cohort") if key in resolved}
        promise = {"trust": "local", "epsilon": self._privacy["epsilon"], "adjacency": "replace", "unit": "client"}
        return {**kept, "analysis": analysis, "privacy": promise, "training": {"rounds": 1}}

    def _run_levels(self, out: Path, run_level: RunLevel, data_root: Path | None, resume: bool) -> dict[str, object]:
        _refuse_other(out, resume=resume)
        plan, tally = self._plan(data_root), Tally(self.asked)
        kept, spent, last, extended = None, 0.0, dict[str, object](), list[int]()
        for level, letters in enumerate(self.asked.lengths):
            candidates = self.asked.candidates(level, kept)
            config = self._with_noise([written(prefix, letters) for prefix in candidates.tolist()], plan, level, spent)
            found = run_level(config, levels_folder(out, level))
            if found is None:
                expected = "answers on this machine, as each level asks about those of the last one"
                raise UserError(self.asked.key("kind"), expected, "a server elsewhere", "Run it in simulation")
            last, answer = found, cast(Mapping[str, object], found["answers"][self.asked.name])
            shares = np.array(cast(list[float], answer["value"]))
            estimates = Estimates(candidates, shares, cast(float, answer["standard_error"]))
            tally.add(level, estimates)
            kept = self.asked.extended(estimates)
            extended.append(len(kept))
            spent = cast(float, found["mu"] or 0.0)
        promise, statement = self._together(plan)
        cost = {"share": 1.0, "epsilon_alone": promise["epsilon"], "extended": extended}
        top = answer_of(self.asked, tally.all()[: self.asked.top])
        answers = self._answers({**last, **promise}, cast(int, last["clients"]), top, cost)
        answers["mu"] = spent or None
        directory = RunDirectory(out)
        for name, content in (("privacy.json", promise), (ANALYSIS_FILE, answers)):
            directory.write_json(name, content)
        directory.write_text("privacy.txt", statement)
        return answers

    def _answers(self, promise: Table, clients: int, answer: Table, cost: Table) -> dict[str, object]:
        """Return the content of `analysis.json`; see `answers_of` of other analyses."""
        keys = ("private", "epsilon", "delta", "adversary", "unit", "trust", "adjacency", "colluders", "helpers")
        weight = "every client counts as one" if self._records is None else "records"
        return {
            "name": self.name,
            "clients": clients,
            "clients_of": clients_of(self._first.tables),
            "weight": weight,
            "records": self._records,
            **{key: promise.get(key) for key in keys},
            "mu": None,
            "analyses": None,
            "answers": {self.asked.name: {"kind": self.asked.kind, **answer, **cost}},
        }


def _refuse_other(out: Path, *, resume: bool) -> None:
    """Raise UserError if the folder of all levels holds a run, or an analysis that `resume` does not continue."""
    if RunDirectory(out).file("config.toml").exists():
        raise UserError(str(out), "a folder without a run", "a folder with one", "Choose another --out")
    if levels_folder(out, 0).exists() and not resume:
        remedy = "Add --resume (in Python, resume=True) to continue it, or choose another --out"
        raise UserError(str(out), "a folder without a run", "an analysis, started or finished", remedy)


def drawn_words(federation: Holders, length: int, streams: SeededStreams) -> np.ndarray:
    """Return one word of each client, drawn with equal probabilities, as prefixes of some length; int64 `[clients]`.

    A client without words has `NO_ITEM`.
    """
    symbols = federation.dataset.train_inputs[:, :length].numpy()
    places = streams.source(Purpose.CLIENT_NOISE).uniform(federation.population)
    found = np.full(federation.population, NO_ITEM, dtype=np.int64)
    rows, clients = list[int](), list[int]()
    for client, place in enumerate(places):
        held = federation.rows_of(client)
        if len(held):
            rows.append(int(held[min(int(place * len(held)), len(held) - 1)]))
            clients.append(client)
    found[clients] = encoded(symbols[rows])
    return found


def _read(analysis: Table) -> tuple[HeavyHitters, int | None]:
    """Return the only query of a table `[analysis]`, and its key `records`."""
    queries = {name: table for name, table in analysis.items() if isinstance(table, Mapping)}
    if len(queries) > 1:
        expected, got = "heavy hitters alone, or other queries", f"{len(queries)} queries"
        raise UserError("[analysis]", expected, got, "Ask for heavy hitters in a separate config")
    ((name, table),) = queries.items()
    others = {key: value for key, value in analysis.items() if key not in (name, "records")}
    refuse_unknown(others, [], "analysis")
    options = {key: value for key, value in table.items() if key != "kind"}
    refuse_unknown(options, field_names(HeavyHitters, ("name",)), f"analysis.{name}")
    records = analysis.get("records")
    return read_table(HeavyHitters, options, f"analysis.{name}", name=str(name)), cast("int | None", records)
