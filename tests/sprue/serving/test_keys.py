"""Keys are kept as hashes, found by them, and a file that changes is followed."""

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from upath import UPath

from sprue.cli import main
from sprue.errors import SprueError
from sprue.release.access_log import FOLDER, AccessLog
from sprue.serving.errors import ApiError
from sprue.serving.keys import Caller, KeyFile, add_key, read_keys, remove_key
from sprue.serving.rates import Rate


def bearer(key: str | None, address: str = "10.0.0.7") -> Caller:
    return Caller(key, address, "GET /readyz")


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
    for wrong in (bearer(None), bearer(""), bearer(line[:-1]), bearer(hashlib.sha256(line.encode()).hexdigest())):
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
    assert keys.allows(bearer(None), "score") and keys.allows(bearer("any"), "admin")


def refused_s(keys: KeyFile, caller: Caller) -> int:
    """Seconds until a request that is beyond a rate limit may come again; 0 if it is within."""
    try:
        keys.require(caller, "score")
    except ApiError as error:
        assert (error.status, error.code) == (429, "rate_limited") and error.headers is not None
        return int(error.headers["Retry-After"])
    return 0


def test_a_key_has_its_own_rate_or_that_of_the_service(path: Path) -> None:
    own, other = bearer(add_key(path, "own", ["score"], "1/min")), bearer(add_key(path, "other", ["score", "admin"]))
    keys = KeyFile(path, Rate.of("2/h"))
    assert [refused_s(keys, own) for _ in range(2)] == [0, 60]
    assert [refused_s(keys, other) for _ in range(3)] == [0, 0, 1800]
    assert keys.allows(other, "admin")  # a monitor's look does not count
    with pytest.raises(ApiError, match=r"the key 'own' may make 1 requests in 60 s; try again in 60 s"):
        keys.require(own, "score")
    path.write_text(path.read_text().replace("1/min", "1000/s"))
    assert refused_s(keys, own) <= 1
    with pytest.raises(SprueError, match="'fast' is no rate"):
        add_key(path, "wrong", ["score"], "fast")


def test_without_keys_each_address_has_the_rate_of_the_service() -> None:
    keys = KeyFile(None, Rate.of("1/h"))
    assert [refused_s(keys, bearer(None, address)) for address in ("10.0.0.7", "10.0.0.8", "10.0.0.7")] == [0, 0, 3600]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "plain"}, r"keys\.0\.sha256: "),
        ({"scopes": []}, r"keys\.0\.scopes: "),
        ({"scopes": ["root"]}, r"keys\.0\.scopes\.0: "),
        ({"rate": "20"}, r"keys\.0\.rate: "),
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


def test_a_key_that_the_store_has_no_entry_of_is_printed_all_the_same(path: Path) -> None:
    store = path.parent / "store"
    store.write_text("no folder")
    command = ["--store", str(store), "keys", "add", "line", "--scope", "score", "--keys", str(path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert KeyFile(path).allows(bearer(result.stdout.strip()), "score")


def test_the_command_prints_a_key_once_and_revokes_it(path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        store = ["--store", str(path.parent / "store")]
        result = CliRunner().invoke(main, [*store, "keys", *arguments, "--keys", str(path)])
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
    assert run("add", "slow", "--scope", "score", "--rate", "fast")[0] == 1
    assert run("add", "slow", "--scope", "score", "--rate", "3/s")[0] == 0
    log = AccessLog(UPath(path.parent / "store" / FOLDER))
    entries = list(log.entries())
    assert [(each.kind, each.origin, each.detail) for each in entries] == [
        ("key added", "command", f"line in {path}, for score, admin"),
        ("key removed", "command", f"line in {path}"),
        ("key added", "command", f"slow in {path}, for score, 3/s"),
    ]
    assert all("@" in each.by for each in entries)
    written = "".join(file.read_text() for file in (path.parent / "store").rglob("*.json"))
    assert "sprue_" not in written and not any(key.sha256 in written for key in read_keys(path))
