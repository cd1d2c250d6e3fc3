"""The champion, which is served, and the challenger, which may become it: how these aliases change."""

import mlflow
from mlflow.exceptions import MlflowException

from sprue.errors import SprueError
from sprue.tracking import trail
from sprue.tracking.lock import class_lock
from sprue.tracking.registry import CHALLENGER, CHAMPION, NOT_FOUND


def holder(class_name: str, alias: str) -> int | None:
    """The version that has an alias, if one has."""
    try:
        return int(mlflow.MlflowClient().get_model_version_by_alias(class_name, alias).version)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        return None


def reconcile(class_name: str) -> int | None:
    """The champion's version; a change of it that the trail does not know is recorded as external first."""
    current = holder(class_name, CHAMPION)
    changes = [entry for entry in trail.entries(class_name) if entry.kind != "refused"]
    known = changes[-1].after if changes else None
    if current != known:
        trail.record(class_name, "external", known, current, "the alias was changed outside of sprue")
    return current


def enter(class_name: str, version: int) -> str:
    """Gives the version of the current detector its place: a class's first is champion, every other one challenges.

    Returns:
        The alias that the version has.
    """
    client = mlflow.MlflowClient()
    with class_lock(class_name):
        champion = reconcile(class_name)
        if champion is None:
            client.set_registered_model_alias(class_name, CHAMPION, str(version))
            trail.record(class_name, "first", None, version, "the class had no champion", version)
        elif champion != version:
            if holder(class_name, CHALLENGER) != version:
                client.set_registered_model_alias(class_name, CHALLENGER, str(version))
            return CHALLENGER
        elif holder(class_name, CHALLENGER) is not None:
            client.delete_registered_model_alias(class_name, CHALLENGER)
        return CHAMPION


def crown(
    class_name: str,
    version: int,
    judged_against: int | None,
    kind: trail.Kind,
    reason: str,
    figures: dict[str, float] | None = None,
) -> None:
    """Makes a version the champion.

    Args:
        class_name: The product class.
        version: The new champion.
        judged_against: The champion that the decision is about.
        kind: Of the decision.
        reason: Why, in words.
        figures: What it rests on.

    Raises:
        SprueError: If another version has become champion since.
    """
    client = mlflow.MlflowClient()
    with class_lock(class_name):
        champion = reconcile(class_name)
        if champion != judged_against:
            raise SprueError(
                f"{class_name}: version {champion or 'none'} has become champion in the meantime, and version "
                f"{version} was judged against {judged_against or 'none'}; nothing was changed, try again"
            )
        client.set_registered_model_alias(class_name, CHAMPION, str(version))
        if holder(class_name, CHALLENGER) == version:
            client.delete_registered_model_alias(class_name, CHALLENGER)
        trail.record(class_name, kind, champion, version, reason, version, figures)


def roll_back(class_name: str, reason: str) -> int:
    """Makes the champion before the present one champion again.

    Returns:
        Its version.

    Raises:
        SprueError: If there was none, or it is no longer registered.
    """
    with class_lock(class_name):
        current = reconcile(class_name)
    before = previous(class_name, current)
    if before is None:
        raise SprueError(f"{class_name}: there is no champion before version {current or 'none'} to go back to")
    crown(class_name, before, current, "rolled back", reason)
    return before


def previous(class_name: str, current: int | None) -> int | None:
    """The champion that the present one has replaced, whoever did that; going back twice goes back two steps."""
    line: list[int | None] = [None]
    for entry in trail.entries(class_name):
        if entry.kind == "rolled back" and entry.after in line:
            del line[len(line) - line[::-1].index(entry.after) :]
        elif entry.kind != "refused":
            line.append(entry.after)
    registered = {
        int(version.version) for version in mlflow.MlflowClient().search_model_versions(f"name = '{class_name}'")
    }
    earlier = [version for version in line if version is not None and version != current and version in registered]
    return earlier[-1] if earlier else None
