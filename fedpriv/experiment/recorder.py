"""Records a run round by round, both on the engines here and on Flower."""

import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedpriv.engines import one_thread
from fedpriv.errors import has_extra
from fedpriv.experiment.analyses.answers import ANALYSIS_FILE, answers_of
from fedpriv.experiment.build import Experiment
from fedpriv.experiment.heterogeneity import measure_heterogeneity
from fedpriv.experiment.learned import warnings_of
from fedpriv.experiment.pictures.curves import plot_curves
from fedpriv.experiment.run_directory import (
    CLIENTS_FILE,
    DIAGNOSTICS_FILE,
    FACTS_FILE,
    HETEROGENEITY_FILE,
    LEDGERS_FILE,
    RunDirectory,
    model_facts,
)
from fedpriv.experiment.timing import clock_is_public, clock_row, lateness_row
from fedpriv.experiment.watching import StopRun, Watcher
from fedpriv.mechanisms.filtered import Filtered, FilterState
from fedpriv.methods import ServerState, side_values_of
from fedpriv.privacy import (
    NOT_PROMISED,
    PrivacyPlan,
    Simulated,
    privacy_statement,
    quoted,
    rounded_up,
    signal_warning,
    with_analyses,
)
from fedpriv.privacy.own_sizes import ledgers_of, of_sizes, sizes_in_words
from fedpriv.rounds import Total, begin_round, signal_to_noise
from fedpriv.streams import Randomness
from fedpriv.tables import Record, Table
from fedpriv.tasks.per_client import ClientExamples, evaluate_clients
from fedpriv.tasks.task import Forward
from fedpriv.vectors import Layout

__all__ = [
    "OLDER",
    "Recorder",
    "RunFacts",
    "diagnostics_row",
    "no_promise",
    "summary_of",
    "terms_in_words",
]

_log = logging.getLogger("fedpriv")

_OF_A_TUNING = """
One trial of a tuning

  The epsilon above is that of this one run, regardless of its result. If this run was selected from several by its
  score, the selection costs more: tuning.json of the sweep states the guarantee in that case.
"""

_SPENT = """
Spent at the end of the run

  {rounds} of at most {rounds_planned} rounds, which used epsilon = {rounded} of the budget. The promise above is the
  whole budget and does not shrink: releases decided how much of it was used.
"""

# In a checkpoint, the prefix of a model that some client still works on; its number follows.
OLDER = "model-after-"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts of a run that its summary repeats.

    Args:
        name: The run's name.
        method: The method's name.
        digest: Digest of the experiment.
        seed: The seed, or the number of a repetition.
        rounds: The planned number of rounds.
        population: The number of clients.
        expected_cohort: The expected number of clients in a round.
        parameters: The number of trained parameters.
        plan: The privacy plan; None for a run without privacy.
        ran: The execution of the run; contains at least `engine`.
    """

    name: str
    method: str
    digest: str
    seed: int
    rounds: int
    population: int
    expected_cohort: float
    parameters: int
    plan: PrivacyPlan | None
    ran: Table


@dataclass
class Recorder:
    """The writer of a run's records.

    Args:
        experiment: The experiment.
        directory: The run directory.
        ran: The execution of the run, for the summary; contains at least `engine`.
        watch: Called with every round's rows, if given.
        checkpoint_seconds: Minimum time between checkpoints.
        checkpoint_every: Rounds between checkpoints; overrides `checkpoint_seconds`.
        randomness: The source of noise and cohorts: `seeded` or `system`.
        deployed: True on real devices. Nothing about a noiseless sum of a private run is then written.
        forward: Computes outputs for evaluations elsewhere; see `Engine.forward`.
    """

    experiment: Experiment
    directory: RunDirectory
    ran: Table
    watch: Watcher | None = None
    checkpoint_seconds: float = 10.0
    checkpoint_every: int | None = None
    randomness: Randomness = "seeded"
    deployed: bool = False
    forward: Forward | None = None
    _taken: Counter[int] = field(default_factory=Counter)
    _saved_at: float = field(default_factory=time.monotonic)
    _round_began: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """Write everything known before the first round."""
        experiment, plan = self.experiment, self.experiment.plan
        size = experiment.population.task.layout.size
        if plan is not None and experiment.config.learns and (drowned := signal_warning(plan, size)):
            _log.warning("%s", drowned)
        self._write_promise()
        self.directory.write_json(FACTS_FILE, self._facts())
        self.directory.write_model("initial.safetensors", experiment.initial_model, self._layout)
        if not self.deployed and not self.directory.file(HETEROGENEITY_FILE).exists():
            measured = measure_heterogeneity(experiment.config, experiment.population)
            self.directory.write_json(HETEROGENEITY_FILE, measured)
        self._round_began = time.monotonic()

    def _write_promise(self, spent: Record | None = None) -> None:
        """Write the promise as numbers and as a statement; at the end, with what a run under a filter has spent."""
        experiment, plan = self.experiment, self.experiment.plan
        statement = privacy_statement(
            plan,
            method=experiment.config.title,
            randomness=self.randomness,
            deployed=self.deployed,
            simulated=Simulated(clock=experiment.timeline is not None, fused=self._fused),
            data=experiment.config.facts,
            recorded=True,
            app="fixed" if self.deployed else None,
            size=experiment.population.task.layout.size if experiment.config.learns else None,
        )
        choice = experiment.config.privacy
        if choice is not None and choice.draw is not None:
            statement += _OF_A_TUNING
        if spent is not None:
            statement += _SPENT.format(rounded=rounded_up(spent["epsilon_spent"]), **spent)
        promise = no_promise() if plan is None else plan.as_dict()
        if experiment.config.needs_sizes:
            by_client = of_sizes(plan, experiment.population.federation.sizes)
            promise |= by_client
            statement += sizes_in_words(by_client)
        if choice is not None:
            together, paragraph = with_analyses(plan, choice.analyses, choice.analyses_mu)
            promise, statement = promise | together, quoted(statement, paragraph)
        used = {} if spent is None else {"spent": spent}
        self.directory.write_json("privacy.json", {**promise, **used, "statement": statement})
        self.directory.write_text("privacy.txt", statement)

    def _spent(self, state: ServerState, rounds: int) -> Record | None:
        """Return the part of its budget that a run under a filter has spent, and its rounds; None for other runs."""
        spent, plan = self.experiment.server.filtered(state), self.experiment.plan
        if spent is None or plan is None:
            return None
        planned = self.experiment.config.training.rounds
        return {"rounds": rounds, "rounds_planned": planned, "epsilon_spent": plan.epsilon_of_share(spent.share)}

    def initial(self, model: Tensor, round: int = 0) -> None:
        """Record the model before the first round, or after a round that a crash left without a row."""
        released = {"round": round, **self._promise(round, None), **self._evaluation(model, round)}
        self._record({**released, **self._clock(round, released=True)}, {"round": round})

    def replayed(self, last_round: int, taken: Mapping[int, int] | None = None) -> None:
        """Resume after `last_round`: drop later rows and recount participations.

        Args:
            last_round: The last saved round.
            taken: How often each client took part; None if the cohorts can be redrawn.
        """
        for name in ("rounds.jsonl", "diagnostics.jsonl"):
            self.directory.keep_rows(name, last_round)
        if self._keeps_ledger:
            for past in range(1, last_round + 1) if taken is None else ():
                self._count(past)
            self._taken.update(taken or {})
        self._round_began = time.monotonic()

    def after_round(
        self,
        round: int,
        state: ServerState,
        total: Total,
        client_states: Callable[[], dict[str, Tensor]] | None,
        taken: Mapping[int, int] | None = None,
        older: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Record a round, and write a checkpoint if one is due and the clients' states are available.

        Args:
            round: Its number.
            state: The server's state after it.
            total: The sum of the messages.
            client_states: Returns all clients' states; None if they are elsewhere.
            taken: How often each client took part, if the caller knows; None counts the drawn cohorts.
            older: Models that clients still work on, by the number of the round that produced them.
        """
        seconds = time.monotonic() - self._round_began
        if taken is not None:
            self._taken = Counter(taken)
        elif self._keeps_ledger:
            self._count(round)
        spent = self.experiment.server.filtered(state)
        evaluation = self._evaluation(state.model, round, last=spent is not None and spent.stopped)
        released = {"round": round, **self._promise(round, spent), **evaluation, **self._clock(round, released=True)}
        if self.experiment.population.rules.sums is not None:
            released["void"] = total.void
        if (side := side_values_of(self.experiment.config.method)) is not None:
            released |= side.released(state._asdict())
        stopped = None
        try:
            self._record(released, self._diagnose(round, state, total, seconds))
        except StopRun as stop:
            stopped = stop
        if client_states is not None and (stopped is not None or self._checkpoint_due(round)):
            digest, server = self.experiment.config.digest, state._asdict()
            server |= {f"{OLDER}{number}": model for number, model in (older or {}).items()}
            self.directory.save(digest, self.promise, round, server, client_states())
            self._saved_at = time.monotonic()
        if stopped is not None:
            raise stopped
        self._round_began = time.monotonic()

    def finish(self, state: ServerState) -> Record:
        """Write the final model, the plot if possible and, last of all, the summary; return the summary."""
        self.directory.write_model("model.safetensors", state.model, self._layout)
        rounds = self.directory.rows("rounds.jsonl")
        if has_extra("report") and self.experiment.config.learns:  # otherwise the command line suggests the extra
            plot_curves(
                rounds,
                self.directory.file("curves.png"),
                title=self._title(),
                task=self.experiment.config.task,
                classes=self.experiment.population.federation.dataset.classes,
            )
        answers = answers_of(self.experiment, state.model)
        if answers is not None:
            self.directory.write_json(ANALYSIS_FILE, answers)
        rows = self.directory.rows("diagnostics.jsonl")
        clients = self._evaluate_clients(state.model)
        self.directory.write_json(DIAGNOSTICS_FILE, {**self._diagnostics(rows), **clients})
        plan = self.experiment.plan
        if plan is not None and self._keeps_ledger and self.experiment.config.needs_sizes:
            sizes = np.asarray(self.experiment.population.federation.sizes).tolist()
            self.directory.write_json(LEDGERS_FILE, {"clients": ledgers_of(plan, sizes, self._counts.tolist())})
        summary = self._summary(rounds[-1], rows)
        if (spent := self._spent(state, rounds[-1]["round"])) is not None:
            self._write_promise(spent)
            summary |= spent
        self.directory.write_json("summary.json", summary)
        self.directory.checkpoint.path.unlink(missing_ok=True)
        return summary

    def _facts(self) -> dict[str, object]:
        config, dataset = self.experiment.config, self.experiment.population.federation.dataset
        frozen = self.experiment.population.task.frozen_digest
        return model_facts(config.data.dataset, dataset, config.task.width(dataset.classes), frozen)

    def _evaluate_clients(self, model: Tensor) -> dict[str, object]:
        """Write the scores of single clients if the experiment asks for them, and return their distribution."""
        choice, people = self.experiment.config.evaluation, self.experiment.population
        tested = people.federation.dataset.tested
        if choice is None or not choice.clients or tested is None:
            return {}
        data, device = people.federation.dataset, people.task.device
        rows = np.split(np.argsort(tested.owners, kind="stable"), np.cumsum(np.bincount(tested.owners)))
        rows = [torch.from_numpy(own) for own in rows[: people.federation.population]]
        clients = (
            ClientExamples(client, *people.examples(client), *(part[own].to(device) for part in parts))
            for client, own in enumerate(rows)
            for parts in ((data.test_inputs, data.test_labels),)
        )
        with one_thread():
            found = evaluate_clients(people.task, model.to(device), clients, choice)
        self.directory.write_json(CLIENTS_FILE, found)
        return {"clients": found["distribution"]}

    @property
    def promise(self) -> str:
        """The facts that all rounds of a run share besides its config: data, frozen weights, noise and accountant."""
        plan, data = self.experiment.plan, f"data {self.experiment.population.federation.fingerprint}"
        if self.ran.get("precision", "float32") != "float32":
            data += f", {self.ran['precision']}"
        if (frozen := self.experiment.population.task.frozen_digest) is not None:
            data += f", frozen weights {frozen[:12]}"
        if self.experiment.timeline is not None:
            data += f", timeline {self.experiment.timeline.fingerprint}"
        return data + terms_in_words(plan, ", one draw of clients' noise a round" if self._fused else "")

    @property
    def _fused(self) -> bool:
        """True if one noise vector per round was drawn for the sum of the messages, instead of one for each message."""
        return self.ran.get("client_noise") == "fused"

    @property
    def _marks(self) -> dict[str, object]:
        """The scores that the privacy guarantee does not cover, if any."""
        names = self.experiment.config.not_covered
        return {"not_covered": list(names)} if names else {}

    @property
    def _layout(self) -> Layout:
        return self.experiment.population.task.layout

    @property
    def _keeps_ledger(self) -> bool:
        return self.experiment.plan is not None and self.experiment.plan.trust_rules.charges_participations

    def _clock(self, round: int, *, released: bool) -> dict[str, object]:
        """Return a round's values of the virtual clock, either the released ones or the others."""
        timeline = self.experiment.timeline
        if timeline is None:
            return {}
        step = timeline.step(round) if round else None
        row = clock_row(step) if clock_is_public(self.experiment.config) == released else {}
        return row if released or step is None else {**row, **lateness_row(step)}

    def _count(self, round: int) -> None:
        if self.experiment.timeline is not None:
            self._taken.update(self.experiment.timeline.step(round).sent.tolist())
            return
        state = self.experiment.server.init(torch.zeros(1))
        self._taken.update(begin_round(self.experiment.server, state, round).cohort.tolist())

    def _checkpoint_due(self, round: int) -> bool:
        if round == self.experiment.config.training.rounds:
            return False
        if self.checkpoint_every is not None:
            return round % self.checkpoint_every == 0
        return time.monotonic() - self._saved_at >= self.checkpoint_seconds

    def _promise(self, round: int, spent: FilterState | None) -> dict[str, object]:
        """Return epsilon after a round, and the noise of the round if a controller chose it."""
        plan, mechanism = self.experiment.plan, self.experiment.server.mechanism
        if plan is None or spent is None or not isinstance(mechanism, Filtered):
            return {"epsilon": None if plan is None else plan.epsilon_after(round)}
        multiplier = mechanism.multiplier(int(spent.filter_last))
        return {"epsilon": plan.epsilon_of_share(spent.share), "noise_multiplier": multiplier}

    def _evaluation(self, model: Tensor, round: int, *, last: bool = False) -> dict[str, object]:
        looks = last or self.experiment.config.training.evaluates(round)
        names = self.experiment.config.task.scores
        found: Mapping[str, float | None] = self.experiment.evaluate(model, self.forward) if looks else {}
        row = {f"test_{name}": found.get(name) for name in names}
        if self.experiment.config.data.validation is not None:
            found = (looks and self.experiment.validate(model, self.forward)) or {}
            row |= {f"validation_{name}": found.get(name) for name in names}
        return {**row, **self._marks}

    def _diagnose(self, round: int, state: ServerState, total: Total, seconds: float) -> dict[str, object]:
        population = self.experiment.population
        plan = self.experiment.plan
        bare = self.deployed and plan is not None
        client_stddev = population.rules.noise_stddev * self._weight(round)
        noise = None if bare else signal_to_noise(total, self.experiment.server.last_stddev(state), client_stddev)
        row = diagnostics_row(round, state.model, total, seconds, noise=noise, bare=bare)
        if bare:
            return row
        void = {} if population.rules.sums is None else {"void": total.void}
        return {**row, **void, **self._clock(round, released=False)}

    def _weight(self, round: int) -> float:
        """Return the root mean square of the weights of a round's messages."""
        if self.experiment.timeline is None:
            return 1.0
        step = self.experiment.timeline.step(round)
        return math.sqrt(step.squared_weights / max(len(step.counted), 1))

    def _record(self, released: Record, diagnostics: Record) -> None:
        self.directory.append("rounds.jsonl", released)
        if len(diagnostics) > 1:
            self.directory.append("diagnostics.jsonl", diagnostics)
        if self.watch is not None:
            self.watch(released, diagnostics)

    def _title(self) -> str:
        config, plan = self.experiment.config, self.experiment.plan
        promise = "not private"
        if plan is not None and plan.private:
            promise = f"{plan.trust} trust, ({rounded_up(plan.epsilon)}, {plan.delta:g})-DP"
        return f"{config.name}: {config.method_name}, {promise}"

    def _summary(self, last: Record, diagnostics: list[Record]) -> dict[str, object]:
        config = self.experiment.config
        facts = RunFacts(
            name=config.name,
            method=config.method_name,
            digest=config.digest,
            seed=config.seed,
            rounds=config.training.rounds,
            population=self.experiment.population.federation.population,
            expected_cohort=self.experiment.server.sampling.expected_size,
            parameters=self.experiment.population.task.layout.size,
            plan=self.experiment.plan,
            ran=self.ran,
        )
        measured = {} if config.task.usual else {"metrics": {one.name: one.better for one in config.task.measured}}
        counts = self._counts if self._keeps_ledger else None
        summary = summary_of(facts, last, diagnostics, {**measured, **self._marks}, counts)
        return {**summary, **self._clock_at_the_end(released=True)}

    def _diagnostics(self, rows: list[Record]) -> dict[str, object]:
        """Return the totals that accompany the summary and are not released."""
        return {
            "data_fingerprint": self.experiment.population.federation.fingerprint,
            "messages": sum(row["cohort_size"] for row in rows),
            "non_finite": sum(row["non_finite"] for row in rows),
            "warnings": warnings_of(rows),
            **self._clock_at_the_end(released=False),
            **({} if self.deployed else {"heterogeneity": self.directory.read_json(HETEROGENEITY_FILE)}),
        }

    def _clock_at_the_end(self, *, released: bool) -> dict[str, object]:
        timeline, rounds = self.experiment.timeline, self.experiment.config.training.rounds
        if timeline is None or clock_is_public(self.experiment.config) != released:
            return {}
        row = clock_row(timeline.step(rounds) if rounds else None)
        return {key: value for key, value in row.items() if key != "counted"}

    @property
    def _counts(self) -> np.ndarray:
        """How often each client took part, int64 `[clients]`."""
        counts = np.zeros(self.experiment.population.federation.population, dtype=np.int64)
        for client, times in self._taken.items():
            counts[client] = times
        return counts


def summary_of(
    facts: RunFacts,
    last: Record,
    diagnostics: list[Record],
    more: Table,
    counts: np.ndarray | None = None,
) -> dict[str, object]:
    """Return the summary of a finished run.

    Args:
        facts: The facts that it repeats.
        last: The last row of `rounds.jsonl`.
        diagnostics: The rows of `diagnostics.jsonl`.
        more: Further values, after the scores.
        counts: How often each client took part, int64 `[clients]`; None without a ledger.
    """
    plan = facts.plan
    seconds = sum(row["seconds"] for row in diagnostics)
    # For a private run, use the expected number of messages: the actual number may show who took part.
    messages = sum(row["cohort_size"] if plan is None else facts.expected_cohort for row in diagnostics)
    promise = no_promise() if plan is None else plan.as_dict()
    keys = ("private", "epsilon", "delta", "noise_multiplier", "noise_stddev", "l2_sensitivity")
    return {
        "name": facts.name,
        "method": facts.method,
        "engine": facts.ran["engine"],
        "execution": facts.ran,
        "digest": facts.digest,
        "seed": facts.seed,
        "rounds": facts.rounds,
        "population": facts.population,
        "expected_cohort": facts.expected_cohort,
        "parameters": facts.parameters,
        **{key: value for key, value in last.items() if key.startswith(("test_", "validation_"))},
        **more,
        **{key: promise[key] for key in (*keys, "trust", "adjacency", "accountant", "adversary")},
        **({} if counts is None or plan is None else {"ledger": _ledger_of(plan, counts)}),
        "seconds": seconds,
        "clients_per_second": messages / seconds if seconds else 0.0,
    }


def diagnostics_row(
    round: int, model: Tensor, total: Total, seconds: float, *, noise: float | None, bare: bool
) -> dict[str, object]:
    """Return a round's row of `diagnostics.jsonl`.

    Args:
        round: The number of the round.
        model: The model after it, `[params]`.
        total: The sum of its messages.
        seconds: Its duration.
        noise: The signal-to-noise ratio; None if it is unknown.
        bare: True to record nothing about the noiseless sum.
    """
    speed = {"seconds": seconds, "clients_per_second": total.messages / max(seconds, 1e-9)}
    if bare:
        return {"round": round, "cohort_size": total.messages, "non_finite": 0, **speed}
    return {
        "round": round,
        "cohort_size": total.messages,
        "non_finite": total.non_finite,
        "signal_norm": total.signal_norm,
        "sum_norm": float(torch.linalg.vector_norm(total.sum, dtype=torch.float64)),
        "signal_to_noise": noise,
        "model_norm": float(torch.linalg.vector_norm(model, dtype=torch.float64)),
        **speed,
    }


def terms_in_words(plan: PrivacyPlan | None, drawn: str = "") -> str:
    """Return the privacy terms that all rounds of a run must share, for its checkpoint; empty without privacy.

    Args:
        plan: The privacy plan.
        drawn: How noise is drawn, if not for each client.
    """
    if plan is None:
        return ""
    if plan.noise is not None:
        drawn += f", matrix {hashlib.sha256(json.dumps(plan.noise.as_dict()).encode()).hexdigest()[:16]}"
    return f", noise {plan.noise_stddev!r}, {plan.accountant}{drawn}"


def _ledger_of(plan: PrivacyPlan, counts: np.ndarray) -> dict[str, object]:
    """Return the epsilon that single clients actually spent, by how often each took part, int64 `[clients]`."""
    counts_of = {"most": counts.max(), "median": math.ceil(np.median(counts)), "least": counts.min()}
    return {
        who: {"participations": int(times), "epsilon": plan.epsilon_of_participations(int(times))}
        for who, times in counts_of.items()
    }


def no_promise() -> dict[str, object]:
    """Return the values of a privacy plan for a run without privacy."""
    keys = ("epsilon", "delta", "noise_multiplier", "l2_sensitivity", "trust", "adjacency", "accountant")
    absent = {"private": False, "noise_stddev": 0.0, "adversary": "none: not private"}
    return {**dict.fromkeys(keys), **absent, **NOT_PROMISED}
