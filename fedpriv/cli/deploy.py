"""Setting up deployments and running their processes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.app import app
from fedpriv.errors import require_extra

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
    from fedpriv.deploy.device.device import Device
    from fedpriv.deploy.device.ledger import account_of

    device = Device.at(bundle)
    limits = device.policy.limits
    print(account_of(device.folder, limits.epsilon, limits.delta, limits.adjacency))


@deploy.command()
def server(
    folder: Annotated[Path, typer.Argument(metavar="SERVER_DIR", help="The server's folder.", show_default=False)],
) -> None:
    """Run the server of a deployment."""
    from fedpriv.deploy.setup.superlink import run_server

    raise typer.Exit(run_server(folder))
