"""Seeded faults, each of which some test must kill.

    python tests/mutants.py [WORDS ...] [--jobs N] [--tested]   all faults, or those whose name holds one of the words

Each fault is a change of one place in the product. The program copies the working tree to a temporary folder, puts
one fault in, runs the tests named beside it there, and reports a fault that no test notices. Exit code 1 if any
survives, or if tests could not run. `tests/core/test_core_mutants.py` checks with every test run that the places still
exist.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
KILLERS = ROOT / "tests" / "killers.json"
"""Of each fault, the test that noticed it the last time: it is tried first, which makes a run of all much faster."""


class Mutant(NamedTuple):
    """One fault: its name, the file, the text there now, the faulty text, and the tests that must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


DATA = "tests/data/test_data_shifts.py tests/data/test_data_validation.py tests/experiment/test_experiment_data.py"
CORE = "tests/core tests/aggregation tests/mechanisms tests/methods"
ENGINES, EXPERIMENT = "tests/engines", "tests/experiment/test_experiment_run.py"
PRIVACY, FLOWER, CONFIG = (
    "tests/privacy",
    "tests/flower --ignore=tests/flower/test_flower_run.py",
    "tests/experiment/test_experiment_config.py",
)
ROUNDS, NORMEC, NOISE = "fedpriv/rounds.py", "fedpriv/methods/alpha_normec.py", "fedpriv/mechanisms/noise.py"
STEP, METHOD = "fedpriv/engines/in_place.py", "fedpriv/methods/base.py"
LOCAL, OPTIMIZERS = "tests/tasks/test_tasks_local_work.py", "tests/methods/test_methods_server_optimizers.py"
ENGINES_TESTED = "tests/experiment/test_experiment_engines.py"
RAY, GRID = "tests/engines/test_engines_ray.py", "tests/flower/test_flower_grid.py"
PER_EXAMPLE, BY_EXAMPLE = "fedpriv/tasks/per_example", "tests/tasks/test_tasks_per_example.py"
BOUNDING, PLAN, ACCOUNTING = "fedpriv/bounding.py", "fedpriv/privacy/plan.py", "fedpriv/privacy/accounting.py"

MEMBER, CHAOS = "tests/deploy/test_deploy_member.py", "tests/deploy/test_deploy_chaos.py"
GUARD, LEDGER, PROMISE = (
    "tests/flower/test_flower_guard.py",
    "tests/deploy/test_deploy_ledger.py",
    "tests/deploy/test_deploy_promise.py",
)
SUMS, AGGREGATION = "tests/engines/test_engines_secure_sum.py", "tests/privacy/test_privacy_aggregation.py"
AGGREGATED, SHARES = "fedpriv/privacy/aggregation.py", "fedpriv/mechanisms/shares.py"
SECURE_DEPLOYED = "tests/deploy/test_deploy_sums.py"
COORDINATOR, APPS = "tests/deploy/test_deploy_coordinator.py", "tests/deploy/test_deploy_app.py"

SCHEDULES, TIMELINE = "fedpriv/clock/schedules.py", "fedpriv/clock/timeline.py"
TIMED, CHARGED = "tests/clock/test_clock_timeline.py", "tests/clock/test_clock_privacy.py"
CLOCKED = "tests/clock/test_clock_run.py"
SCHEDULES, TIMELINE = "fedpriv/clock/schedules.py", "fedpriv/clock/timeline.py"
TIMED, CHARGED = "tests/clock/test_clock_timeline.py", "tests/clock/test_clock_privacy.py"
CLOCKED = "tests/clock/test_clock_run.py"
SCORING, TUNED = "fedpriv/sweeps/tuning_score.py", "tests/sweeps/test_sweeps_tuning.py"
AUDITED, ATTACKED = "tests/audit/test_audit_faults.py", "tests/audit/test_audit_run.py"

GAUSSIAN, TAILS, STREAMS = "fedpriv/mechanisms/gaussian.py", "fedpriv/mechanisms/tails.py", "fedpriv/streams.py"
SAMPLING, TRUST = "fedpriv/privacy/sampling.py", "fedpriv/privacy/trust.py"
SAMPLED, STREAMED = "tests/mechanisms/test_mechanisms_gaussian.py", "tests/core/test_core_streams.py"
SPENDING, SPENT = "fedpriv/report/spent.py", "tests/report/test_report_spent.py"
SAMPLED, STREAMED = "tests/mechanisms/test_mechanisms_gaussian.py", "tests/core/test_core_streams.py"
SPENDING, SPENT = "fedpriv/report/spent.py", "tests/report/test_report_spent.py"
SPENDING_TUNED = "fedpriv/report/spent_tuning.py"
PROMISED = "tests/privacy/test_privacy_promises.py"

NEIGHBORS, RELEASED = "tests/experiment/test_experiment_neighbors.py", "tests/experiment/test_experiment_released.py"
FAILURES, TRAINED = "tests/flower/test_flower_failures.py", "tests/flower/test_flower_trained.py"
PACED = "tests/flower/test_flower_pace.py"

RECORDS = "fedpriv/privacy/records.py"
OF_RECORDS = "tests/privacy/test_privacy_records.py"
OF_EXAMPLES = "tests/engines/test_engines_examples.py"
OF_ESTIMATORS, DIFFERENCES = "tests/engines/test_engines_estimators.py", "fedpriv/methods/difference_estimators.py"
TASKED, SCORED = "tests/tasks/test_tasks_kinds.py", "tests/experiment/test_experiment_tasks.py"

SECURE = "fedpriv/secure"
SECURE_MASKS, SECURE_ROUND = "tests/secure/test_secure_masks.py", "tests/secure/test_secure_round.py"
SECURE_ATTACKS, SECURE_RECORD = "tests/secure/test_secure_attacks.py", "tests/secure/test_secure_record.py"

MUTANTS = [
    Mutant(
        "examples: a memory's sensitivity forgets that both data sets move",
        RECORDS,
        "min(2.0 * moved * math.sqrt(rounds) / left, trivial)",
        "min(moved * math.sqrt(rounds) / left, trivial)",
        OF_RECORDS,
    ),
    Mutant(
        "examples: damping does not matter to a memory",
        RECORDS,
        "self.beta / (1.0 - self.damping)",
        "self.beta",
        OF_RECORDS,
    ),
    Mutant(
        "examples: a round of local steps is charged as one",
        RECORDS,
        "return max(self.record.terms.steps, 1)",
        "return 1",
        OF_RECORDS,
    ),
    Mutant(
        "examples: the rates of clients and batches are multiplied",
        RECORDS,
        "rate = min(self.record.terms.rate + 2.0**-53, 1.0)",
        "rate = self._hidden * self.record.terms.rate",
        OF_RECORDS,
    ),
    Mutant(
        "examples: a hidden client counts with its expected number of rounds",
        RECORDS,
        "counts = [min(count, most) for count in range(step, most + step, step)]",
        "counts = [max(round(rounds * self._hidden), 1)]",
        OF_RECORDS,
    ),
    Mutant(
        "examples: sums are divided by the batch",
        "fedpriv/tasks/local_work.py",
        "return noised / self.terms.divisor(len(labels))",
        "return noised / max(len(labels) if batch is None else len(batch), 1)",
        OF_EXAMPLES,
    ),
    Mutant(
        "examples: memories are rounded to float32",
        "fedpriv/engines/base.py",
        "exact = self.rules.examples is not None",
        "exact = False",
        OF_EXAMPLES,
    ),
    Mutant(
        "examples: every round draws the same noise for its steps",
        ROUNDS,
        "StepNoise(self.streams, self.step_stddev, round, client)",
        "StepNoise(self.streams, self.step_stddev, 1, client)",
        OF_EXAMPLES,
    ),
    Mutant(
        "examples: the noise of a step is on another scale than the sum",
        "fedpriv/tasks/local_work.py",
        "noised = total if self.noise is None",
        "total = total * self.terms.divisor(len(labels))\n        noised = total if self.noise is None",
        OF_EXAMPLES,
    ),
    Mutant(
        "examples: a device believes the sensitivity that it is told",
        "fedpriv/deploy/device/policy.py",
        "if record != record_bound(instructions.method, record.terms):",
        "if False:",
        "tests/deploy/test_deploy_examples.py",
    ),
    Mutant(
        "examples: a client's budget ignores local steps",
        "fedpriv/deploy/device/ledger.py",
        "return math.inf if steps else",
        "return 0.0 if steps else",
        "tests/deploy/test_deploy_examples.py",
    ),
    Mutant(
        "examples: a device sends examples' messages for an operator who protects clients",
        "fedpriv/deploy/device/policy.py",
        'if terms.unit == "example" and self.accepts.unit != "example":',
        "if False:",
        "tests/deploy/test_deploy_examples.py",
    ),
    Mutant(
        "positions are averaged over the batch",
        "fedpriv/tasks/kinds.py",
        "(labels != self.ignore_index).sum(dim=1).clamp(min=1)",
        "(labels != self.ignore_index).sum(dim=1).float().mean().clamp(min=1)",
        TASKED,
    ),
    Mutant(
        "class weights are divided by their sum over the batch",
        "fedpriv/tasks/kinds.py",
        'label_smoothing=self.label_smoothing, reduction="none")',
        'reduction="none") / (1.0 if weights is None else weights[labels].mean())',
        TASKED,
    ),
    Mutant(
        "a loss that changes with other examples is accepted",
        "fedpriv/tasks/kinds.py",
        "        if not torch.allclose(first, found.detach()[0]",
        "        if False and not torch.allclose(first, found.detach()[0]",
        TASKED,
    ),
    Mutant(
        "the slope of padding in another loss",
        "fedpriv/tasks/dense.py",
        "labels.flatten(0, 1)) * weights.flatten()).sum()",
        "labels.flatten(0, 1))).sum()",
        TASKED,
    ),
    Mutant(
        "scores of single clients in a private run",
        "fedpriv/experiment/config.py",
        '    if config.privacy is not None:\n        remedy = "Remove [evaluation]',
        '    if False:\n        remedy = "Remove [evaluation]',
        SCORED,
    ),
    Mutant(
        "tuning: a metric without limits is released with noise",
        "fedpriv/sweeps/tuning.py",
        "if noise is not None and not metric.bounded:",
        "if False:",
        "tests/tasks/test_tasks_metrics.py",
    ),
    Mutant(
        "tuning: a client's undefined score ends the sum",
        SCORING,
        "worst if math.isnan(score) else score",
        "score",
        "tests/tasks/test_tasks_metrics.py",
    ),
    Mutant(
        "the largest error is the best setting",
        "fedpriv/report/analysis.py",
        "study.metric.sign * made[",
        "1.0 * made[",
        "tests/tasks/test_tasks_metrics.py",
    ),
    Mutant(
        "a policy that names tasks accepts others",
        "fedpriv/deploy/device/policy.py",
        "TASKS.name_of(config.task), self.accepts.tasks)",
        "TASKS.name_of(config.task), ())",
        SCORED,
    ),
    Mutant(
        "a server's config makes a device import what it names",
        "fedpriv/deploy/device/own_data.py",
        "    with only_known():",
        "    if True:",
        "tests/deploy/test_deploy_app.py",
    ),
    Mutant(
        "a slow client's weight is not charged",
        TIMELINE,
        "squares.charge(group.clients.tolist(), group.weight**2)",
        "squares.charge(group.clients.tolist(), 1.0)",
        CHARGED,
    ),
    Mutant(
        "a message that came too late is not charged",
        TIMELINE,
        "sent.charge(step.sent.tolist(), 1)",
        "sent.charge(step.counted.tolist(), 1)",
        CHARGED,
    ),
    Mutant(
        "a message still on its way at the end is not charged",
        SCHEDULES,
        "late = self._under_way() if done == steps else []",
        "late = []",
        CHARGED,
    ),
    Mutant(
        "a client counts twice in a step",
        TIMELINE,
        "if (counted[1:] == counted[:-1]).any():",
        "if False:",
        TIMED,
    ),
    Mutant(
        "amplification where the first answers count",
        SCHEDULES,
        "return self.over_select == 1.0",
        "return True",
        CHARGED,
    ),
    Mutant(
        "a timeline is charged by its steps",
        ACCOUNTING,
        "return self.sampling.charge(rounds, each_message=self.trust.shows_messages)",
        "return float(rounds)",
        CHARGED,
    ),
    Mutant(
        "a timeline that a removed client would change",
        SAMPLING,
        'adjacencies: ClassVar[tuple[Adjacency, ...]] = ("replace",)',
        "adjacencies: ClassVar[tuple[Adjacency, ...]] = ADJACENCIES",
        CHARGED,
    ),
    Mutant(
        "a client that waits for its step is asked again",
        SCHEDULES,
        "waiting[start].append(one.client)",
        "waiting[start].append(one.client), self._busy.discard(one.client)",
        TIMED,
    ),
    Mutant(
        "the clock says who was in a hidden cohort",
        SCHEDULES,
        "(hidden or clock.fleet.devices.keep_hours)",
        "clock.fleet.devices.keep_hours",
        TIMED,
    ),
    Mutant(
        "messages weigh by staleness although clients remember",
        SCHEDULES,
        "usual = 0.0 if memory else 0.5",
        "usual = 0.5",
        CLOCKED,
    ),
    Mutant(
        "a client that came too late moves its memory",
        "fedpriv/experiment/timing.py",
        "            parts.append((group.weight, engine.sum_messages(broadcast)))",
        "            parts.append((group.weight, engine.sum_messages(broadcast)))\n"
        "            engine.sum_messages(broadcast._replace(cohort=self.timeline.step(number).late))",
        CLOCKED,
    ),
    Mutant(
        "everybody works on the newest model",
        "fedpriv/experiment/timing.py",
        "self.kept[group.start]",
        "self.kept[max(self.kept)]",
        CLOCKED,
    ),
    Mutant(
        "a checkpoint forgets models that are worked on",
        "fedpriv/experiment/recorder.py",
        "for number, model in (older or {}).items()",
        "for number, model in {}.items()",
        CLOCKED,
    ),
    Mutant(
        "two sums of a step share their noise",
        "fedpriv/engines/fused_noise.py",
        "total.messages, broadcast.part)",
        "total.messages, 0)",
        CHARGED,
    ),
    Mutant(
        "validation examples stay with the clients",
        "fedpriv/data/validation.py",
        "return replace(_kept(dataset, ~held), validation_inputs=inputs",
        "return replace(dataset, validation_inputs=inputs",
        DATA,
    ),
    Mutant(
        "every client's inputs are shifted alike",
        "fedpriv/data/federation.py",
        "streams.source(Purpose.SHIFT, client=client)",
        "streams.source(Purpose.SHIFT)",
        DATA,
    ),
    Mutant(
        "a deployment measures its clients' data",
        "fedpriv/experiment/recorder.py",
        "if not self.deployed and not self.directory.file(HETEROGENEITY_FILE).exists():",
        "if not self.directory.file(HETEROGENEITY_FILE).exists():",
        APPS,
    ),
    Mutant(
        "absent validation changes the experiment",
        "fedpriv/experiment/config.py",
        "if self.data.validation is not None:\n            data",
        "if True:\n            data",
        DATA,
    ),
    Mutant(
        "a plan without memory serves a method with memory",
        ROUNDS,
        "if has_memory(method) and not plan.client_memory:",
        "if False:",
        CORE,
    ),
    Mutant(
        "parameters that turn zero into NaN",
        "fedpriv/checks.py",
        "if not 1e-20 <= value <= 1e20:",
        "if False:",
        CORE,
    ),
    Mutant(
        "the sum is rounded before the noise",
        ROUNDS,
        "noise, total.double(), rules.streams, round)",
        "noise, total.float().double(), rules.streams, round)",
        CORE,
    ),
    Mutant(
        "amplification of fixed-size cohorts with memory",
        SAMPLING,
        "self.sampling_prob < 1.0 and not client_memory",
        "self.sampling_prob < 1.0",
        PRIVACY,
    ),
    Mutant(
        "a resumed run changes its noise",
        "fedpriv/experiment/run_directory.py",
        'if metadata.get("promise") != promise:',
        "if False:",
        EXPERIMENT,
    ),
    Mutant(
        "another experiment's summary is returned",
        "fedpriv/experiment/run_directory.py",
        'summary.get("digest") != digest',
        "False",
        EXPERIMENT,
    ),
    Mutant(
        "a strategy is started twice under one promise",
        "strategies/method_strategy.py",
        'if hasattr(self, "agreement"):',
        "if False:",
        FLOWER,
    ),
    Mutant(
        "an unbounded message is summed",
        "strategies/method_strategy.py",
        "        if fault:",
        "        if False:",
        FAILURES,
    ),
    Mutant(
        "Flower's messages in order of arrival",
        "fedpriv/flower/server/nodes.py",
        "answer = answer_to.get(message.metadata.message_id)",
        "answer = dict(enumerate(answer_to.values())).get(len(contents) + len(failures))",
        FAILURES,
    ),
    Mutant(
        "a client's metrics leave a private run",
        "clients/mod.py",
        "    released = {} if instructions.private or (guard and not guard.releases_metrics(message)) else metrics",
        "    released = metrics",
        FLOWER,
    ),
    Mutant(
        "messages rounded to the model's number format",
        "fedpriv/flower/messages.py",
        "return {ARRAYS: self._record(vector, (form.dtype,) * len(self.dtypes))}",
        "return {ARRAYS: self._record(vector, self.dtypes)}",
        FLOWER,
    ),
    Mutant(
        "a client that lost its memory goes on",
        "fedpriv/flower/state.py",
        "if record is not None and instructions.last_round in (committed, pending):",
        "if record is not None:",
        "tests/flower/test_flower_messages.py",
    ),
    Mutant(
        "the seed of a central run goes to the clients",
        "strategies/method_strategy.py",
        "streams = rules.streams if rules.draws_secrets else None",
        "streams = rules.streams",
        FLOWER,
    ),
    Mutant(
        "no noise at the server",
        ROUNDS,
        "noisy, noise = rules.mechanism.noise(noise, total.double(), rules.streams, round)",
        "noisy = total.double()",
        CORE,
    ),
    Mutant(
        "a mechanism of noise remembers nothing",
        ROUNDS,
        "noisy, noise = rules.mechanism.noise(",
        "noisy, _ = rules.mechanism.noise(",
        "tests/mechanisms/test_mechanisms_state.py",
    ),
    Mutant(
        "a mechanism of noise begins anew with memories",
        ROUNDS,
        "return joined(self.method.init_server(state.model), noise)",
        "return self.init(state.model)",
        "tests/mechanisms/test_mechanisms_state.py",
    ),
    Mutant(
        "workers get names of classes that they cannot import",
        "fedpriv/engines/ray/host.py",
        "        cloudpickle.register_pickle_by_value(module)\n",
        "        pass\n",
        "tests/experiment/test_experiment_ray.py",
    ),
    Mutant(
        "no noise at the client",
        ROUNDS,
        "return apply_client_rule(rules.method, state, signal, release, round)",
        "return apply_client_rule(rules.method, state, signal, None, round)",
        CORE,
    ),
    Mutant("noise of the wrong size", NOISE, "rounded_noise(exact, stddev,", "rounded_noise(exact, stddev**0.5,", CORE),
    Mutant(
        "noise is not rounded to a grid",
        NOISE,
        "torch.as_tensor(np.clip(levels, -level, level).astype(np.float64) * grid)",
        "values.double() + torch.randn(values.shape, dtype=torch.float64) * stddev",
        "tests/privacy/test_privacy_floats.py",
    ),
    Mutant(
        "the grid is finer than the noise needs",
        NOISE,
        "grid = release_grid(stddev) if grid is None else grid",
        "grid = 2.0**-40",
        CORE,
    ),
    Mutant("levels are not clamped", NOISE, "np.clip(levels, -level, level)", "levels", CORE),
    Mutant(
        "experiments with one seed share their noise",
        "fedpriv/experiment/build.py",
        "streams = config.streams\n    agreed",
        "streams = SeededStreams(config.seed)\n    agreed",
        "tests/privacy/test_privacy_floats.py",
    ),
    Mutant(
        "the same noise each round",
        NOISE,
        "streams.source(purpose, *address)",
        "streams.source(purpose, 1, address[1])",
        CORE,
    ),
    Mutant(
        "the same noise for every client",
        NOISE,
        "streams.source(purpose, *address)",
        "streams.source(purpose, address[0], 0)",
        CORE,
    ),
    Mutant("clipping ignored", BOUNDING, "torch.minimum(self.clip_norm * _SHRINK / norm, ratio)", "ratio", CORE),
    Mutant("the bound is exceeded by rounding", BOUNDING, "_SHRINK = 1.0 - 2.0**-21", "_SHRINK = 1.0 + 2.0**-21", CORE),
    Mutant("plain normalization", BOUNDING, "1.0 / (self.alpha / ratio + norm)", "1.0 / norm", CORE),
    Mutant("NaN let through", BOUNDING, "torch.where(finite, vectors, 0.0).double()", "vectors.double()", CORE),
    Mutant(
        "NaN slips past the check for huge rows",
        BOUNDING,
        "ordinary = (norm < _HUGE) & (scale >= _TINY)",
        "ordinary = ~(norm >= _HUGE)",
        CORE,
    ),
    Mutant(
        "the same cohort each round",
        ROUNDS,
        "rules.streams.source(Purpose.COHORT, round)",
        "rules.streams.source(Purpose.COHORT, 1)",
        CORE,
    ),
    Mutant(
        "divided by the actual cohort",
        "fedpriv/experiment/run.py",
        "finish_round(experiment.server, state, number, total.sum)",
        "finish_round(experiment.server, state, number, "
        "total.sum * experiment.server.sampling.expected_size / max(total.messages, 1))",
        "tests/experiment",
    ),
    Mutant(
        "divided by the population",
        ROUNDS,
        "noisy / rules.sampling.expected_size",
        "noisy / rules.sampling.population",
        CORE,
    ),
    Mutant(
        "noise on both sides",
        TRUST,
        "Shares(server=0.0, client=stddev)",
        "Shares(stddev, stddev)",
        CORE,
    ),
    Mutant("noise on the wrong side", TRUST, "Shares(server=0.0, client=stddev)", "Shares(stddev, 0.0)", CORE),
    Mutant(
        "sent memory where the server adds the noise", ROUNDS, "if method.needs_client_noise and", "if False and", CORE
    ),
    Mutant(
        "noiseless memory sees the noise",
        NORMEC,
        'learned = sent if self.memory == "sent" else message',
        "learned = sent",
        CORE,
    ),
    Mutant(
        "sent memory forgets the noise",
        NORMEC,
        'learned = sent if self.memory == "sent" else message',
        "learned = message",
        CORE,
    ),
    Mutant(
        "Clip21's memory sees the noise",
        "fedpriv/methods/clip21.py",
        "remember(state.memory, message, 1.0)",
        "remember(state.memory, sent_message(message, release), 1.0)",
        CORE,
    ),
    Mutant("server factor beta over the cohort", NORMEC, "self.beta * sampling_prob", "self.beta", CORE),
    Mutant(
        "Clip21's server factor over the cohort",
        "fedpriv/methods/clip21.py",
        "remember(state.memory, mean_message, sampling_prob)",
        "remember(state.memory, mean_message, 1.0)",
        CORE,
    ),
    Mutant(
        "only clients forget",
        NORMEC,
        "memory = decayed(state.memory, self.damping, 1)\n        memory = remember(memory, mean_message",
        "memory = state.memory\n        memory = remember(memory, mean_message",
        CORE,
    ),
    Mutant("skipped rounds are not forgotten", NORMEC, "round - 1 - state.updated", "0", CORE),
    Mutant("forgets one round too many", NORMEC, "round - 1 - state.updated", "round - state.updated", CORE),
    Mutant(
        "a memory that does not start at zero",
        NORMEC,
        "ClientMemory(torch.zeros(size), torch.zeros(1))",
        "ClientMemory(torch.ones(size), torch.zeros(1))",
        CORE,
    ),
    Mutant("steps uphill", METHOD, "state.model - method.server_lr * ", "state.model + method.server_lr * ", CORE),
    Mutant(
        "server normalization always",
        NORMEC,
        "direction(memory) if self.server_normalization else memory",
        "direction(memory)",
        CORE,
    ),
    Mutant("replace counted as add-or-remove", PLAN, "REPLACE_FACTOR = 2.0", "REPLACE_FACTOR = 1.0", PRIVACY),
    Mutant(
        "amplification claimed in the local model",
        ACCOUNTING,
        "return self.trust.hides_cohorts and self.sampling",
        "return self.sampling",
        PRIVACY,
    ),
    Mutant(
        "composition forgotten",
        ACCOUNTING,
        "shift = math.sqrt(releases.charged(rounds)) / noise_multiplier",
        "shift = 1.0 / noise_multiplier",
        PRIVACY,
    ),
    Mutant(
        "Poisson replace in the wrong units",
        ACCOUNTING,
        "min(noise_multiplier * releases.sensitivity, MAX_HIDING_NOISE)",
        "min(noise_multiplier * releases.sensitivity**2, MAX_HIDING_NOISE)",
        PRIVACY,
    ),
    Mutant(
        "fixed-size replace in the wrong units",
        ACCOUNTING,
        "gone, come, other = Half(q, 1.0 + stead, 1.0), Half(q, stead, 1.0), Half(q, 1.0 + stead, 2.0)",
        "gone, come, other = Half(q, 1.0, 1.0), Half(q, stead, 1.0), Half(q, 1.0, 2.0)",
        PRIVACY,
    ),
    Mutant(
        "cohorts twice as large as accounted",
        "fedpriv/privacy/sampling.py",
        "-math.log1p(-self.sampling_prob)",
        "-math.log1p(-min(2 * self.sampling_prob, 0.999))",
        PRIVACY,
    ),
    Mutant(
        "runs with another source share their noise",
        "fedpriv/experiment/config.py",
        '("aggregation", "devices", "schedule", "sources", "task")',
        '("aggregation", "devices", "schedule", "task")',
        "tests/experiment/test_experiment_own.py",
    ),
    Mutant(
        "frozen parameters are sent and noised",
        "fedpriv/vectors.py",
        "for name, parameter in module.named_parameters() if parameter.requires_grad}",
        "for name, parameter in module.named_parameters()}",
        "tests/core/test_core_vectors.py",
    ),
    Mutant(
        "a table's numbers are scaled by what all rows hold",
        "fedpriv/data/user_files.py",
        "shift, scale = self.numeric[name]",
        "shift, scale = np.nanmean(numbers), np.nanstd(numbers) + 1e-9",
        "tests/data/test_data_user_files.py",
    ),
    Mutant(
        "rows of a data function that are not finite are taken",
        "fedpriv/data/own.py",
        "if not np.isfinite(array).all():",
        "if False:",
        "tests/experiment/test_experiment_own.py",
    ),
    Mutant(
        "an own method's messages are not measured",
        "fedpriv/rounds.py",
        "if not longest <= bound:",
        "if False:",
        "tests/experiment/test_experiment_own.py",
    ),
    Mutant(
        "figures with a bound of their own are followed",
        "fedpriv/methods/base.py",
        "or found.bounded != method.bounded:",
        "or False:",
        "tests/experiment/test_experiment_own.py",
    ),
    Mutant(
        "an own method may send another message than the released one",
        "fedpriv/rounds.py",
        "if released and not torch.equal(message, released[0]):",
        "if False:",
        "tests/experiment/test_experiment_own.py",
    ),
    Mutant(
        "an own method's messages may exceed the bound a little",
        "fedpriv/rounds.py",
        "if not longest <= bound:",
        "if not longest <= bound * (1.0 + 1e-6):",
        "tests/experiment/test_experiment_own.py",
    ),
    Mutant(
        "an own method may leave its noise out",
        "fedpriv/rounds.py",
        "if release is not None and len(bounded) != 1:",
        "if False:",
        "tests/experiment/test_experiment_own.py",
    ),
    Mutant(
        "an own model keeps what it sees",
        "fedpriv/tasks/own.py",
        "tried(torch.ones_like(example))",
        "tried(example)",
        "tests/experiment/test_experiment_own.py",
    ),
    Mutant(
        "a partial hides the file that made it",
        "fedpriv/plugins.py",
        "kind.named_in = module",
        "kind.named_in = kind.__module__",
        "tests/experiment/test_experiment_own.py",
    ),
    Mutant(
        "one client has two names",
        "fedpriv/data/own.py",
        '    if known.dtype.kind != "U":',
        "    if True:",
        "tests/data/test_data_user_files.py",
    ),
    Mutant(
        "a client's missing cells change how many clients there are",
        "fedpriv/data/user_files.py",
        'made |= {} if everyone is None else {"clients": everyone}',
        "pass",
        "tests/data/test_data_user_files.py",
    ),
    Mutant(
        "the folder of a data function makes other noise for the report",
        "fedpriv/report/spent_runs.py",
        "tables = with_bare_names({name: config[name] for name in NOISE_TABLES if name in config})",
        "tables = {name: config[name] for name in NOISE_TABLES if name in config}",
        "tests/report/test_report_spent.py",
    ),
    Mutant(
        "buffers leave un-noised",
        "fedpriv/vectors.py",
        "if layer.track_running_stats and layer.training)",
        "if False)",
        CORE,
    ),
    Mutant(
        "padding leaks into the gradient",
        "fedpriv/engines/vectorized.py",
        "weights[i, : len(r)] = 1.0 / max(len(r), 1)",
        "weights[i] = 1.0 / longest",
        ENGINES,
    ),
    Mutant(
        "every round the same minibatch",
        "fedpriv/tasks/local_work.py",
        "streams.source(Purpose.LOCAL_WORK, round, client)",
        "streams.source(Purpose.LOCAL_WORK, 1, client)",
        f"{CORE} {ENGINES}",
    ),
    Mutant(
        "pseudo-gradient with the wrong sign",
        "fedpriv/tasks/local_work.py",
        "return self._start - self.model\n",
        "return self.model - self._start\n",
        f"{CORE} {ENGINES}",
    ),
    Mutant(
        "memories lost between rounds",
        "fedpriv/engines/states.py",
        "                field.copy_(value)",
        "                pass",
        ENGINES,
    ),
    Mutant(
        "memories never move", STEP, "memory.add_(sent if rule.sent else signals, alpha=rule.beta)", "pass", ENGINES
    ),
    Mutant(
        "the memory keeps the noise that it should not",
        STEP,
        "memory.add_(sent if rule.sent else signals",
        "memory.add_(sent",
        ENGINES,
    ),
    Mutant(
        "local passes leave out the last batch",
        "fedpriv/tasks/local_work.py",
        "for start in range(0, examples, size)]",
        "for start in range(0, examples - size + 1, size)]",
        LOCAL,
    ),
    Mutant(
        "local passes of all clients counted as the longest's",
        "fedpriv/engines/vectorized.py",
        "return local.signal(model.new_tensor(steps).unsqueeze(1))",
        "return local.signal(max(steps))",
        "tests/engines/test_engines_equal.py",
    ),
    Mutant(
        "local gradients read off the rounded models",
        "fedpriv/tasks/local_work.py",
        'return self._sum if self._kind == "gradient-sum" else self._sum / steps',
        'return (self._start - self.model) / self._lr / (1 if self._kind == "gradient-sum" else steps)',
        LOCAL,
    ),
    Mutant(
        "server optimiser: nothing is remembered",
        "fedpriv/methods/server_optimizers.py",
        "return direction, joined(own, kept)",
        "return direction, joined(own, past)",
        OPTIMIZERS,
    ),
    Mutant(
        "server optimiser: Adam without its correction",
        "fedpriv/methods/server_optimizers.py",
        "if self.bias_correction else (1.0, 1.0)",
        "if not self.bias_correction else (1.0, 1.0)",
        OPTIMIZERS,
    ),
    Mutant(
        "server optimiser: clients are told of it",
        ROUNDS,
        "            method=method.client_part,\n            noise_stddev=client_stddev",
        "            method=method,\n            noise_stddev=client_stddev",
        OPTIMIZERS,
    ),
    Mutant(
        "a new key at its default is another experiment",
        "fedpriv/experiment/schema.py",
        'if field.metadata.get("absent_by_default") and',
        "if False and",
        CONFIG,
    ),
    Mutant(
        "a changed client rule is passed over",
        "fedpriv/methods/base.py",
        'if "client_rule" in vars(kind):',
        "if False:",
        ENGINES,
    ),
    Mutant(
        "a state comes back from the disk as another client's",
        "fedpriv/engines/states.py",
        "self.away[client] * self._row_bytes",
        "0 * self._row_bytes",
        ENGINES,
    ),
    Mutant(
        "clients' noise fused into too much",
        NOISE,
        "spread = stddev * math.sqrt(clients)",
        "spread = stddev * clients",
        ENGINES_TESTED,
    ),
    Mutant(
        "clients' noise fused into one client's",
        NOISE,
        "spread = stddev * math.sqrt(clients)",
        "spread = stddev",
        ENGINES_TESTED,
    ),
    Mutant(
        "noise is fused though a memory keeps it",
        "fedpriv/engines/fused_noise.py",
        "return not has_memory(rules.method) if rule is None else not rule.sent",
        "return True",
        ENGINES_TESTED,
    ),
    Mutant(
        "a run goes on under other noise",
        "fedpriv/experiment/recorder.py",
        'if self._fused else ""',
        'if False else ""',
        ENGINES_TESTED,
    ),
    Mutant(
        "a derived bound is taken for its parent's",
        "fedpriv/methods/base.py",
        "type(found.bounded) not in IN_PLACE or",
        "False or",
        ENGINES,
    ),
    Mutant(
        "rounds since a snapshot are not repeated",
        "fedpriv/engines/ray/engine.py",
        "for past in self._snapshots.rounds:",
        "for past in []:",
        RAY,
    ),
    Mutant(
        "clients of an app share arrays with the server",
        "fedpriv/flower/apps/virtual_clients.py",
        "self._queue.extend(map(copy_message, messages))",
        "self._queue.extend(messages)",
        GRID,
    ),
    Mutant(
        "a client's state is lost between messages",
        "fedpriv/flower/apps/virtual_clients.py",
        "self._contexts[client] = copy_context(context)",
        "pass",
        GRID,
    ),
    Mutant("sums depend on order", "fedpriv/aggregation/exact.py", ".add_(self.shift).sub_(self.shift)", "", CORE),
    Mutant(
        "gradients of padding",
        "fedpriv/tasks/dense.py",
        "return slope.mul_(weights.unsqueeze(-1))",
        "return slope.mul_(weights.amax(dim=-1, keepdim=True).unsqueeze(-1))",
        ENGINES,
    ),
    Mutant(
        "the bound of one example is ignored",
        f"{PER_EXAMPLE}/clipped.py",
        "            scales = scales_of(norms, bound)",
        "            scales = torch.ones_like(norms)",
        BY_EXAMPLE,
    ),
    Mutant(
        "an example outside the mask counts",
        f"{PER_EXAMPLE}/clipped.py",
        "~(kept & torch.isfinite(norms))",
        "~torch.isfinite(norms)",
        BY_EXAMPLE,
    ),
    Mutant(
        "numbers that are not finite reach the sum of the others",
        f"{PER_EXAMPLE}/clipped.py",
        "            parts = [part.without(excluded) for part in parts]",
        "            pass",
        BY_EXAMPLE,
    ),
    Mutant(
        "terms that cancel are not charged",
        f"{PER_EXAMPLE}/clipped.py",
        "torch.maximum(s.norms, s.terms / MAX_CANCELLATION**2)",
        "s.norms",
        BY_EXAMPLE,
    ),
    Mutant(
        "outputs that depend on other examples are accepted",
        f"{PER_EXAMPLE}/clipped.py",
        "            self._refuse_dependence(x)\n",
        "",
        BY_EXAMPLE,
    ),
    Mutant(
        "a parameter's use outside its layer is not noticed",
        f"{PER_EXAMPLE}/capture.py",
        "    if any(counts[key] > uses for key, uses in expected.items()):",
        "    if False:",
        BY_EXAMPLE,
    ),
    Mutant(
        "the norm of a bias is left out",
        f"{PER_EXAMPLE}/parts.py",
        "        left = _squared(self.inputs)\n        if self.bias is not None:",
        "        left = _squared(self.inputs)\n        if False:",
        BY_EXAMPLE,
    ),
    Mutant(
        "padding of a client counts as examples",
        "fedpriv/tasks/dense.py",
        "excluded = ~(mask & torch.isfinite(norms))",
        "excluded = ~torch.isfinite(norms)",
        BY_EXAMPLE,
    ),
    Mutant("memories lost at a restart", "fedpriv/experiment/run.py", "engine.restore(client)", "pass", EXPERIMENT),
    Mutant(
        "rounds recorded twice after a restart",
        "fedpriv/experiment/recorder.py",
        "self.directory.keep_rows(name, last_round)",
        "pass",
        EXPERIMENT,
    ),
    Mutant(
        "a checkpoint that is off by one round",
        "fedpriv/experiment/recorder.py",
        "directory.save(digest, self.promise, round, server, client_states())",
        "directory.save(digest, self.promise, round - 1, server, client_states())",
        EXPERIMENT,
    ),
    Mutant(
        "another experiment's folder is taken",
        "fedpriv/experiment/run_directory.py",
        "if found != digest:",
        "if False:",
        EXPERIMENT,
    ),
    Mutant(
        "unknown keys are ignored",
        "fedpriv/experiment/schema.py",
        "        if key not in known:",
        "        if False:",
        CONFIG,
    ),
    Mutant("the digest forgets privacy", "fedpriv/experiment/config.py", "            **privacy,\n", "", CONFIG),
    Mutant(
        "a run without noise is called private",
        PLAN,
        "return self.noise_multiplier > 0.0 and math.isfinite(self.epsilon)",
        "return True",
        EXPERIMENT,
    ),
    Mutant(
        "deployment: a repeated request is noised afresh",
        "fedpriv/deploy/device/device.py",
        "return _given_before(record, terms, request)",
        "pass",
        MEMBER,
    ),
    Mutant(
        "deployment: a turn whose message is lost is noised again",
        "fedpriv/deploy/device/device.py",
        "            _refuse_released(past, entry)\n",
        "",
        CHAOS,
    ),
    Mutant(
        "deployment: a release is not written to the ledger",
        "fedpriv/deploy/device/device.py",
        "                ledger.append(line)\n",
        "                pass\n",
        MEMBER,
    ),
    Mutant(
        "deployment: a pending memory is committed whatever counted",
        "fedpriv/deploy/device/memory.py",
        "if self.pending_turn and last_turn == self.pending_turn:",
        "if self.pending_turn:",
        CHAOS,
    ),
    Mutant(
        "deployment: a pending memory is never committed",
        "fedpriv/deploy/device/memory.py",
        "if self.pending_turn and last_turn == self.pending_turn:",
        "if False:",
        CHAOS,
    ),
    Mutant(
        "deployment: a damaged memory is used",
        "fedpriv/deploy/device/memory.py",
        'if line.decode(errors="replace") != f"{_VERSION} {hashlib.sha256(body).hexdigest()}":',
        "if False:",
        MEMBER,
    ),
    Mutant(
        "deployment: records are not on the disk when the message leaves",
        "fedpriv/files.py",
        "                _write_all(file, line)\n                os.fsync(file)",
        "                _write_all(file, line)",
        MEMBER,
    ),
    Mutant(
        "deployment: the budget is not looked at",
        "fedpriv/deploy/device/device.py",
        "if not epsilon <= budget:",
        "if False:",
        MEMBER,
    ),
    Mutant(
        "deployment: the quick bound is too low",
        "fedpriv/deploy/device/ledger.py",
        "return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta)) <= epsilon",
        "return rho <= epsilon",
        MEMBER,
    ),
    Mutant(
        "deployment: an experiment may use more examples than the ledger charges",
        "fedpriv/deploy/device/own_data.py",
        "if charged is not None and charged != config.example_terms:",
        "if False:",
        "tests/deploy/test_deploy_examples.py",
    ),
    Mutant(
        "deployment: the terms of a memory may change",
        "fedpriv/deploy/device/device.py",
        "            _refuse_changed(past, entry)\n            settled",
        "            settled",
        "tests/deploy/test_deploy_examples.py",
    ),
    Mutant(
        "deployment: a memory may lack a message that was sent",
        "fedpriv/deploy/device/device.py",
        "    if _is_dropped(terms, record):",
        "    if False:",
        "tests/deploy/test_deploy_examples.py",
    ),
    Mutant(
        "deployment: an example of a run for clients is charged as one client less",
        "fedpriv/deploy/device/ledger.py",
        "plan.under_replace() if plan.record is None else plan",
        "plan",
        "tests/deploy/test_deploy_examples.py",
    ),
    Mutant(
        "deployment: replacement is counted as removal",
        "fedpriv/deploy/device/ledger.py",
        'return (REPLACE_FACTOR if adjacency == "replace" or unit == "example" else 1.0)',
        "return 1.0",
        MEMBER,
    ),
    Mutant(
        "deployment: a client follows a seed",
        "fedpriv/deploy/device/policy.py",
        "if instructions.seed is not None:",
        "if False:",
        MEMBER,
    ),
    Mutant(
        "deployment: less noise than promised is accepted",
        "fedpriv/deploy/device/policy.py",
        "if not abs(instructions.noise_stddev - needed) <= _TOLERANCE * needed:",
        "if False:",
        MEMBER,
    ),
    Mutant(
        "deployment: whoever accepts a trust accepts all",
        "fedpriv/deploy/device/policy.py",
        "return words[: 1 + words.index(self.trust)]",
        "return words",
        MEMBER,
    ),
    Mutant(
        "deployment: an unknown trust costs nothing",
        "fedpriv/deploy/device/ledger.py",
        "    if any(entry.trust_rules is None for entry in entries):\n        return math.inf\n",
        "",
        MEMBER,
    ),
    Mutant(
        "a server that sees messages is charged by its weights",
        ACCOUNTING,
        "each_message=self.trust.shows_messages)",
        "each_message=False)",
        CHARGED,
    ),
    Mutant(
        "a share m / n is rounded down",
        SAMPLING,
        "return math.nextafter(self.sampling_prob, 1.0)",
        "return self.sampling_prob",
        "tests/privacy/test_privacy_losses.py",
    ),
    Mutant(
        "deployment: the floor on noise is not looked at",
        "fedpriv/deploy/device/policy.py",
        "        if not multiplier >= least:\n",
        "        if False:\n",
        MEMBER,
    ),
    Mutant(
        "deployment: an open turn is drawn again after a restart",
        "fedpriv/deploy/coordinator.py",
        'if facts["open"] is not None:',
        "if False:",
        COORDINATOR,
    ),
    Mutant(
        "deployment: who did not answer is counted",
        "fedpriv/deploy/coordinator.py",
        "self.last_turn |= dict.fromkeys(counted, turn)",
        "self.last_turn |= dict.fromkeys(self.asked(), turn)",
        CHAOS,
    ),
    Mutant(
        "deployment: too few are enough",
        "fedpriv/deploy/coordinator.py",
        "if len(valid) < self.least_messages:",
        "if False:",
        COORDINATOR,
    ),
    Mutant(
        "deployment: a message beyond its bound is summed",
        "fedpriv/flower/server/faults.py",
        "if norm > limit else",
        "if False else",
        COORDINATOR,
    ),
    Mutant(
        "deployment: lost memories are not started anew",
        "fedpriv/deploy/coordinator.py",
        "        self._reset_memories()\n        return True",
        "        return True",
        COORDINATOR,
    ),
    Mutant(
        "deployment: noise and cohorts come from the seed",
        "strategies/server_app.py",
        "    if not seeded:\n",
        "    if False:\n",
        APPS,
    ),
    Mutant(
        "deployment: a turn is not saved before it is sent",
        "fedpriv/deploy/server.py",
        "            coordinator.begin()\n            save()\n",
        "            coordinator.begin()\n",
        APPS,
    ),
    Mutant(
        "deployment: a node runs any bundle",
        "fedpriv/flower/internals/supernode.py",
        "    if digest not in accepted:",
        "    if False:",
        "tests/deploy/test_deploy_node.py",
    ),
    Mutant(
        "guard: a node without a home obeys any server",
        "fedpriv/deploy/device/guard.py",
        "    if not simulated():",
        "    if False:",
        GUARD,
    ),
    Mutant(
        "guard: an order with a seed makes a simulation",
        "clients/mod.py",
        "        guard = guard_of(context)\n",
        '        seeded = "seed" in message.content.config_records.get("fedpriv", {})\n'
        "        guard = None if seeded else guard_of(context)\n",
        GUARD,
    ),
    Mutant(
        "guard: a simulation is not guarded even with a home",
        "fedpriv/deploy/device/guard.py",
        "    if not home:",
        "    if not home or simulated():",
        GUARD,
    ),
    Mutant(
        "guard: other messages than training pass",
        "clients/mod.py",
        "        return call_next(message, context) if guard is None else guard.evaluate(message, context, call_next)",
        "        return call_next(message, context)",
        GUARD,
    ),
    Mutant(
        "guard: an evaluation is answered whatever the policy says",
        "fedpriv/deploy/device/policy.py",
        "        if not self.accepts.evaluation:",
        "        if False:",
        GUARD,
    ),
    Mutant(
        "guard: an app's exception is told to the server",
        "fedpriv/flower/refusals.py",
        '_OPEN = ("policy", "model", "stale", "lost")',
        '_OPEN = ("policy", "model", "stale", "lost", "app")',
        GUARD,
    ),
    Mutant(
        "guard: a server that is not trusted is told that an app failed",
        "fedpriv/deploy/device/guard.py",
        "if terms.against_server else make_signal",
        "if False else make_signal",
        GUARD,
    ),
    Mutant(
        "drop-in: an app is taken to remember nothing if its method does not",
        "strategies/named.py",
        "client_memory=self.app_memory or has_memory(method)",
        "client_memory=has_memory(method)",
        "tests/flower/test_flower_drop_in.py",
    ),
    Mutant(
        "drop-in: runs of one seed with other settings share their noise",
        "strategies/named.py",
        "begun = self._settings, self._digest_of_first_model",
        "begun = (self._digest_of_first_model,)",
        "tests/flower/test_flower_drop_in.py",
    ),
    Mutant(
        "guard: metrics leave a private run that says it is not",
        "fedpriv/deploy/device/policy.py",
        "        if not instructions.private:\n",
        "        if False:\n",
        GUARD,
    ),
    Mutant(
        "guard: metrics leave because the order says so",
        "clients/mod.py",
        "    released = {} if instructions.private or (guard and not guard.releases_metrics(message)) else metrics",
        "    released = metrics",
        GUARD,
    ),
    Mutant(
        "guard: another client's order is followed",
        "fedpriv/deploy/device/guard.py",
        "        if self.client is not None and instructions.client != self.client:",
        "        if False:",
        GUARD,
    ),
    Mutant(
        "ledger: only the run's own memory is asked",
        "fedpriv/deploy/device/device.py",
        "        for path, lines, digest in remembered_ledgers(self.folder):",
        "        for path, lines, digest in ():",
        LEDGER,
    ),
    Mutant(
        "ledger: the head that the server shows is not looked at",
        "fedpriv/deploy/device/device.py",
        "        if shown is None:\n",
        "        if True:\n",
        LEDGER,
    ),
    Mutant(
        "ledger: a head is believed whoever signed it",
        "fedpriv/deploy/device/device.py",
        "        if shown.key == key.public and shown.valid:",
        "        if True:",
        LEDGER,
    ),
    Mutant(
        "ledger: any signature will do",
        "fedpriv/deploy/device/heads.py",
        "        except (ValueError, InvalidSignature):\n            return False\n",
        "        except (ValueError, InvalidSignature):\n            pass\n",
        LEDGER,
    ),
    Mutant(
        "ledger: a server that is restored forgets heads",
        "fedpriv/deploy/coordinator.py",
        "        self.heads = {k: head for k, head in heads.items() if head is not None}\n",
        "        self.heads = {}\n",
        LEDGER,
    ),
    Mutant(
        "ledger: an older head replaces a newer one",
        "fedpriv/deploy/heads.py",
        "        if before.key != head.key or head.lines >= before.lines:",
        "        if True:",
        LEDGER,
    ),
    Mutant(
        "ledger: heads end with the run",
        "fedpriv/deploy/server.py",
        "        book.keep(coordinator.heads)\n",
        "",
        LEDGER,
    ),
    Mutant(
        "promise: whether clients remember is not said",
        "fedpriv/flower/privacy_terms.py",
        "            client_memory=self.client_memory,\n",
        "",
        PROMISE,
    ),
    Mutant(
        "promise: a server denies its method's memory",
        "fedpriv/deploy/device/policy.py",
        "    if has_memory(instructions.method) and not terms.client_memory:",
        "    if False:",
        PROMISE,
    ),
    Mutant(
        "promise: more turns than were accounted",
        "fedpriv/deploy/coordinator.py",
        "        if self.plan is not None and self.plan.rounds != self.turns:",
        "        if False:",
        PROMISE,
    ),
    Mutant(
        "sampler: a number that 64 bits do not decide is decided by an approximation",
        GAUSSIAN,
        "rounded[start + index] = _round_exactly(float(block[index]), stddev, step, number)",
        "rounded[start + index] = round((float(block[index]) + stddev * number.estimate) / step)",
        SAMPLED,
    ),
    Mutant(
        "sampler: the fast part takes the other sign",
        GAUSSIAN,
        "noise *= (1.0 + 2.0 * signs) * -(stddev / grid)",
        "noise *= (1.0 + 2.0 * signs) * (stddev / grid)",
        SAMPLED,
    ),
    Mutant(
        "sampler: further bits continue the tail on the other side",
        TAILS,
        "self.positive = bool(word >> 63)",
        "self.positive = not word >> 63",
        SAMPLED,
    ),
    Mutant("sampler: no margin", GAUSSIAN, "_ERROR = 2.0**-34", "_ERROR = 0.0", SAMPLED),
    Mutant(
        "sampler: tiny tails are taken from the table's first interval",
        GAUSSIAN,
        " | (tails < 1 << _OCTAVES.start)",
        "",
        SAMPLED,
    ),
    Mutant(
        "sampler: C is used unseen",
        GAUSSIAN,
        "return in_c if same and np.array_equal(found, expected) else _round_in_numpy",
        "return in_c",
        SAMPLED,
    ),
    Mutant(
        "sampler: C takes values that are not finite as they are",
        "fedpriv/mechanisms/gaussian.c",
        "fabs(values[i]) <= DBL_MAX ? values[i] * inverse : 0.0",
        "values[i] * inverse",
        SAMPLED,
    ),
    Mutant(
        "sampler: the grid by a rounded logarithm",
        GAUSSIAN,
        "math.ldexp(1.0, math.frexp(stddev)[1] - 3)",
        "2.0 ** math.floor(math.log2(stddev / 4.0))",
        SAMPLED,
    ),
    Mutant(
        "streams: one noise for all experiments of a seed",
        STREAMS,
        'f"{self.seed} {self.noise_id}"',
        'f"{self.seed}"',
        STREAMED,
    ),
    Mutant(
        "streams: further bits come from the words to come",
        STREAMS,
        "int(np.random.Philox(child).random_raw(number)[-1])",
        "int(self.rng.bit_generator.random_raw(1)[0])",
        STREAMED,
    ),
    Mutant(
        "streams: a client and a position make another client's address",
        STREAMS,
        "_MORE, position % 2**32, position >> 32)",
        "position)",
        STREAMED,
    ),
    Mutant(
        "streams: a forked process repeats its parent's noise",
        STREAMS,
        "if self._cipher is None or self._process != os.getpid():",
        "if self._cipher is None:",
        STREAMED,
    ),
    Mutant(
        "coins: decided by float64 alone",
        SAMPLING,
        "for index in np.flatnonzero(~decided).tolist():",
        "for index in np.flatnonzero(decided & ~decided).tolist():",
        "tests/privacy/test_privacy_sampling.py",
    ),
    Mutant(
        "examples are held out by label over all natural clients",
        "fedpriv/data/validation.py",
        "    if dataset.groups is None:\n        held = _held_out_of_labels",
        "    if True:\n        held = _held_out_of_labels",
        NEIGHBORS,
    ),
    Mutant(
        "a speaker who says nothing gives the place away",
        "fedpriv/data/natural_files.py",
        "if name not in SILENT:",
        "if name not in SILENT and words:",
        NEIGHBORS,
    ),
    Mutant(
        "clients that are tested on train as well",
        "fedpriv/data/validation.py",
        "replace(_kept(whole, to_train), test_inputs",
        "replace(_kept(whole, to_train | to_test), test_inputs",
        "tests/data/test_data_validation.py",
    ),
    Mutant(
        "the same places are held out to test and to validate on",
        "fedpriv/data/validation.py",
        "_TO_TEST, _TO_VALIDATE = 0, 1",
        "_TO_TEST, _TO_VALIDATE = 0, 0",
        "tests/data/test_data_validation.py",
    ),
    Mutant(
        "validation on natural clients' own examples counts as public",
        "fedpriv/experiment/config.py",
        'held: Whose = "within" if natural else "public"',
        'held: Whose = "public"',
        NEIGHBORS,
    ),
    Mutant(
        "a score that no promise covers is not marked",
        "fedpriv/experiment/config.py",
        "return () if self.privacy is None else self.facts.not_covered",
        "return ()",
        RELEASED,
    ),
    Mutant(
        "a score that no promise covers has a plain name in a tracker",
        "fedpriv/tracking/trackers.py",
        "return NOT_COVERED + key if key in self.not_covered else key",
        "return key",
        "tests/tracking/test_tracking_trackers.py",
    ),
    Mutant(
        "trackers get diagnostics of private runs unasked",
        "fedpriv/tracking/trackers.py",
        "config.privacy is None if diagnostics is None else diagnostics",
        "True if diagnostics is None else diagnostics",
        "tests/tracking/test_tracking_trackers.py",
    ),
    Mutant(
        "what is not released is created for all to read",
        "fedpriv/privacy/released.py",
        "return OWNER_ONLY if _OF_NAME[name].kind is Kind.OWNER else None",
        "_OF_NAME[name]; return None",
        RELEASED,
    ),
    Mutant(
        "a part that a crash left is written to as it is",
        "fedpriv/files.py",
        "part.unlink(missing_ok=True)  # a leftover of a crash would keep its mode",
        "part.touch(); os.O_EXCL = 0",
        RELEASED,
    ),
    Mutant(
        "what an older version left open stays open",
        "fedpriv/experiment/run_directory.py",
        "            self._shut()\n",
        "",
        RELEASED,
    ),
    Mutant(
        "states beside memory lie in a folder for all",
        "fedpriv/engines/states.py",
        "folder.mkdir(mode=0o700, parents=True",
        "folder.mkdir(parents=True",
        RELEASED,
    ),
    Mutant(
        "snapshots of states are open to all",
        "fedpriv/engines/ray/snapshots.py",
        "[content], 0o600, durable=False)",
        "[content], 0o644, durable=False)",
        RELEASED,
    ),
    Mutant(
        "a refusal shows a checksum of the data",
        "fedpriv/experiment/run_directory.py",
        'else ("", "different data")',
        "else (promise, theirs[0])",
        RELEASED,
    ),
    Mutant(
        "a checksum of the data is in the summary",
        "fedpriv/experiment/recorder.py",
        '"seed": config.seed,',
        '"seed": f"{config.seed} {self.experiment.population.federation.fingerprint}",',
        RELEASED,
    ),
    Mutant(
        "speed says how many of a hidden cohort took part",
        "fedpriv/experiment/recorder.py",
        'row["cohort_size"] if plan is None else expected for row',
        'row["cohort_size"] for row',
        RELEASED,
    ),
    Mutant(
        "an audit is blind to noise that is missing",
        NOISE,
        "    if stddev == 0.0:\n        return values\n    exact",
        "    if True:\n        return values\n    exact",
        AUDITED,
    ),
    Mutant(
        "an audit is blind to half the noise",
        NOISE,
        "rounded_noise(exact, stddev, streams",
        "rounded_noise(exact, 0.5 * stddev, streams",
        AUDITED,
    ),
    Mutant(
        "an audit is blind to the same noise each round",
        NOISE,
        "streams.source(purpose, *address), grid)",
        "streams.source(purpose, 1, address[1]), grid)",
        AUDITED,
    ),
    Mutant(
        "an audit is blind to noise forgotten every tenth round",
        NOISE,
        "    if stddev == 0.0:\n        return values\n    exact",
        "    if stddev == 0.0 or address[0] % 10 == 9:\n        return values\n    exact",
        AUDITED,
    ),
    Mutant(
        "an audit is blind to noise on half the coordinates",
        NOISE,
        "np.clip(levels, -level, level).astype(np.float64) * grid",
        "np.where(np.arange(len(exact)) % 2, levels * grid, exact)",
        AUDITED,
    ),
    Mutant(
        "an audit is blind to a bound that is ignored",
        BOUNDING,
        "return torch.minimum(1.0 / (self.alpha / ratio + norm), _SHRINK / norm)",
        "return 3.0 * torch.minimum(1.0 / (self.alpha / ratio + norm), _SHRINK / norm)",
        AUDITED,
    ),
    Mutant(
        "an audit is blind to replace counted as add-or-remove",
        PLAN,
        "(self.l2_bound if self.sums is None else self.sums.l2_bound) * self._factor",
        "self.l2_bound",
        AUDITED,
    ),
    Mutant(
        "an audit forgets that neighbors under replace are twice as far apart",
        "fedpriv/audit/verdict.py",
        'return REPLACE_FACTOR if self.plan.adjacency == "replace" else 1.0',
        "return 1.0",
        AUDITED,
    ),
    Mutant(
        "an audit convicts at the confidence of its bounds",
        "fedpriv/audit/verdict.py",
        "(1.0 - CONVICTION) / (len(means) + len(others))",
        "1.0 - confidence",
        AUDITED,
    ),
    Mutant(
        "an audit bounds without allowing for chance",
        "fedpriv/audit/statistics.py",
        " - float(stats.t.isf(significance, count - 1)) * error",
        " + 0.0 * error",
        "tests/audit/test_audit_statistics.py",
    ),
    Mutant(
        "an audit does not whiten",
        "fedpriv/audit/scores.py",
        "inverses=1.0 / ((1.0 - drawn) * values + drawn * values.mean())",
        "inverses=np.ones_like(values)",
        "tests/audit/test_audit_scores.py",
    ),
    Mutant(
        "an audit takes the plan's noise for its null",
        "fedpriv/audit/scores.py",
        "np.linalg.eigh(gram / size)",
        "np.linalg.eigh(np.eye(len(gram)))",
        "tests/audit/test_audit_scores.py",
    ),
    Mutant(
        "an audit tosses no coins",
        "fedpriv/audit/canaries.py",
        "generator(seed, _COINS).integers(2, size=isotropic)",
        "np.ones(isotropic, dtype=np.int64)",
        ATTACKED,
    ),
    Mutant(
        "an audit draws the cohorts of a larger population",
        "fedpriv/audit/attack.py",
        "begin_round(self.experiment.server, state, number)",
        "begin_round(self.server, state, number)",
        ATTACKED,
    ),
    Mutant(
        "an audit divides the canaries' sum by the real clients",
        "fedpriv/audit/attack.py",
        "sampling.population + len(canaries.planted), sampling.sampling_prob",
        "sampling.population, sampling.sampling_prob",
        ATTACKED,
    ),
    Mutant(
        "a canary is turned by its memory",
        "fedpriv/audit/canaries.py",
        "return min(1e6 * (",
        "return min(1e-2 * (",
        ATTACKED,
    ),
    Mutant(
        "rounding decides where delta is small",
        "fedpriv/privacy/losses.py",
        "            tilted, before = self._tilted(theta, center), best\n",
        "            tilted, before = self._tilted(2.0**-8, center), best\n",
        "tests/privacy/test_privacy_losses.py",
    ),
    Mutant(
        "the client in one's place sends nothing",
        ACCOUNTING,
        "Half(q, 1.0 + stead, 1.0), Half(q, stead, 1.0), Half(q, 1.0 + stead, 2.0)",
        "Half(q, 1.0, 1.0), Half(q, 0.0, 1.0), Half(q, 1.0 + stead, 2.0)",
        "tests/privacy/test_privacy_losses.py",
    ),
    Mutant(
        "what is cut off is free",
        "fedpriv/privacy/losses.py",
        "return -math.expm1(sum(count * math.log1p(-min(losses.infinite, 0.5)) for losses, count in self.parts))",
        "return 0.0",
        "tests/privacy/test_privacy_losses.py",
    ),
    Mutant(
        "one order of neighbours is composed",
        ACCOUNTING,
        " else ((gone, come), (come, gone))",
        " else ((come, gone),)",
        "tests/privacy",
    ),
    Mutant(
        "promises: replace is promised at the epsilon of add-or-remove",
        PLAN,
        "            return found\n        return replace(found, noise_multiplier=",
        "            return self\n        return replace(self, noise_multiplier=",
        PROMISED,
    ),
    Mutant(
        "promises: a hidden cohort is given an exact mu",
        PLAN,
        "        if self._credits_sampling:\n            return None\n",
        "",
        PROMISED,
    ),
    Mutant(
        "spent: two Gaussian runs cost no more than the larger",
        SPENDING,
        "mu, delta = math.sqrt(math.fsum(mu * mu for mu in exact)), min(deltas)",
        "mu, delta = max(exact), min(deltas)",
        SPENT,
    ),
    Mutant(
        "spent: sums of epsilons are stated at one delta",
        SPENDING,
        "math.fsum(run.epsilon_after(rounds) for run, rounds in charged), math.fsum(deltas)",
        "math.fsum(run.epsilon_after(rounds) for run, rounds in charged), min(deltas)",
        SPENT,
    ),
    Mutant(
        "spent: a run without privacy is left out",
        SPENDING,
        "    if any(run.plan is None for run, _ in charged):",
        "    charged = [(run, rounds) for run, rounds in charged if run.plan is not None]\n    if False:",
        SPENT,
    ),
    Mutant(
        "spent: the checkpoint of a killed run is not asked",
        "fedpriv/report/spent_runs.py",
        "return max(recorded, turns, directory.checkpoint.round() or 0)",
        "return max(recorded, turns)",
        SPENT,
    ),
    Mutant(
        "spent: shared noise is composed like independent noise",
        SPENDING,
        "if sharing([run for run, _ in charged]):",
        "if False:",
        SPENT,
    ),
    Mutant(
        "spent: the trials of a tuning are counted beside it",
        SPENDING_TUNED,
        "for run in found.pop(path)}",
        "for run in found[path]}",
        SPENT,
    ),
    Mutant(
        "spent: a tuning is believed whatever epsilon it states",
        SPENDING_TUNED,
        "not stated >= least * (1.0 - _ROUNDING)",
        "False",
        SPENT,
    ),
    Mutant(
        "spent: a tuning hides trials that were not drawn for it",
        SPENDING_TUNED,
        'raise _Misfit("one of them was not drawn for it")',
        "continue",
        SPENT,
    ),
    Mutant(
        "spent: the scores of a tuning that is added up cost nothing",
        SPENDING_TUNED,
        "return [*runs, scores]",
        "return runs",
        SPENT,
    ),
    Mutant(
        "spent: tunings that share their noise are composed like others",
        SPENDING_TUNED,
        "return self.trials",
        "return (self,)",
        SPENT,
    ),
    Mutant(
        "tuning: the random number of trials costs nothing",
        "fedpriv/privacy/tuning.py",
        "(trial.epsilons + once + math.log(mean)",
        "(trial.epsilons + math.log(mean)",
        "tests/privacy/test_privacy_tuning.py",
    ),
    Mutant(
        "tuning: trials of one seed share their cohorts",
        "fedpriv/streams.py",
        "(self.own_cohorts and purpose is Purpose.COHORT)",
        "False",
        "tests/sweeps/test_sweeps_tuning.py",
    ),
    Mutant(
        "tuning: a changed sweep goes on with trials that were drawn for another",
        "fedpriv/sweeps/tuning.py",
        'or found.get("digest") != digest',
        "or False",
        "tests/sweeps/test_sweeps_tuning.py",
    ),
    Mutant(
        "tuning: a score on clients' examples has no noise",
        SCORING,
        "rounded_noise(np.array([total / UNITS]), noise.stddev, source)",
        "np.rint(np.array([total / UNITS]) / release_grid(noise.stddev))",
        TUNED,
    ),
    Mutant(
        "tuning: a score has half the noise that is charged",
        SCORING,
        "noise.stddev, source)",
        "0.5 * noise.stddev, source)",
        TUNED,
    ),
    Mutant(
        "tuning: a noised score costs nothing",
        "fedpriv/privacy/tuning.py",
        "training if score is None else score.after(training)",
        "training",
        "tests/privacy/test_privacy_tuning.py",
    ),
    Mutant(
        "tuning: a sweep that goes on draws its scores again",
        SCORING,
        "left = runs.keys() - scores.keys()",
        "left = set(runs)",
        TUNED,
    ),
    Mutant(
        "tuning: scores that were lost after a selection are drawn again",
        SCORING,
        "if left and released:",
        "if False:",
        TUNED,
    ),
    Mutant(
        "tuning: a client counts in a score with each of its examples",
        SCORING,
        "math.floor(score * UNITS)",
        "math.floor(score * UNITS) * len(rows)",
        "tests/experiment/test_experiment_neighbors.py",
    ),
    Mutant(
        "tuning: a client's number in a score follows from who holds something",
        "fedpriv/data/validation.py",
        "HeldOut(dataset.test_groups, dataset.natural_population)",
        "HeldOut(dataset.test_groups, len(np.unique(dataset.test_groups)))",
        "tests/experiment/test_experiment_neighbors.py",
    ),
    Mutant(
        "drop-in: frozen arrays are noised like the others",
        "fedpriv/flower/trained.py",
        'trained = set(model) - _matching(model, frozen or (), "frozen") - integers',
        'trained = set(model) - integers if _matching(model, frozen or (), "frozen") or True else set()',
        TRAINED,
    ),
    Mutant(
        "drop-in: arrays that training leaves alone are noised without a word",
        "fedpriv/flower/trained.py",
        "    if instructions.private and not arrays.declared and instructions.last_round == 0:",
        "    if False:",
        TRAINED,
    ),
    Mutant(
        "drop-in: a server that is the adversary is told what training changed",
        "fedpriv/flower/trained.py",
        "        if instructions.noise_stddev == 0.0 or instructions.diagnostics:",
        "        if True:",
        TRAINED,
    ),
    Mutant(
        "drop-in: a fixed array may change at a client",
        "fedpriv/flower/trained.py",
        "    if sent.data == returned.data:",
        "    if True:",
        TRAINED,
    ),
    Mutant(
        "drop-in: a message that is not finite is summed",
        "fedpriv/flower/server/faults.py",
        "    if not bool(torch.isfinite(message).all()):",
        "    if False:",
        FAILURES,
    ),
    Mutant(
        "drop-in: a client remembers a message that was lost",
        "fedpriv/flower/state.py",
        "side = _PENDING if instructions.last_round == pending else _COMMITTED",
        "side = _PENDING",
        f"{FAILURES} tests/flower/test_flower_messages.py",
    ),
    Mutant(
        "drop-in: the server counts a message that it did not get",
        "fedpriv/flower/server/attendance.py",
        "        self.last_round |= dict.fromkeys(counted, round)",
        "        self.last_round |= dict.fromkeys([*counted, *failures], round)",
        FAILURES,
    ),
    Mutant(
        "drop-in: any number of clients may fail",
        "fedpriv/flower/server/attendance.py",
        "        elif len(failures) <= self._tolerated(asked):",
        "        elif True:",
        FAILURES,
    ),
    Mutant(
        "drop-in: a run of secret cohorts ends if half of a cohort fails",
        "strategies/method_strategy.py",
        "            max_failures=MAX_FAILURES if limit is None and not secret else limit,",
        "            max_failures=MAX_FAILURES if limit is None else limit,",
        FAILURES,
    ),
    Mutant(
        "a statement hides that a simulation noised the sum and not each message",
        "fedpriv/experiment/recorder.py",
        "timeline is not None, fused=self._fused)",
        "timeline is not None)",
        ENGINES_TESTED,
    ),
    Mutant(
        "drop-in: a round of a stated length ends with its last answer",
        "fedpriv/flower/server/pace.py",
        "        time.sleep(max(left, 0.0))",
        "        time.sleep(0.0)",
        PACED,
    ),
    Mutant(
        "drop-in: a round of a stated length waits for a client that hangs",
        "fedpriv/flower/server/pace.py",
        "        return self._grid.send_and_receive(asked, timeout=left if timeout is None else min(timeout, left))",
        "        return self._grid.send_and_receive(asked, timeout=timeout)",
        PACED,
    ),
    Mutant(
        "drop-in: the statement does not say that a round's length shows who took part",
        "fedpriv/flower/server/drop_in_statement.py",
        "        timed = _AS_LONG_AS_ANSWERS_TAKE if round_seconds is None",
        "        timed = _SECRET if round_seconds is None",
        PACED,
    ),
    Mutant(
        "drop-in: a lost memory shows that its client was in a secret cohort",
        "fedpriv/flower/server/attendance.py",
        "believed = [] if self.secret else believed_losses",
        "believed = believed_losses",
        FAILURES,
    ),
    Mutant(
        "drop-in: the model of a run that ends with an error is lost",
        "strategies/method_strategy.py",
        "            rescue(self.result.arrays, self._finished, self.rescue_folder)\n",
        "",
        FAILURES,
    ),
    Mutant(
        "drop-in: a run whose updates were all not finite ends well",
        "strategies/method_strategy.py",
        "        if 0 < self._messages == self._non_finite:",
        "        if False:",
        FAILURES,
    ),
    Mutant(
        "drop-in: noise that drowns the signal is not said",
        "strategies/method_strategy.py",
        "        if drowned:\n",
        "        if False:\n",
        TRAINED,
    ),
    Mutant(
        "drop-in: a metric is divided by the examples of clients that lack it",
        "fedpriv/flower/server/metrics.py",
        "values = {client: metrics[name] for client, metrics in counted.items() if name in metrics}",
        "values = {client: metrics.get(name, 0.0) for client, metrics in counted.items()}",
        "tests/flower/test_flower_metrics.py",
    ),
    Mutant(
        "drop-in: a client without examples loses all clients' metrics",
        "fedpriv/flower/server/metrics.py",
        "    counted = {client: metrics for client, metrics in reported.items() if client not in left_out}",
        "    counted = {} if left_out else reported",
        "tests/flower/test_flower_metrics.py",
    ),
    Mutant(
        "flower: a client's error is cut to its last line",
        "fedpriv/flower/client_errors.py",
        '"\\n".join(lines[begins:])',
        "lines[-1]",
        "tests/flower/test_flower_errors.py",
    ),
    Mutant(
        "a run that learned nothing exits as if it had",
        "fedpriv/cli/print_run.py",
        "    if learned_nothing(rows):",
        "    if False:",
        "tests/experiment/test_experiment_learned.py",
    ),
    Mutant(
        "deployment: a full disk charges a message that never left",
        "fedpriv/deploy/device/device.py",
        "            memory.prepare(answered)\n            try:\n                ledger.append(line)",
        "            try:\n                ledger.append(line)\n                memory.prepare(answered)",
        MEMBER,
    ),
    Mutant(
        "deployment: what a crash left unfinished is thrown away",
        "fedpriv/deploy/device/device.py",
        "            memory.complete(ledger.holds)\n",
        "",
        MEMBER,
    ),
    Mutant(
        "deployment: what lies beside a memory is believed without the ledger",
        "fedpriv/deploy/device/memory.py",
        "if record is not None and is_charged(record.ledger_lines, record.ledger_hash):",
        "if record is not None:",
        MEMBER,
    ),
    Mutant(
        "deployment: a memory that is not finite is used",
        "fedpriv/deploy/device/device.py",
        "    if not all(bool(torch.isfinite(field).all()) for field in record.committed.values()):",
        "    if False:",
        MEMBER,
    ),
    Mutant(
        "a client whose memory is not finite is not counted",
        ROUNDS,
        "counted = torch.where(torch.isfinite(decisive), norms, math.inf).flatten()",
        "counted = norms.flatten()",
        "tests/engines/test_engines_in_place.py",
    ),
    Mutant(
        "deployment: a removed node is taken for one whose clock is wrong",
        "fedpriv/flower/internals/supernode.py",
        "self.removed = self.taken and not known",
        "self.removed = False",
        "tests/deploy/test_deploy_node.py",
    ),
    Mutant(
        "deployment: a removed key is only noted, and still taken",
        "fedpriv/deploy/setup/keys.py",
        "            server.unregister(node)\n",
        "            pass\n",
        "tests/deploy/test_deploy_keys.py",
    ),
    Mutant(
        "deployment: check and register know nothing of removed keys",
        "fedpriv/deploy/setup/keys.py",
        "        return gone + again",
        "        return []",
        "tests/deploy/test_deploy_keys.py",
    ),
    Mutant(
        "deployment: a node lives on without what it has started",
        "fedpriv/flower/internals/supernode.py",
        "        os.kill(os.getpid(), signal.SIGINT)\n        if not self._over",
        "        if not self._over",
        "tests/deploy/test_deploy_node.py",
    ),
    Mutant(
        "deployment: Flower's processes outlive a killed node",
        "fedpriv/flower/companion.py",
        "            fcntl.flock(file, fcntl.LOCK_SH)\n            os.kill(os.getpid(), signal.SIGKILL)",
        "            fcntl.flock(file, fcntl.LOCK_SH)",
        "tests/deploy/test_deploy_companion.py",
    ),
    Mutant(
        "deployment: a full disk is not looked at",
        "fedpriv/deploy/checks.py",
        "    if free < max(least, _MIN_FREE):",
        "    if False:",
        "tests/deploy/test_deploy_check.py",
    ),
    Mutant(
        "a model is made before its parameters are counted",
        "fedpriv/deploy/device/own_data.py",
        "check_size=lambda size: _refuse_other_size(size, model)",
        "check_size=None",
        APPS,
    ),
    Mutant(
        "a number that float32 cannot hold is a feedback step",
        NORMEC,
        'for key in ("alpha", "beta", "server_lr"):',
        'for key in ("alpha", "server_lr"):',
        "tests/experiment/test_experiment_extremes.py",
    ),
    Mutant(
        "a model of NaN goes on in silence",
        ROUNDS,
        "    if not bool(torch.isfinite(after.model).all()):",
        "    if False:",
        "tests/experiment/test_experiment_extremes.py",
    ),
    Mutant(
        "deployment: a client starts afresh whatever the server holds for ever",
        "fedpriv/experiment/deployment.py",
        'if self.lost_memory == "reset-one" and method.lost_memory != "reset-one":',
        "if False:",
        COORDINATOR,
    ),
    Mutant(
        "deployment: a lost memory shows that its client was in a secret cohort",
        "fedpriv/deploy/coordinator.py",
        "believed = [] if self.secret_cohorts else believed_losses",
        "believed = believed_losses",
        COORDINATOR,
    ),
    Mutant(
        "deployment: a lost memory may end a run of secret cohorts",
        "fedpriv/deploy/coordinator.py",
        'self.choice.lost_memory in ("reset-all", "stop"):',
        "False:",
        COORDINATOR,
    ),
    Mutant(
        "deployment: a turn with a secret cohort ends with its last answer",
        "fedpriv/deploy/server.py",
        "        if coordinator.secret_cohorts:\n            # The times",
        "        if False:\n            # The times",
        APPS,
    ),
    Mutant(
        "aggregator: a memory keeps the message that was not rounded",
        "fedpriv/feedback.py",
        "return release.rounded(message) if isinstance(release, RoundedRelease) else message",
        "return message",
        SUMS,
    ),
    Mutant(
        "aggregator: memories in place keep the message that was not rounded",
        STEP,
        "    signals = on_grid(signals, release)\n",
        "",
        SUMS,
    ),
    Mutant(
        "aggregator: sampling is credited although the server sees who answers",
        TRUST,
        "    hides_cohorts: ClassVar[bool] = False\n    charges_participations: ClassVar[bool] = False\n",
        "    hides_cohorts: ClassVar[bool] = True\n    charges_participations: ClassVar[bool] = False\n",
        AGGREGATION,
    ),
    Mutant(
        "aggregator: shares do not make up for colluding clients",
        AGGREGATED,
        "share = noise / math.sqrt(self.honest)",
        "share = noise / math.sqrt(self.least_survivors)",
        AGGREGATION,
    ),
    Mutant(
        "aggregator: shares do not make up for clients that do not answer",
        AGGREGATED,
        "share = noise / math.sqrt(self.honest)",
        "share = noise / math.sqrt(self.most - self.colluders)",
        AGGREGATION,
    ),
    Mutant(
        "aggregator: the rounding of messages is not charged",
        PLAN,
        "return (self.l2_bound if self.sums is None else self.sums.l2_bound) * self._factor",
        "return self.l2_bound * self._factor",
        AGGREGATION,
    ),
    Mutant(
        "aggregator: a sum beyond the guard band counts",
        SHARES,
        "if bool((levels.abs() > self.limit).any()):",
        "if bool((levels.abs() > HALF_MODULUS).any()):",
        SUMS,
    ),
    Mutant(
        "aggregator: sums do not wrap around",
        SHARES,
        "return torch.remainder(levels + HALF_MODULUS, 2 * HALF_MODULUS) - HALF_MODULUS",
        "return levels",
        SUMS,
    ),
    Mutant(
        "aggregator: a void round moves the memories",
        "fedpriv/engines/secure_sum.py",
        "            self._inner.undo()\n",
        "",
        SUMS,
    ),
    Mutant(
        "aggregator: a round counts however few answer",
        "fedpriv/engines/secure_sum.py",
        "if (self._sums.answering or len(broadcast.cohort)) < self._sums.least:",
        "if len(broadcast.cohort) < 1:",
        SUMS,
    ),
    Mutant(
        "aggregator: clients that are not sampled do not answer, and sampling is credited",
        "fedpriv/engines/secure_sum.py",
        "if self._sums.answering is None:",
        "if True:",
        SUMS,
    ),
    Mutant(
        "aggregator: sampling is credited against all helpers",
        PLAN,
        'alone = {"trust": "local", "adjacency": "replace", "aggregation": None, "l2_bound": bound}',
        'alone = {"trust": "central", "adjacency": "replace", "aggregation": None, "l2_bound": bound}',
        AGGREGATION,
    ),
    Mutant(
        "aggregator: against all helpers, the noise of the sum is counted as a client's",
        PLAN,
        "noise_multiplier=share / (REPLACE_FACTOR * bound))",
        "noise_multiplier=self.noise_multiplier)",
        AGGREGATION,
    ),
    Mutant(
        "aggregator: a device credits sampling by the server",
        "fedpriv/deploy/device/policy.py",
        "if numbers.everyone_answers:",
        "if False:",
        "tests/deploy/test_deploy_sums.py",
    ),
    Mutant(
        "aggregator: the server chooses the adjacency that a ledger charges",
        "fedpriv/deploy/device/ledger.py",
        'return whole.under_replace() if adjacency == "replace" and not plan.trust_rules.trusts_server else whole',
        "return whole",
        "tests/deploy/test_deploy_sums.py",
    ),
    Mutant(
        "aggregator: memories fade in void rounds",
        ROUNDS,
        "counting = round - rules.voids(state)",
        "counting = round",
        SUMS,
    ),
    Mutant(
        "aggregator: the noise of a void round is used again",
        ROUNDS,
        "return self.round if self.turn is None else self.turn",
        "return self.round",
        SUMS,
    ),
    Mutant(
        "aggregator: coarse shares are taken for Gaussian noise",
        AGGREGATED,
        "if sums.share_stddev > 0.0 and self.closeness(sums, rounds) > MAX_CLOSENESS:",
        "if False:",
        AGGREGATION,
    ),
    Mutant(
        "aggregator: memories may keep noised messages",
        "fedpriv/experiment/config.py",
        '    if config.method.needs_client_noise:\n        expected = \'"noiseless" with privacy.trust',
        '    if False:\n        expected = \'"noiseless" with privacy.trust',
        SUMS,
    ),
    Mutant(
        "aggregator: Flower's simulated clients do not round their messages",
        "fedpriv/flower/messages.py",
        "least=1) if self.grid else None",
        "least=1) if False else None",
        "tests/flower/test_flower_equals_loop.py",
    ),
    Mutant(
        "aggregator: a void round of Flower's simulation moves memories",
        "strategies/method_strategy.py",
        "self.attendance.finish(server_round, [], failures)",
        "self.attendance.finish(server_round, messages, failures)",
        "tests/flower/test_flower_equals_loop.py",
    ),
    Mutant(
        "secure: a client draws the same seed in every round",
        f"{SECURE}/client.py",
        "seed = random(SEED_BYTES)",
        "seed = helper.identity",
        SECURE_MASKS,
    ),
    Mutant(
        "secure: masks of all rounds have one key",
        f"{SECURE}/masks.py",
        'pack("mask", run, round, client, helper)',
        'pack("mask", run, client, helper)',
        SECURE_MASKS,
    ),
    Mutant(
        "secure: masks of all helpers have one key",
        f"{SECURE}/masks.py",
        'pack("mask", run, round, client, helper)',
        'pack("mask", run, round, client)',
        SECURE_MASKS,
    ),
    Mutant(
        "secure: a box is not bound to its facts",
        f"{SECURE}/sealing.py",
        ", context)",
        ', b"")',
        "tests/secure",
    ),
    Mutant(
        "secure: a signature does not cover the facts",
        f"{SECURE}/messages.py",
        'return pack("sealed seed", box, context)',
        'return pack("sealed seed", box)',
        SECURE_ATTACKS,
    ),
    Mutant(
        "secure: a client signs all facts but one",
        f"{SECURE}/messages.py",
        'return pack("context", *self.values, client, identity, key)',
        'return pack("context", *self.values[:-1], client, identity, key)',
        "tests/secure",
    ),
    Mutant(
        "secure: a client masks for any helpers that the server shows",
        f"{SECURE}/client.py",
        "    require_pinned(helpers, pinned, facts.run)\n",
        "",
        SECURE_ROUND,
    ),
    Mutant(
        "secure: a helper's key needs no signature",
        f"{SECURE}/messages.py",
        "if helper.run != run or not helper.is_valid:",
        "if helper.run != run:",
        SECURE_ROUND,
    ),
    Mutant(
        "secure: a helper has no minimum",
        f"{SECURE}/helper.py",
        "least = max(self.min_clients, query.facts.least_survivors)",
        "least = query.facts.least_survivors",
        SECURE_ATTACKS,
    ),
    Mutant(
        "secure: a helper ignores the minimum that clients signed",
        f"{SECURE}/helper.py",
        "least = max(self.min_clients, query.facts.least_survivors)",
        "least = self.min_clients",
        SECURE_ATTACKS,
    ),
    Mutant(
        "secure: a helper does not check signatures",
        f"{SECURE}/helper.py",
        "if not sealed.is_signed_by(public, query.facts, member.client):",
        "if False:",
        SECURE_ATTACKS,
    ),
    Mutant(
        "secure: a helper counts a client twice",
        f"{SECURE}/helper.py",
        "if any(later <= earlier for earlier",
        "if any(later < earlier for earlier",
        SECURE_ATTACKS,
    ),
    Mutant(
        "secure: one key is enrolled under two names",
        f"{SECURE}/helper.py",
        "if owners.setdefault(key, client) != client:",
        "if False:",
        SECURE_ATTACKS,
    ),
    Mutant(
        "secure: a helper answers another query about a round",
        f"{SECURE}/helper.py",
        "if answered is not None:",
        "if answered is not None and answered.query == query.digest:",
        f"{SECURE_ATTACKS} {SECURE_RECORD}",
    ),
    Mutant(
        "secure: a helper does not compare queries",
        f"{SECURE}/helper.py",
        "if answered.query != query.digest:",
        "if False:",
        f"{SECURE_ATTACKS} {SECURE_RECORD}",
    ),
    Mutant(
        "secure: a helper's record is not durable",
        f"{SECURE}/log.py",
        "replace_durably(self.folder / LOG_FILE, record.to_bytes())",
        "(self.folder / LOG_FILE).write_bytes(record.to_bytes())",
        SECURE_RECORD,
    ),
    Mutant(
        "secure: a helper's key outlives its record",
        f"{SECURE}/helper.py",
        "X25519PrivateKey.generate().private_bytes_raw()",
        "self.identity.private_bytes_raw()",
        SECURE_RECORD,
    ),
    Mutant(
        "secure: a damaged record is used",
        f"{SECURE}/log.py",
        "if record.to_bytes() != content:",
        "if False:",
        SECURE_RECORD,
    ),
    Mutant(
        "secure: a helper answers two queries at once",
        f"{SECURE}/helper.py",
        "with only_one(self.folder / LOCK_FILE):",
        "if True:",
        SECURE_RECORD,
    ),
    Mutant(
        "secure: clients join after the first query",
        f"{SECURE}/server.py",
        "if self._closed is not None:",
        "if False:",
        SECURE_ROUND,
    ),
    Mutant(
        "secure: a round with too few clients is closed",
        f"{SECURE}/server.py",
        "if len(self._digests) < self.facts.least_survivors:",
        "if not self._digests:",
        SECURE_ROUND,
    ),
    Mutant(
        "secure: an answer needs no signature",
        f"{SECURE}/messages.py",
        "return same and is_signed(self.identity, self.signature, signed)",
        "return same",
        "tests/secure",
    ),
    Mutant(
        "secure: a sum in the guard band is used",
        f"{SECURE}/server.py",
        "np.abs(total) > max_total",
        "np.abs(total) > 2**31",
        SECURE_ROUND,
    ),
    Mutant(
        "secure: a node takes a helper's place by naming it",
        "fedpriv/deploy/helpers.py",
        "if (key.identity.hex(), key.run) != (identity, run) or not key.is_valid:",
        "if key.run != run:",
        "tests/deploy/test_deploy_helper.py",
    ),
    Mutant(
        "secure: a stale answer of a helper is taken",
        "fedpriv/deploy/helpers.py",
        "if not answer.answers(queries[identity]):",
        "if False:",
        "tests/deploy/test_deploy_helper.py",
    ),
    Mutant(
        "centered-clip: clients bound their signals around zero",
        "fedpriv/methods/centered_clip.py",
        "signal if self._center is None else signal - self._center.to(signal.device)",
        "signal",
        "tests/methods/test_methods_reference.py",
    ),
    Mutant(
        "centered-clip: the step in place bounds around zero",
        "fedpriv/engines/in_place.py",
        "signals.sub_(rule.center)",
        "pass",
        "tests/engines/test_engines_equal.py",
    ),
    Mutant(
        "centered-clip: the step in place bounds by the signal's norm",
        "fedpriv/engines/in_place.py",
        "norms if rule.center is None else None",
        "norms",
        "tests/engines/test_engines_equal.py",
    ),
    Mutant(
        "centered-clip: the step in C bounds around zero",
        "fedpriv/engines/in_place.py",
        "center.clone().contiguous()",
        "torch.zeros_like(center)",
        "tests/engines/test_engines_equal.py",
    ),
    Mutant(
        "centered-clip: a device bounds around zero",
        "fedpriv/deploy/device/device.py",
        "turn=terms.turn, shared=shared",
        "turn=terms.turn",
        "tests/deploy/test_deploy_app.py",
    ),
    Mutant(
        "centered-clip: a node of Flower bounds around zero",
        "fedpriv/flower/answers.py",
        "instructions.address, shared",
        "instructions.address",
        "tests/flower/test_flower_drop_in.py",
    ),
    Mutant(
        "centered-clip: a round may widen the bound",
        "fedpriv/rounds.py",
        "method.bounded.l2_bound != self.method.bounded.l2_bound",
        "method.bounded.l2_bound < self.method.bounded.l2_bound",
        "tests/methods/test_methods_centered_clip.py",
    ),
    Mutant(
        "centered-clip: the memory takes the whole mean",
        "fedpriv/methods/centered_clip.py",
        "remember(state.memory, mean_message, self.beta)",
        "remember(state.memory, mean_message, 1.0)",
        "tests/methods/test_methods_theory.py",
    ),
    Mutant(
        "scaffold: local steps are not corrected",
        "fedpriv/tasks/local_work.py",
        "direction = gradient + (self._offset if at_work is None else self._offset * at_work)",
        "pass",
        "tests/methods/test_methods_theory.py",
    ),
    Mutant(
        "scaffold: clients that have finished still move by their correction",
        "fedpriv/tasks/local_work.py",
        "(self._offset if at_work is None else self._offset * at_work)",
        "self._offset",
        "tests/engines/test_engines_equal.py",
    ),
    Mutant(
        "scaffold: the correction enters the signal",
        "fedpriv/tasks/local_work.py",
        "self._sum = gradient if self._sum is None else self._sum + gradient",
        "self._sum = direction if self._sum is None else self._sum + direction",
        "tests/methods/test_methods_theory.py",
    ),
    Mutant(
        "scaffold: the server forgets its control variate in the step",
        "fedpriv/methods/dp_scaffold.py",
        "return state.memory + mean_message, ",
        "return mean_message, ",
        "tests/methods/test_methods_theory.py",
    ),
    Mutant(
        "scaffold: the correction has the wrong sign",
        "fedpriv/methods/dp_scaffold.py",
        "shared.to(state.memory) - state.memory",
        "state.memory - shared.to(state.memory)",
        "tests/methods/test_methods_theory.py",
    ),
    Mutant(
        "scaffold: a Ray worker does not get the second vector",
        "fedpriv/engines/ray/host.py",
        "turn=turn, shared=beside)",
        "turn=turn)",
        "tests/engines/test_engines_ray.py",
    ),
    Mutant(
        "scaffold: a restarted server sends no second vector",
        "fedpriv/deploy/coordinator.py",
        "cohort, capacity, turn=turn, shared=shared)",
        "cohort, capacity, turn=turn)",
        "tests/deploy/test_deploy_coordinator.py",
    ),
    Mutant(
        "scaffold: a device answers a turn again with another second vector",
        "fedpriv/deploy/device/device.py",
        "for sent in (model, shared):",
        "for sent in (model,):",
        "tests/deploy/test_deploy_examples.py",
    ),
    Mutant(
        "scaffold: a device follows a second vector that is not finite",
        "fedpriv/deploy/device/device.py",
        "for sent in (model, shared) if sent is not None",
        "for sent in (model,)",
        "tests/deploy/test_deploy_examples.py",
    ),
    Mutant(
        "scaffold: corrections for sums of gradients are taken",
        "fedpriv/experiment/config.py",
        'config.local.signal not in (None, "gradient-mean")',
        'config.local.signal == "pseudo-gradient"',
        "tests/experiment/test_experiment_config.py",
    ),
    Mutant(
        "clip21-sgd2m: a signal that is not finite stays in the average",
        "fedpriv/methods/clip21_sgd2m.py",
        "torch.where(finite, average, state.average)",
        "average",
        "tests/methods/test_methods_rules.py",
    ),
    Mutant(
        "clip21-sgd2m: the average overshoots",
        "fedpriv/methods/clip21_sgd2m.py",
        "torch.add((1.0 - self.weight) * state.average",
        "torch.add(state.average",
        "tests/methods/test_methods_theory.py",
    ),
    Mutant(
        "clip21-sgd2m: accounted as a method without memory",
        "fedpriv/methods/clip21_sgd2m.py",
        "Feedback(bounded=self.bounded, beta=self.beta, weight=self.weight)",
        "Feedback(bounded=self.bounded, beta=None, weight=self.weight)",
        "tests/engines/test_engines_examples.py",
    ),
    Mutant(
        "clip21-sgd2m: engines skip the average",
        "fedpriv/engines/in_place.py",
        "None if form is None or form.weight is not None else form",
        "form",
        "tests/engines/test_engines_in_place.py",
    ),
    Mutant(
        "clip21-sgd2m: a canary's average is not its push",
        "fedpriv/audit/canaries.py",
        "push = (push - (1.0 - rule.weight) * past) / rule.weight",
        "pass",
        "tests/audit/test_audit_run.py",
    ),
    Mutant(
        "estimators: the noise of a difference is scaled as that of a gradient",
        DIFFERENCES,
        "estimate = state.estimate + mean_message * self._radius(state.model, state.previous)",
        "estimate = state.estimate + mean_message * self.clip_norm",
        OF_ESTIMATORS,
    ),
    Mutant(
        "estimators: restarts are not charged",
        RECORDS,
        "return restarts * self.restart_weight**2 + (rounds - restarts)",
        "return float(rounds - restarts)",
        OF_ESTIMATORS,
    ),
    Mutant(
        "estimators: restarts are charged as other rounds, whatever their weight",
        RECORDS,
        "return restarts * self.restart_weight**2 + (rounds - restarts)",
        "return float(rounds)",
        OF_ESTIMATORS,
    ),
    Mutant(
        "estimators: a client takes an older model for the last one",
        DIFFERENCES,
        "if float(state.updated) != round - 1 or radius == 0.0:",
        "if radius == 0.0:",
        OF_ESTIMATORS,
    ),
    Mutant(
        "estimators: the mean of differences is clipped instead of each",
        "fedpriv/tasks/task.py",
        "total += Clip(clip_norm=1.0)(moved).sum(dim=0)",
        "total += Clip(clip_norm=1.0)(moved.mean(dim=0)) * len(moved)",
        OF_ESTIMATORS,
    ),
    Mutant(
        "estimators: DiceSGD is charged without its feedback",
        RECORDS,
        "return min(direct + fed_back, 2.0 * self.l2_bound * math.sqrt(rounds))",
        "return min(direct, 2.0 * self.l2_bound * math.sqrt(rounds))",
        OF_ESTIMATORS,
    ),
    Mutant(
        "estimators: the feedback of DiceSGD is charged with the root of the rounds",
        RECORDS,
        "* (self.terms.bound * (1.0 + ROUNDING) - clip_norm) * rounds",
        "* (self.terms.bound * (1.0 + ROUNDING) - clip_norm) * math.sqrt(rounds)",
        OF_ESTIMATORS,
    ),
    Mutant(
        "estimators: DiceSGD does not cap gradients",
        "fedpriv/methods/dice_sgd.py",
        "gradients.mean(model, self.gradient_cap) - clipped",
        "gradients.mean(model, 1e20) - clipped",
        OF_ESTIMATORS,
    ),
    Mutant(
        "aggregator: a server asks a helper before it has stored who counts",
        "fedpriv/deploy/server.py",
        "            save()  # a server that forgot U could ask only about another one, which helpers refuse\n",
        "            pass\n",
        SECURE_DEPLOYED,
    ),
    Mutant(
        "aggregator: a device answers a second order for one turn",
        "fedpriv/deploy/device/device.py",
        (
            "            if terms.turn <= record.latest_turn:\n"
            "                return _given_before(record, terms, request)\n"
            "            past, entry = ledger.entries(), _entry(instructions, terms, request)\n"
            "            self._refuse_forgotten(ledger, shown)\n"
            "            _refuse_changed(past, entry)\n"
            "            settled = _settled(instructions, terms, record)\n"
            "            state = _state(instructions, settled, len(model))\n"
            "            _refuse_released(past, entry)\n"
        ),
        (
            "            past, entry = ledger.entries(), _entry(instructions, terms, request)\n"
            "            self._refuse_forgotten(ledger, shown)\n"
            "            _refuse_changed(past, entry)\n"
            "            settled = _settled(instructions, terms, record)\n"
            "            state = _state(instructions, settled, len(model))\n"
        ),
        SECURE_DEPLOYED,
    ),
    Mutant(
        "aggregator: a device stores the bare message",
        "fedpriv/deploy/device/device.py",
        "after._asdict(), request, reply, line.lines",
        "after._asdict(), request, message, line.lines",
        SECURE_DEPLOYED,
    ),
    Mutant(
        "aggregator: a policy's least number of clients in a sum is ignored",
        "fedpriv/deploy/device/policy.py",
        "if not numbers.least_survivors >= self.least_survivors:",
        "if False:",
        SECURE_DEPLOYED,
    ),
    Mutant(
        "aggregator: a device remembers the message that was not rounded",
        "fedpriv/deploy/device/device.py",
        "streams=self.streams, sums=sums)",
        "streams=self.streams)",
        SECURE_DEPLOYED,
    ),
    Mutant(
        "aggregator: a device accepts a plan for a smaller model",
        "fedpriv/deploy/device/policy.py",
        "if numbers.size != parameters:",
        "if False:",
        SECURE_DEPLOYED,
    ),
    Mutant(
        "aggregator: clients may sign different models",
        "fedpriv/deploy/facts.py",
        "for sent in (model, shared):",
        "for sent in (shared,):",
        SECURE_DEPLOYED,
    ),
    Mutant(
        "aggregator: clients are asked while a helper is missing",
        "fedpriv/deploy/server.py",
        "        network.wait_for_helpers(sums.parties.pinned, patience)\n",
        "",
        SECURE_DEPLOYED,
    ),
    Mutant(
        "aggregator: a turn that a helper did not answer counts",
        "fedpriv/deploy/coordinator.py",
        '"void" if sum_ is None else "applied"',
        '"applied"',
        SECURE_DEPLOYED,
    ),
    Mutant(
        "aggregator: a helper that lost its key voids all later turns",
        "fedpriv/deploy/coordinator.py",
        "            self._sums.keys = []  # a helper that has lost its records makes a new key\n",
        "            pass\n",
        SECURE_DEPLOYED,
    ),
]


def verdict(mutant: Mutant, killer: str | None = None) -> tuple[str, str | None]:
    """`killed` if the tests named beside a fault notice it, `ALIVE` if they pass, otherwise the trouble; and the test.

    Args:
        mutant: The fault.
        killer: The test that noticed it the last time, which is tried first.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        file = tree / mutant.file
        text = file.read_text(encoding="utf-8")
        if mutant.old not in text:
            raise SystemExit(f"{mutant.name}: {mutant.file} no longer holds {mutant.old!r}. Fix the list of mutants.")
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        if killer is not None and run_tests(tree, [killer])[0] == 1:
            return "killed", killer
        code, failed = run_tests(tree, mutant.tests.split())
        return {0: "ALIVE ", 1: "killed"}.get(code, f"BROKEN (pytest's exit code {code})"), failed


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str | None]:
    """Pytest's exit code in a copy of the tree, and the test that failed.

    The test of this list itself is left out: any fault would fail it.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", f"cache_dir={folder}", *tests]
        command += ["--ignore=tests/core/test_core_mutants.py"]
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.setdefault("FEDPRIV_CHAOS", "4")
        code = subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=False).returncode
        found = Path(folder) / "v" / "cache" / "lastfailed"
        return code, next(iter(json.loads(found.read_text())), None) if found.exists() else None


def refuse_failing_tests(suites: set[str], jobs: int) -> None:
    """Stops unless the tests pass without a fault: otherwise every fault would seem to be noticed."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copy_tree(Path(folder))
        ordered = sorted(suites)
        for tests, code in zip(
            ordered, pool.map(lambda tests: run_tests(Path(folder), tests.split())[0], ordered), strict=True
        ):
            if code != 0:
                raise SystemExit(f"{tests} fails without any fault. Fix that first.")


def copy_tree(target: Path) -> None:
    """Copies the files that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def main(words: list[str], jobs: int, *, tested: bool) -> int:
    """Runs the faults whose names hold one of `words`; returns the exit code."""
    began = time.monotonic()
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if not tested:
        refuse_failing_tests({mutant.tests for mutant in chosen}, jobs)
    killers: dict[str, str] = json.loads(KILLERS.read_text(encoding="utf-8")) if KILLERS.exists() else {}
    dead = 0
    with ThreadPoolExecutor(jobs) as pool:
        verdicts = pool.map(lambda mutant: verdict(mutant, killers.get(mutant.name)), chosen)
        for mutant, (found, killer) in zip(chosen, verdicts, strict=True):
            print(f"{found}  {mutant.name}", flush=True)
            dead += found == "killed"
            if found == "killed" and killer is not None and killers.get(mutant.name) != killer:
                killers[mutant.name] = killer
                KILLERS.write_text(json.dumps(dict(sorted(killers.items())), indent=1) + "\n", encoding="utf-8")
    print(f"{dead} of {len(chosen)} faults killed in {(time.monotonic() - began) / 60.0:.0f} minutes")
    return 1 if dead < len(chosen) or not chosen else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", help="words of which a fault's name holds one; all faults without")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--tested", action="store_true", help="all tests have just passed without a fault")
    arguments = parser.parse_args()
    raise SystemExit(main(arguments.words, arguments.jobs, tested=arguments.tested))
