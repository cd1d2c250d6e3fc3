"""Makes the secrets of compose.yaml, once: ``python infra/containers/make_secrets.py --name inspection.plant``.

Each is a file of infra/containers/secrets, a folder that its owner alone can enter. The files themselves are readable
by all: containers read them as users of their own, and Docker hands them over as they are. The certificate is signed by
itself; put your own in its place. What is there already stays.
"""

import argparse
import datetime
import json
import secrets
import subprocess
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

FOLDER = Path(__file__).parent / "secrets"
LIFETIME = datetime.timedelta(days=397)


def files() -> dict[str, str]:
    """The files of passwords and tokens that belong together, by their names."""
    postgres, s3_key, s3_secret, admin = (secrets.token_hex(24) for _ in range(4))
    database = f"postgresql+psycopg://mlflow:{postgres}@postgres:5432"
    identity = {
        "name": "sprue",
        "credentials": [{"accessKey": s3_key, "secretKey": s3_secret}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    login = f"[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = {admin}\n"
    return {
        "postgres": postgres,
        "mlflow_backend": f"{database}/mlflow",
        "mlflow_session": secrets.token_hex(32),
        "mlflow_auth.ini": f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}/mlflow_auth\n"
        f"admin_username = admin\nadmin_password = {admin}\nauth_cache_ttl_seconds = 60\n",
        "mlflow_credentials": login,
        "s3.json": json.dumps({"identities": [identity]}, indent=2),
        "aws_credentials": f"[default]\naws_access_key_id = {s3_key}\naws_secret_access_key = {s3_secret}\n",
        "ray_token": secrets.token_hex(32),
        "grafana": secrets.token_hex(24),
    }


def certificate(name: str) -> dict[str, str]:
    """A key and a certificate for it that is signed with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {"tls.crt": made.public_bytes(serialization.Encoding.PEM).decode(), "tls.key": private.decode()}


def make(folder: Path, name: str) -> None:
    """Writes what is missing; files that belong together are made together."""
    folder.mkdir(mode=0o700, exist_ok=True)
    groups = (files(), certificate(name))
    for group in groups:
        missing = [each for each in group if not (folder / each).exists()]
        if missing and len(missing) < len(group):
            sys.exit(f"make_secrets: {folder} lacks {', '.join(missing)}; restore them, or remove the others too")
        for each in missing:
            (folder / each).write_text(group[each])
    keys, first = folder / "keys" / "keys.json", folder / "first.key"
    keys.parent.mkdir(exist_ok=True)
    keys.parent.chmod(0o755)
    if not keys.exists():
        scopes = [word for scope in ("score", "review", "admin") for word in ("--scope", scope)]
        command = [str(Path(sys.executable).parent / "sprue"), "keys", "add", "first", *scopes, "--keys", str(keys)]
        key = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        first.unlink(missing_ok=True)
        first.write_text(key)
        first.chmod(0o400)
        print(f"the first key of the scoring service is in {first}")
    for path in (keys, *(folder / each for group in groups for each in group)):
        path.chmod(0o444)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="the machine's name for its users")
    make(FOLDER, parser.parse_args().name)
