"""The aliases of a model: the champion, which is served, and the challenger, which may replace it."""

import mlflow
from mlflow.exceptions import MlflowException

from sprue.errors import SprueError
from sprue.release import audit_log
from sprue.tracking.lock import alias_lock
from sprue.tracking.registry import CHALLENGER, CHAMPION, NOT_FOUND


def version_for_alias(model: str, alias: str) -> int | None:
    """The version that has an alias; None if none has."""
    try:
        return int(mlflow.MlflowClient().get_model_version_by_alias(model, alias).version)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        return None


def reconcile(model: str) -> int | None:
    """The champion's version. A change that the audit log does not have is recorded as external first."""
    current = version_for_alias(model, CHAMPION)
    changes = [entry for entry in audit_log.entries(model) if entry.kind != "refused"]
    known = changes[-1].after if changes else None
    if current != known:
        audit_log.append(model, "external", known, current, "the alias was changed outside of sprue")
    return current


def assign_alias(model: str, version: int) -> str:
    """Assigns the current detector's version its alias: a model's first is champion, every other one challenger.

    Returns:
        The alias that the version has.
    """
    client = mlflow.MlflowClient()
    with alias_lock(model):
        champion = reconcile(model)
        if champion is None:
            client.set_registered_model_alias(model, CHAMPION, str(version))
            audit_log.append(model, "first", None, version, "the class had no champion", version)
        elif champion != version:
            if version_for_alias(model, CHALLENGER) != version:
                client.set_registered_model_alias(model, CHALLENGER, str(version))
            return CHALLENGER
        elif version_for_alias(model, CHALLENGER) is not None:
            client.delete_registered_model_alias(model, CHALLENGER)
        return CHAMPION


def promote(
    model: str,
    version: int,
    judged_against: int | None,
    kind: audit_log.Kind,
    reason: str,
    metrics: dict[str, float] | None = None,
) -> None:
    """Makes a version the champion.

    Args:
        model: The registered model.
        version: The new champion.
        judged_against: The champion that it was compared with.
        kind: Of the decision.
        reason: Why, in words.
        metrics: What the decision rests on.

    Raises:
        SprueError: If another version has become champion since.
    """
    client = mlflow.MlflowClient()
    with alias_lock(model):
        champion = reconcile(model)
        if champion != judged_against:
            raise SprueError(
                f"{model}: version {champion or 'none'} has become champion in the meantime, and version {version} was "
                f"compared with {judged_against or 'none'}; nothing was changed, try again"
            )
        client.set_registered_model_alias(model, CHAMPION, str(version))
        if version_for_alias(model, CHALLENGER) == version:
            client.delete_registered_model_alias(model, CHALLENGER)
        audit_log.append(model, kind, champion, version, reason, version, metrics)


def roll_back(model: str, reason: str) -> int:
    """Makes the previous champion champion again.

    Returns:
        Its version.

    Raises:
        SprueError: If there was none, or it is no longer registered.
    """
    with alias_lock(model):
        current = reconcile(model)
    before = previous_champion(model, current)
    if before is None:
        raise SprueError(f"{model}: there is no champion before version {current or 'none'} to roll back to")
    promote(model, before, current, "rolled back", reason)
    return before


def previous_champion(model: str, current: int | None) -> int | None:
    """The champion before the current one, however it changed; two rollbacks go back two steps."""
    history: list[int | None] = [None]
    for entry in audit_log.entries(model):
        if entry.kind == "rolled back" and entry.after in history:
            del history[len(history) - history[::-1].index(entry.after) :]
        elif entry.kind != "refused":
            history.append(entry.after)
    registered = {int(version.version) for version in mlflow.MlflowClient().search_model_versions(f"name = '{model}'")}
    earlier = [version for version in history if version is not None and version != current and version in registered]
    return earlier[-1] if earlier else None
