"""An audit: attack an experiment once, judge its privacy guarantee, and write a report."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fedpriv.audit.attack import bytes_needed, start_attack
from fedpriv.audit.canaries import Canaries, draw_canaries
from fedpriv.audit.evidence import attack_central, attack_local
from fedpriv.audit.records import with_weights
from fedpriv.audit.verdict import CONVICTION, Findings, judge
from fedpriv.audit.words import claim_of, in_words, knowledge_of
from fedpriv.checks import a_path, an_object, is_real, shown, whole_from, whole_within
from fedpriv.errors import UserError, has_extra
from fedpriv.experiment.build import Experiment, assemble, check_device
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.execution import LOCAL_ENGINES, LocalEngine
from fedpriv.experiment.run_directory import RunDirectory, jsonable
from fedpriv.files import write_atomically
from fedpriv.privacy import PrivacyPlan, trust_of
from fedpriv.privacy.released import OWNER_ONLY
from fedpriv.tables import Record
from fedpriv.tasks.local_work import DPSGD
from fedpriv.version import __version__

__all__ = ["AUDIT_FILE", "PICTURE_FILE", "Against", "AuditChoice", "audit_experiment", "run_audit"]

Against = Literal["plan", "all-helpers"]
AUDIT_FILE, PICTURE_FILE = "audit.json", "audit.png"
# With fewer canaries, the coin flips might leave nothing to compare.
MIN_CANARIES, MAX_CANARIES = 20, 100_000
_MIN_SEEN = 5
_ALL_HELPERS = "the server together with all helpers, who see every message and know whose it is"
# Share of a canary's noise that the other canaries may add before the report mentions it.
_CROWDED = 0.1


@dataclass(frozen=True, kw_only=True)
class AuditChoice:
    """The options of an attack.

    Args:
        canaries: Number of canaries that take part; under add-or-remove, on average.
        confidence: Confidence of the lower bounds, in (0.5, 1).
        seed: Seed of the canaries. Different seeds are different attacks on the same run.
        engine: `auto`, `loop` or `vectorized`.
        device: The device that computes gradients.
        against: `plan` for the adversary of the plan, or `all-helpers` for the server with all helpers of secure
            aggregation, who see each client's message with its own share of the noise.

    Raises:
        UserError: If a number is out of range, or the engine is unavailable in audits.
    """

    canaries: int = 300
    confidence: float = 0.95
    seed: int = 0
    engine: LocalEngine = "auto"
    device: str = "cpu"
    against: Against = "plan"

    def __post_init__(self) -> None:
        whole_within("--canaries", self.canaries, MIN_CANARIES, MAX_CANARIES, "Choose a few hundred")
        if not is_real(self.confidence) or not 0.5 < self.confidence < 1.0:
            raise UserError(
                "--confidence",
                "above 0.5 and below 1",
                shown(self.confidence),
                "Set --confidence to a number such as 0.95",
            )
        whole_from("--audit-seed", self.seed, 0, "Set --audit-seed to a number such as 1")
        if self.against not in get_args(Against):
            raise UserError("--against", " or ".join(get_args(Against)), repr(self.against), "Set it to plan")
        if self.engine not in LOCAL_ENGINES:
            remedy = "Use --engine loop, which audits the other engines as well: their sums are bit-identical"
            raise UserError("--engine", " or ".join(LOCAL_ENGINES), repr(self.engine), remedy)


def run_audit(
    config: Config | Path | str,
    out: Path | str,
    choice: AuditChoice | None = None,
    *,
    data_root: Path | None = None,
    watch: Callable[[int], None] = lambda _: None,
) -> Record:
    """Attack the experiment with canary clients, write `audit.json` and `audit.png`, and return the former.

    Both files are readable by their owner only. The picture is left out if the extra `report` is not installed.

    Args:
        config: The experiment, or the path of its TOML file.
        out: The folder for both files; must not contain an audit already.
        choice: The options of the attack; None for the defaults.
        data_root: The folder of the data sets; None uses the environment's setting.
        watch: Called with the number of every finished round.

    Raises:
        UserError: If the experiment has no guarantee to attack, or audits do not support it.
    """
    choice, directory = choice or AuditChoice(), RunDirectory(a_path("out", out))
    an_object("choice", choice, "canaries", "fedpriv.audit.AuditChoice()")
    data_root = None if data_root is None else a_path("data_root", data_root)
    config = config if isinstance(config, Config) else load_config(config)
    _refuse_what_is_not_offered(config)
    check_device(choice.device)
    with directory.locked():
        if directory.file(AUDIT_FILE).exists():
            raise UserError(str(directory.path), "a folder without an audit", AUDIT_FILE, "Choose another --out")
        experiment = assemble(config, device=choice.device, data_root=data_root)
        findings, record = audit_experiment(experiment, choice, watch)
        contents: dict[str, bytes | str] = {AUDIT_FILE: json.dumps(jsonable(record), indent=2) + "\n"}
        if has_extra("report"):  # otherwise the command line suggests the extra
            from fedpriv.audit.picture import plot_audit

            contents = {PICTURE_FILE: plot_audit(findings, record), **contents}
        for name, content in contents.items():
            # The noise is that of the run without an audit, and that run's epsilon does not cover a second release.
            write_atomically(directory.file(name), content, OWNER_ONLY)
    return record


def audit_experiment(
    experiment: Experiment, choice: AuditChoice, watch: Callable[[int], None] = lambda _: None
) -> tuple[Findings, Record]:
    """Attack an experiment; return the findings and the contents of `audit.json`. Writes no files.

    Args:
        experiment: The experiment to attack.
        choice: The options.
        watch: See `run_audit`.
    """
    plan = _promise_of(experiment, choice.against)
    canaries = _draw(experiment, plan, choice)
    with start_attack(experiment, canaries, choice.engine) as attack:
        evidence = (attack_local if plan.trust_rules.shows_messages else attack_central)(attack, watch)
        engine = attack.clients.name
    findings = judge(canaries, evidence, plan, choice.confidence)
    record = _record(experiment, plan, choice, canaries, findings) | {"engine": engine}
    return findings, {**record, "words": in_words(record)}


def _refuse_what_is_not_offered(config: Config) -> None:
    if config.privacy is None:
        raise UserError(
            "[privacy]", "a guarantee to attack", "a non-private config", "Add [privacy] with an epsilon to audit it"
        )
    if config.training.rounds < 1:
        raise UserError(
            "training.rounds", "at least 1 in an audit", config.training.rounds, "Set training.rounds to 1 or more"
        )
    if config.controller is not None:
        remedy = "Remove [controller] with -s controller=: constant noise spends the same budget"
        expected = "no such table in an audit: its scores weigh all rounds alike"
        raise UserError("[controller]", expected, "a controller", remedy)
    if isinstance(config.local, DPSGD) and not trust_of(config.privacy.trust).shows_messages:
        expected = '"local" in an audit of "dp-sgd": in a sum, the noise of all clients\' steps hides the canaries'
        remedy = "Audit the same plan with -s privacy.trust=local"
        raise UserError("privacy.trust", expected, repr(config.privacy.trust), remedy)
    if isinstance(config.local, DPSGD) and config.local.ascent > 0.0:
        expected = "0 in an audit: the first gradient of a step is in no message"
        raise UserError("local.ascent", expected, config.local.ascent, "Audit the same plan with -s local.ascent=0")
    if config.devices is not None:
        remedy = "Remove [devices] and [schedule] with -s devices= -s schedule="
        raise UserError("[devices]", "no [devices] table in an audit", "a virtual clock", remedy)


def _promise_of(experiment: Experiment, against: Against) -> PrivacyPlan:
    plan = experiment.plan
    if plan is None or not plan.private:
        remedy = "Set privacy.epsilon: without noise there is no guarantee to attack"
        raise UserError("privacy.noise_multiplier", "noise that gives a finite epsilon", "a run without noise", remedy)
    if against == "plan":
        return plan
    if plan.sums is None:
        remedy = 'Remove the option, or audit a plan with privacy.trust = "aggregator"'
        raise UserError("--against", f'plan with privacy.trust = "{plan.trust}"', against, remedy)
    return plan.against_all_helpers()


def _draw(experiment: Experiment, plan: PrivacyPlan, choice: AuditChoice) -> Canaries:
    """Return the candidates of an audit, if they fit in memory."""
    size, rounds = experiment.population.task.layout.size, experiment.config.training.rounds
    needed, room = bytes_needed(size, rounds, 2 * choice.canaries), _memory()
    if needed > room:
        remedy = "Lower --canaries, training.rounds or the model's size"
        raise UserError("--canaries", f"an attack within {room / 1e9:.1f} GB", f"{needed / 1e9:.1f} GB", remedy)
    drawn = draw_canaries(
        seed=choice.seed,
        count=choice.canaries,
        size=size,
        rounds=rounds,
        sampling_prob=experiment.server.sampling.hiding_prob,
        separation=experiment.server.sampling.separation,
        replace=plan.adjacency == "replace",
        local=plan.trust_rules.shows_messages,
    )
    canaries = with_weights(drawn, experiment)
    if len(canaries.seen) < _MIN_SEEN:
        expected = f"at least {_MIN_SEEN} canaries that take part in some round"
        raise UserError("--canaries", expected, len(canaries.seen), "Raise --canaries or training.rounds")
    return canaries


def _crowding(experiment: Experiment, plan: PrivacyPlan, canaries: Canaries) -> float:
    """Return the variance that other canaries add to a score, over the noise's; 0 if messages are seen one by one."""
    if plan.trust_rules.shows_messages:
        return 0.0
    longest = plan.l2_bound if plan.record is None else plan.record.alone()
    bound = longest / plan.noise_stddev
    sampled = experiment.server.sampling.sampling_prob * len(canaries.planted)
    return sampled * bound**2 / experiment.population.task.layout.size


def _memory() -> float:
    """Return this machine's memory in bytes."""
    return float(os.sysconf("SC_PAGE_SIZE")) * float(os.sysconf("SC_PHYS_PAGES"))


def _record(
    experiment: Experiment, plan: PrivacyPlan, choice: AuditChoice, canaries: Canaries, findings: Findings
) -> Record:
    """Return the contents of `audit.json`, without its words."""
    best, config = findings.best, experiment.config
    taken = canaries.takes_part[canaries.seen].sum(axis=1)
    hidden = experiment.server.sampling.hiding_prob < 1.0
    return {
        "verdict": "guilty" if findings.guilty else "not guilty",
        "epsilon_claimed": findings.claimed,
        "epsilon_estimate": best.estimate,
        "epsilon_lower": best.lower,
        "confidence": choice.confidence,
        "verdict_confidence": CONVICTION,
        "canaries": choice.canaries,
        "unit": plan.unit,
        "against": choice.against,
        "adversary": _ALL_HELPERS if choice.against == "all-helpers" else plan.adversary,
        "claim": claim_of(hidden, plan),
        "knowledge": knowledge_of(plan, hidden),
        "epsilon_promised": plan.epsilon,
        "trust": config.privacy and config.privacy.trust,
        **{key: getattr(plan, key) for key in ("delta", "adjacency", "noise_multiplier", "noise_stddev")},
        "canaries_seen": len(canaries.seen) + len(canaries.coordinates) + len(canaries.steady),
        "candidates": len(canaries.coins),
        "participations": {"mean": float(taken.mean()), "min": int(taken.min()), "max": int(taken.max())},
        "scores": [finding.as_dict() for finding in findings.scores],
        "best_score": best.name,
        "final_model": dict(zip(("epsilon_estimate", "epsilon_lower"), findings.final_model, strict=True)),
        "without_cohorts": None if findings.without_cohorts is None else {"epsilon_estimate": findings.without_cohorts},
        "crowded": _crowding(experiment, plan, canaries) > _CROWDED,
        "null": {"directions": len(findings.null), "deviation": float(findings.null.std())},
        "name": config.name,
        "method": config.method_name,
        "population": experiment.population.federation.population,
        "parameters": experiment.population.task.layout.size,
        "rounds": config.training.rounds,
        "seed": config.seed,
        "audit_seed": choice.seed,
        "digest": config.digest,
        "version": __version__,
    }
