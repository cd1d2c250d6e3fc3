"""The public classes reproduce the authors' networks, and the check can fail."""

import json
from pathlib import Path

import numpy as np
import pytest

from defectflow.golden import TOLERANCE, compare, main


@pytest.fixture(autouse=True)
def device():
    """The files are compared on the CPU."""


FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_authors_networks_are_reproduced(path):
    found = compare(path)
    assert found.outputs <= TOLERANCE
    assert found.log_dets <= TOLERANCE
    assert found.round_trip <= TOLERANCE


def test_all_published_networks_are_here():
    assert {path.stem.split("_")[0] for path in FILES} == {"csflow", "dnfad", "multiflow"}


@pytest.mark.parametrize("array", ["z1", "logdet", "block1.s2.down_conv12.weight", "block0.perm2"])
def test_a_changed_array_is_found(tmp_path, capsys, array):
    with np.load(FILES[0]) as file:
        arrays = {name: file[name] for name in file.files}
    arrays[array] = arrays[array][::-1].copy() if array.endswith("perm2") else arrays[array] + 1e-6
    np.savez(tmp_path / "changed.npz", **arrays)
    assert main([str(tmp_path / "changed.npz")]) == 1
    assert "differs" in capsys.readouterr().out


def test_what_is_not_a_network_is_refused_by_name(tmp_path, capsys):
    np.savez(tmp_path / "odd.npz", meta=json.dumps({"model": "nice"}))
    np.savez(
        tmp_path / "empty.npz",
        meta=json.dumps(
            {
                "model": "csflow",
                "sizes": [[8, 8]],
                "channels": 4,
                "blocks": 1,
                "hidden": 4,
                "clamp": 3,
                "kernel_sizes": [3],
            }
        ),
    )
    assert main([str(tmp_path / name) for name in ("odd.npz", "empty.npz", "none.npz")]) == 1
    errors = capsys.readouterr().err
    assert "there is no network 'nice'" in errors
    assert "empty.npz does not hold the arrays of a csflow network" in errors
    assert "none.npz" in errors
    assert main([]) == 2
