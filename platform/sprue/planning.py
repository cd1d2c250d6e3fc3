"""What a parameter file asks for: the fits of a dataset's classes, as the recipe or as a search says."""

from defectflow import fitting_config
from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.inference.backbone import resolve
from sprue.inference.detector import Scoring
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context
from sprue.search.record import SearchRecord, with_winners
from sprue.search.space import SearchConfig
from sprue.training.loop import FitSettings
from sprue.training.requests import fit_requests, flow_name
from sprue.training.worker import FitRequest


def check_parameters(context: Context) -> None:
    """Checks the sections that the later stages read, before the first expensive one.

    Raises:
        SprueError: If a setting is unknown or out of range.
    """
    spec = context.settings(FeatureSpec, "features")
    context.settings(FitSettings, "fit")
    context.settings(Scoring, "scoring")
    context.settings(SearchConfig, "search")
    settings = context.section("flow")
    name = flow_name(settings)
    # What a backbone's maps are like is known later; these suit every setting that any suit.
    scales = [[(4096, 64 >> scale, 64 >> scale)] * len(spec.blocks) for scale in range(len(spec.scales))]
    try:
        fitting_config(name, scales, pictures=1_000_000, settings=settings)
    except (TypeError, ValueError) as error:
        raise SprueError(f"flow: {error}") from error


def recipe_requests(context: Context, manifest: Manifest) -> list[FitRequest]:
    """One request for each class of the manifest, with the recipe's own settings.

    Raises:
        SprueError: If a setting is unknown or out of range.
    """
    spec = resolve(context.settings(FeatureSpec, "features"))
    settings = context.settings(FitSettings, "fit")
    return fit_requests(manifest, spec, context.folder / "features", context.section("flow"), settings)


def settings_found(context: Context, class_name: str) -> str:
    """How a class's settings were found, in words."""
    if not context.settings(SearchConfig, "search").trials:
        return "the recipe's own"
    record = SearchRecord.read(context.folder / "search" / class_name)
    best, recipe = record.trials[record.best - 1], record.trials[0]
    return (
        f"the best of {len(record.trials)} that were tried, by drawn defects on good validation pictures "
        f"(AUROC {best.objective:.1%}; the recipe's own {recipe.objective:.1%})"
    )


def final_requests(context: Context, manifest: Manifest) -> list[FitRequest]:
    """One request for each class of the manifest, with the settings that its search found best, if there is one.

    Raises:
        SprueError: If a setting is unknown or out of range, or a class has not been searched as the parameters say.
    """
    config, scoring = context.settings(SearchConfig, "search"), context.settings(Scoring, "scoring")
    return with_winners(recipe_requests(context, manifest), context.folder / "search", config, scoring)
