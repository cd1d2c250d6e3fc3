"""The certificate under which the service speaks TLS, checked before anything starts."""

import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sprue.errors import SprueError

SOON = timedelta(days=14)
"""Before the end of a certificate, in which the start of the service warns of it."""


@dataclass(frozen=True)
class Certificate:
    """A certificate with the chain to its authority, and its private key.

    Attributes:
        chain: PEM file; the service's own certificate is the first.
        key: PEM file, not encrypted. Ray Serve's proxies read both, on each node that has one.
        names: DNS names that it holds for, in lower case, without wildcards.
        ends: When it expires.
        der: The service's own certificate.
    """

    chain: Path
    key: Path
    names: tuple[str, ...]
    ends: datetime
    der: bytes

    @classmethod
    def read(cls, chain: Path, key: Path) -> "Certificate":
        """Reads and checks the files.

        Raises:
            SprueError: If one is missing, unreadable or no PEM, the key is encrypted or another one's, or the
                certificate has expired or is not valid yet.
        """
        try:
            pem = chain.read_bytes()
            key.read_bytes()
        except OSError as error:
            raise SprueError(f"the certificate can't be read: {error}") from error
        try:
            own = x509.load_pem_x509_certificates(pem)[0]
        except (ValueError, IndexError) as error:
            raise SprueError(f"{chain} is no certificate in PEM: {error}") from error
        _require_pair(chain, key)
        now, ends = datetime.now(UTC), own.not_valid_after_utc
        if ends <= now:
            raise SprueError(f"the certificate {chain} expired on {ends:%Y-%m-%d at %H:%M} UTC: renew it")
        if own.not_valid_before_utc > now:
            starts = f"{own.not_valid_before_utc:%Y-%m-%d at %H:%M} UTC"
            raise SprueError(f"the certificate {chain} is not valid before {starts}: is this machine's clock right?")
        return cls(chain.resolve(), key.resolve(), _names(own), ends, own.public_bytes(Encoding.DER))

    @property
    def warning(self) -> str | None:
        """What the user should know of a certificate that is valid."""
        if self.ends - datetime.now(UTC) > SOON:
            return None
        return f"the certificate {self.chain} expires on {self.ends:%Y-%m-%d}: renew it, and start the service again"


def _require_pair(chain: Path, key: Path) -> None:
    def encrypted() -> str:
        raise SprueError(
            f"the key {key} is encrypted: decrypt it, such as with `openssl pkey`, into a file of mode 0600"
        )

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password=encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SprueError(f"the key {key} is not that of the certificate {chain}") from error
        raise SprueError(f"the key {key} or the certificate {chain} can't be used: {error.reason or error}") from error


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    found = names.get_values_for_type(x509.DNSName)
    return tuple(dict.fromkeys(each.lower() for each in found if not each.startswith("*")))


def served_certificate(address: str, port: int) -> bytes | None:
    """The certificate (DER) that a server shows; None if it speaks no TLS. Nothing is trusted, and nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((address, port), timeout=5.0) as plain, context.wrap_socket(plain) as secure:
            return secure.getpeercert(binary_form=True)
    except OSError:
        return None
