"""The privacy statement: what a run promises, in words that a lawyer could read."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedpriv.privacy.plan import PrivacyPlan
from fedpriv.privacy.released import DataFacts, Kind, Output, outputs_of
from fedpriv.privacy.unit import unit_of
from fedpriv.privacy.warning import signal_warning

__all__ = ["Simulated", "privacy_statement", "rounded_up"]

_NOT_PRIVATE = """\
This run is NOT private. No noise was added and nothing is promised about the data of any client, whoever looks."""

_NO_NOISE = """\
This run has NO privacy guarantee. Its plan names a noise multiplier of {multiplier:g}: messages are bounded, but next \
to nothing hides them."""

_NOT_COVERED = (
    "what clients report about themselves outside the noised messages, such as losses, norms of signals and counts of "
    "messages that were not finite, and how many clients took part or how fast they were: diagnostics.jsonl, "
    "diagnostics.json, and seconds and clients_per_second in summary.json, are for simulations only",
    "other runs on the same clients' data: what two runs spend adds up",
    "the choice of hyperparameters, of the model or of the number of rounds, if it looked at the clients' data",
    "statistics that a model keeps of its inputs, such as those of BatchNorm: models with buffers are refused",
    "the time that a client takes, and whether it answers at all",
)

_SEEDED = (
    "the noise and the cohorts come from a seed: whoever knows it can take the noise off again. This is a simulation; "
    "with real people the randomness must come from the operating system. Two runs of one experiment with one seed "
    "share their noise: if the data, or an app of your own, changed in between, the difference of their models has none"
)

_CLIENTS = {
    "natural": "Clients: those that the data have. Who they are is public. What a client trains on follows from its "
    "own data, its number and public constants, never from the data of another client.",
    "simulated": "Clients: simulated. A public rule, the partition, divided a pool of examples between them; it may "
    "have looked at labels. Neighboring populations differ in the data of one client as they are after that division, "
    "which may be replaced by anything. The division itself, the shape of an example and the set of labels are taken "
    "as public.",
}
_CLIENTS["resampled"] = _CLIENTS["simulated"] + (
    " Here clients draw from the pool with replacement, so that several hold the same example: what is protected is a "
    "client, not an example."
)

_TESTED = {
    "public": "Test: on examples that belong to no client here, and are public or the server's own.",
    "clients": "Test: on all examples of some clients, chosen by the seed, who take no part. They are not protected: "
    "what the models score on their examples is released without noise.",
    "within": "Test: on some of the protected clients' own examples. The promise does NOT cover the test scores "
    "(test_accuracy, test_loss): they are released without noise, and depend on these clients' data whatever epsilon "
    "is.",
}

_HELD_OUT = (
    "Validation: the examples held out to choose by are {whose}. They are not protected: what the models score on them "
    "is released without noise (validation scores in rounds.jsonl and summary.json)."
)

_WHOSE = {
    "public": "taken to be public, or the server's own",
    "clients": "those of some clients, chosen by the seed, who take no part",
    "within": "taken from the clients' own examples, each client's by itself",
}

_HELD_OUT_OF_CLIENTS = (
    " For these a client is promised nothing, although its other examples are protected together: the promise does NOT "
    "cover the validation scores (validation_accuracy, validation_loss)."
)

_HELD_OUT_ITEM = "the examples held out for validation, and what is chosen by them"

_TESTED_ITEM = "the test scores, which are computed on protected clients' own examples, and what is chosen by them"

_EVALUATED_ITEM = (
    "the metrics of the clients' own evaluation: they are averaged without noise, and their clients not hidden"
)


_DEPLOYED = (
    "who is asked in a round, and who answers: the server knows it, whoever watches the network or the clients may, "
    "and participation.jsonl names them",
)

_SECRET = (
    "Noise and cohorts come from the operating systems of those who draw them, and are kept nowhere. A client that "
    "does not answer is one whose message is zero; the noise that hides a client does not depend on how many answer, "
    "and a round of which nothing was used is counted like any other."
)

_SECRET_COHORTS = (
    " Here epsilon relies on nobody knowing who took part: keep participation.jsonl, logs and the network's traffic "
    "from the adversary."
)

_FUSED = (
    "Simulated noise: this run drew one noise a round for the sum of its clients' messages, distributed as the sum of "
    "their own noises is (--client-noise fused). No single message got noise here. What is said of single messages "
    "holds where each client draws its own, as on devices and with --client-noise faithful; the models are distributed "
    "alike."
)


_FILES = "Released or not, file by file (what is not released can be read by its owner alone)"


_WHOSE_APP = {
    "fixed": "The app: nodes that `fedpriv deploy node` starts run their own installed code, refuse any that a server "
    "sends, and follow orders only within their policies. For a client on any other node the promise is not against a "
    "server that supplies the app.",
    "supplied": "The app: if Flower's nodes run the app that comes with a run, the promise is not against a server "
    "that supplies the app, or the settings that have it do anything but train (the run config). It holds against the "
    "server for clients whose node itself fixes the app, with a policy and a ledger behind it.",
}

_ROLLED_BACK = (
    "a client's whole disk that is put back to an earlier state, if the server helps: the client's ledger forgets "
    "what was spent since. The signed head of the ledger that the server shows would tell; a server cannot forge it, "
    "but can keep it back"
)

_CLOCK = (
    "Clock: devices, the numbers of examples that clients hold and when clients answer are taken as public, and as the "
    "same in both populations; none of them may depend on the values of anybody's data."
)

_IN_TIME = (
    " Whether a client that is asked answers, and in time, depends on itself alone; a round in which it does not is "
    "one in which its message is zero. Where epsilon relies on nobody knowing who took part, the clock and the bytes "
    "sent are for simulations only, like diagnostics."
)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What only a simulation may do, and its statement says.

    Args:
        clock: Whether a virtual clock decides who is in time.
        fused: Whether one noise was drawn for the sum of a round's messages, where clients draw their own.
    """

    clock: bool = False
    fused: bool = False


def privacy_statement(
    plan: PrivacyPlan | None,
    *,
    method: str,
    randomness: str,
    deployed: bool = False,
    simulated: Simulated | None = None,
    data: DataFacts | None = None,
    recorded: bool = False,
    evaluated: bool = False,
    app: Literal["fixed", "supplied"] | None = None,
    size: int | None = None,
) -> str:
    """The statement of a run.

    Args:
        plan: What is promised; None for a run that promises nothing.
        method: The method's name, as in `[method]`.
        randomness: `seeded` or `system`: where noise and cohorts come from.
        deployed: Whether real devices take part.
        simulated: What a simulation does that devices do not; None for nothing of it.
        data: Whose examples are used for what; None if that is not known here.
        recorded: Whether the run fills a run directory, of which every file is then listed.
        evaluated: Whether clients evaluate models and report the metrics.
        app: Who decides which code real clients run: `fixed` if their nodes may do so themselves, `supplied` if the
            server may send it; None in simulations, where nobody is attacked.
        size: Number of parameters, to say whether the noise leaves anything to learn; None if that is not known.

    Returns:
        Paragraphs of plain text; no epsilon stands in it without its adversary.
    """
    if plan is None:
        return f"Privacy statement for {method}\n\n{_NOT_PRIVATE}\n"
    if not plan.private:
        return f"Privacy statement for {method}\n\n{_fill(_NO_NOISE.format(multiplier=plan.noise_multiplier))}\n"
    not_covered = [*_NOT_COVERED, *((_SEEDED,) if randomness == "seeded" else ()), *(_DEPLOYED if deployed else ())]
    not_covered += [*_scored_items(data), *([_EVALUATED_ITEM] if evaluated else [])]
    not_covered += [_ROLLED_BACK] if app else []
    trust, unit, simulated = plan.trust_rules, unit_of(plan.unit), simulated or Simulated()
    secret = _SECRET + (_SECRET_COHORTS if plan.amplification else "")
    paragraphs = [
        f"Privacy statement for {method}",
        _fill(_promise(plan)),
        _fill(trust.who(plan.sampling.most)),
        *([_fill(_WHOSE_APP[app])] if app and not trust.trusts_server else []),
        _fill(unit.over(plan.rounds)),
        _fill(unit.neighbors[plan.adjacency]),
        _fill(_cohorts(plan)),
        *([_fill(_CLOCK + (_IN_TIME if plan.sampling.draws_cohorts else ""))] if simulated.clock else []),
        _fill(_mechanism(plan)),
        *([_fill(_FUSED)] if simulated.fused and trust.clients_add_noise else []),
        *([_fill(f"Use: {drowned}")] if size and (drowned := signal_warning(plan, size)) else []),
        *_about_data(data, deployed=deployed),
        *([_fill(secret)] if deployed and randomness == "system" else []),
        f"Accountant: {plan.accountant}; composition over rounds is adaptive.",
        _listed("Not covered", not_covered),
        *([_listed(_FILES, _recorded(data, deployed=deployed))] if recorded else []),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _about_data(data: DataFacts | None, *, deployed: bool) -> list[str]:
    """Who the clients are, and whose examples models are scored on. A deployment's clients are who they are."""
    if data is None:
        return []
    paragraphs = [] if deployed else [_CLIENTS[data.clients]]
    paragraphs.append(_TESTED[data.test])
    if data.validation is not None:
        ending = _HELD_OUT_OF_CLIENTS if data.validation == "within" else ""
        paragraphs.append(_HELD_OUT.format(whose=_WHOSE[data.validation]) + ending)
    return [_fill(paragraph) for paragraph in paragraphs]


def _scored_items(data: DataFacts | None) -> list[str]:
    if data is None:
        return []
    return [*([_TESTED_ITEM] if data.test == "within" else []), *([_HELD_OUT_ITEM] if data.validation else [])]


def _recorded(data: DataFacts | None, *, deployed: bool) -> list[str]:
    """Every file that a run writes, whether it is released, and what is in it."""
    told = [_recorded_file(output) for output in outputs_of(deployed=deployed)]
    last = sum(output.kind is not Kind.OWNER for output in outputs_of(deployed=deployed))
    unprotected = ["released, not covered: seconds, clients_per_second and execution in summary.json: timings"]
    if data is not None and data.not_covered:
        where = "rounds.jsonl, summary.json, curves.png and trackers, where not_covered names them"
        unprotected.append(f"released, not covered: {', '.join(data.not_covered)} in {where}")
    return [*told[:last], *unprotected, *told[last:]]


def _recorded_file(output: Output) -> str:
    return f"{output.kind.value}: {output.name}, {output.about}"


def _listed(title: str, items: Sequence[str]) -> str:
    return f"{title}:\n" + "\n".join(_fill(f"* {item};", hang=2) for item in items).rstrip(";") + "."


def _promise(plan: PrivacyPlan) -> str:
    epsilon, against = rounded_up(plan.epsilon), "the adversary below"
    weak = ""
    if plan.delta >= 1.0 / plan.sampling.population:
        weak = (
            f" WARNING: delta is at least 1 / clients ({1.0 / plan.sampling.population:.2g}): such a delta would also "
            "allow one client's data to be released outright."
        )
    return (
        f"Promise: against {against}, the run is (epsilon, delta)-differentially private with epsilon = {epsilon} at "
        f"delta = {plan.delta:g}, for each {unit_of(plan.unit).one}.{weak}"
    )


def rounded_up(epsilon: float) -> str:
    """Four digits, never below the figure itself."""
    if epsilon == 0.0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 3)
    return f"{math.ceil(epsilon / unit - 1e-9) * unit:.4g}"


def _cohorts(plan: PrivacyPlan) -> str:
    sampling = plan.sampling
    credit = "Epsilon relies on the adversary not knowing who took part." if plan.amplification else ""
    caveats = sampling.caveats(
        trust=plan.trust_rules, adjacency=plan.adjacency, client_memory=plan.client_memory, rounds=plan.rounds
    )
    return f"Cohorts: of {sampling.population} clients, {sampling.how}. {credit} {caveats}"


def _mechanism(plan: PrivacyPlan) -> str:
    sampling = plan.sampling
    return (
        f"Mechanism: a message has l2 norm at most {plan.l2_bound:g}, so one client moves it or their sum by at most "
        f"{plan.l2_sensitivity:g}{sampling.moved(plan.trust_rules)}. Gaussian noise of standard deviation "
        f"{plan.noise_stddev:.6g} per coordinate is added to {plan.trust_rules.noised} ({plan.noise_multiplier:.6g} "
        f"times the sensitivity), in {plan.rounds} {sampling.turns}. {_grid(plan)} Sums are divided by "
        f"{sampling.divisor}."
    )


def _grid(plan: PrivacyPlan) -> str:
    return (
        "Noise is sampled exactly, and every number that carries it is released as a multiple of "
        f"{plan.release_grid:g}, so that the promise holds for the bits that a computer releases; sampling adds "
        "nothing to epsilon or delta."
    )


def _fill(text: str, hang: int = 0) -> str:
    return textwrap.fill(" ".join(text.split()), width=100, subsequent_indent=" " * hang)
