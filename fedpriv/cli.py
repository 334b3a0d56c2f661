"""The command line: fedpriv new | run | sweep | compare | report | audit | flower | deploy | privacy | data | list."""

import dataclasses
import io
import json
import math
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpriv.checks import at_least_one
from fedpriv.clock import DEVICES, SCHEDULES
from fedpriv.data.dataset import DATASETS
from fedpriv.data.federation import Holders, plot_who_holds_what, who_holds_what
from fedpriv.data.heterogeneity import figures_of
from fedpriv.data.partitions import PARTITIONS
from fedpriv.data.shifts import SHIFTS
from fedpriv.engines.native import feedback_in_c
from fedpriv.errors import UserError, has_extra, require_extra
from fedpriv.experiment.build import assemble_clients, sampling_of
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.execution import ENGINES, Execution, bytes_of
from fedpriv.experiment.heterogeneity import measure_heterogeneity
from fedpriv.experiment.learned import learned_nothing, warnings_of
from fedpriv.experiment.progress import RoundProgress
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import DIAGNOSTICS_FILE, RunDirectory, jsonable
from fedpriv.files import write_atomically
from fedpriv.mechanisms.gaussian import noise_is_in_c
from fedpriv.methods import METHODS, SERVER_OPTIMIZERS
from fedpriv.native import about_compiled
from fedpriv.privacy import NOT_PROMISED, SAMPLINGS, noise_against_signal, privacy_statement, rounded_up
from fedpriv.privacy.released import OWNER_ONLY
from fedpriv.rounds import agree
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import LOCAL_WORKS
from fedpriv.tasks.models import MODELS
from fedpriv.tracking.trackers import track, watched_by
from fedpriv.version import __version__

if TYPE_CHECKING:
    from fedpriv.report.spent import Group

__all__ = ["app", "main"]

app = typer.Typer(
    help="Differentially private federated learning.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    """Differentially private federated learning."""
    if show:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's TOML file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="table.key=value", help="Change a key of the config; empty value removes it."),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Where data sets lie; else FEDPRIV_DATA, else ./data.", show_default=False)
]
Logs = Annotated[
    list[str] | None,
    typer.Option("--log", metavar="TRACKER", help="Send rounds to tensorboard, mlflow or wandb too; may be repeated."),
]
LogDiagnostics = Annotated[
    bool | None,
    typer.Option(
        "--log-diagnostics/--no-log-diagnostics",
        help="Whether what is not released is sent there as well.",
        show_default="of runs without privacy",
    ),
]


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the experiment is called.", show_default=False)],
    source: Annotated[str, typer.Option("--from", help="The shipped experiment to begin with.")] = "quickstart",
) -> None:
    """Write NAME.toml, a first experiment, into the folder where you are."""
    from fedpriv.experiment.starter import write_starter

    path = write_starter(name, source)
    print(f"made        {path}\nnext        fedpriv run {shlex.quote(str(path))}")


@app.command()
def run(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="The run directory; else runs/NAME.", show_default=False)] = None,
    engine: Annotated[str, typer.Option(help="auto (measures), loop, vectorized, ray or flower.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    data_root: DataRoot = None,
    settings: Settings = None,
    workers: Annotated[
        int | None, typer.Option(help="Ray workers; else one a core, or a GPU.", show_default=False)
    ] = None,
    compute: Annotated[str, typer.Option(help="In a Ray worker: auto, loop or vectorized.")] = "auto",
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="Each Ray worker's share of a GPU, such as 0.25.", show_default=False)
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running Ray, or auto; else one is started.", show_default=False)
    ] = None,
    state_memory: Annotated[
        str | None,
        typer.Option(help="Most memory of client states, such as 8GB; more goes to the disk.", show_default=False),
    ] = None,
    state_folder: Annotated[
        Path | None, typer.Option(help="Where those states go; else the temporary folder.", show_default=False)
    ] = None,
    client_noise: Annotated[
        str | None,
        typer.Option(
            help="With trust local: fused (one draw a round, the same law) or faithful.", show_default="fused"
        ),
    ] = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last", help="Channels innermost: faster convolutions on CPUs.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, or bfloat16: faster, coarser gradients.", show_default="float32")
    ] = None,
    deploy: Annotated[
        str | None,
        typer.Option(
            metavar="CONNECTION", help="Run on real devices: a deployment's folder admin, or a Flower connection."
        ),
    ] = None,
    test_seeded: Annotated[bool, typer.Option("--test-seeded", hidden=True)] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run directory.")] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Rounds between checkpoints; else one every ten seconds.", show_default=False)
    ] = None,
    log: Logs = None,
    log_diagnostics: LogDiagnostics = None,
) -> None:
    """Run an experiment and fill its run directory."""
    experiment = load_config(config, settings or ())
    directory = out or Path("runs") / experiment.name
    if checkpoint_every is not None:
        at_least_one("--checkpoint-every", checkpoint_every, "Give a number of rounds")
    execution = Execution(
        engine=engine,
        compute=compute,
        client_noise=client_noise,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        ray_address=ray_address,
        state_memory=None if state_memory is None else bytes_of(state_memory),
        state_folder=state_folder,
        channels_last=channels_last,
        precision=precision,
    )
    if log and deploy is not None:
        raise UserError("--log", "a run on this machine", "--deploy", "Drop one of the two")
    with (
        track(log or (), experiment, directory, diagnostics=log_diagnostics) as sent,
        RoundProgress(experiment.training.rounds) as progress,
    ):
        watch = watched_by(progress, sent)
        if deploy is not None:
            from fedpriv.deploy.run import run_deployed

            summary = run_deployed(
                experiment,
                directory,
                deploy,
                device=device,
                data_root=data_root,
                resume=resume,
                seeded=test_seeded,
                watch=progress,
            )
        elif engine == "flower":
            from fedpriv.flower.launch import run_with_flower

            summary = run_with_flower(
                experiment, directory, device=device, data_root=data_root, resume=resume, watch=watch
            )
        else:
            summary = run_experiment(
                experiment,
                directory,
                engine=engine,
                device=device,
                data_root=data_root,
                resume=resume,
                watch=watch,
                checkpoint_every=checkpoint_every,
                execution=execution,
            )
    if summary is None:
        print(f"done        the run directory is on the server: {directory.resolve()}")
    else:
        _print_summary(summary, directory)
        _print_warnings(directory)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep's TOML file.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; else runs/NAME.", show_default=False)] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Trials at a time; else as many as there is room for.", show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(help="In each trial: auto, loop or vectorized.")] = "vectorized",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    cpus_per_trial: Annotated[float, typer.Option(help="Cores that each trial needs, and PyTorch's threads.")] = 1.0,
    gpus_per_trial: Annotated[float, typer.Option(help="Each trial's share of a GPU, such as 0.25; on Ray.")] = 0.0,
    ray: Annotated[bool, typer.Option("--ray", help="Ray deals out cores, too; else processes of our own.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running Ray, or auto; else one is started.", show_default=False)
    ] = None,
    data_root: DataRoot = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in the folder.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Go on, and try failed trials again.")] = False,
    no_stop: Annotated[
        bool, typer.Option("--no-stop", help="Go on, stop no trial early, and finish those that were.")
    ] = False,
    log: Logs = None,
    log_diagnostics: LogDiagnostics = None,
) -> None:
    """Run an experiment for all values along some axes, trials side by side; failed trials do not stop it."""
    from fedpriv.sweeps.config import load_sweep
    from fedpriv.sweeps.files import CHOSEN, TRIALS
    from fedpriv.sweeps.live import SweepTable
    from fedpriv.sweeps.run import SweepState, run_sweep
    from fedpriv.sweeps.table import other_trials
    from fedpriv.sweeps.tuning import about_tuning

    plan = load_sweep(file)
    folder = out or Path("runs") / plan.name
    complaints: dict[str, list[str]] = {}
    with SweepTable() as table:

        def watch(state: SweepState) -> None:
            complaints.update(state.complaints)
            table(state)

        trials = run_sweep(
            plan,
            folder,
            jobs=jobs,
            engine=engine,
            device=device,
            data_root=data_root,
            resume=resume or retry,
            retry=retry,
            stop=not no_stop,
            cpus_per_trial=cpus_per_trial,
            gpus_per_trial=gpus_per_trial,
            ray=ray,
            ray_address=ray_address,
            logs=log or (),
            log_diagnostics=log_diagnostics,
            watch=watch,
        )
    failed = trials[trials["status"] == "failed"]
    for name, reason in list(zip(failed["trial"], failed["reason"], strict=True))[:5]:
        print(f"failed      {name or 'no experiment'}: {reason}")
    for name, lines in list(complaints.items())[:5]:
        print(f"not logged  {name}: {lines[-1]}")
    for line in islice(trial_warnings(folder / TRIALS, trials["trial"]), 5):
        print(line)
    stopped = list(trials["status"]).count("stopped")
    counts = f"{list(trials['status']).count('done')} done, {len(failed)} failed"
    counts += f", {stopped} stopped early" if stopped else ""
    others = other_trials(trials, folder / TRIALS)
    if others:
        what = "trial that" if others == 1 else "trials that"
        print(f"others      {others} {what} {file} does not have; kept in {folder / TRIALS}, not in the table")
    print(
        f"trials      {len(trials)}: {counts}\n"
        f"table       {folder / 'trials.csv'}\nresults     fedpriv.load_results({str(folder)!r})"
    )
    if plan.tuning is not None:
        for sentence in about_tuning(json.loads((folder / CHOSEN).read_bytes())):
            print(f"tuning      {sentence}")
    if len(failed) == len(trials):
        raise typer.Exit(2)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Run directories.", show_default=False)],
    as_csv: Annotated[bool, typer.Option("--csv", help="As CSV.")] = False,
) -> None:
    """Show finished runs side by side: what differs in their configs, and what came out."""
    from fedpriv.experiment.results import compare_runs

    table = compare_runs(runs)
    if as_csv:
        print(table.to_csv(), end="")
        return
    console = Console()
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", *table.columns):
        shown.add_column(name, overflow="fold")
    for name, row in table.iterrows():
        shown.add_row(str(name), *("" if value is None or value != value else str(value) for value in row))
    console.print(shown)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A sweep's folder, or any of run directories.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Where to; else DIR/report.", show_default=False)] = None,
    select: Annotated[
        str | None,
        typer.Option(help="test or validation chooses the best; else validation if all have it.", show_default=False),
    ] = None,
) -> None:
    """Make one page about many runs: the best of each method, curves, robustness, privacy; figures and tables."""
    require_extra("fedpriv report", "report")
    from fedpriv.report.write import write_report

    page = write_report(folder, out, select=select)
    print(f"page        {page}\nfigures     {page.parent / 'figures'}\ntables      {page.parent / 'tables'}")


@app.command()
def audit(
    config: ConfigFile,
    canaries: Annotated[int, typer.Option(help="How many clients are planted.")] = 300,
    confidence: Annotated[float, typer.Option(help="Of the lower bound on epsilon.")] = 0.95,
    out: Annotated[Path | None, typer.Option(help="The folder; else runs/NAME-audit.", show_default=False)] = None,
    settings: Settings = None,
    engine: Annotated[str, typer.Option(help="auto (measures), loop or vectorized.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    data_root: DataRoot = None,
    audit_seed: Annotated[int, typer.Option(help="Seed of the canaries; another seed is another attack.")] = 0,
) -> None:
    """Attack an experiment's promise with planted clients in one run; exit code 1 if it is found guilty."""
    from fedpriv.audit import AUDIT_FILE, PICTURE_FILE, AuditChoice, run_audit

    experiment = load_config(config, settings or ())
    directory = out or Path("runs") / f"{experiment.name}-audit"
    choice = AuditChoice(canaries=canaries, confidence=confidence, seed=audit_seed, engine=engine, device=device)
    with RoundProgress(experiment.training.rounds) as progress:
        found = run_audit(
            experiment, directory, choice, data_root=data_root, watch=lambda number: progress({"round": number}, {})
        )
    level = f"{100 * found['confidence']:g} %"
    print(
        f"verdict     {found['verdict']}\n"
        f"claimed     epsilon {rounded_up(found['epsilon_claimed'])} at delta = {found['delta']:g}, "
        f"{found['adjacency']} adjacency\n"
        f"measured    at least {found['epsilon_lower']:.2f} at {level} confidence; estimate "
        f"{found['epsilon_estimate']:.2f}\n"
        f"adversary   {found['adversary']}\n"
        f"picture     {directory / PICTURE_FILE}\n"
        f"record      {directory / AUDIT_FILE}\n\n{textwrap.fill(found['words'], width=100)}"
    )
    raise typer.Exit(1 if found["verdict"] == "guilty" else 0)


@app.command()
def flower(
    app_dir: Annotated[Path, typer.Argument(metavar="APP_DIR", help="The Flower app's folder.", show_default=False)],
    clients: Annotated[int, typer.Option(help="How many clients: partition ids 0 to N - 1.", show_default=False)],
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "-c", "--run-config", metavar="key=value", help="Change a key of the app's config, as flwr run does."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that run clients; above 1, Ray's.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(help="Each worker's share of a GPU, such as 0.25.")] = 0.0,
    ray_address: Annotated[
        str, typer.Option(help="A Ray cluster's HOST:PORT or auto; else a Ray of the run's own.", show_default=False)
    ] = "",
) -> None:
    """Run a Flower app as it is, without Flower's servers. What it writes under relative names lands where you are."""
    require_extra("fedpriv flower", "flower", ["flwr"])
    from fedpriv.flower.apps.run import Workers, run_app

    asked = Workers(workers, gpus_per_worker, ray_address)
    if asked.need_ray:
        require_extra("fedpriv flower --workers", "flower")
    print(run_app(app_dir, clients, run_config or (), asked))


deploy = typer.Typer(help="Set up, check and run a server and nodes on machines of their own.", no_args_is_help=True)
app.add_typer(deploy, name="deploy")


@deploy.callback()
def _for_all_of_deploy() -> None:
    require_extra("fedpriv deploy", "deploy")


DeployDir = Annotated[Path, typer.Argument(metavar="DIR", help="The deployment's folder.", show_default=False)]
Days = Annotated[int, typer.Option(help="How long the server's certificate is valid.")]


@deploy.command()
def init(
    folder: DeployDir,
    nodes: Annotated[int, typer.Option(help="How many nodes: one a client.", show_default=False)],
    host: Annotated[str, typer.Option(help="What nodes call the server: a name or an address.", show_default=False)],
    port: Annotated[int, typer.Option(help="The server's port.")] = 9092,
    days: Days = 365,
    trust: Annotated[str, typer.Option(help="In the nodes' policies: local or central.")] = "local",
    epsilon: Annotated[float, typer.Option(help="In the nodes' policies: most that may be spent.")] = 8.0,
    delta: Annotated[float, typer.Option(help="In the nodes' policies: the delta of that.")] = 1e-5,
) -> None:
    """Make the folders of a deployment: keys, certificates, policies, scripts, and a README on what goes where."""
    from fedpriv.deploy.setup.provision import init_deployment, make_deployment

    deployment = make_deployment(host=host, port=port, nodes=nodes, trust=trust, epsilon=epsilon, delta=delta)
    init_deployment(folder, deployment, days)
    print(f"made        server, admin, ca and {nodes} nodes in {folder}\nnext        {folder / 'README.md'}")


@deploy.command()
def add(
    folder: DeployDir, nodes: Annotated[int, typer.Option(help="How many nodes to add.", show_default=False)]
) -> None:
    """Make the folders of further nodes."""
    from fedpriv.deploy.setup.provision import add_nodes

    added = add_nodes(folder, nodes)
    print(f"made        {', '.join(added)} in {folder}\nnext        admin/register.sh; see {folder / 'README.md'}")


@deploy.command()
def register(folder: DeployDir = Path()) -> None:
    """Tell the server the keys of the nodes in admin/nodes/. DIR is the deployment's folder, or admin in it."""
    from fedpriv.deploy.setup.keys import register_nodes

    lines, faults = register_nodes(folder)
    for line in lines:
        print(line)
    for line in faults:
        print(line, file=sys.stderr)
    if faults:
        raise typer.Exit(2)


@deploy.command()
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The node's name, such as node-3.", show_default=False)],
    folder: DeployDir = Path(),
) -> None:
    """Take a node away for good, by its name. DIR is the deployment's folder, or admin in it; else where you are."""
    from fedpriv.deploy.setup.keys import remove_node

    print(remove_node(name, folder))
    print("A run that has begun continues without it: its messages are missing, the number of clients stays what the")
    print("plan says, and each turn that asks it lasts until the deadline.")


@deploy.command()
def renew(
    folder: DeployDir,
    days: Days = 365,
    host: Annotated[str | None, typer.Option(help="Another name of the server.", show_default=False)] = None,
) -> None:
    """Make a new key and certificate for the server."""
    from fedpriv.deploy.setup.provision import renew_certificate

    renew_certificate(folder, days, host)
    print(f"made        {folder / 'server'}/server.pem and server.key\nnext        copy both to the server, restart it")


@deploy.command()
def check(
    folder: Annotated[
        Path, typer.Argument(metavar="PATH", help="A deployment, or its server, admin or node-I.", show_default=False)
    ],
    connect: Annotated[bool, typer.Option("--connect/--no-connect", help="Whether to call the server.")] = True,
) -> None:
    """Check a folder of a deployment: files, keys, certificates, versions, policy, and the way to the server."""
    from fedpriv.deploy.setup.check import check_folder, print_findings

    if not print_findings(check_folder(folder, connect)):
        raise typer.Exit(2)


@deploy.command()
def node(
    bundle: Annotated[Path, typer.Argument(metavar="NODE_DIR", help="The node's folder.", show_default=False)],
) -> None:
    """Run a node. It runs its own installed fedpriv, within its own policy, and no code that a server sends."""
    from fedpriv.deploy.setup.supernode import run_node

    raise typer.Exit(run_node(bundle))


@deploy.command()
def ledger(
    bundle: Annotated[Path, typer.Argument(metavar="NODE_DIR", help="The node's folder.", show_default=False)],
) -> None:
    """Show what has left a node, run by run, and what its data have been spent."""
    from fedpriv.deploy.device.ledger import account_of
    from fedpriv.deploy.device.member import Member

    member = Member.at(bundle)
    limits = member.policy.limits
    print(account_of(member.folder, limits.epsilon, limits.delta, limits.adjacency))


@deploy.command()
def server(
    folder: Annotated[Path, typer.Argument(metavar="SERVER_DIR", help="The server's folder.", show_default=False)],
) -> None:
    """Run the server of a deployment."""
    from fedpriv.deploy.setup.superlink import run_server

    raise typer.Exit(run_server(folder))


@app.command()
def privacy(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="The experiment's TOML file.", show_default=False)
    ] = None,
    settings: Settings = None,
    data_root: DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan, or what was spent, as JSON.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the trade-off curve, type I against type II error."),
    ] = None,
    spent: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Instead of a config: add up what the runs below a folder have spent."),
    ] = None,
) -> None:
    """Show what an experiment promises: noise, epsilon, statement; or what runs have spent. Trains nothing."""
    if (config is None) == (spent is None) or (spent is not None and (settings or plot)):
        remedy = "Name an experiment's TOML file (with -s and --plot if you like), or --spent DIR alone"
        raise UserError("CONFIG", "either a config or --spent", "both" if spent else "neither", remedy)
    if spent is not None:
        _show_spent(spent, as_json=as_json)
    else:
        assert config is not None
        _show_plan(load_config(config, settings or ()), data_root, plot, as_json=as_json)


def _size_of(experiment: Config, data_root: Path | None) -> int | None:
    """The number of parameters; None if the data set, which decides about it, is not on this machine."""
    try:
        return assemble_clients(experiment, data_root=data_root).task.layout.size
    except UserError:
        return None


def _show_plan(experiment: Config, data_root: Path | None, plot: Path | None, *, as_json: bool) -> None:
    sampling = sampling_of(experiment, data_root)
    plan = experiment.plan(sampling)
    agree(experiment.method, sampling, plan, SeededStreams(experiment.seed))
    size = None if plan is None else _size_of(experiment, data_root)
    if plot is not None:
        from fedpriv.experiment.tradeoff import plot_trade_off

        plot_trade_off(plan, plot, experiment.name)
    if as_json:
        absent = {"private": False, "epsilon": None, "delta": None, "noise_multiplier": None, "noise_stddev": 0.0}
        absent |= {**dict.fromkeys(("l2_sensitivity", "trust", "adjacency", "accountant")), **NOT_PROMISED}
        found = absent if plan is None else plan.as_dict(thorough=True)
        if plan is not None and plan.private and size is not None:
            found |= noise_against_signal(plan, size).as_dict()
        print(json.dumps(jsonable(found), indent=2))
    else:
        told: dict[str, Any] = {
            "size": size,
            "clock": experiment.devices is not None,
            "data": experiment.data.facts,
            "recorded": True,
        }
        print(privacy_statement(plan, method=experiment.method_name, randomness="seeded", **told))
        if plot is not None:
            print(f"picture     {plot}")


def _show_spent(folder: Path, *, as_json: bool) -> None:
    from fedpriv.report.spent import notes_on, spent_below

    groups = spent_below(folder)
    if as_json:
        found = {"folder": str(folder), "groups": [group.as_dict() for group in groups], "notes": notes_on(groups)}
        print(json.dumps(jsonable(found), indent=2))
        return
    console = Console()
    for group in groups:
        promise = "no privacy" if group.trust is None else f"trust {group.trust}, {group.adjacency}"
        console.print(f"{group.label}: {promise}", markup=False, highlight=False)
        if group.adversary is not None:
            console.print(f"adversary: {group.adversary}", markup=False, highlight=False)
        console.print(_spent_table(group))
        console.print(f"composition: {group.total.how}\n", markup=False, highlight=False)
    for note in notes_on(groups):
        console.print(f"* {note}", markup=False, highlight=False)


def _spent_table(group: "Group") -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "state", "rounds", "epsilon", "delta"):
        shown.add_column(name, overflow="fold", justify="left" if name in ("run", "state") else "right")
    for run in group.runs:
        delta = "" if run.plan is None else f"{run.plan.delta:g}"
        shown.add_row(escape(run.name), run.state, run.extent, _epsilon(run.epsilon_after(run.rounds)), delta)
    delta = "" if group.total.delta is None else f"{group.total.delta:g}"
    shown.add_row("together", "", "", _epsilon(group.total.epsilon), delta, style="bold")
    return shown


def _epsilon(epsilon: float) -> str:
    return rounded_up(epsilon) if math.isfinite(epsilon) else "infinite"


@app.command()
def data(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG ...", help="TOML files.", show_default=False)],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Where to; else runs/NAME-data.", show_default=False)] = None,
    data_root: DataRoot = None,
    all_gradients: Annotated[
        bool, typer.Option("--all-gradients", help="Compare gradients whatever it costs, of up to 200 clients.")
    ] = False,
) -> None:
    """Show who holds what, as a table and a picture, and how much clients differ; of several, the latter alone."""
    columns = {}
    for path in configs:
        experiment = load_config(path, settings or ())
        population = assemble_clients(experiment, data_root=data_root)
        columns[str(path)] = figures_of(measure_heterogeneity(experiment, population, bounded=not all_gradients))
        if len(configs) == 1:
            _show_clients(experiment, population.federation, out or Path("runs") / f"{experiment.name}-data")
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("", no_wrap=True)
    for name in columns:
        shown.add_column(name, overflow="fold")
    for key in dict.fromkeys(key for figures in columns.values() for key in figures):
        shown.add_row(key, *("" if key not in figures else f"{figures[key]:.6g}" for figures in columns.values()))
    Console().print(shown)


def _show_clients(experiment: Config, federation: Holders, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    table = who_holds_what(federation)
    write_atomically(directory / "clients.csv", table.to_csv(index=False), OWNER_ONLY)
    if has_extra("report"):
        picture = io.BytesIO()
        plot_who_holds_what(federation, picture, partition=experiment.tables["data"]["partition"])
        write_atomically(directory / "clients.png", picture.getvalue(), OWNER_ONLY)
    print(table.to_string(index=False, max_rows=24))
    print(f"\ntable    {directory / 'clients.csv'}\npicture  {_picture(directory / 'clients.png')}\n")


def _picture(path: Path) -> str:
    return str(path) if has_extra("report") else "none: pip install 'fedpriv[report]' draws it"


@app.command(name="list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List methods, data, models, engines and what else a config can name; and what of it runs in C here."""
    kinds = {
        "methods": _describe(METHODS),
        "server": _describe(SERVER_OPTIMIZERS),
        "data": _describe(DATASETS),
        "partitions": _describe(PARTITIONS),
        "shifts": _describe(SHIFTS),
        "models": _describe(MODELS),
        "local": _describe(LOCAL_WORKS),
        "cohorts": _describe(SAMPLINGS, hidden=("population",)),
        "devices": _describe(DEVICES),
        "schedules": _describe(SCHEDULES),
        "engines": {name: {"about": about, "keys": {}} for name, about in ENGINES.items()},
        "in C": {
            "client step": {"about": about_compiled(feedback_in_c() is not None), "keys": {}},
            "noise": {"about": about_compiled(noise_is_in_c()), "keys": {}},
        },
    }
    if as_json:
        print(json.dumps(kinds, indent=2))
        return
    console = Console()
    for title, entries in kinds.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for column in ("name", "what it is", "keys"):
            table.add_column(column, overflow="fold")
        for name, entry in entries.items():
            keys = ", ".join(f"{key}={json.dumps(value)}" for key, value in entry["keys"].items())
            table.add_row(name, entry["about"], keys)
        console.print(table)
        console.print()


def _describe(kinds: Mapping[str, type[Any]], hidden: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "about": _first_line(kind),
            "keys": {f.name: _default(f) for f in dataclasses.fields(kind) if f.init and f.name not in hidden},
        }
        for name, kind in kinds.items()
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return "required" if field.default_factory is dataclasses.MISSING else field.default_factory()


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _print_summary(summary: dict[str, Any], directory: Path) -> None:
    accuracy, loss = summary["test_accuracy"], summary["test_loss"]
    if summary["private"]:
        promise = f"{rounded_up(summary['epsilon'])} at delta = {summary['delta']:g}, {summary['adjacency']} adjacency"
        promise += f"\nadversary   {summary['adversary']}"
    else:
        promise = "none: this run is not private"
    if summary.get("validation_accuracy") is not None:
        unprotected = _mark(summary, "validation_accuracy")
        print(f"validation  {summary['validation_accuracy']:.4f} on the examples held out, to choose by{unprotected}")
    print(
        f"accuracy    {accuracy:.4f} on the test set (loss {'not finite' if loss is None else format(loss, '.4f')})"
        f"{_mark(summary, 'test_accuracy')}\n"
        f"epsilon     {promise}\n"
        f"{_clock_line(summary, directory)}"
        f"speed       {summary['clients_per_second']:.0f} clients/s, engine {_engine_line(summary)}\n"
        f"picture     {_picture(directory / 'curves.png')}\n"
        f"statement   {directory / 'privacy.txt'}"
    )


def _print_warnings(directory: Path) -> None:
    """Print what a run's diagnostics give cause to say; a UserError if nothing was learned, which is all recorded."""
    rows = RunDirectory(directory).rows("diagnostics.jsonl")
    warnings = warnings_of(rows)
    if learned_nothing(rows):
        remedy = f"{warnings[0].removesuffix('.')}. Its records are in {directory}"
        raise UserError("the run", "updates of finite numbers", "none", remedy)
    for warning in warnings:
        print(f"warning     {warning}", file=sys.stderr)


def trial_warnings(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """Yield a line for each warning that trials of a sweep give cause to."""
    for name in filter(None, names):
        for warning in warnings_of(RunDirectory(folder / name).rows("diagnostics.jsonl")):
            yield f"warning     {name}: {warning}"


def _mark(summary: dict[str, Any], score: str) -> str:
    """A warning at a score that is computed on protected clients' own examples."""
    return "; NOT covered by epsilon: on the clients' own examples" if score in summary.get("not_covered", ()) else ""


def _clock_line(summary: dict[str, Any], directory: Path) -> str:
    """How long the run would have taken on its devices; nothing without a virtual clock."""
    beside = RunDirectory(directory).read_json(DIAGNOSTICS_FILE) or {}  # its clock may show who took part
    found = {**beside, **summary}
    if "simulated_seconds" not in found:
        return ""
    hours, rest = divmod(round(found["simulated_seconds"]), 3600)
    down, up = (found[key] / 1e6 for key in ("bytes_down", "bytes_up"))
    return f"clock       {hours} h {rest // 60} min {rest % 60} s, {down:.1f} MB down, {up:.1f} MB up (simulated)\n"


def _engine_line(summary: dict[str, Any]) -> str:
    """Which engine ran, and what it was measured against if it was chosen by measuring."""
    ran, line = summary["execution"], summary["engine"]
    if ran.get("workers", 1) > 1:
        line += f" with {ran['workers']} workers, {ran['compute']} inside"
    if ran.get("seconds_per_client"):
        each = ", ".join(f"{name} {1e3 * seconds:.2g}" for name, seconds in ran["seconds_per_client"].items())
        line += f" (measured, ms a client: {each})"
    return line


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a mistake of the user's is one line on stderr and exit code 2."""
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except UserError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()))
    except (KeyboardInterrupt, click.Abort):
        print("fedpriv: stopped. Runs in process go on from the last checkpoint with --resume.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        where = error.filename or "file system"
        _fail(f"{where}: {error.strerror or error}. Mend it and run again; a run goes on with --resume")
    else:
        raise SystemExit(code if isinstance(code, int) else 0)


def _fail(line: str) -> None:
    print(f"fedpriv: {line}", file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
