"""The stack's secrets: made once, readable by their owner alone."""

import datetime
import ipaddress
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import bcrypt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from settings import LOOPBACK, Settings, StackError

PEOPLE, MACHINES = "admin", "sprue"
"""MLflow's two accounts: the one that people log in with, everywhere, and that of jobs and services."""
NAMES = ("postgres", "s3_key", "s3_secret", "s3_signing", "ray", "people", "machines", "mlflow_session")
RENEW = datetime.timedelta(days=30)
LIFETIME = datetime.timedelta(days=397)


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read; it appears whole."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


def kept_secrets(folder: Path) -> dict[str, str]:
    """Passwords and tokens of this folder's services."""
    path = folder / "secrets.json"
    if not path.exists():
        write_private(path, json.dumps({name: secrets.token_hex(24) for name in NAMES}, indent=2))
    return dict(json.loads(path.read_text()))


def make_credentials(settings: Settings, known: dict[str, str]) -> None:
    """Writes what is missing: Ray's token, the first key for the scoring service, logins and certificates.

    Raises:
        StackError: If the file of keys takes none.
    """
    folder = settings.folder
    write_private(folder / "ray.token", known["ray"])
    if not (folder / "first.key").exists():
        _add_first_key(folder)
    for name, accounts in (("people", (PEOPLE,)), ("mlflow", (PEOPLE, MACHINES))):
        file = folder / "conf" / f"{name}.htpasswd"
        if not file.exists():
            write_private(file, "".join(_login(each, known) for each in accounts))
    _make_certificates(settings)


def _add_first_key(folder: Path) -> None:
    """Adds a key to those that there are: stations use them."""
    name = f"first-{secrets.token_hex(4)}" if (folder / "keys.json").exists() else "first"
    scopes = [word for scope in ("score", "review", "admin") for word in ("--scope", scope)]
    command = [Path(sys.executable).parent / "sprue", "keys", "add", name, *scopes, "--keys", "keys.json"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if made.returncode:
        raise StackError(f"there is no key for this machine: {made.stderr.strip()}")
    write_private(folder / "first.key", made.stdout.strip())


def _login(account: str, known: dict[str, str]) -> str:
    """A line for nginx. It hashes with each request; more rounds would add nothing to a random password."""
    password = known["people" if account == PEOPLE else "machines"]
    return f"{account}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(rounds=5)).decode()}\n"


def write_client_environment(settings: Settings, known: dict[str, str]) -> None:
    """Writes ``client.env``, with which this machine's shells reach the stack: ``. store/stack/client.env``."""
    variables = {
        **machine_environment(settings, known),
        "RAY_AUTH_TOKEN": known["ray"],
        "RAY_ADDRESS": settings.address("ray"),
        "RAY_API_SERVER_ADDRESS": f"http://{settings.address('ray_dashboard')}",
        "SPRUE_URL": settings.url,
        "SPRUE_CA": str(settings.folder / "tls" / "ca.pem"),
        "SPRUE_KEY": (settings.folder / "first.key").read_text(),
    }
    write_private(
        settings.folder / "client.env", "".join(f"export {name}='{value}'\n" for name, value in variables.items())
    )


def machine_environment(settings: Settings, known: dict[str, str]) -> dict[str, str]:
    """What jobs and the scoring service need to reach Ray, the object store and MLflow."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(settings.folder / "ray.token"),
        # Else Ray replaces the loopback address by the machine's own, and listens there; the variable's name is of the
        # systems where that is so by default.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "AWS_ENDPOINT_URL": f"http://{settings.address('s3')}",
        "AWS_ACCESS_KEY_ID": known["s3_key"],
        "AWS_SECRET_ACCESS_KEY": known["s3_secret"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": f"http://{settings.address('mlflow')}",
        "MLFLOW_TRACKING_USERNAME": MACHINES,
        "MLFLOW_TRACKING_PASSWORD": known["machines"],
    }


def give(path: Path, user: str) -> None:
    """Gives a file to the user as which a service of root's runs."""
    if os.geteuid() == 0:
        shutil.chown(path, user, user)


def _make_certificates(settings: Settings) -> None:
    """A certificate authority of this stack's own, and what it signs, renewed in time.

    The proxy has a certificate for its names, and the object store's servers one with which they know one another.
    """
    folder, now = settings.folder / "tls", datetime.datetime.now(datetime.UTC)
    if not (folder / "ca.pem").exists():
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
        _write_pair(folder / "ca", key, authority)
    for stem, names in ((folder / "proxy", settings.names), (folder / "s3", ["localhost", LOOPBACK])):
        if not _is_valid(stem.with_suffix(".pem"), names, now):
            _sign(folder / "ca", stem, names, now)


def _is_valid(file: Path, names: list[str], now: datetime.datetime) -> bool:
    """Whether there is a certificate for these names that will last."""
    if not file.exists():
        return False
    kept = x509.load_pem_x509_certificate(file.read_bytes())
    found = kept.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return kept.not_valid_after_utc - now > RENEW and [str(each.value) for each in found] == names


def _sign(authority: Path, stem: Path, names: list[str], now: datetime.datetime) -> None:
    """Makes a key, and a certificate for some names that the authority signs."""
    issuer = x509.load_pem_x509_certificate(authority.with_suffix(".pem").read_bytes())
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
