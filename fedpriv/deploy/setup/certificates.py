"""Keys and certificates of a deployment: a separate CA, a server certificate, and a key for each node."""

import datetime
import ipaddress
import re
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpriv.errors import UserError

__all__ = ["Authority", "Pair", "make_node_key", "refuse_host"]

_AUTHORITY_DAYS = 3650

# Machines with slightly slow clocks must be able to use a new certificate at once.
_BEFORE = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Pair:
    """Private key with its certificate or public key, both as the bytes of files."""

    private: bytes
    public: bytes


def refuse_host(host: str) -> None:
    """Raise a `UserError` unless `host` is a host name or an IP address that nodes can reach."""
    try:
        if ipaddress.ip_address(host).is_unspecified:
            raise UserError("--host", "an address that nodes can reach", host, "Give the server's name or address")
    except ValueError:
        label = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
        numeric = re.fullmatch(r"[0-9.]+", host)
        if numeric or len(host) > 253 or not re.fullmatch(rf"{label}(\.{label})*", host):
            expected = "a host name or an IP address, without port or scheme"
            raise UserError("--host", expected, repr(host), "Write it like fl.example.org or 10.0.0.5") from None


@dataclass(frozen=True)
class Authority:
    """CA that signs the server certificates of one deployment."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls) -> "Authority":
        """Create a new CA that is valid for ten years."""
        key, begin = ec.generate_private_key(ec.SECP384R1()), _now() - _BEFORE
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpriv deployment CA")])
        usage = dict.fromkeys(_USES, False) | {"key_cert_sign": True, "crl_sign": True}
        certificate = (
            _builder(key.public_key(), name, name, begin, begin + datetime.timedelta(days=_AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .sign(key, hashes.SHA384())
        )
        return cls(key, certificate)

    @classmethod
    def read(cls, pair: Pair) -> "Authority":
        """Read the CA from the content of its files; see `pair`.

        Raises:
            ValueError: If the content is invalid.
        """
        key = load_pem_private_key(pair.private, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an elliptic-curve key")
        certificate = x509.load_pem_x509_certificate(pair.public)
        if certificate.public_key() != key.public_key():
            raise ValueError("the key of another certificate")
        return cls(key, certificate)

    @property
    def pair(self) -> Pair:
        """Content of the CA's files."""
        return Pair(_private(self.key), self.certificate.public_bytes(Encoding.PEM))

    def server_pair(self, host: str, days: int, begin: datetime.datetime | None = None) -> Pair:
        """Return a new key and certificate for the server.

        Args:
            host: Name or IP address of the server. The certificate is also valid for localhost, 127.0.0.1 and ::1.
            days: Validity of the certificate, in days.
            begin: Beginning of its validity; None for now.
        """
        key, begin = ec.generate_private_key(ec.SECP384R1()), begin or _now() - _BEFORE
        end = min(begin + _BEFORE + datetime.timedelta(days=days), self.certificate.not_valid_after_utc)
        usage = dict.fromkeys(_USES, False) | {"digital_signature": True}
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpriv server")])
        certificate = (
            _builder(key.public_key(), name, self.certificate.subject, begin, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
            .add_extension(signer, critical=False)
            .sign(self.key, hashes.SHA384())
        )
        return Pair(_private(key), certificate.public_bytes(Encoding.PEM))


def make_node_key() -> Pair:
    """Return a new key for a node, in OpenSSH's format, which Flower requires."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return Pair(private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")


_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _builder(
    key: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    issuer: x509.Name,
    begin: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _names(host: str) -> list[x509.GeneralName]:
    """Return the names of the server, each once, as an IP address or otherwise as a DNS name."""
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys([host, "localhost", "127.0.0.1", "::1"]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name.lower()))
    return names


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
