"""Seeded faults, each of which some test must kill.

    python tests/mutants.py [WORDS ...]      all faults, or those whose name holds one of the words

Each fault is a change of one place in the product. The program copies the working tree to a temporary folder, puts
one fault in, runs the tests named beside it there, and reports a fault that no test notices. Exit code 1 if any
survives. `tests/core/test_core_mutants.py` checks with every test run that the places still exist.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """One fault: its name, the file, the text there now, the faulty text, and the tests that must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


DATA = (
    "tests/learning/test_learning_shifts.py tests/learning/test_learning_validation.py "
    "tests/experiment/test_experiment_data.py"
)
CORE, ENGINES, EXPERIMENT = "tests/core", "tests/engines", "tests/experiment/test_experiment_run.py"
PRIVACY, FLOWER, CONFIG = (
    "tests/privacy",
    "tests/flower --ignore=tests/flower/test_flower_run.py",
    "tests/experiment/test_experiment_config.py",
)
ROUNDS, NORMEC, NOISE = "fedpriv/rounds.py", "fedpriv/methods/alpha_normec.py", "fedpriv/noise.py"
STEP = "fedpriv/engines/step.py"
LOCAL, OPTIMIZERS = "tests/learning/test_learning_local_work.py", "tests/core/test_core_server.py"
ENGINES_TESTED = "tests/experiment/test_experiment_engines.py"
RAY, GRID = "tests/engines/test_engines_ray.py", "tests/flower/test_flower_grid.py"
BOUNDING, PLAN, ACCOUNTING = "fedpriv/bounding.py", "fedpriv/privacy/plan.py", "fedpriv/privacy/accounting.py"

MEMBER, CHAOS = "tests/deploy/test_deploy_member.py", "tests/deploy/test_deploy_chaos.py"
COORDINATOR, APPS = "tests/deploy/test_deploy_coordinator.py", "tests/deploy/test_deploy_app.py"

SCHEDULES, TIMELINE = "fedpriv/devices/schedules.py", "fedpriv/devices/timeline.py"
TIMED, CHARGED = "tests/devices/test_devices_timeline.py", "tests/devices/test_devices_privacy.py"
CLOCKED = "tests/devices/test_devices_run.py"

GAUSSIAN, TAILS, STREAMS = "fedpriv/gaussian.py", "fedpriv/tails.py", "fedpriv/streams.py"
SAMPLING = "fedpriv/privacy/sampling.py"
SAMPLED, STREAMED = "tests/core/test_core_gaussian.py", "tests/core/test_core_streams.py"

MUTANTS = [
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
        'return sampling.charge(rounds, each_message=trust == "local")',
        "return float(rounds)",
        CHARGED,
    ),
    Mutant(
        "a timeline that a removed client would change",
        PLAN,
        'if isinstance(sampling, Scheduled) and adjacency != "replace":',
        "if False:",
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
        "fedpriv/experiment/journal.py",
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
        "fedpriv/learning/validation.py",
        "train_inputs=dataset.train_inputs[kept],\n        train_labels=dataset.train_labels[kept],",
        "",
        DATA,
    ),
    Mutant(
        "every client's inputs are shifted alike",
        "fedpriv/learning/shifts.py",
        "streams.source(Purpose.SHIFT, client=client)",
        "streams.source(Purpose.SHIFT)",
        DATA,
    ),
    Mutant(
        "a deployment measures its clients' data",
        "fedpriv/experiment/journal.py",
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
        BOUNDING,
        "if not 1e-20 <= value <= 1e20:",
        "if False:",
        CORE,
    ),
    Mutant(
        "the sum is rounded before the noise",
        ROUNDS,
        "rules.noise_stddev, total.double(), round)",
        "rules.noise_stddev, total.float().double(), round)",
        CORE,
    ),
    Mutant(
        "amplification of fixed-size cohorts with memory",
        ACCOUNTING,
        "(client_memory and isinstance(sampling, FixedSize))",
        "False",
        PRIVACY,
    ),
    Mutant(
        "a resumed run changes its noise",
        "fedpriv/experiment/records.py",
        'if metadata.get("promise") != promise:',
        "if False:",
        EXPERIMENT,
    ),
    Mutant(
        "another experiment's summary is returned",
        "fedpriv/experiment/records.py",
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
        "if not norm <= plan.l2_bound:",
        "if False:",
        FLOWER,
    ),
    Mutant(
        "Flower's messages in order of arrival",
        "strategies/nodes.py",
        "found = [answer_to.get(message.metadata.message_id) for message in asked]",
        "found = list(answer_to.values())",
        FLOWER,
    ),
    Mutant(
        "a client's metrics leave a private run",
        "clients/mod.py",
        "metrics = {} if order.private else dict(answer.content.metric_records)",
        "metrics = dict(answer.content.metric_records)",
        FLOWER,
    ),
    Mutant(
        "messages rounded to the model's number format",
        "clients/wire.py",
        "return {ARRAYS: self._record(vector, (form.dtype,) * len(self.dtypes))}",
        "return {ARRAYS: self._record(vector, self.dtypes)}",
        FLOWER,
    ),
    Mutant(
        "a client that lost its memory goes on",
        "clients/state.py",
        "if fresh._fields and last_round != order.last_round:",
        "if False:",
        FLOWER,
    ),
    Mutant(
        "the seed of a central run goes to the clients",
        "strategies/method_strategy.py",
        "streams = rules.streams if rules.noise_stddev > 0.0 else None",
        "streams = rules.streams",
        FLOWER,
    ),
    Mutant(
        "no noise at the server",
        ROUNDS,
        "noisy = release_sum(rules.streams, rules.noise_stddev, total.double(), round)",
        "noisy = total.double()",
        CORE,
    ),
    Mutant(
        "no noise at the client",
        ROUNDS,
        "apply_client_rule(rules.method, state, signal, rules.release(round, client), round)",
        "apply_client_rule(rules.method, state, signal, None, round)",
        CORE,
    ),
    Mutant("noise of the wrong size", NOISE, "rounded_noise(exact, stddev,", "rounded_noise(exact, stddev**0.5,", CORE),
    Mutant(
        "noise is not rounded to a grid",
        NOISE,
        "torch.from_numpy(np.clip(levels, -level, level).astype(np.float64) * grid)",
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
        "fedpriv/experiment/assemble.py",
        "streams = SeededStreams(config.seed, config.noise_id)\n    server",
        "streams = SeededStreams(config.seed)\n    server",
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
        ROUNDS,
        "client_stddev = plan.noise_stddev\n",
        "client_stddev = server_stddev = plan.noise_stddev\n",
        CORE,
    ),
    Mutant("noise on the wrong side", ROUNDS, 'if plan.trust == "local":', 'if plan.trust != "local":', CORE),
    Mutant(
        "sent memory where the server adds the noise", ROUNDS, "elif method.needs_client_noise:", "elif False:", CORE
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
    Mutant("steps uphill", NORMEC, "state.model - self.server_lr * step", "state.model + self.server_lr * step", CORE),
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
        'if trust == "local" or isinstance(sampling, Everyone | Scheduled):',
        "if isinstance(sampling, Everyone):",
        PRIVACY,
    ),
    Mutant(
        "composition forgotten",
        ACCOUNTING,
        "shift = math.sqrt(rounds) / noise_multiplier",
        "shift = 1.0 / noise_multiplier",
        PRIVACY,
    ),
    Mutant(
        "Poisson replace in the wrong units",
        ACCOUNTING,
        "2.0 * noise_multiplier if replace else noise_multiplier",
        "4.0 * noise_multiplier if replace else noise_multiplier",
        PRIVACY,
    ),
    Mutant(
        "fixed-size replace in the wrong units",
        ACCOUNTING,
        "noise_multiplier if replace else 0.5 * noise_multiplier",
        "2.0 * noise_multiplier if replace else noise_multiplier",
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
        "buffers leave un-noised",
        "fedpriv/vectors.py",
        "refuse_buffers(name for name, _ in module.named_buffers())",
        "",
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
        "fedpriv/learning/local_work.py",
        "streams.source(Purpose.LOCAL_WORK, round, client)",
        "streams.source(Purpose.LOCAL_WORK, 1, client)",
        "tests/core tests/engines",
    ),
    Mutant(
        "pseudo-gradient with the wrong sign",
        "fedpriv/learning/local_work.py",
        "return self._start - self.model\n",
        "return self.model - self._start\n",
        "tests/core tests/engines",
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
        "fedpriv/learning/local_work.py",
        "for start in range(0, examples, size)]",
        "for start in range(0, examples - size + 1, size)]",
        LOCAL,
    ),
    Mutant(
        "local passes of all clients counted as the longest's",
        "fedpriv/engines/vectorized.py",
        "return walk.signal(model.new_tensor(steps).unsqueeze(1))",
        "return walk.signal(max(steps))",
        "tests/engines/test_engines_equal.py",
    ),
    Mutant(
        "local gradients read off the rounded models",
        "fedpriv/learning/local_work.py",
        'return self._sum if self._kind == "gradient-sum" else self._sum / steps',
        'return (self._start - self.model) / self._lr / (1 if self._kind == "gradient-sum" else steps)',
        LOCAL,
    ),
    Mutant(
        "server optimiser: nothing is remembered",
        "fedpriv/methods/server.py",
        "past = learned(*(getattr(state, name).double() for name in learned._fields))",
        "past = self.optimizer.init(exact)",
        OPTIMIZERS,
    ),
    Mutant(
        "server optimiser: Adam without its correction",
        "fedpriv/methods/server.py",
        "if self.bias_correction else (1.0, 1.0)",
        "if not self.bias_correction else (1.0, 1.0)",
        OPTIMIZERS,
    ),
    Mutant(
        "server optimiser: clients are told of it",
        ROUNDS,
        "ClientRules(method=client_part(method), ",
        "ClientRules(method=method, ",
        OPTIMIZERS,
    ),
    Mutant(
        "a new key at its default is another experiment",
        "fedpriv/experiment/tables.py",
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
        "fedpriv/experiment/journal.py",
        'if self.ran.get("client_noise") == "fused" else ""',
        'if False else ""',
        ENGINES_TESTED,
    ),
    Mutant(
        "a derived bound is taken for its parent's",
        "fedpriv/methods/base.py",
        "return found if type(found.bounded) in IN_PLACE else None",
        "return found",
        ENGINES,
    ),
    Mutant(
        "rounds since a snapshot are not repeated",
        "fedpriv/engines/ray.py",
        "for past in self._snapshots.rounds:",
        "for past in []:",
        RAY,
    ),
    Mutant(
        "clients of an app share arrays with the server",
        "strategies/virtual_clients.py",
        "self._queue.extend(map(copy_message, messages))",
        "self._queue.extend(messages)",
        GRID,
    ),
    Mutant(
        "a client's state is lost between messages",
        "strategies/virtual_clients.py",
        "self._contexts[client] = copy_context(context)",
        "pass",
        GRID,
    ),
    Mutant("sums depend on order", "fedpriv/sums.py", ".add_(self.shift).sub_(self.shift)", "", CORE),
    Mutant(
        "gradients of padding",
        "fedpriv/learning/dense.py",
        "return slope.mul_(weights.unsqueeze(-1))",
        "return slope.mul_(weights.amax(dim=-1, keepdim=True).unsqueeze(-1))",
        ENGINES,
    ),
    Mutant("memories lost at a restart", "fedpriv/experiment/run.py", "engine.restore(client)", "pass", EXPERIMENT),
    Mutant(
        "rounds recorded twice after a restart",
        "fedpriv/experiment/journal.py",
        "self.directory.keep_rows(name, last_round)",
        "pass",
        EXPERIMENT,
    ),
    Mutant(
        "a checkpoint that is off by one round",
        "fedpriv/experiment/journal.py",
        "checkpoint.write(digest, self.promise, round, server, client_states())",
        "checkpoint.write(digest, self.promise, round - 1, server, client_states())",
        EXPERIMENT,
    ),
    Mutant(
        "another experiment's folder is taken",
        "fedpriv/experiment/records.py",
        "if found != digest:",
        "if False:",
        EXPERIMENT,
    ),
    Mutant(
        "unknown keys are ignored",
        "fedpriv/experiment/tables.py",
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
        "clients/member.py",
        "return _given_before(record, terms, request)",
        "pass",
        MEMBER,
    ),
    Mutant(
        "deployment: a turn whose message is lost is noised again",
        "clients/member.py",
        "            _refuse_released(past, entry)\n",
        "",
        CHAOS,
    ),
    Mutant(
        "deployment: a release is not written to the ledger",
        "clients/member.py",
        "                ledger.append(line)\n",
        "                pass\n",
        MEMBER,
    ),
    Mutant(
        "deployment: a pending memory is committed whatever counted",
        "clients/memory.py",
        "if self.pending_turn and last_turn == self.pending_turn:",
        "if self.pending_turn:",
        CHAOS,
    ),
    Mutant(
        "deployment: a pending memory is never committed",
        "clients/memory.py",
        "if self.pending_turn and last_turn == self.pending_turn:",
        "if False:",
        CHAOS,
    ),
    Mutant(
        "deployment: a damaged memory is used",
        "clients/memory.py",
        'if line.decode(errors="replace") != f"{_VERSION} {hashlib.sha256(body).hexdigest()}":',
        "if False:",
        MEMBER,
    ),
    Mutant(
        "deployment: records are not on the disk when the message leaves",
        "clients/files.py",
        "                _write_all(file, line)\n                os.fsync(file)",
        "                _write_all(file, line)",
        MEMBER,
    ),
    Mutant(
        "deployment: the budget is not looked at",
        "clients/member.py",
        "if not epsilon <= limits.epsilon:",
        "if False:",
        MEMBER,
    ),
    Mutant(
        "deployment: the quick bound is too low",
        "clients/ledger.py",
        "return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta)) <= epsilon",
        "return rho <= epsilon",
        MEMBER,
    ),
    Mutant(
        "deployment: replacement is counted as removal",
        "clients/ledger.py",
        'moved = REPLACE_FACTOR if adjacency == "replace" else 1.0',
        "moved = 1.0",
        MEMBER,
    ),
    Mutant(
        "deployment: a client follows a seed",
        "clients/policy.py",
        "if order.seed is not None:",
        "if False:",
        MEMBER,
    ),
    Mutant(
        "deployment: less noise than promised is accepted",
        "clients/policy.py",
        "if not abs(order.noise_stddev - needed) <= _TOLERANCE * needed:",
        "if False:",
        MEMBER,
    ),
    Mutant(
        "deployment: the floor on noise is not looked at",
        "clients/policy.py",
        "        if not multiplier >= least:\n",
        "        if False:\n",
        MEMBER,
    ),
    Mutant(
        "deployment: an open turn is drawn again after a restart",
        "strategies/coordinator.py",
        'if facts["open"] is not None:',
        "if False:",
        COORDINATOR,
    ),
    Mutant(
        "deployment: who did not answer is counted",
        "strategies/coordinator.py",
        "self.last_turn |= dict.fromkeys(counted, broadcast.round)",
        "self.last_turn |= dict.fromkeys(asked, broadcast.round)",
        CHAOS,
    ),
    Mutant(
        "deployment: too few are enough",
        "strategies/coordinator.py",
        "elif len(valid) < self._needed:",
        "elif False:",
        COORDINATOR,
    ),
    Mutant(
        "deployment: a message beyond its bound is summed",
        "strategies/coordinator.py",
        "        if norm > bound:\n",
        "        if False:\n",
        COORDINATOR,
    ),
    Mutant(
        "deployment: lost memories are not started anew",
        "strategies/coordinator.py",
        "        self._start_anew()\n        return True",
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
        "strategies/deployment.py",
        "        broadcast = coordinator.begin()\n        save()\n",
        "        broadcast = coordinator.begin()\n",
        APPS,
    ),
    Mutant(
        "deployment: a node runs any bundle",
        "clients/supernode_internals.py",
        "    if digest not in accepted:",
        "    if False:",
        "tests/deploy/test_deploy_node.py",
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
        "fedpriv/gaussian.c",
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
        "*self._sequence.spawn_key, _MORE, position",
        "*self._sequence.spawn_key, position",
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
        "deployment: a full disk charges a message that never left",
        "clients/member.py",
        "            memory.prepare(answered)\n            try:\n                ledger.append(line)",
        "            try:\n                ledger.append(line)\n                memory.prepare(answered)",
        MEMBER,
    ),
    Mutant(
        "deployment: what a crash left unfinished is thrown away",
        "clients/member.py",
        "            memory.complete(ledger.holds)\n",
        "",
        MEMBER,
    ),
    Mutant(
        "deployment: what lies beside a memory is believed without the ledger",
        "clients/memory.py",
        "if record is not None and is_charged(record.ledger_lines, record.ledger_hash):",
        "if record is not None:",
        MEMBER,
    ),
    Mutant(
        "deployment: a memory that is not finite is used",
        "clients/member.py",
        "    if not all(bool(torch.isfinite(field).all()) for field in record.committed.values()):",
        "    if False:",
        MEMBER,
    ),
    Mutant(
        "a client whose memory is not finite is not counted",
        STEP,
        "self._norms += torch.where(torch.isfinite(decisive), norms, math.inf).flatten().tolist()",
        "self._norms += norms.flatten().tolist()",
        "tests/engines/test_engines_step.py",
    ),
    Mutant(
        "deployment: a removed node is taken for one whose clock is wrong",
        "clients/supernode_internals.py",
        "self.removed = self.taken and not known",
        "self.removed = False",
        "tests/deploy/test_deploy_node.py",
    ),
    Mutant(
        "deployment: a removed key is only noted, and still taken",
        "strategies/deploy_keys.py",
        "            server.unregister(node)\n",
        "            pass\n",
        "tests/deploy/test_deploy_keys.py",
    ),
    Mutant(
        "deployment: check and register know nothing of removed keys",
        "strategies/deploy_keys.py",
        "        return gone + again",
        "        return []",
        "tests/deploy/test_deploy_keys.py",
    ),
    Mutant(
        "deployment: Flower's processes outlive a killed node",
        "clients/companion.py",
        "            fcntl.flock(file, fcntl.LOCK_SH)\n            os.kill(os.getpid(), signal.SIGKILL)",
        "            fcntl.flock(file, fcntl.LOCK_SH)",
        "tests/deploy/test_deploy_companion.py",
    ),
    Mutant(
        "deployment: a full disk is not looked at",
        "clients/deploy_checks.py",
        "    if free < max(least, _LEAST_FREE):",
        "    if False:",
        "tests/deploy/test_deploy_check.py",
    ),
    Mutant(
        "a model is made before its parameters are counted",
        "clients/own_data.py",
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
        'if self.lost_memory == "start-afresh" and method.lost_memory != "start-afresh":',
        "if False:",
        COORDINATOR,
    ),
    Mutant(
        "deployment: a turn with a secret cohort ends with its last answer",
        "strategies/deployment.py",
        "        if coordinator.secret_cohorts:\n            # Neither",
        "        if False:\n            # Neither",
        APPS,
    ),
]


def killed(mutant: Mutant) -> bool:
    """Whether the tests named beside a fault notice it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        file = tree / mutant.file
        text = file.read_text(encoding="utf-8")
        if mutant.old not in text:
            raise SystemExit(f"{mutant.name}: {mutant.file} no longer holds {mutant.old!r}. Mend the list of mutants.")
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        return run_tests(tree, mutant.tests) == 1


def run_tests(tree: Path, tests: str) -> int:
    """Pytest's exit code in a copy of the tree. The test of this list itself is left out: any fault would fail it."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    command += ["--ignore=tests/core/test_core_mutants.py"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=False).returncode


def refuse_failing_tests(suites: set[str]) -> None:
    """Stops unless the tests pass without a fault: else every fault would seem to be noticed."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        for tests in sorted(suites):
            if run_tests(Path(folder), tests) != 0:
                raise SystemExit(f"{tests} fails without any fault. Mend that first.")


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


def main(words: list[str]) -> int:
    """Runs the faults whose names hold one of `words`; returns the exit code."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    refuse_failing_tests({mutant.tests for mutant in chosen})
    alive = []
    for mutant in chosen:
        dead = killed(mutant)
        print(f"{'killed' if dead else 'ALIVE '}  {mutant.name}", flush=True)
        alive += [] if dead else [mutant.name]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} faults killed")
    return 1 if alive or not chosen else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
