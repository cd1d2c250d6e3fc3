"""What the local stack makes at its start leaves valid what it made before."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from sprue.serving.keys import Caller, KeyFile, add_key, read_keys

SCOPES = ("score", "review", "admin")
Local = Callable[[str], ModuleType]
Start = Callable[[], Path]


@pytest.fixture
def start(tmp_path: Path, local: Local) -> Start:
    """Makes the credentials of a stack, and returns its folder."""
    credentials, settings = local("credentials"), local("settings").Settings(tmp_path / "stack")
    settings.make_folders()

    def made() -> Path:
        credentials.make_credentials(settings, credentials.kept_secrets(settings.folder))
        return settings.folder

    return made


def test_another_first_key_leaves_those_of_the_stations_valid(start: Start) -> None:
    folder = start()
    station = add_key(folder / "keys.json", "line-7", ["score"])
    before = (folder / "first.key").read_text()
    start()
    assert (folder / "first.key").read_text() == before
    (folder / "first.key").unlink()
    start()
    keys = KeyFile(folder / "keys.json")
    assert keys.allows(Caller(station, "", ""), "score")
    assert all(keys.allows(Caller((folder / "first.key").read_text(), "", ""), scope) for scope in SCOPES)
    assert [key.name for key in read_keys(folder / "keys.json")][:2] == ["first", "line-7"]


def test_a_damaged_file_of_keys_is_named_and_kept(start: Start, local: Local) -> None:
    folder = start()
    (folder / "first.key").unlink()
    (folder / "keys.json").write_text("{")
    with pytest.raises(local("settings").StackError, match=r"keys\.json is no file of keys"):
        start()
    assert (folder / "keys.json").read_text() == "{"
