"""Checks of a deployment's folders and server: files, permissions, certificates, versions and the connection."""

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

# A server refuses nodes that are more than 5 s ahead or 300 s behind; it reports the time in whole seconds.
_AHEAD_SECONDS = 5.0
_BEHIND_SECONDS = 60.0

_CALL_SECONDS = 10.0

_MIB = 2.0**20
# With less free space, logs and records alone could fill the disk.
_MIN_FREE = 64 * _MIB
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class Finding:
    """Outcome of one check.

    Args:
        what: Subject of the check.
        state: ok, note (worth knowing) or wrong.
        line: Result; if it is wrong, also a remedy.
    """

    what: str
    state: Literal["ok", "note", "wrong"]
    line: str = ""


class WrongServerError(UserError):
    """Error for a server that is not the server of this deployment."""


def refuse_wrong(folder: Path, findings: Iterable[Finding]) -> None:
    """Raise a `UserError` that lists all failed checks of a folder, if there are any."""
    wrong = [f"{finding.what}: {finding.line.rstrip('.')}" for finding in findings if finding.state == "wrong"]
    if wrong:
        remedy = f"Run `fedpriv deploy check {folder}`"
        raise UserError(str(folder), "a folder that passes its checks", " | ".join(wrong), remedy)


def judge(what: str, check: Callable[[], str]) -> list[Finding]:
    """Return the finding of a check that returns a line, or raises a `UserError`."""
    try:
        return [Finding(what, "ok", check())]
    except UserError as error:
        return [Finding(what, "wrong", str(error))]


def split_address(address: str, where: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT or [HOST]:PORT.

    Raises:
        UserError: If the address has another format.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if "://" in address or not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(where, "HOST:PORT", repr(address), "Write it like fl.example.org:9092")
    return host, int(port)


def check_presence(folder: Path, names: Iterable[str]) -> list[Finding]:
    """Check that files exist."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        line = f"{', '.join(missing)} missing: copy the whole folder again from its origin"
        return [Finding("files", "wrong", line)]
    return [Finding("files", "ok", "complete")]


def manifest_of(folder: Path, names: Iterable[str]) -> str:
    """Return a manifest in the format of `sha256sum --check`."""
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(names))


def check_manifest(folder: Path) -> list[Finding]:
    """Check that the files in the manifest are unchanged."""
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        return [Finding("manifest", "wrong", f"{folder / MANIFEST} cannot be read: copy the folder again")]
    changed = []
    for line in lines:
        digest, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            changed.append(name)
    if changed:
        line = f"{', '.join(changed)} changed since creation: find out who changed it, and copy the folder again"
        return [Finding("manifest", "wrong", line)]
    return [Finding("manifest", "ok", f"{len(lines)} files unchanged")]


def check_permissions(folder: Path, names: Iterable[str]) -> list[Finding]:
    """Check that only their owner can read the folder and its private files."""
    modes = {folder: "700", **{folder / name: "600" for name in names}}
    found = [path for path in modes if path.exists() and stat.S_IMODE(path.stat().st_mode) & _OTHERS]
    if found:
        commands = "; ".join(f"chmod {modes[path]} {path}" for path in found)
        return [Finding("permissions", "wrong", f"other users can read private files: {commands}")]
    return [Finding("permissions", "ok", "only their owner can read private files")]


def check_space(folder: Path, wanted: float, what: str, least: float = 0.0) -> list[Finding]:
    """Check the free space on the disk of a folder.

    Args:
        folder: Folder for the files; it need not exist yet.
        wanted: Bytes that may be needed; less space is worth a note.
        what: Description of their use.
        least: Bytes that are certainly needed; less space is wrong.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = float(shutil.disk_usage(place).free)
    line = f"{_in_words(free)} free; {what} takes up to {_in_words(wanted)}"
    if free < max(least, _MIN_FREE):
        return [Finding("space", "wrong", f"{line}: free some space on the disk of {folder}")]
    if free < wanted:
        return [Finding("space", "note", f"{line}: a full disk would stop it")]
    return [Finding("space", "ok", line)]


def _in_words(size: float) -> str:
    return f"{size / _MIB:,.0f} MiB" if size < 1024 * _MIB else f"{size / _MIB / 1024:,.1f} GiB"


def load_certificate(path: Path) -> x509.Certificate:
    """Return the certificate in a PEM file.

    Raises:
        UserError: If the file has no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise UserError(str(path), "a certificate", error.strerror or error, "Copy it again") from None
    except ValueError:
        raise UserError(str(path), "a certificate in PEM format", "a different format", "Copy it again") from None


def check_certificate(what: str, path: Path, ca: Path) -> list[Finding]:
    """Check that a certificate is signed by the CA and valid now.

    Args:
        what: Name of the certificate in the finding.
        path: File of the certificate.
        ca: File of the CA's certificate; the same file for the CA itself.
    """
    return judge(what, lambda: _certificate(load_certificate(path), load_certificate(ca), path))


def _certificate(certificate: x509.Certificate, ca: x509.Certificate, path: Path) -> str:
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        remedy = "Take both files from the same `fedpriv deploy init`"
        raise UserError(str(path), "a certificate signed by ca.crt", "a certificate of another CA", remedy) from None
    now = _now()
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        remedy = "Set this machine's clock"
        raise UserError(str(path), f"a clock after {begin:%Y-%m-%d %H:%M} UTC", f"{now:%Y-%m-%d %H:%M} UTC", remedy)
    if now > end:
        remedy = "Run `fedpriv deploy renew DIR`, or set this machine's clock"
        raise UserError(str(path), "a valid certificate", f"a certificate that expired on {end:%Y-%m-%d}", remedy)
    soon = "; renew it soon" if end - now < _SOON else ""
    return f"valid until {end:%Y-%m-%d}{soon}"


def versions() -> dict[str, str]:
    """Return the versions installed on this machine."""
    python = ".".join(platform.python_version_tuple()[:2])
    flwr, torch = (importlib.metadata.version(name).partition("+")[0] for name in ("flwr", "torch"))
    return {"fedpriv": __version__, "app": app_hash(), "flwr": flwr, "torch": torch, "python": python}


def check_versions(folder: Path) -> list[Finding]:
    """Check that this machine has the versions of the deployment; Python and torch may differ."""
    try:
        made = tomllib.loads((folder / VERSIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [Finding("versions", "wrong", f"{folder / VERSIONS} cannot be read: copy the folder again")]
    here = versions()
    other = [name for name, version in here.items() if made.get(name) != version]
    listed = "; ".join(f"{name} {here[name]} here, {made.get(name, 'none')} in {VERSIONS}" for name in other)
    if {"fedpriv", "app", "flwr"} & set(other):
        line = f"{listed}: install the same versions on all machines; after an upgrade of all, update {VERSIONS}"
        return [Finding("versions", "wrong", line)]
    if other:
        return [Finding("versions", "note", listed)]
    line = f"fedpriv {here['fedpriv']}, flwr {here['flwr']}, torch {here['torch']}, Python {here['python']}"
    return [Finding("versions", "ok", line)]


def covers(certificate: Path, host: str) -> str:
    """Return a line that confirms that a certificate is for a host.

    Raises:
        UserError: If it is not.
    """
    names = _names_in(load_certificate(certificate))
    if not _is_named(names, host):
        remedy = "Use one of these names for the server, or run `fedpriv deploy renew DIR --host HOST`"
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
    """Check that the server answers over TLS with a certificate of the CA, and that the clocks agree.

    Args:
        address: HOST:PORT.
        ca: File of the CA's certificate.
    """
    try:
        host, port = split_address(address, "superlink")
        offset = call_server(host, port, ca)
    except UserError as error:
        return [Finding("server", "wrong", str(error))]
    reached = Finding("server", "ok", f"{address} answers, and ca.crt has signed its certificate")
    if offset is None:
        return [reached]
    if not -_AHEAD_SECONDS < offset < _BEHIND_SECONDS:
        line = f"this machine's clock is {abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} the server's"
        return [reached, Finding("clock", "wrong", f"{line}, so that it refuses nodes: set both by NTP")]
    return [reached, Finding("clock", "ok", "agrees with the server's")]


def call_server(host: str, port: int, ca: Path) -> float | None:
    """Request a SuperLink's health page over TLS; return by how many seconds its clock is ahead of this machine's.

    Args:
        host: Name or address of the server, for which its certificate must be valid.
        port: Port of the server.
        ca: File of the only trusted CA.

    Returns:
        The offset in seconds; None if the answer has no date.

    Raises:
        WrongServerError: If another server answers.
        UserError: If no server answers.
    """
    where = f"{host}:{port}"
    load_certificate(ca)
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
        remedy = "Compare the address with server/server.toml: another program listens there"
        raise WrongServerError(where, "a SuperLink with TLS", error, remedy) from None
    except socket.gaierror:
        raise UserError(where, "a known host", "an unknown name", "Fix the name, or this machine's DNS") from None
    except OSError as error:
        remedy = "Start server/start-superlink.sh, and open this port in all firewalls"
        raise UserError(where, "a SuperLink that answers", error.strerror or error, remedy) from None
    if answer.status != http.HTTPStatus.OK:
        remedy = "Compare the address with server/server.toml: another program listens there"
        raise WrongServerError(where, "a healthy SuperLink", f"HTTP status {answer.status}", remedy)
    date = answer.getheader("Date")
    return None if date is None else parsedate_to_datetime(date).timestamp() - _now().timestamp()


def _mistrust(error: ssl.SSLCertVerificationError) -> str:
    if "expired" in error.verify_message:
        return "Run `fedpriv deploy renew DIR`, or set this machine's clock"
    if "not yet valid" in error.verify_message:
        return "Set this machine's clock"
    if "match" in error.verify_message:
        return "Use a name in the server's certificate, or run `fedpriv deploy renew DIR --host HOST`"
    return (
        "Do not continue before you know the cause: ca.crt and the server belong to different deployments, or an "
        "attacker intercepts the connection"
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
