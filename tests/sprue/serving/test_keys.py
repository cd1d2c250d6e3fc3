"""Keys are kept as hashes, found by them, and a file that changes is followed."""

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from fastapi.security import HTTPAuthorizationCredentials

from sprue.cli import main
from sprue.errors import SprueError
from sprue.serving.errors import ApiError
from sprue.serving.keys import KeyFile, add_key, read_keys, remove_key


def bearer(key: str) -> HTTPAuthorizationCredentials:
    return HTTPAuthorizationCredentials(scheme="Bearer", credentials=key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_file_holds_hashes_that_only_its_owner_reads(path: Path) -> None:
    made = [add_key(path, name, ["score"]) for name in ("line-1", "line-2")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert not any(key in text or key.removeprefix("sprue_") in text for key in made)
    assert len(set(made)) == 2 and all(len(key) > 40 for key in made)
    assert [key.sha256 for key in read_keys(path)] == [hashlib.sha256(key.encode()).hexdigest() for key in made]


def test_a_file_that_others_may_read_stays_so_when_it_changes(path: Path) -> None:
    add_key(path, "line-1", ["score"])
    path.chmod(0o640)
    add_key(path, "line-2", ["score"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_keys_that_are_made_at_once_are_all_kept(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add_key(path, f"line-{number}", ["score"]), range(8)))
    assert sorted(key.name for key in read_keys(path)) == [f"line-{number}" for number in range(8)]


def test_a_key_does_what_its_scopes_allow(path: Path) -> None:
    line, monitor = add_key(path, "line", ["score"]), add_key(path, "monitor", ["admin", "admin"])
    keys = KeyFile(path)
    assert keys.allows(bearer(line), "score") and not keys.allows(bearer(line), "admin")
    assert keys.allows(bearer(monitor), "admin") and not keys.allows(bearer(monitor), "score")
    for wrong in (None, bearer(""), bearer(line[:-1]), bearer(hashlib.sha256(line.encode()).hexdigest())):
        assert not keys.allows(wrong, "score")
        with pytest.raises(ApiError) as refusal:
            keys.require(wrong, "score")
        assert refusal.value.status == 401
    with pytest.raises(ApiError, match="'monitor' has not the scope 'score'; it has: admin") as refusal:
        keys.require(bearer(monitor), "score")
    assert refusal.value.status == 403


def test_a_changed_file_is_followed_and_a_broken_one_is_not(path: Path) -> None:
    first = add_key(path, "first", ["score"])
    keys = KeyFile(path)
    second = add_key(path, "second", ["score"])
    assert keys.allows(bearer(second), "score")
    remove_key(path, "first")
    assert not keys.allows(bearer(first), "score")
    whole = path.read_text()
    for broken in (path.unlink, lambda: path.write_text("[")):
        broken()
        assert keys.allows(bearer(second), "score") and not keys.allows(bearer(first), "score")
        assert keys.error is not None and str(path) in keys.error
    path.write_text(whole)
    assert keys.allows(bearer(second), "score") and keys.error is None


def test_without_a_file_everybody_may_do_everything() -> None:
    keys = KeyFile(None)
    assert keys.allows(None, "score") and keys.allows(bearer("any"), "admin")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "plain"}, r"keys\.0\.sha256: "),
        ({"scopes": []}, r"keys\.0\.scopes: "),
        ({"scopes": ["root"]}, r"keys\.0\.scopes\.0: "),
        ({"name": "a b"}, r"keys\.0\.name: "),
        ({"key": "plain"}, r"keys\.0\.key: "),
    ],
)
def test_a_malformed_file_is_named_with_its_field(path: Path, change: dict[str, object], words: str) -> None:
    key = {"name": "line", "sha256": "0" * 64, "scopes": ["score"]}
    path.write_text(json.dumps({"format": 1, "keys": [key | change]}))
    with pytest.raises(SprueError, match=rf"keys\.json is no file of keys: {words}") as refusal:
        KeyFile(path)
    assert "plain" not in str(refusal.value)  # what may be a secret is not repeated


def test_names_are_given_once(path: Path) -> None:
    key = {"name": "line", "sha256": "0" * 64, "scopes": ["score"]}
    path.write_text(json.dumps({"format": 1, "keys": [key, key]}))
    with pytest.raises(SprueError, match="two keys have the same name"):
        read_keys(path)


def test_the_command_prints_a_key_once_and_revokes_it(path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["keys", *arguments, "--keys", str(path)])
        return result.exit_code, result.output

    status, printed = run("add", "line", "--scope", "score", "--scope", "admin")
    assert status == 0
    keys = KeyFile(path)
    assert keys.allows(bearer(printed.strip()), "score") and keys.allows(bearer(printed.strip()), "admin")
    assert run("add", "line", "--scope", "score")[0] == 1
    status, message = run("add", "a/b", "--scope", "score")
    assert status == 1 and "'a/b' has not" in message
    assert run("add", "other")[0] == 2  # without a scope
    assert run("remove", "line") == (0, "")
    status, message = run("remove", "line")
    assert status == 1 and "has no key 'line'; it has: none" in message
    assert not keys.allows(bearer(printed.strip()), "score")
