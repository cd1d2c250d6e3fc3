"""A finished fit is written with its plan, and read back complete or not at all."""

import json

import pytest
import torch
from upath import UPath

from sprue.errors import SprueError
from sprue.training.record import FitRecord


@pytest.fixture
def record(make_spec, tmp_path):
    spec = make_spec(tmp_path / "plant")
    flow = spec.build_flow()
    flow.fit_adaptor([[torch.randn(4, 3, 6, 6), torch.randn(4, 5, 3, 3)]])
    return FitRecord(
        spec=spec, best_epoch=7, history=[{"epoch": 1, "train_nll": 1.5}], commit="abc", cpus=2, state=flow.state_dict()
    )


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_record_reads_back_and_builds_the_fitted_flow(place, record, tmp_path, request):
    folder = UPath(tmp_path / "fit") if place == "local" else UPath(f"s3://{request.getfixturevalue('s3_bucket')}/fit")
    assert not FitRecord.is_current(folder, record.spec.key)
    record.write(folder)
    assert FitRecord.is_current(folder, record.spec.key)
    assert not FitRecord.is_current(folder, "other")
    read = FitRecord.read(folder)
    assert {**vars(read), "state": None} == {**vars(record), "state": None}
    state = read.build_flow().state_dict()
    assert state.keys() == record.state.keys()
    assert all(torch.equal(value, state[key]) for key, value in record.state.items())
    params = read.spec.params
    assert {name: params[name] for name in ("flow", "features", "train_images", "flow.adapted", "flow.channels")} == {
        "flow": "patchflow",
        "features": record.spec.features.fingerprint,
        "train_images": 10,
        "flow.adapted": 6,
        "flow.channels": [3, 5],
    }
    assert (params["flow.bottleneck"], params["fit.epochs"], params["fit.seed"]) == (8, 3, 0)


def test_the_facts_are_all_but_the_weights(record):
    assert record.facts["key"] == record.spec.key
    assert record.facts["spec"] == json.loads(record.spec.model_dump_json())
    assert json.loads(json.dumps(record.facts)) == record.facts


def test_no_fit_and_a_damaged_fit_say_what_to_do(record, tmp_path):
    folder = tmp_path / "fit"
    with pytest.raises(SprueError, match="run the fit stage first"):
        FitRecord.read(UPath(folder))
    record.write(UPath(folder))
    (folder / "flow.safetensors").write_bytes(b"short")
    with pytest.raises(SprueError, match=r"is not a finished fit.*delete it and run the fit stage again"):
        FitRecord.read(UPath(folder))
    (folder / "flow.safetensors").unlink()
    with pytest.raises(SprueError, match="is not a finished fit"):
        FitRecord.read(UPath(folder))
    record.write(UPath(folder))
    for damage in ({"commit": None}, {"spec": {"dataset": "plant"}}):
        facts = json.loads((folder / "fit.json").read_text()) | damage
        (folder / "fit.json").write_text(json.dumps({key: value for key, value in facts.items() if value}))
        with pytest.raises(SprueError, match="is not a finished fit"):
            FitRecord.read(UPath(folder))
        record.write(UPath(folder))
