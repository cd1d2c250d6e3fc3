"""The aliases of a model: the champion, which is served, and the challenger, which may replace it."""

import mlflow
from mlflow.exceptions import MlflowException

from sprue.errors import SprueError
from sprue.release.audit_log import History, Kind, histories
from sprue.tracking.lock import alias_lock
from sprue.tracking.registry import CHALLENGER, CHAMPION, NOT_FOUND, champions, model_names


def version_for_alias(model: str, alias: str) -> int | None:
    """The version that has an alias; None if none has."""
    try:
        return int(mlflow.MlflowClient().get_model_version_by_alias(model, alias).version)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        return None


def reconcile(model: str) -> History:
    """The decisions about a model; a change of the champion that they lack is recorded as external first."""
    current, history = version_for_alias(model, CHAMPION), History.read(model)
    if current != history.champion:
        history.append("external", history.champion, current, "the alias was changed outside of sprue")
    return history


def reconcile_changed(model: str | None = None) -> None:
    """Records changes of the champions outside of sprue, of a model or of all; only models with one are locked."""
    if model:
        current = {model: version_for_alias(model, CHAMPION)}
        logged = [History.read(model)]
    else:
        current = {**dict.fromkeys(model_names()), **{each.model_name: each.version for each in champions()}}
        logged = histories()
    recorded = {history.model: history.champion for history in logged}
    for name, version in current.items():
        if version != recorded.get(name):
            with alias_lock(name):
                reconcile(name)


def assign_alias(model: str, version: int) -> str:
    """Assigns the current detector's version its alias: a model's first is champion, every other one challenger.

    That is so where the champion's alias was removed, too: a version that was refused must not take its place.

    The caller holds the model's lock.

    Returns:
        The alias that the version has.
    """
    client, history = mlflow.MlflowClient(), reconcile(model)
    if not any(entry.after for entry in history.entries):
        client.set_registered_model_alias(model, CHAMPION, str(version))
        history.append("first", None, version, "the class had no champion", version)
    elif history.champion != version:
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
    kind: Kind,
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
        history = reconcile(model)
        champion = history.champion
        if champion != judged_against:
            raise SprueError(
                f"{model}: version {champion or 'none'} has become champion in the meantime, and version {version} was "
                f"compared with {judged_against or 'none'}; nothing was changed, try again"
            )
        client.set_registered_model_alias(model, CHAMPION, str(version))
        if version_for_alias(model, CHALLENGER) == version:
            client.delete_registered_model_alias(model, CHALLENGER)
        history.append(kind, champion, version, reason, version, metrics)


def roll_back(model: str, reason: str) -> int:
    """Makes the previous champion champion again.

    Returns:
        Its version.

    Raises:
        SprueError: If there was none, or it is no longer registered.
    """
    with alias_lock(model):
        history = reconcile(model)
    current, before = history.champion, _previous_champion(history)
    if before is None:
        raise SprueError(f"{model}: there is no champion before version {current or 'none'} to roll back to")
    promote(model, before, current, "rolled back", reason)
    return before


def _previous_champion(history: History) -> int | None:
    """The champion before the current one, however it changed; two rollbacks go back two steps."""
    champions: list[int | None] = [None]
    for entry in history.entries:
        if entry.kind == "rolled back" and entry.after in champions:
            del champions[len(champions) - champions[::-1].index(entry.after) :]
        elif entry.kind != "refused":
            champions.append(entry.after)
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{history.model}'")
    registered = {int(version.version) for version in versions}
    earlier = [each for each in champions if each is not None and each != history.champion and each in registered]
    return earlier[-1] if earlier else None
