"""The stack's certificates: an authority of its own, and what it signs, renewed in time."""

import datetime
import ipaddress
from pathlib import Path

from credentials import write_private
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from settings import LOOPBACK, Settings

RENEW = datetime.timedelta(days=30)
LIFETIME = datetime.timedelta(days=397)


def make_certificates(settings: Settings, now: datetime.datetime) -> set[str]:
    """Makes or renews what is missing or in its last month, and returns the services that have another.

    The proxy has a certificate for its names, and the object store's servers one with which they know one another.
    The authority stays: clients trust it.
    """
    folder = settings.folder / "tls"
    if not (folder / "ca.pem").exists():
        _make_authority(folder / "ca", now)
    renewed = set()
    for service, stem, names in (
        ("proxy", folder / "proxy", settings.names),
        ("seaweedfs", folder / "s3", ["localhost", LOOPBACK]),
    ):
        if not _is_valid(stem.with_suffix(".pem"), names, now):
            _sign(folder / "ca", stem, names, now)
            renewed.add(service)
    return renewed


def ending_certificates(settings: Settings, now: datetime.datetime) -> list[str]:
    """A line for each certificate that is in its last month."""
    lines = []
    for file in sorted((settings.folder / "tls").glob("*.pem")):
        if (end := _read(file).not_valid_after_utc) - now <= RENEW:
            cure = "`make up` renews it"
            if file.stem == "ca":
                cure = "remove its folder and run `make up`; clients have to trust the new authority"
            lines.append(f"{file} ends on {end:%Y-%m-%d}: {cure}")
    return lines


def _make_authority(stem: Path, now: datetime.datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sprue local stack")])
    usage = x509.KeyUsage(
        key_cert_sign=True, crl_sign=True, digital_signature=False, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip
    authority = (
        _certificate(name, name, key.public_key(), now, 10 * LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_pair(stem, key, authority)


def _read(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def _is_valid(file: Path, names: list[str], now: datetime.datetime) -> bool:
    """Whether there is a certificate for these names that will last."""
    if not file.exists():
        return False
    kept = _read(file)
    found = kept.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return kept.not_valid_after_utc - now > RENEW and [str(each.value) for each in found] == names


def _sign(authority: Path, stem: Path, names: list[str], now: datetime.datetime) -> None:
    """Makes a key, and a certificate for some names that the authority signs."""
    issuer = _read(authority.with_suffix(".pem"))
    issuer_key = serialization.load_pem_private_key(authority.with_suffix(".key").read_bytes(), None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[-1])])
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _certificate(subject, issuer.subject, key.public_key(), now, LIFETIME)
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    _write_pair(stem, key, certificate)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    day = datetime.timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + lifetime)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write_pair(stem: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private(stem.with_suffix(".key"), private.decode())
    write_private(stem.with_suffix(".pem"), certificate.public_bytes(serialization.Encoding.PEM).decode())
