"""The plan of a class: its file, its folds, and what it refuses."""

import pytest
from upath import UPath

from sprue.errors import SprueError
from sprue.store import digest, write_bytes
from sprue.training.plan import ClassPlan, read_plans
from sprue.training.spec import FitSpec


@pytest.fixture
def spec(make_spec, tmp_path):
    return make_spec(tmp_path)


@pytest.fixture
def plan(spec):
    return ClassPlan(fits=(spec,))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_plan_reads_back_as_it_was(place, plan, tmp_path, request):
    folder = UPath(tmp_path) if place == "local" else UPath(f"s3://{request.getfixturevalue('s3_bucket')}")
    plan.write(folder / "plan")
    read = ClassPlan.read(folder / "plan", "brick")
    assert read == plan
    assert (read.key, read.params) == (plan.key, plan.params)
    text = (folder / "plan" / "brick.json").read_bytes()
    read.write(folder / "plan")
    assert (folder / "plan" / "brick.json").read_bytes() == text


def test_the_plan_of_one_fit_is_named_by_it(plan, spec):
    assert (plan.class_name, plan.key, plan.images, plan.params) == ("brick", spec.key, 10, spec.params)
    assert plan.training_samples == list(spec.train)


def test_folds_are_fitted_one_by_one_and_every_good_image_trains(make_plan, tmp_path):
    plan = make_plan(tmp_path, folds=3)
    assert [fit.name for fit in plan.fits] == ["brick/fold-1", "brick/fold-2", "brick/fold-3"]
    good = {sample for fit in plan.fits for sample in (*fit.train, *fit.validation)}
    calibrating = []
    for fit in plan.fits:
        used = {*fit.train, *fit.validation}
        assert len(used) == len(fit.train) + len(fit.validation) < len(good)
        calibrating += good - used
    # Each good image is unseen by exactly one fit.
    assert sorted(calibrating) == sorted(good)
    assert len(good) == plan.images == 14
    assert len({fit.key for fit in plan.fits} | {plan.key}) == 4
    assert plan.params["calibration.folds"] == 3


def write_plan(folder, spec):
    """A dataset's folder with a manifest and the plan that was made of it."""
    write_bytes(folder / "manifest.parquet", b"the first")
    planned: FitSpec = spec.model_copy(update={"manifest": digest(folder / "manifest.parquet")})
    ClassPlan(fits=(planned,)).write(folder / "plan")


def test_the_plans_are_read_in_the_order_of_their_names(spec, tmp_path):
    folder = UPath(tmp_path)
    for name in ("grass", "brick.2", "brick"):
        write_plan(folder, spec.model_copy(update={"class_name": name}))
    assert [each.class_name for each in read_plans(folder)] == ["brick", "brick.2", "grass"]


def test_a_plan_of_another_manifest_is_refused(spec, tmp_path):
    folder = UPath(tmp_path)
    with pytest.raises(SprueError, match=r"there is no plan in .*plan; run the search stage first"):
        read_plans(folder)
    write_plan(folder, spec)
    assert [each.class_name for each in read_plans(folder)] == ["brick"]
    write_bytes(folder / "manifest.parquet", b"another")
    with pytest.raises(
        SprueError, match=r"the plan of class brick in .* is of another manifest; run the search stage again"
    ):
        read_plans(folder)
    (folder / "plan" / "brick.json").write_text("{}")
    with pytest.raises(SprueError, match=r"is no plan, or damaged: .*; run the search stage again"):
        read_plans(folder)
