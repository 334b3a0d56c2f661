"""The commands `fedpriv deploy ...`: set up deployments and run their processes."""

from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.app import app
from fedpriv.cli.terminal import say
from fedpriv.errors import number_of, require_extra

deploy = typer.Typer(help="Set up, check and run a server and nodes on separate machines.", no_args_is_help=True)
app.add_typer(deploy, name="deploy")


@deploy.callback()
def _for_all_of_deploy() -> None:
    require_extra("fedpriv deploy", "deploy")


DeployDir = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the deployment.", show_default=False)]
LogFormat = Annotated[str, typer.Option(help="Format of the log: text, or json with one object for each event.")]
MetricsPort = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Port of Prometheus metrics; 0 for a free one.", show_default="no metrics"),
]
MetricsHost = Annotated[str, typer.Option(help="Address of this machine at which metrics are served.")]
Days = Annotated[int, typer.Option(help="Validity of the server's certificate, in days.")]


@deploy.command()
def init(
    folder: DeployDir,
    nodes: Annotated[int, typer.Option(help="Number of nodes, one for each client.", show_default=False)],
    host: Annotated[
        str, typer.Option(help="Host name or IP address at which nodes reach the server.", show_default=False)
    ],
    port: Annotated[int, typer.Option(help="Port of the server.")] = 9092,
    days: Days = 365,
    trust: Annotated[str, typer.Option(help="Trust in the nodes' policies: local, aggregator or central.")] = "local",
    unit: Annotated[str, typer.Option(help="Unit of privacy in the nodes' policies: client or example.")] = "client",
    epsilon: Annotated[float, typer.Option(help="Privacy budget of one unit in the nodes' policies.")] = 8.0,
    delta: Annotated[float, typer.Option(help="Delta of that budget.")] = 1e-5,
    helpers: Annotated[int, typer.Option(help="Number of helpers of secure aggregation.")] = 0,
) -> None:
    """Create the folders of a deployment: keys, certificates, policies, scripts and a README."""
    from fedpriv.deploy.setup.provision import init_deployment, make_deployment

    policy = {"trust": trust, "unit": unit, "epsilon": epsilon, "delta": delta}
    deployment = make_deployment(host=host, port=port, nodes=nodes, helpers=helpers, **policy)
    init_deployment(folder, deployment, days)
    made = (
        f"{number_of(nodes, 'node')} and {number_of(helpers, 'helper')}"
        if helpers
        else f"and {number_of(nodes, 'node')}"
    )
    say(f"made        server, admin, ca{',' if helpers else ''} {made} in {folder}\nnext        {folder / 'README.md'}")


@deploy.command()
def add(
    folder: DeployDir,
    nodes: Annotated[int, typer.Option(help="Number of nodes to add.")] = 1,
    register: Annotated[
        bool, typer.Option("--register/--no-register", help="Register their keys with the running server.")
    ] = True,
) -> None:
    """Add nodes while the server runs: make their folders, and register their keys. Other nodes need no change."""
    from fedpriv.deploy.setup.membership import join_nodes

    lines, faults = join_nodes(folder, nodes, register=register)
    for line in lines:
        say(line)
    for line in faults:
        say(f"fedpriv: {line}", error=True)
    if faults:
        raise typer.Exit(2)


@deploy.command()
def register(
    folder: DeployDir = Path(),
    wait: Annotated[float, typer.Option(help="Seconds to wait for a server that does not answer yet.")] = 0.0,
) -> None:
    """Register the keys in admin/nodes/ with the server. DIR is the folder of the deployment, or admin in it."""
    from fedpriv.deploy.setup.keys import register_nodes
    from fedpriv.flower.internals.control import once_it_answers

    lines, faults = once_it_answers(lambda: register_nodes(folder), wait, say)
    for line in lines:
        say(line)
    for line in faults:
        say(line, error=True)
    if faults:
        raise typer.Exit(2)


@deploy.command()
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the node, such as node-3.", show_default=False)],
    folder: DeployDir = Path(),
) -> None:
    """Remove a node permanently. DIR is the folder of the deployment, or admin in it; by default the current one."""
    from fedpriv.deploy.setup.keys import remove_node

    say(remove_node(name, folder))
    say(
        "A run in progress continues without it. Its messages are missing, the number of clients stays as planned,\n"
        "and each turn that asks it lasts until the deadline.",
        paragraphs=True,
    )


@deploy.command()
def renew(
    folder: DeployDir,
    days: Days = 365,
    host: Annotated[
        str | None, typer.Option(help="New host name or IP address of the server.", show_default=False)
    ] = None,
) -> None:
    """Create a new key and certificate for the server."""
    from fedpriv.deploy.setup.provision import renew_certificate

    renew_certificate(folder, days, host)
    say(f"made        {folder / 'server'}/server.pem and server.key")
    say("next        copy both to the server and restart it")
    if host is not None:
        say(f"host        also copy server.toml, and set superlink of every node.toml and helper.toml to {host}")


@deploy.command()
def check(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="Folder of a deployment, or server, admin or node-I in it.", show_default=False
        ),
    ],
    connect: Annotated[bool, typer.Option("--connect/--no-connect", help="Connect to the server.")] = True,
) -> None:
    """Check a folder of a deployment: files, keys, certificates, versions, policy and the connection to the server."""
    from fedpriv.deploy.setup.check import check_folder, print_findings

    if not print_findings(check_folder(folder, connect)):
        raise typer.Exit(2)


StatusDir = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="Folder of a deployment, server or admin in it, or a run directory.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@deploy.command()
def status(
    folder: StatusDir,
    run: Annotated[Path | None, typer.Option(help="Run directory to show.", show_default="the newest")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the server, its certificates, the runs, and each node's rounds, refusals and budget."""
    from fedpriv.deploy.status.show import show_status

    show_status(folder, run, watch=watch, as_json=as_json)


@deploy.command("list")
def list_nodes(folder: StatusDir, as_json: AsJson = False) -> None:
    """List the nodes by name, with state and time of the last connection."""
    from fedpriv.deploy.status.show import show_list

    show_list(folder, as_json=as_json)


@deploy.command()
def node(
    bundle: Annotated[Path, typer.Argument(metavar="NODE_DIR", help="Folder of the node.", show_default=False)],
    log_format: LogFormat = "text",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
) -> None:
    """Run a node. It runs its own installed fedpriv, follows its own policy and executes no code from a server."""
    from fedpriv.deploy.operate.party import operate
    from fedpriv.deploy.setup.supernode import run_node

    with operate(bundle, log_format, metrics_port, metrics_host):
        raise typer.Exit(run_node(bundle))


@deploy.command()
def ledger(
    bundle: Annotated[Path, typer.Argument(metavar="NODE_DIR", help="Folder of the node.", show_default=False)],
) -> None:
    """Show the messages that a node has sent in each run, and the privacy budget it has spent."""
    from fedpriv.deploy.device.device import Device
    from fedpriv.deploy.device.ledger import account_of
    from fedpriv.deploy.kinds import require_kind

    require_kind(bundle, "node")
    device = Device.at(bundle)
    limits = device.policy.limits
    unit = device.policy.accepts.unit
    say(account_of(device.folder, limits.epsilon, limits.delta, limits.adjacency, unit))


@deploy.command()
def server(
    folder: Annotated[Path, typer.Argument(metavar="SERVER_DIR", help="Folder of the server.", show_default=False)],
    log_format: LogFormat = "text",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
) -> None:
    """Run the server of a deployment."""
    from fedpriv.deploy.operate.party import operate
    from fedpriv.deploy.setup.superlink import run_server

    with operate(folder, log_format, metrics_port, metrics_host):
        raise typer.Exit(run_server(folder))
