"""All settings, as pydantic models: of a dataset, of a recipe and of the parameter file.

Imports neither torch nor Ray, so that a bad setting is reported within a second or two.
"""

import ast
import inspect
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    Strict,
    StringConstraints,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from defectflow.config import CONFIGS, FUSION_TOP, FlowConfig, Shape, config_for_features

Fraction = Annotated[float, Gt(0), Lt(1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Of a dataset or a class: it becomes a folder, a part of a URL and a part of a registered model's name."""

FlowName = Literal["csflow", "dnfad", "fusion", "gaussian", "memorybank", "multiflow", "patchflow"]
ScoreType = Literal["latent", "likelihood"]
Guarantee = Literal["marginal", "conditional"]
LayoutName = Literal["mvtec", "mvtec-views"]


class Settings(BaseModel):
    """A section of settings: unknown keys and values of another type are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describes each field with the text below it.

        With `use_attribute_docstrings`, the import would search all modules for each class's source: for 3 s where
        torch, Ray and MLflow are loaded.
        """
        schema = handler(core_schema)
        described = handler.resolve_ref_schema(schema)
        for name, text in _field_docstrings(cls).items():
            described["properties"][name]["description"] = text
        return schema


class ManifestSettings(Settings):
    """How the dataset's folders are read, and how its good training images are split."""

    layout: LayoutName = "mvtec"
    """Folder convention; ``mvtec-views`` has a folder of views in the place of each image."""
    seed: int = 0
    """Of the split."""
    calibration: Fraction = 0.05
    """Fraction of the good images that is held out to calibrate; at least as many as ``calibration.alpha`` needs."""
    validation: Fraction = 0.15
    """Fraction of the good images that is held out to choose the best epoch, to search, and to standardise the scores
    of a fusion; less where too few would be left to train on, and at most 40 samples."""
    keep: Annotated[tuple[str, ...], Strict(False)] = ()
    """Images that are good although they look foreign or like a copy, by their paths in the dataset's folder."""
    drop: Annotated[tuple[str, ...], Strict(False)] = ()
    """Images that are not used, likewise."""

    @model_validator(mode="after")
    def _leaves_training_images(self) -> "ManifestSettings":
        if self.calibration + self.validation >= 1:
            raise ValueError("validation: calibration and validation must sum to less than 1")
        return self

    @model_validator(mode="after")
    def _decides_once(self) -> "ManifestSettings":
        if both := sorted(set(self.keep) & set(self.drop)):
            raise ValueError(f"drop: {', '.join(both)} is in keep too; remove it from one of the two")
        return self


class FeatureSettings(Settings):
    """The frozen backbone and where it is tapped."""

    backbone: str
    """A timm model's name without weight tag."""
    weights: Annotated[str, StringConstraints(pattern=r"^(package|file|s3|hub):.+")]
    """``package:NAME``, ``file:PATH``, ``s3://BUCKET/KEY`` or ``hub:TAG``."""
    blocks: Annotated[tuple[Annotated[int, Ge(0)], ...], Len(1)]
    """Blocks whose outputs are read, counted from 0."""
    scales: Annotated[tuple[Annotated[float, Gt(0), Le(1)], ...], Len(1)]
    """Sizes at which an image is read, as fractions of ``input_size``: 1/k for whole k."""
    input_size: Annotated[int, Ge(32)]
    """Side of the square input in pixels."""
    grid: Annotated[int, Ge(1)] | None = None
    """Largest side of a stored map; the means of larger ones are stored. All maps are stored as they are if null."""

    @model_validator(mode="after")
    def _blocks_and_scales_fit(self) -> "FeatureSettings":
        if len(set(self.blocks)) < len(self.blocks):
            raise ValueError("blocks: name each block once")
        for scale in self.scales:
            factor = round(1 / scale)
            if self.input_size % factor or abs(1 / factor - scale) > 1e-6:
                raise ValueError(f"scales: {scale} is not 1/k for a whole k that divides input_size {self.input_size}")
        return self


class FitSettings(Settings):
    """How a flow is fitted."""

    epochs: Annotated[int, Ge(1)] = 10
    """Passes over the training images."""
    patience: Annotated[int, Ge(0)] = 0
    """Epochs without a better validation likelihood after which the fit ends early; 0 for never."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Samples a step, of all workers together."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """Peak of the schedule."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: a cosine to zero, or the peak throughout."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.2
    """Fraction of the steps in which the rate rises linearly."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """``adam`` adds the weight decay to the gradient, ``adamw`` subtracts it from the weights."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    """Decay of the optimizer's means of the gradient and of its square."""
    epsilon: Annotated[float, Gt(0)] = 1e-8
    """Added to the optimizer's divisor."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Strength of the pull of the weights to zero."""
    gradient_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the couplings' products in training; weights, log-determinants and scores are float32. ``auto`` is bfloat16 on
    GPUs and on CPUs that multiply in it (AVX512-BF16 or AMX)."""
    recompute: bool = False
    """Save memory by recomputing the couplings' inputs in the backward pass."""
    workers: Annotated[int, Ge(1)] = 1
    """Processes that share a class's steps, each on its own GPU where there are any."""
    min_workers: Annotated[int, Ge(1)] | None = None
    """Fewest workers with which a fit goes on when machines leave, and begins before they join; null for all."""
    gpus: Annotated[float, Gt(0), Le(1)] = 1.0
    """Of a GPU that a worker takes, where there are any: with 0.25, four fits share one, which a small fit leaves idle
    most of the time. Several workers need 1."""
    memory: Annotated[float, Gt(0)] = 8.0
    """GiB of training features that a worker holds; larger ones are streamed. Validation features may take as many."""
    seed: int = 0
    """Of the initial weights, the permutations, the order of the images and the noise."""

    @model_validator(mode="after")
    def _workers_have_gpus(self) -> "FitSettings":
        if self.workers > 1 and self.gpus < 1:
            raise ValueError("gpus: workers that share a fit need a GPU each; set gpus to 1 or workers to 1")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers, {self.workers}")
        return self


class ScoringSettings(Settings):
    """How an image's anomaly score is made of its positions' scores."""

    score_type: ScoreType = "latent"
    """``latent`` for the latent norm, ``likelihood`` for the negative log-likelihood."""
    top: Annotated[float, Gt(0), Le(1)] | None = None
    """Fraction of the positions (DNFAD: of its upsampled map) with the highest scores, whose mean is the image's score;
    the flow's own if null."""


class SearchSettings(Settings):
    """How a class's flow is searched."""

    trials: Annotated[int, Ge(0)] = 0
    """Settings that are tried for each class, the recipe's own first; 0 for no search."""
    epochs: Annotated[int, Ge(1)] | None = None
    """Of a full trial; the fit's if null."""
    minutes: Annotated[float, Gt(0)] | None = None
    """After which no epoch of a class's search begins; no limit if null."""
    seed: int = 0
    """Of the settings that are tried."""
    space: dict[str, Any] = Field(default_factory=dict)
    """What each setting may be: a list of values, or a mapping with ``low``, ``high`` and perhaps ``log``. If empty,
    depth, width, noise and learning rate vary around the recipe's."""

    @model_validator(mode="after")
    def _space_can_be_read(self) -> "SearchSettings":
        for name, domain in self.space.items():
            is_range = isinstance(domain, Mapping) and {"low", "high"} <= set(domain) <= {"low", "high", "log"}
            if not (is_range or (isinstance(domain, list) and domain)):
                raise ValueError(f"space.{name}: give a list of values or a mapping with low and high")
        return self


class CalibrationSettings(Settings):
    """What the threshold promises."""

    alpha: Fraction = 0.05
    """The false-alarm rate: at most this fraction of good samples is called anomalous."""
    guarantee: Guarantee = "marginal"
    """``marginal``: ``alpha`` holds on average over calibrations. ``conditional``: it holds for the threshold in use,
    with the probability ``confidence`` over calibrations."""
    confidence: Fraction = 0.95
    """Of the conditional guarantee, which needs at least log(1 - confidence) / log(1 - alpha) calibration samples."""
    folds: Annotated[int, Ge(3)] | None = None
    """Cross-conformal calibration: so many flows are fitted, each without one fold of the good images, which calibrates
    it; their mean scores. Every good image trains and calibrates, and a fit costs as many times as much. If null, one
    flow is fitted and a calibration set is held out."""

    @model_validator(mode="after")
    def _guarantee_has_folds(self) -> "CalibrationSettings":
        if self.folds and self.guarantee == "conditional":
            raise ValueError(
                "folds: the conditional guarantee needs a held-out calibration set; set guarantee to marginal or folds "
                "to null"
            )
        return self


class FlowSettings(Settings):
    """The flow's name, and those of its settings that differ from the published ones."""

    name: FlowName

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings that were set by hand."""
        return self.model_dump(exclude={"name"}, exclude_unset=True)


def _accept_lists(hint: Any) -> Any:
    """A type whose tuples may be given as lists, which is what YAML has; what is in them stays strict."""
    if get_origin(hint) is not tuple:
        return hint
    return Annotated[tuple[tuple(_accept_lists(each) for each in get_args(hint))], Strict(False)]  # type: ignore[misc]


def _flow_settings(name: str, config: type[FlowConfig]) -> type[FlowSettings]:
    """The section of one flow: the fields of its config, all optional; its channels follow from the features."""
    hints = get_type_hints(config)
    defaults = {
        field.name: field.default if field.default is not MISSING else None
        for field in fields(config)
        if field.name != "channels"
    }

    def in_range(
        cls: type[FlowSettings], content: Any, validate: ModelWrapValidatorHandler[FlowSettings]
    ) -> FlowSettings:
        """Reports what is out of range beside what has the wrong type."""
        errors: list[InitErrorDetails] = []
        try:
            settings = validate(content)
        except ValidationError as error:
            errors = [cast(InitErrorDetails, dict(each)) for each in error.errors(include_url=False)]
            settings = None
        wrong = {"name", *(each["loc"][0] for each in errors)}
        given = {key: value for key, value in content.items() if key not in wrong} if isinstance(content, dict) else {}
        try:
            # As many maps as any features have, so that only what does not depend on them is judged.
            config(channels=(4096,) * 64, **given)
        except (ValueError, TypeError) as error:
            field, _, message = str(error).partition(": ")
            problem = PydanticCustomError("out_of_range", "{message}", {"message": message})
            errors.append(InitErrorDetails(type=problem, loc=(field,), input=given.get(field)))
        if errors:
            raise ValidationError.from_exception_data(name, errors)
        assert settings is not None
        return settings

    definitions: dict[str, Any] = {field: (_accept_lists(hints[field]), default) for field, default in defaults.items()}
    return create_model(
        f"{config.__name__.removesuffix('Config')}Settings",
        __base__=FlowSettings,
        __doc__=f"Settings of the flow {name}; see its config class in ``defectflow``.",
        __validators__={"in_range": model_validator(mode="wrap")(classmethod(in_range))},  # type: ignore[arg-type, dict-item]
        **definitions | {"name": (Literal[name], ...)},
    )


FLOW_SETTINGS = {name: _flow_settings(name, config) for name, config in CONFIGS.items()}
"""The section ``flow`` of each flow."""

# Pickle finds a class by its module and name, where settings are sent to another process.
globals().update({settings.__name__: settings for settings in FLOW_SETTINGS.values()})

if TYPE_CHECKING:
    AnyFlowSettings = FlowSettings
else:
    AnyFlowSettings = Annotated[reduce(or_, FLOW_SETTINGS.values()), Field(discriminator="name")]


class Recipe(Settings):
    """What is done with a dataset: features, flow, fit and scoring."""

    published: str = ""
    """The metric of the recipe's paper, which the report shows beside its own."""
    features: FeatureSettings
    flow: AnyFlowSettings
    fit: FitSettings = FitSettings()
    scoring: ScoringSettings = ScoringSettings()

    @model_validator(mode="after")
    def _flow_fits_features(self) -> "Recipe":
        # The backbone's channels are known later; these suit every setting that any suit.
        scales: list[list[Shape]] = [
            [(4096, 64 >> scale, 64 >> scale)] * len(self.features.blocks) for scale in range(len(self.features.scales))
        ]
        try:
            config_for_features(self.flow.name, scales, images=1_000_000, settings=self.flow.overrides)
        except ValueError as error:
            raise ValueError(f"flow.{error}") from error
        return self

    @model_validator(mode="after")
    def _fusion_is_scored_as_it_is_standardised(self) -> "Recipe":
        if self.flow.name == "fusion" and self.scoring.score_type != "latent":
            raise ValueError("scoring.score_type: a fusion standardises latent norms; set it to latent")
        if self.flow.name == "fusion" and self.scoring.top not in (None, FUSION_TOP):
            raise ValueError(f"scoring.top: a fusion standardises its members' scores at {FUSION_TOP}; leave it out")
        return self


class DatasetSettings(Recipe):
    """Everything that can be set for one dataset."""

    manifest: ManifestSettings = ManifestSettings()
    search: SearchSettings = SearchSettings()
    calibration: CalibrationSettings = CalibrationSettings()


class Params(Settings):
    """The parameter file: the settings of each dataset, by its name."""

    datasets: dict[Name, DatasetSettings]

    @model_validator(mode="after")
    def _names_are_free(self) -> "Params":
        for name in self.datasets:
            if name == "mlflow" or name.startswith("sprue-"):
                raise ValueError(f"datasets.{name}: the name is reserved; give the dataset another")
        return self


def _field_docstrings(settings: type[Settings]) -> dict[str, str]:
    """The texts below a class's fields, those of its bases included."""
    found: dict[str, str] = {}
    for each in reversed(settings.__mro__):
        if issubclass(each, Settings) and each not in FLOW_SETTINGS.values():  # these are made, and have no source
            (definition,) = cast(list[ast.ClassDef], ast.parse(inspect.getsource(each)).body)
            found |= {
                field.target.id: inspect.cleandoc(text.value.value)
                for field, text in pairwise(definition.body)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if isinstance(text.value.value, str)
            }
    return found


def json_schema(kind: type[Settings]) -> str:
    """The JSON Schema of a parameter file or a recipe, for editors."""
    schema = kind.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"
