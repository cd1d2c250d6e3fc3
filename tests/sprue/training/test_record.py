"""A finished fit is found again by everything its weights depend on."""

import json
from dataclasses import replace

import pytest
import torch
from upath import UPath

from defectflow import build_flow
from sprue.errors import SprueError
from sprue.training.loop import FitSettings
from sprue.training.record import FitRecord, fit_key
from sprue.training.worker import FitRequest

REQUEST = FitRequest(
    class_name="brick",
    fingerprint="f" * 16,
    table="/here/features",
    blocks=2,
    train=(("a",), ("b",)),
    validation=(("c",),),
    flow_name="patchflow",
    flow_config={"adapted": 4, "bottleneck": 8},
    settings=FitSettings(),
)


def record():
    flow = build_flow("patchflow", channels=(3, 2), adapted=4, bottleneck=8)
    flow.fit_adaptor([[torch.randn(4, 3, 4, 4), torch.randn(4, 2, 2, 2)]])
    return FitRecord(
        class_name="brick",
        key=fit_key(REQUEST),
        fingerprint=REQUEST.fingerprint,
        flow_name="patchflow",
        flow_config={"adapted": 4, "bottleneck": 8, "channels": [3, 2]},
        settings={"epochs": 10, "seed": 0},
        pictures=2,
        best_epoch=7,
        history=[{"epoch": 1, "train_nll": 1.5}],
        commit="abc",
        cpus=2,
        state=flow.state_dict(),
    )


def test_the_key_changes_with_all_that_the_weights_depend_on_and_not_with_the_place():
    changes = {
        "class_name": "grass",
        "fingerprint": "e" * 16,
        "train": (("a",), ("b",), ("d",)),
        "validation": (("d",),),
        "flow_name": "other",
        "flow_config": {"adapted": 5, "bottleneck": 8},
        "settings": FitSettings(seed=1),
    }
    keys = {fit_key(replace(REQUEST, **{name: value})) for name, value in changes.items()}
    assert len(keys | {fit_key(REQUEST)}) == len(changes) + 1
    assert fit_key(replace(REQUEST, table="s3://elsewhere/features")) == fit_key(REQUEST)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_record_reads_back_and_builds_the_fitted_flow(place, tmp_path, request):
    folder = UPath(tmp_path / "fit") if place == "local" else UPath(f"s3://{request.getfixturevalue('s3_bucket')}/fit")
    written = record()
    assert not FitRecord.is_current(folder, written.key)
    written.write(folder)
    assert FitRecord.is_current(folder, written.key)
    assert not FitRecord.is_current(folder, "other")
    read = FitRecord.read(folder)
    assert {**vars(read), "state": None} == {**vars(written), "state": None}
    state = read.build_flow().state_dict()
    assert state.keys() == written.state.keys()
    assert all(torch.equal(value, state[key]) for key, value in written.state.items())
    assert read.params() == {
        "flow": "patchflow",
        "features": "f" * 16,
        "train_pictures": 2,
        "flow.adapted": 4,
        "flow.bottleneck": 8,
        "flow.channels": [3, 2],
        "fit.epochs": 10,
        "fit.seed": 0,
    }


def test_no_fit_and_a_damaged_fit_say_what_to_do(tmp_path):
    folder = UPath(tmp_path)
    with pytest.raises(SprueError, match="run the fit stage first"):
        FitRecord.read(folder)
    record().write(folder)
    (tmp_path / "flow.safetensors").write_bytes(b"short")
    with pytest.raises(SprueError, match=r"is not a finished fit.*delete it and run the fit stage again"):
        FitRecord.read(folder)
    (tmp_path / "flow.safetensors").unlink()
    with pytest.raises(SprueError, match="is not a finished fit"):
        FitRecord.read(folder)
    record().write(folder)
    facts = json.loads((tmp_path / "fit.json").read_text())
    del facts["commit"]
    (tmp_path / "fit.json").write_text(json.dumps(facts))
    with pytest.raises(SprueError, match="is not a finished fit"):
        FitRecord.read(folder)
