"""Checks of what `fedpriv deploy init` made: files, permissions, certificates, versions, and the server itself."""

import datetime
import hashlib
import http.client
import importlib.metadata
import ipaddress
import platform
import shutil
import socket
import ssl
import stat
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedpriv.errors import UserError
from fedpriv.flower.bundle import app_hash
from fedpriv.version import __version__

__all__ = [
    "MANIFEST",
    "VERSIONS",
    "Finding",
    "WrongServerError",
    "call_server",
    "check_certificate",
    "check_manifest",
    "check_permissions",
    "check_presence",
    "check_server",
    "check_space",
    "check_versions",
    "covers",
    "judge",
    "load_certificate",
    "manifest_of",
    "refuse_wrong",
    "split_address",
    "versions",
]

MANIFEST = "MANIFEST.sha256"
VERSIONS = "versions.toml"

_SOON = datetime.timedelta(days=30)

# A server refuses nodes that are more than 5 s ahead or 300 s behind; it tells the time in whole seconds.
_AHEAD_SECONDS = 5.0
_BEHIND_SECONDS = 60.0

_CALL_SECONDS = 10.0

_MIB = 2.0**20
# Below that a disk is full for all that Flower and fedpriv write about anything.
_LEAST_FREE = 64 * _MIB
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        what: What was checked.
        state: ok, note (worth knowing) or wrong.
        line: What was found; if it is wrong, also what to do.
    """

    what: str
    state: Literal["ok", "note", "wrong"]
    line: str = ""


class WrongServerError(UserError):
    """Whoever answers is not the server of this deployment."""


def refuse_wrong(folder: Path, findings: Iterable[Finding]) -> None:
    """Raises a UserError that holds everything that is wrong with a folder, if anything is."""
    wrong = [f"{finding.what}: {finding.line}" for finding in findings if finding.state == "wrong"]
    if wrong:
        remedy = f"See `fedpriv deploy check {folder}`"
        raise UserError(str(folder), "a folder that passes its checks", " | ".join(wrong), remedy)


def judge(what: str, check: Callable[[], str]) -> list[Finding]:
    """The finding of a check that returns what it found, or raises a UserError that says what to do."""
    try:
        return [Finding(what, "ok", check())]
    except UserError as error:
        return [Finding(what, "wrong", str(error))]


def split_address(address: str, where: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [HOST]:PORT.

    Raises:
        UserError: If it is something else.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if "://" in address or not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(where, "HOST:PORT", repr(address), "For example fl.example.org:9092")
    return host, int(port)


def check_presence(folder: Path, names: Iterable[str]) -> list[Finding]:
    """Whether files are there."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        line = f"{', '.join(missing)} missing: copy the whole folder again from where it was made"
        return [Finding("files", "wrong", line)]
    return [Finding("files", "ok", "all there")]


def manifest_of(folder: Path, names: Iterable[str]) -> str:
    """A manifest, as `sha256sum --check` reads it."""
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(names))


def check_manifest(folder: Path) -> list[Finding]:
    """Whether the files of the manifest are as they were made."""
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    changed = []
    for line in lines:
        digest, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            changed.append(name)
    if changed:
        line = f"{', '.join(changed)} changed since made: find out who did it, and copy the folder again"
        return [Finding("manifest", "wrong", line)]
    return [Finding("manifest", "ok", f"{len(lines)} files as they were made")]


def check_permissions(folder: Path, names: Iterable[str]) -> list[Finding]:
    """Whether only their owner can read the folder and its private files."""
    modes = {folder: "700", **{folder / name: "600" for name in names}}
    found = [path for path in modes if path.exists() and stat.S_IMODE(path.stat().st_mode) & _OTHERS]
    if found:
        commands = "; ".join(f"chmod {modes[path]} {path}" for path in found)
        return [Finding("permissions", "wrong", f"others can read private files: {commands}")]
    return [Finding("permissions", "ok", "private files are their owner's alone")]


def check_space(folder: Path, wanted: float, what: str, least: float = 0.0) -> list[Finding]:
    """Whether there is room on a folder's disk.

    Args:
        folder: Where files are written; it need not be there yet.
        wanted: Bytes that may be needed; fewer are worth a note.
        what: What for.
        least: Bytes that surely are needed.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = float(shutil.disk_usage(place).free)
    line = f"{_in_words(free)} free; {what} takes up to {_in_words(wanted)}"
    if free < max(least, _LEAST_FREE):
        return [Finding("space", "wrong", f"{line}: free some on the disk of {folder}")]
    if free < wanted:
        return [Finding("space", "note", f"{line}: a full disk ends it")]
    return [Finding("space", "ok", line)]


def _in_words(size: float) -> str:
    return f"{size / _MIB:,.0f} MiB" if size < 1024 * _MIB else f"{size / _MIB / 1024:,.1f} GiB"


def load_certificate(path: Path) -> x509.Certificate:
    """The certificate in a PEM file.

    Raises:
        UserError: If there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise UserError(str(path), "a certificate", error.strerror or error, "Copy it again") from None
    except ValueError:
        raise UserError(str(path), "a certificate in PEM form", "something else", "Copy it again") from None


def check_certificate(what: str, path: Path, ca: Path) -> list[Finding]:
    """Whether a certificate is the CA's and valid now.

    Args:
        what: What it is, for the finding.
        path: Its file.
        ca: The file of the CA's certificate; the same file for the CA itself.
    """
    return judge(what, lambda: _certificate(load_certificate(path), load_certificate(ca), path))


def _certificate(certificate: x509.Certificate, ca: x509.Certificate, path: Path) -> str:
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        remedy = "The two are of different deployments: take both from one `fedpriv deploy init`"
        raise UserError(str(path), "a certificate that ca.crt has signed", "one of another CA", remedy) from None
    now = _now()
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        remedy = "Set this machine's clock"
        raise UserError(str(path), f"a clock after {begin:%Y-%m-%d %H:%M} UTC", f"{now:%Y-%m-%d %H:%M} UTC", remedy)
    if now > end:
        remedy = "Make a new one: `fedpriv deploy renew DIR`; or set this machine's clock"
        raise UserError(str(path), "a certificate that is valid", f"one that expired on {end:%Y-%m-%d}", remedy)
    soon = "; renew it soon" if end - now < _SOON else ""
    return f"valid until {end:%Y-%m-%d}{soon}"


def versions() -> dict[str, str]:
    """What this machine runs."""
    python = ".".join(platform.python_version_tuple()[:2])
    flwr, torch = (importlib.metadata.version(name).partition("+")[0] for name in ("flwr", "torch"))
    return {"fedpriv": __version__, "app": app_hash(), "flwr": flwr, "torch": torch, "python": python}


def check_versions(folder: Path) -> list[Finding]:
    """Whether this machine runs what the deployment was made with; Python and torch may differ."""
    try:
        made = tomllib.loads((folder / VERSIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [Finding("versions", "wrong", f"{folder / VERSIONS} cannot be read: copy the folder again")]
    here = versions()
    other = [name for name, version in here.items() if made.get(name) != version]
    told = "; ".join(f"{name} {here[name]} here, {made.get(name, 'none')} in {VERSIONS}" for name in other)
    if {"fedpriv", "app", "flwr"} & set(other):
        line = f"{told}: install the same versions on all machines; after an upgrade of all, mend {VERSIONS}"
        return [Finding("versions", "wrong", line)]
    if other:
        return [Finding("versions", "note", told)]
    line = f"fedpriv {here['fedpriv']}, flwr {here['flwr']}, torch {here['torch']}, Python {here['python']}"
    return [Finding("versions", "ok", line)]


def covers(certificate: Path, host: str) -> str:
    """That a certificate is for a host.

    Raises:
        UserError: If it is not.
    """
    names = _names_in(load_certificate(certificate))
    if not _is_named(names, host):
        remedy = "Call the server by one of these, or make a new certificate: `fedpriv deploy renew DIR --host HOST`"
        raise UserError(str(certificate), f"a certificate for {host}", f"one for {', '.join(names)}", remedy)
    return f"the certificate is for {host}"


def _names_in(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def _is_named(names: Iterable[str], host: str) -> bool:
    try:
        return str(ipaddress.ip_address(host)) in names
    except ValueError:
        return host.lower() in {name.lower() for name in names}


def check_server(address: str, ca: Path) -> list[Finding]:
    """Whether the server answers over TLS with a certificate of the CA, and has the same time.

    Args:
        address: HOST:PORT.
        ca: The file of the CA's certificate.
    """
    try:
        host, port = split_address(address, "superlink")
        offset = call_server(host, port, ca)
    except UserError as error:
        return [Finding("server", "wrong", str(error))]
    reached = Finding("server", "ok", f"{address} answers, and its certificate is of ca.crt")
    if offset is None:
        return [reached]
    if not -_AHEAD_SECONDS < offset < _BEHIND_SECONDS:
        line = f"this machine's clock is {abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} the server's"
        return [reached, Finding("clock", "wrong", f"{line}, which then refuses nodes: set both by NTP")]
    return [reached, Finding("clock", "ok", "agrees with the server's")]


def call_server(host: str, port: int, ca: Path) -> float | None:
    """Calls a SuperLink's health page over TLS; returns by how many seconds its clock is ahead, None if it has none.

    Args:
        host: Its name or address, which its certificate must be for.
        port: Its port.
        ca: The file of the one CA that is trusted.

    Raises:
        WrongServerError: If somebody else answers.
        UserError: If nobody answers.
    """
    where = f"{host}:{port}"
    try:
        context = ssl.create_default_context(cafile=str(ca))
        connection = http.client.HTTPSConnection(host, port, timeout=_CALL_SECONDS, context=context)
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
        finally:
            connection.close()
    except ssl.SSLCertVerificationError as error:
        raise WrongServerError(
            where, "a certificate for it, signed by ca.crt", error.verify_message, _mistrust(error)
        ) from None
    except (ssl.SSLError, http.client.HTTPException) as error:
        remedy = "Something else than the SuperLink listens there: see server/server.toml"
        raise WrongServerError(where, "a SuperLink with TLS", error, remedy) from None
    except socket.gaierror:
        raise UserError(where, "a host that has an address", "none", "Mend the name, or this machine's DNS") from None
    except OSError as error:
        remedy = "Start server/start-superlink.sh, and open this port in the firewalls between"
        raise UserError(where, "a SuperLink that answers", error.strerror or error, remedy) from None
    if answer.status != http.HTTPStatus.OK:
        remedy = "Something else than the SuperLink listens there: see server/server.toml"
        raise WrongServerError(where, "a healthy SuperLink", f"HTTP status {answer.status}", remedy)
    date = answer.getheader("Date")
    return None if date is None else parsedate_to_datetime(date).timestamp() - _now().timestamp()


def _mistrust(error: ssl.SSLCertVerificationError) -> str:
    if "expired" in error.verify_message:
        return "Make a new certificate, `fedpriv deploy renew DIR`, or set this machine's clock"
    if "not yet valid" in error.verify_message:
        return "Set this machine's clock"
    if "match" in error.verify_message:
        return "Call the server by a name that its certificate has, or `fedpriv deploy renew DIR --host HOST`"
    return (
        "ca.crt and the server are of different deployments, or somebody stands between: do not go on before you know"
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
