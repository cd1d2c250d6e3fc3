"""The local stack's certificates are renewed in their last month, under the same authority."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

from cryptography import x509

NOW = datetime.now(UTC)


def test_each_is_renewed_in_its_last_month(tmp_path: Path, local: Callable[[str], ModuleType]) -> None:
    certificates, settings = local("certificates"), local("settings").Settings(tmp_path / "stack")
    settings.make_folders()
    assert certificates.make_certificates(settings, NOW) == {"proxy", "seaweedfs"}
    authority = x509.load_pem_x509_certificate((settings.folder / "tls/ca.pem").read_bytes())
    for days, renewed in ((365, set()), (369, {"proxy", "seaweedfs"})):
        then = NOW + timedelta(days=days)
        endings = certificates.ending_certificates(settings, then)
        assert [Path(line.split()[0]).name for line in endings] == (["proxy.pem", "s3.pem"] if renewed else [])
        assert certificates.make_certificates(settings, then) == renewed
        assert not certificates.ending_certificates(settings, then)
    for name in ("proxy", "s3"):
        found = x509.load_pem_x509_certificate((settings.folder / f"tls/{name}.pem").read_bytes())
        found.verify_directly_issued_by(authority)
        assert found.not_valid_after_utc > NOW + timedelta(days=700)


def test_an_authority_in_its_last_month_is_named_and_kept(tmp_path: Path, local: Callable[[str], ModuleType]) -> None:
    certificates, settings = local("certificates"), local("settings").Settings(tmp_path / "stack")
    settings.make_folders()
    certificates.make_certificates(settings, NOW - timedelta(days=3950))
    authority = (settings.folder / "tls/ca.pem").read_text()
    certificates.make_certificates(settings, NOW)
    assert (settings.folder / "tls/ca.pem").read_text() == authority
    (line,) = certificates.ending_certificates(settings, NOW)
    assert "tls/ca.pem ends on" in line and "remove its folder" in line
