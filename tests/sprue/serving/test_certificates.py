"""Certificates are checked before anything starts; each mistake is named."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from sprue.cli import main
from sprue.errors import SprueError
from sprue.serving.certificates import Certificate, served_certificate

Issue = Callable[..., tuple[Path, Path]]


def test_a_certificate_says_its_names_and_its_end(issue: Issue) -> None:
    certificate = Certificate.read(*issue("line", ["Scoring.plant", "*.plant", "scoring.plant", "localhost"]))
    assert certificate.names == ("scoring.plant", "localhost")
    assert certificate.warning is None
    soon = Certificate.read(*issue("soon", ["localhost"], days=7)).warning
    assert soon is not None and "soon.pem expires on" in soon


def test_each_mistake_is_named(issue: Issue, tmp_path: Path) -> None:
    chain, key = issue("line", ["localhost"])
    other_chain, other_key = issue("other", ["localhost"])
    text, encrypted = tmp_path / "text.pem", tmp_path / "encrypted.pem"
    text.write_text("no certificate")
    subprocess.run(["openssl", "pkey", "-in", key, "-out", encrypted, "-aes256", "-passout", "pass:x"], check=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    for files, words in {
        (tmp_path / "none.pem", key): "the certificate can't be read: .*none.pem",
        (chain, tmp_path / "none.pem"): "the certificate can't be read: .*none.pem",
        (folder, key): "the certificate can't be read: .*folder",
        (text, key): "text.pem is no certificate in PEM",
        (key, key): "is no certificate in PEM",
        (chain, text): "can't be used",
        (chain, chain): "can't be used",
        (chain, other_key): "is not that of the certificate",
        (other_chain, key): "is not that of the certificate",
        (chain, encrypted): "is encrypted: decrypt it",
        issue("old", ["localhost"], days=-1): r"old.pem expired on \d{4}-\d\d-\d\d",
        issue("early", ["localhost"], days=9, starts=2): "is not valid before",
    }.items():
        with pytest.raises(SprueError, match=words):
            Certificate.read(*files)


def test_the_command_tells_it_before_it_starts_anything(issue: Issue, tmp_path: Path) -> None:
    chain, _ = issue("line", ["localhost"])
    _, key = issue("other", ["localhost"])
    for arguments, status, words in (
        (["--tls-cert", str(chain)], 2, "give both --tls-cert FILE and --tls-key FILE"),
        (["--tls-cert", str(chain), "--tls-key", str(key)], 1, "is not that of the certificate"),
        (["--rate", "20"], 1, "'20' is no rate"),
    ):
        done = CliRunner().invoke(main, ["--store", str(tmp_path / "store"), "serve", *arguments], prog_name="sprue")
        assert (done.exit_code, words in done.output) == (status, True), done.output
    assert not (tmp_path / "store").exists()


def test_what_speaks_no_tls_shows_no_certificate(unused_port: int) -> None:
    assert served_certificate("127.0.0.1", unused_port) is None
