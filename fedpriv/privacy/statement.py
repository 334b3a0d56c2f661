"""The privacy statement: a run's guarantee in words that a lawyer can read."""

import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from fedpriv.checks import one_of, shown, true_or_false, whole_from
from fedpriv.errors import UserError, plural
from fedpriv.mechanisms.shares import HALF_MODULUS
from fedpriv.privacy.plan import PrivacyPlan
from fedpriv.privacy.records import RecordBound
from fedpriv.privacy.released import DataFacts, Kind, Output, outputs_of
from fedpriv.privacy.unit import unit_of
from fedpriv.privacy.warning import delta_warning, signal_warning
from fedpriv.tables import Record

__all__ = ["Simulated", "files_in_words", "privacy_statement", "quoted", "rounded_up", "with_analyses"]

_NOT_PRIVATE = """\
This run is NOT private. No noise was added, and nothing is promised about any client's data, against any adversary."""

_NO_NOISE = """\
This run has NO privacy guarantee. Its plan has a noise multiplier of {multiplier:g}: messages are bounded, but almost \
nothing hides them."""

_NOT_COVERED = (
    "values that clients report outside the noised messages, such as losses, norms of signals and counts of messages "
    "that were not finite, and the number and speed of the clients that took part: diagnostics.jsonl, "
    "diagnostics.json, and seconds and clients_per_second in summary.json, are for simulations only",
    "other runs on the same clients' data: the privacy costs of all runs add up",
    "the choice of hyperparameters, of the model or of the number of rounds, if it used the clients' data",
    "statistics that a model keeps of its inputs, such as those of BatchNorm: models with buffers are refused",
    "the time that a client takes, and whether it answers at all",
)

_SEEDED = (
    "the noise and the cohorts come from a seed: anyone who knows it can remove the noise. This is a simulation; with "
    "real people, the randomness must come from the operating system. Two runs of one experiment with one seed share "
    "their noise: if the data or your app changed between them, the difference of their models contains no noise"
)

_CLIENTS = {
    "natural": "Clients: those of the data set. Their identities are public. A client's training data follow from its "
    "own data, its number and public constants, never from the data of another client.",
    "simulated": "Clients: simulated. A public rule, the partition, divided a pool of examples among them; it may have "
    "used labels. Neighboring populations differ in one client's data after that division; these data may be replaced "
    "by any others. The division itself, the shape of an example and the set of labels are treated as public.",
}
_DRAWN_AGAIN = " Here clients draw from the pool with replacement, so several may hold the same example: "
_CLIENTS["resampled"] = _CLIENTS["simulated"] + _DRAWN_AGAIN + "the promise protects a client, not an example."

_CLIENTS_OF_EXAMPLES = {
    **_CLIENTS,
    "simulated": "Clients: simulated. A public rule, the partition, divided a pool of examples among them; it may have "
    "used labels. Neighboring populations differ in one example of one client after that division. The division "
    "itself, the shape of an example and the set of labels are treated as public.",
}
_CLIENTS_OF_EXAMPLES["resampled"] = (
    _CLIENTS_OF_EXAMPLES["simulated"] + _DRAWN_AGAIN + "the promise protects one copy in one client, not all copies."
)

_TESTED = {
    "public": "Test: on examples that belong to no client here, and are public or the server's own.",
    "clients": "Test: on all examples of some clients, chosen by the seed, who take no part. They are not protected: "
    "the models' scores on their examples are released without noise.",
    "within": "Test: on some of the protected clients' own examples. The promise does NOT cover the test scores "
    "({scores}): they are released without noise and depend on these clients' data, regardless of "
    "epsilon.",
}

_HELD_OUT = (
    "Validation: the examples held out for selection are {whose}. They are not protected: the models' scores on them "
    "are released without noise (validation scores in rounds.jsonl and summary.json)."
)

_WHOSE = {
    "public": "treated as public, or the server's own",
    "clients": "those of some clients, chosen by the seed, who take no part",
    "within": "taken from the clients' own examples, separately for each client",
}

_HELD_OUT_OF_CLIENTS = (
    " Nothing is promised for these examples, although a client's other examples are protected together: the promise "
    "does NOT cover the validation scores ({scores})."
)

_REPORTED = (
    "In its message, and under the same bound and noise, every client also sends: {values}. The noisy means of these "
    "values, and the bounds that follow from them, are released in rounds.jsonl; the epsilon above covers them."
)
_ASKED = (
    "Analysis: the released model is the vector of noised answers to these questions: {questions}. {weight} The "
    "epsilon above covers all answers together, and everything computed from them. No model is trained, and nothing "
    "is scored on test examples."
)
_HELD_OUT_ITEM = "the examples held out for validation, and choices based on them"

_TESTED_ITEM = "the test scores, which are computed on protected clients' own examples, and choices based on them"

_EVALUATED_ITEM = (
    "the metrics of the clients' own evaluation: they are averaged without noise, and their clients are not hidden"
)


_DEPLOYED = (
    "which clients are asked in a round, and which answer: the server knows them, anyone who watches the network or "
    "the clients may know them, and participation.jsonl names them",
)

_SECRET = (
    "Noise and cohorts come from the operating systems of the machines that draw them, and are never stored. A client "
    "that does not answer is treated as one with a zero message. {noise} A round is charged even if nothing of it was "
    "used."
)

_SAME_NOISE = "The noise that hides a client does not depend on the number of answers."
_ENOUGH_SHARES = "A sum with too few shares of the noise is never formed: helpers reveal none."

_SECRET_COHORTS = (
    " Here epsilon relies on the adversary not knowing who took part: keep participation.jsonl, logs and network "
    "traffic from the adversary."
)

_FUSED = (
    "Simulated noise: this run drew one noise vector per round for the sum of its clients' messages, with the "
    "distribution of the sum of their individual noise (--client-noise fused). No single message got noise here. "
    "Statements about single messages hold if each client draws its own noise, as on devices and with --client-noise "
    "faithful; the models have the same distribution."
)


_FILES = "Released or not, file by file (only the owner can read a file that is not released)"


_WHOSE_APP = {
    "fixed": "The app: nodes started by `fedpriv deploy node` run their own installed code, refuse any code that a "
    "server sends, and follow instructions only within their policies. For a client on any other node, the promise "
    "does not hold against a server that supplies the app.",
    "supplied": "The app: if Flower's nodes run the app that comes with a run, the promise does not hold against a "
    "server that supplies the app, or settings that make it do anything but train (the run config). It holds against "
    "the server for clients on a node that itself fixes the app, and backs it with a policy and a ledger.",
}

_ROLLED_BACK = (
    "a client's whole disk that is restored to an earlier state, if the server helps: the client's ledger then lacks "
    "everything spent since. The signed head of the ledger that the server shows would reveal this; a server cannot "
    "forge it, but can withhold it"
)

_CLOCK = (
    "Clock: devices, clients' numbers of examples and the times at which clients answer are treated as public, and as "
    "the same in both populations; none of them may depend on the values of any client's data."
)

_IN_TIME = (
    " A client alone determines if it answers a request in time; its message is zero in a round in which it does not. "
    "If epsilon relies on the adversary not knowing who took part, the clock and the bytes sent are for simulations "
    "only, like diagnostics."
)


_ADVERSARIES = (
    "Adversaries: with up to {honest} clients on its side, that is colluding with it, invented by it, or leaving out "
    "their noise, the adversary above learns at most epsilon = {colluders}. Anyone who sees only the noised sums "
    "learns at most epsilon = {sums}. The server together with {all_helpers}, or with {puppets} of the clients that "
    "answer, sees a client's message alone: then only the client's own share of the noise, of standard deviation "
    "{share:.6g}, protects it, and epsilon = {alone} ({adjacency}). All at delta = {delta:g}."
)

_VOID = (
    "Aggregation: messages and shares are whole multiples of {grid:g}, added modulo 2^{bits}. Messages of norm "
    "{bound:g} are rounded to the grid first, and the rounded bound {rounded:.9g} is charged. Every client adds "
    "Gaussian noise of standard deviation {share:.6g}, so that any {honest} shares have at least the noise above; more "
    "answers give more noise, which is not credited. A round with fewer than {least} answers, or with a sum beyond "
    "{limit:g} in some coordinate, is void: all clients keep their earlier states, and it is charged all the same."
)

_SIMULATED_SUMS = (
    "Simulated: one process computed all messages and added the clients' integer shares. There were no masks, no keys "
    "and no helpers. A deployment with secure aggregation would release the same sums."
)

_DEPLOYED_SUMS = (
    "Masks: every message was masked on its client, for {helpers} that the client's own policy pins, and every client "
    "in a sum signed its thresholds, its share of the noise, the instructions and the model. A helper answers once "
    "about a round, for the clients in its own list. A helper that does not answer makes a round void."
)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Choices that only a simulation may make, for its statement.

    Args:
        clock: True if a virtual clock decides which clients are in time.
        fused: True if one noise vector was drawn for the sum of a round's messages, instead of one for each client.
    """

    clock: bool = False
    fused: bool = False


_COMPOSED = (
    "Promise to quote: before this run, the same clients answered {analyses}, whose results it used. Together, against "
    "the adversary below: epsilon = {epsilon} at delta = {delta:g} ({composition}). The promise above covers this run "
    "alone. Sampling is not credited to the analyses."
)


def with_analyses(plan: PrivacyPlan | None, analyses: Sequence[str] | None, mu: float | None) -> tuple[Record, str]:
    """Return the guarantee of a run together with the analyses that it used, for JSON and as a paragraph.

    Args:
        plan: The run's plan.
        analyses: Names of the analyses; None for none.
        mu: See `PrivacyPlan.with_analyses`.

    Returns:
        An empty table and text if there are no analyses, or the run has no guarantee. `quoted` puts the paragraph in
        its place.
    """
    if plan is None or not plan.private or analyses is None or mu is None:
        return {}, ""
    epsilon, delta, composition = plan.with_analyses(mu)
    finite = math.isfinite(epsilon)
    table: Record = {"analyses": list(analyses), "mu": mu, "epsilon": epsilon if finite else None, "delta": delta}
    table["composition"] = composition
    facts = {"epsilon": rounded_up(epsilon) if finite else "infinite", "delta": delta, "composition": composition}
    text = _COMPOSED.format(analyses=" and ".join(analyses), **facts)
    promise = {**table, "adversary": plan.adversary, "adjacency": plan.adjacency, "unit": plan.unit}
    return {"with_analyses": promise}, _fill(text)


def quoted(statement: str, paragraph: str) -> str:
    """Return a statement with the paragraph of `with_analyses`, if not empty, right after its promise."""
    if not paragraph:
        return statement
    promise, adversary, rest = statement.partition("\n\nAdversary:")
    return f"{promise}\n\n{paragraph}{adversary}{rest}"


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
    """Return the statement of a run.

    Args:
        plan: The privacy plan; None for a run without a guarantee.
        method: The method's name, as in `[method]`.
        randomness: The source of noise and cohorts: `seeded` or `system`.
        deployed: True if real devices take part.
        simulated: Choices that only a simulation may make; None if there are none.
        data: The origin of the examples; None if it is not known here.
        recorded: True if the run writes a run directory; the statement then lists every file.
        evaluated: True if clients evaluate models and report the metrics.
        app: The source of the code that real clients run: `fixed` if their nodes may fix it, `supplied` if the server
            may send it; None in simulations, which have no attacker.
        size: Number of parameters, to warn if the noise drowns the signal; None if it is not known.

    Returns:
        Paragraphs of plain text; no epsilon appears in them without its adversary.
    """
    for name, value, kind in (
        ("plan", plan, PrivacyPlan),
        ("simulated", simulated, Simulated),
        ("data", data, DataFacts),
    ):
        if value is not None and not isinstance(value, kind):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(name, f"a {kind.__name__}, or None", shown(value), f"Give {name} such an object")
    _check_words(randomness, app, size)
    for name, value in (("deployed", deployed), ("recorded", recorded), ("evaluated", evaluated)):
        true_or_false(name, value)
    if plan is None:
        return f"Privacy statement for {method}\n\n{_NOT_PRIVATE}\n"
    if not plan.private:
        return f"Privacy statement for {method}\n\n{_fill(_NO_NOISE.format(multiplier=plan.noise_multiplier))}\n"
    not_covered = [*_NOT_COVERED, *((_SEEDED,) if randomness == "seeded" else ()), *(_DEPLOYED if deployed else ())]
    not_covered += [*_scored_items(data), *([_EVALUATED_ITEM] if evaluated else [])]
    not_covered += [_ROLLED_BACK] if app else []
    trust, unit, simulated = plan.trust_rules, unit_of(plan.unit), simulated or Simulated()
    noise = _SAME_NOISE if plan.aggregation is None else _ENOUGH_SHARES
    secret = _SECRET.format(noise=noise) + (_SECRET_COHORTS if plan.amplification else "")
    paragraphs = [
        f"Privacy statement for {method}",
        _fill(_promise(plan)),
        _fill(trust.who(plan.sampling.most)),
        *([_fill(_WHOSE_APP[app])] if app and not trust.trusts_server else []),
        _fill(unit.over(plan.rounds)),
        _fill(unit.neighbors[plan.adjacency]),
        _fill(_cohorts(plan)),
        *([_fill(_CLOCK + (_IN_TIME if plan.sampling.draws_cohorts else ""))] if simulated.clock else []),
        _fill(_mechanism(plan) if plan.record is None else _mechanism_of_records(plan, plan.record)),
        *([] if plan.record is None else [_fill(_whole_clients(plan))]),
        *_about_sums(plan, masked=deployed or app is not None),
        *([_fill(_FUSED)] if simulated.fused and trust.clients_add_noise else []),
        *([_fill(f"Use: {drowned}")] if size and (drowned := signal_warning(plan, size)) else []),
        *_about_data(data, deployed=deployed, examples=plan.record is not None),
        *([_fill(secret)] if deployed and randomness == "system" else []),
        f"Accountant: {plan.accountant}; composition over rounds is {'fully ' if plan.filtered else ''}adaptive.",
        _listed("Not covered", not_covered),
        *([_listed(_FILES, _recorded(data, outputs_of(deployed=deployed)))] if recorded else []),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _check_words(randomness: str, app: str | None, size: int | None) -> None:
    """Raise UserError for another source of noise or of an app: its sentences would be missing in the statement."""
    one_of("randomness", randomness, ("seeded", "system"))
    if app is not None:
        one_of("app", app, ("fixed", "supplied"))
    if size is not None:
        whole_from("size", size, 0, "Give the number of trained parameters")


def _about_sums(plan: PrivacyPlan, *, masked: bool) -> list[str]:
    """Return paragraphs on secure aggregation: its numbers, its adversaries, and whether it is simulated."""
    terms, sums = plan.aggregation, plan.sums
    if terms is None or sums is None:
        return []
    against = {one["name"]: one for one in plan.adversaries()}
    epsilons = {name: _in_words(one["epsilon"]) for name, one in against.items()}
    named = "the helper" if terms.helpers == 1 else f"{terms.helpers} helpers"
    helpers = "the helper" if terms.helpers == 1 else f"all {terms.helpers} helpers"
    adversaries = _ADVERSARIES.format(
        honest=terms.colluders,
        colluders=epsilons["colluders"],
        sums=epsilons["sums"],
        all_helpers=helpers,
        puppets=terms.least_survivors - 1,
        share=sums.share_stddev,
        alone=epsilons["all-helpers"],
        adjacency=against["all-helpers"]["adjacency"],
        delta=plan.delta,
    )
    aggregation = _VOID.format(
        grid=sums.step,
        bits=(2 * HALF_MODULUS).bit_length() - 1,
        bound=plan.l2_bound,
        rounded=sums.l2_bound,
        share=sums.share_stddev,
        honest=terms.honest,
        least=terms.least_survivors,
        limit=sums.limit * sums.step,
    )
    how = _DEPLOYED_SUMS.format(helpers=named) if masked else _SIMULATED_SUMS
    return [_fill(aggregation), _fill(adversaries), _fill(how)]


def _in_words(epsilon: float | None) -> str:
    return "infinite" if epsilon is None else rounded_up(epsilon)


def _about_data(data: DataFacts | None, *, deployed: bool, examples: bool) -> list[str]:
    """Return paragraphs on the clients (of a simulation), and on the examples that models are scored on."""
    if data is None:
        return []
    paragraphs = [] if deployed else [(_CLIENTS_OF_EXAMPLES if examples else _CLIENTS)[data.clients]]
    if data.asked:
        paragraphs.append(_ASKED.format(questions="; ".join(data.asked), weight=data.weight))
    else:
        paragraphs.append(_TESTED[data.test].format(scores=", ".join(f"test_{score}" for score in data.scores)))
    if data.validation is not None and data.scores:
        scores = ", ".join(f"validation_{score}" for score in data.scores)
        ending = _HELD_OUT_OF_CLIENTS.format(scores=scores) if data.validation == "within" else ""
        ending = ending.replace("are protected together", "are protected one by one") if examples else ending
        paragraphs.append(_HELD_OUT.format(whose=_WHOSE[data.validation]) + ending)
    if data.reported:
        paragraphs.append(_REPORTED.format(values=", ".join(data.reported)))
    return [_fill(paragraph) for paragraph in paragraphs]


def _scored_items(data: DataFacts | None) -> list[str]:
    if data is None or not data.scores:
        return []
    return [*([_TESTED_ITEM] if data.test == "within" else []), *([_HELD_OUT_ITEM] if data.validation else [])]


def files_in_words(names: Collection[str]) -> str:
    """Return a paragraph on the files that a run of an app writes, with their release status and content."""
    return _listed(_FILES, _recorded(None, [one for one in outputs_of(deployed=False) if one.name in names]))


def _recorded(data: DataFacts | None, outputs: Sequence[Output]) -> list[str]:
    """Return the files that a run writes, with their release status and content; the released ones come first."""
    listed = [_recorded_file(output) for output in outputs]
    last = sum(output.kind is not Kind.OWNER for output in outputs)
    unprotected = ["released, not covered: seconds, clients_per_second and execution in summary.json: timings"]
    if data is not None and data.not_covered:
        where = "rounds.jsonl, summary.json, curves.png and trackers, if not_covered names them"
        unprotected.append(f"released, not covered: {', '.join(data.not_covered)} in {where}")
    return [*listed[:last], *unprotected, *listed[last:]]


def _recorded_file(output: Output) -> str:
    return f"{output.kind.value}: {output.name}, {output.about}"


def _listed(title: str, items: Sequence[str]) -> str:
    return f"{title}:\n" + "\n".join(_fill(f"* {item};", hang=2) for item in items).rstrip(";") + "."


def _promise(plan: PrivacyPlan) -> str:
    epsilon, against = rounded_up(plan.epsilon), "the adversary below"
    warning = delta_warning(plan)
    weak = "" if warning is None else f" WARNING: {warning}"
    return (
        f"Promise: against {against}, the run is (epsilon, delta)-differentially private with epsilon = {epsilon} at "
        f"delta = {plan.delta:g}, for each {unit_of(plan.unit).one}.{weak}"
    )


def rounded_up(epsilon: float) -> str:
    """Return epsilon rounded up to four digits."""
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
    if plan.noise is not None:
        return (
            f"Mechanism: a message has l2 norm at most {plan.l2_bound:g}, so one client moves a sum of messages by at "
            f"most {plan.l2_sensitivity:g}. "
            f"{plan.noise.how(plan.noise_stddev, plan.l2_sensitivity, sampling, plan.rounds)} {_grid(plan)} Sums are "
            f"divided by {sampling.divisor}."
        )
    if plan.filtered:
        return _FILTERED.format(
            bound=plan.l2_bound,
            sensitivity=plan.l2_sensitivity,
            rounds=plan.rounds,
            mu=plan.gaussian_dp_mu,
            rho=plan.zcdp_rho,
            multiplier=plan.noise_multiplier,
            divisor=sampling.divisor,
        )
    return (
        f"Mechanism: a message has l2 norm at most {plan.l2_bound:g}, so one client moves it, or a sum of messages, "
        f"by at most {plan.l2_sensitivity:g}{sampling.moved(plan.trust_rules)}. Gaussian noise of standard deviation "
        f"{plan.noise_stddev:.6g} per coordinate is added to {plan.trust_rules.noised} ({plan.noise_multiplier:.6g} "
        f"times the sensitivity), in {plan.rounds} {_turns(plan)}. {_grid(plan)} Sums are divided by "
        f"{sampling.divisor}."
    )


def _turns(plan: PrivacyPlan) -> str:
    """Return the word for the plan's rounds."""
    return plural(plan.sampling.turns.removesuffix("s"), plan.rounds)


_FILTERED = (
    "Mechanism: a message has l2 norm at most {bound:g}, so one client moves a sum of messages by at most "
    "{sensitivity:g}. Gaussian noise is added to the sum. A controller chooses the noise of each round, and sees "
    "nothing but earlier noised sums and public numbers. A privacy filter charges each round before it begins, and "
    "ends the run before the sum of the squares of sensitivity over standard deviation exceeds the square of mu = "
    "{mu:.6g} (rho = {rho:.6g} in terms of zCDP). So the promise holds for any controller; it is fixed before the run"
    " and stays the same if the run ends early. There are at most {rounds} rounds: constant noise of {multiplier:.6g}"
    " times the sensitivity would allow all of them. No amplification by sampling is claimed. Noise is sampled "
    "exactly, and every noised number is released as a multiple of a power of two that follows from the noise of its "
    "round. So the promise holds for the bits that a computer releases, and sampling the noise adds nothing to "
    "epsilon or delta. Sums are divided by {divisor}."
)

_ROUTES = {
    "memory": "Clients remember their messages without noise, so an example of one round also changes later messages. "
    "Over all {rounds} rounds, one example moves a client's messages together by at most {sensitivity:g} (Euclidean "
    "norm). Gaussian noise of standard deviation {stddev:.6g} per coordinate is added to {noised}: {multiplier:.6g} "
    "times that sensitivity.",
    "feedback": "In messages, gradients are clipped once more, to {clip_norm:g}. Clients remember the parts cut off "
    "and send them in later rounds, at most {feedback_clip:g} a round, so an example of one round also changes later "
    "messages. Over all {rounds} rounds, one example moves a client's messages together by at most {sensitivity:g} "
    "(Euclidean norm). Gaussian noise of standard deviation {stddev:.6g} per coordinate is added to {noised}: "
    "{multiplier:.6g} times that sensitivity.",
    "fresh": "One example moves a message by at most {sensitivity:g}. Gaussian noise of standard deviation "
    "{stddev:.6g} per coordinate is added to {noised} ({multiplier:.6g} times the sensitivity), in {rounds} {turns}.",
    "steps": "In a round, the local steps of a client use {steps} sums of bounded gradients. Gaussian noise of "
    "standard deviation {stddev:.6g} per coordinate is added to each, before the division: {multiplier:.6g} times the "
    "sensitivity {sensitivity:g} of the sum. Everything after that, including the message, is computed from the "
    "noised sums.",
}

_RESTARTS = (
    " This sum is sent at restarts: in the first round and every {period} rounds. In other rounds, the change of each "
    "gradient since the last round's model is clipped instead, to a bound that follows from the two models, which are "
    "public. Messages are in units of their round's bound.{weighted}"
)
_WEIGHTED = (
    " At restarts they are {weight:g} times as long, so that a restart costs as much as {cost:g} other rounds; the "
    "sensitivity below is that of other rounds."
)

_BATCHES = (
    " Each example is in a batch independently with probability {rate:g}, in secret, and sums are divided by the "
    "expected size of the batch, never by the actual one. Epsilon relies on the adversary not knowing the batches."
)

_GRID_OF_STEPS = (
    "Noise is sampled exactly, and every noised sum is a multiple of {grid:g}. So the promise holds for the bits that "
    "a computer releases, which follow from these sums, and sampling the noise adds nothing to epsilon or delta."
)

_COUNTED = (
    " Sampling of clients is credited only as the number of rounds of a client, because its other examples may show "
    "whether it takes part, or by the promise of the same noise to whole clients (replace): the smaller epsilon is "
    "stated."
)


def _mechanism_of_records(plan: PrivacyPlan, record: RecordBound) -> str:
    terms = record.terms
    how = "clipped" if terms.normalization is None else "smoothly normalized"
    whose = (
        f"{terms.examples}, a public number"
        if terms.declared
        else f"the client's number of examples, which is public ({terms.examples} for the client with the fewest)"
    )
    found = (
        f"Mechanism: the gradient of each example is {how} to a norm of at most {terms.bound:g}; a gradient that is "
        f"not finite counts as zero. The sum of a client's gradients is divided by {whose}."
    )
    numbers = {"rounds": plan.rounds, "sensitivity": plan.l2_sensitivity, "stddev": plan.noise_stddev}
    numbers |= {"noised": plan.trust_rules.noised, "multiplier": plan.noise_multiplier, "steps": terms.steps}
    if record.period is not None:
        weight = record.restart_weight
        weighted = "" if weight == 1.0 else _WEIGHTED.format(weight=weight, cost=weight**2)
        found += _RESTARTS.format(period=record.period, weighted=weighted)
    numbers |= {"clip_norm": record.clip_norm, "feedback_clip": record.feedback_clip}
    words = _ROUTES["feedback" if record.feedback_clip is not None else record.route]
    found += " " + words.format(**numbers, turns=_turns(plan))
    found += _BATCHES.format(rate=terms.rate) if terms.rate < 1.0 else ""
    found += _COUNTED if plan.amplification else ""
    released = _GRID_OF_STEPS.format(grid=plan.release_grid) if record.route == "steps" else _grid(plan)
    return f"{found} {released} Sums of messages are divided by {plan.sampling.divisor}."


def _whole_clients(plan: PrivacyPlan) -> str:
    """Return the promise of the same noise to whole clients."""
    whole = plan.of_clients()
    if whole is None or not whole.private:
        return "Whole clients: nothing is promised for all examples of a client together."
    return (
        f"Whole clients: the same noise also promises epsilon = {rounded_up(whole.epsilon)} at delta = {plan.delta:g} "
        f"for all examples of a client together ({whole.adjacency}), against the same adversary. Above 10 or so, such "
        "an epsilon means little: facts about a client as a whole may show."
    )


def _grid(plan: PrivacyPlan) -> str:
    return (
        f"Noise is sampled exactly, and every noised number is released as a multiple of {plan.release_grid:g}. So the "
        "promise holds for the bits that a computer releases, and sampling the noise adds nothing to epsilon or delta."
    )


def _fill(text: str, hang: int = 0) -> str:
    return textwrap.fill(" ".join(text.split()), width=100, subsequent_indent=" " * hang)
