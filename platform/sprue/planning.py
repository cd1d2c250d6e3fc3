"""What a parameter file asks for: the fits of a dataset's classes, as the recipe or as a search says."""

from sprue.data.manifest import Manifest
from sprue.inference.backbone import resolve
from sprue.inference.detector import Scoring
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context
from sprue.search.record import with_winners
from sprue.search.space import SearchConfig
from sprue.training.loop import FitSettings
from sprue.training.requests import fit_requests
from sprue.training.worker import FitRequest


def recipe_requests(context: Context, manifest: Manifest) -> list[FitRequest]:
    """One request for each class of the manifest, with the recipe's own settings.

    Raises:
        SprueError: If a setting is unknown or out of range.
    """
    spec = resolve(context.settings(FeatureSpec, "features"))
    settings = context.settings(FitSettings, "fit")
    return fit_requests(manifest, spec, context.folder / "features", context.section("flow"), settings)


def final_requests(context: Context, manifest: Manifest) -> list[FitRequest]:
    """One request for each class of the manifest, with the settings that its search found best, if there is one.

    Raises:
        SprueError: If a setting is unknown or out of range, or a class has not been searched as the parameters say.
    """
    config, scoring = context.settings(SearchConfig, "search"), context.settings(Scoring, "scoring")
    return with_winners(recipe_requests(context, manifest), context.folder / "search", config, scoring)
