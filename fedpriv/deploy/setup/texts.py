"""The texts of the files that `fedpriv deploy init` writes; `$name` is filled in."""

from string import Template

from fedpriv.deploy.device.policy import POLICY_TEXT as POLICY

__all__ = [
    "ADMIN_CONFIG",
    "DOCKERFILE",
    "NODE_TOML_TEXT",
    "POLICY",
    "README",
    "REGISTER",
    "SERVER_TOML_TEXT",
    "SERVICE",
    "START",
]

NODE_TOML_TEXT = Template("""\
superlink = "$address"  # the server, as its certificate names it
partition-id = $node  # which client this node is; no other node has this number
num-partitions = $nodes  # how many clients there are
# runtime-port = 9094  # between this node and its own processes, on this machine only; else a free one
# data-root = "/path/to/data"  # where data sets lie
# device = "cuda"  # where gradients are computed; else the run's choice

# A node runs one Flower app, fedpriv's own, and refuses any other. To run an app of your own (with
# clients.private_mod), list the SHA-256 of its bundle (`flwr build`, then `sha256sum *.fab`). Read the app before: it
# can do on this machine whatever this node can, and the policy and the budget in this folder bind what it sends only if
# it uses the mod.
# accepted-apps = ["..."]
""")

SERVER_TOML_TEXT = Template("""\
address = "$address"  # by which nodes call this server, as its certificate names it
listen = "0.0.0.0"  # the address of this machine at which it listens

# From where runs are started and nodes registered; Flower asks for no password there. A run is code that this server
# executes, and whoever may start one may read what clients send. Add addresses and networks with care, as in
# "10.0.0.7" or "10.0.0.0/24"; better, leave it so and come by `ssh -L $port:127.0.0.1:$port`.
admin-from = ["127.0.0.1", "::1"]
""")

ADMIN_CONFIG = Template("""\
# Flower's connections. Use it with FLWR_HOME set to this folder.
[superlink]
default = "deployment"

[superlink.deployment]
address = "127.0.0.1:$port"
root-certificates = '$ca'
""")

START = Template("""\
#!/bin/sh
# Starts $what with this folder. Stop it with Ctrl-C or SIGTERM.
set -eu
cd "$$(dirname "$$0")"
: "$${FEDPRIV:=fedpriv}"
if ! command -v "$$FEDPRIV" > /dev/null; then
    echo "$$0: expected fedpriv on the PATH, got none. Activate its environment, or set FEDPRIV=/path/to/fedpriv." >&2
    exit 2
fi
exec "$$FEDPRIV" deploy $command .
""")

REGISTER = Template("""\
#!/bin/sh
# Tells the server about the keys in nodes/. It may run again at any time: keys that the server knows stay as they are.
set -eu
cd "$$(dirname "$$0")"
: "$${FEDPRIV:=fedpriv}"
if ! command -v "$$FEDPRIV" > /dev/null; then
    echo "$$0: expected fedpriv on the PATH, got none. Activate its environment, or set FEDPRIV=/path/to/fedpriv." >&2
    exit 2
fi
exec "$$FEDPRIV" deploy register .
""")

SERVICE = Template("""\
# For systemd. As root: useradd --system fedpriv; put this folder at $home, owned by fedpriv; install fedpriv in
# /opt/fedpriv/venv; copy this file to /etc/systemd/system; systemctl enable --now $unit
[Unit]
Description=fedpriv $what
Wants=network-online.target
After=network-online.target time-sync.target

[Service]
Type=exec
User=fedpriv
WorkingDirectory=$home
ExecStart=/opt/fedpriv/venv/bin/fedpriv deploy $command $home
Restart=on-failure
RestartSec=30
# 2: something that a person must mend.
RestartPreventExitStatus=2
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ReadWritePaths=$home
ProtectHome=read-only
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX

[Install]
WantedBy=multi-user.target
""")

DOCKERFILE = Template("""\
# The image holds programs only; this folder, with its keys and memory, stays outside and is mounted.
#   cp /path/to/$wheel .    (made by `pip wheel --no-deps .` in fedpriv's sources)
#   docker build -t $unit .
#   docker run --init --user "$$(id -u):$$(id -g)"$options -v "$$PWD:/home/fedpriv" $unit
FROM python:$python-slim
COPY $wheel /tmp/
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==$torch \\
    && pip install --no-cache-dir "/tmp/$wheel[deploy,data,report]" flwr==$flwr torch==$torch
ENV HOME=/home/fedpriv PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/fedpriv
ENTRYPOINT ["fedpriv", "deploy", "$command", "/home/fedpriv"]
""")

README = Template("""\
# A deployment of fedpriv: one server, $nodes nodes

Made by `fedpriv deploy init`, with fedpriv $fedpriv and flwr $flwr. The server is `$address`.
All machines need the same versions of fedpriv and flwr, and clocks that NTP keeps right: the server refuses a node
whose clock is 5 seconds ahead.

## What goes where

| folder | to whom | who may see it |
|---|---|---|
| `ca/` | nobody: keep it offline, with a copy | only you. With `ca.key` anyone can pose as the server |
| `server/` | the server's machine | its operator. `server.key` is secret |
| `admin/` | whoever starts runs, at best on the server's machine | no secret in it; `admin-from` decides who may |
| `node-0/` ... `node-$last/` | one to each client's machine | its operator alone. `node.key` is secret |

Copy each folder as a whole, over a channel that is private (`scp -rp`, a USB stick), and delete it here once it has
arrived; keep `ca/`, `deployment.toml`, `bundles.sha256` and `admin/`. A manifest finds damage and mistakes, not
somebody who also changed the manifest: the receiver runs `sha256sum MANIFEST.sha256` and compares, by telephone,
with the line in `bundles.sha256`.

## Start, in this order

1. On the server: `server/start-superlink.sh`. Nodes must be able to reach port $port; nothing else has to be open.
2. On the server, in another shell: `admin/register.sh`. It can run again at any time.
   From another machine: `ssh -L $port:127.0.0.1:$port $host`, and there `admin/register.sh`.
3. Each client reads and edits `fedpriv-client.toml`, its policy, and `node.toml`; then `node-I/start-node.sh`.
4. See who is there: `fedpriv deploy check admin`.

Under systemd or Docker instead: see the head of `fedpriv-superlink.service`, `fedpriv-node.service`, `Dockerfile`.

A node that was killed, as by a power cut, is taken back by the server after a minute; `start-node.sh` waits for that.

## Check

    fedpriv deploy check .            # before the folders are handed out
    fedpriv deploy check server       # on the server
    fedpriv deploy check admin        # are all keys registered, who is online
    fedpriv deploy check node-0       # on a client's machine; --no-connect leaves the network out

One line a check; exit code 0 if nothing is wrong, else 2. `start-superlink.sh` and `start-node.sh` make the same checks
first, and start nothing if one fails.

## What each file is

| file | what it is |
|---|---|
| `ca/ca.key`, `ca.crt` | the deployment's own certificate authority. Nodes trust `ca.crt` and no other |
| `server/server.key`, `server.pem` | its key and certificate, for `$host` and localhost, until $until |
| `server/server.toml` | where it listens, and from where it may be administered |
| `server/flower/` | Flower's database of runs, nodes and messages. Back it up; without it, register the nodes again |
| `admin/config.toml` | Flower's connection `deployment`, for FLWR_HOME |
| `admin/nodes/*.pub` | the nodes' public keys; `register.sh` tells the server |
| `admin/removed-keys` | the public keys of nodes that were removed, with name and date |
| `node-I/node.key`, `node.pub` | the node's key: who has it is this client to the server |
| `node-I/node.toml` | the server's address, which client this is, where its data lie, which apps it runs |
| `node-I/fedpriv-client.toml` | the policy: what is sent at all, and how much privacy may be spent |
| `node-I/state/` | the client's error-feedback memory, and the ledger of what its data have been spent |
| `node-I/ledger.key` | made with the first message: signs how long the ledger is. Secret |
| `server/flower/client-heads.json` | what clients have signed about their ledgers. Keep it with Flower's database |
| `node-I/flower/` | what Flower unpacks; can be deleted while the node is stopped |
| `versions.toml` | what the deployment was made with. After an upgrade of all machines, mend it |
| `MANIFEST.sha256` | checksums of the files that nobody has to edit |

## Who is trusted with what

* Nodes run their own installed fedpriv. They accept one bundle only, `$app`,
  which is a few lines that call it, and answer any other with an error. A server can ask; it cannot send code.
* What a node sends is bounded by its own policy, whatever the server asks for.
* The server executes the code of runs, and with `trust = "central"` it sees bare messages. Flower asks whoever starts a
  run for no password: `admin-from` in `server.toml` decides, by default the server's machine alone. Do not put a
  reverse proxy on that machine: everything would come from 127.0.0.1.
* Whoever has an account on a node's machine can talk to the node's own processes on 127.0.0.1: share it with nobody.

## A client's memory: back up `state/`

Stop the node, copy `node-I/state/` to a place that is as private, start it again. The copy is good until the node
takes part again. **An older copy must not be put back as if nothing had happened**: its ledger forgets what has been
spent since, so that the budget could be spent twice, and its memory no longer fits the server's. The client notices by
the signed head of its ledger that the server shows, and refuses.
If `state/` is lost, or only an old copy is left: lower `epsilon` in the policy by what has been spent since, as far as
it is known from the runs' records, and remove `ledger.key`, so that the former head counts no more; or leave the client
out for good. Tell whoever runs the experiment.

## Add nodes

    fedpriv deploy add . --nodes 1    # beside ca/ and deployment.toml: makes node-$nodes/ and its public key in admin/

Take `admin/nodes/` to where `register.sh` runs, and run it. Hand out the folder. Give every other node the new
`num-partitions` in `node.toml`, and restart it, before the next run begins.

A client that wants a key that nobody else ever had: in its folder `ssh-keygen -t ecdsa -b 384 -N '' -f node.key`,
rename `node.key.pub` to `node.pub`, and send that file for `admin/nodes/`.

## Remove a node

    fedpriv deploy remove node-1          # in this folder or in admin/, while the server runs

Do so at once if its key or machine is lost. The server takes nothing more from it; the node says so in one line and
ends. The key moves from `admin/nodes/` to `admin/removed-keys`, and no server ever takes it back: a client that comes
back needs a new key (above). A run that is going on goes on without the client: its messages are missing, and each
turn that asks it lasts until its deadline. The number of clients stays what the plan says, so that sums are divided as
before and noise and epsilon hold. The client's `state/` stays on its own machine.

Keys that are registered but not in `admin/nodes/` have no name there: `fedpriv deploy check admin` shows the server's
numbers for them, and `FLWR_HOME=$$PWD/admin flwr supernode unregister NUMBER deployment` takes them away.

## Renew the server's certificate

    fedpriv deploy renew . --days 365          # beside ca/; nodes need nothing new

Copy `server/server.pem` and `server/server.key` to the server and restart it. With `--host NEW` the certificate is
for another name; then change `superlink` in every `node.toml` and `address` in `server.toml`. The CA is valid for ten
years; if `ca.key` is lost or stolen, make a new deployment.
""")
