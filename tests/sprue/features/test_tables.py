"""What is written to a table is read back to the bit, in any order.

Shapes: N images, C channels, H rows, W columns.
"""

import hashlib

import numpy as np
import pytest
from upath import UPath

from sprue.errors import SprueError
from sprue.features import tables
from sprue.features.tables import FeatureTable, write_part

SHAPES = [(4, 6, 5), (7, 3, 2)]


def names(start, count):
    return [hashlib.sha256(str(index).encode()).hexdigest() for index in range(start, start + count)]


def maps(count, seed=0):
    """Random bit patterns: subnormals, infinities and NaNs occur too."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2**16, (count, *shape), dtype=np.uint16).view(np.float16) for shape in SHAPES]


def bits(stored):
    return [map_NCHW.view(np.uint16) for map_NCHW in stored]


def assert_same_bits(one, other):
    for ours, theirs in zip(bits(one), bits(other), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    if request.param == "local":
        return UPath(tmp_path / "table")
    return UPath(f"s3://{request.getfixturevalue('s3_bucket')}/table")


@pytest.fixture
def small_groups(monkeypatch):
    """Row groups of four images."""
    monkeypatch.setattr(tables, "ROW_GROUP_BYTES", 4 * sum(2 * int(np.prod(shape)) for shape in SHAPES))


def test_several_parts_and_row_groups_come_back_to_the_bit_and_in_order(folder, small_groups):
    stored = maps(24)
    digests = names(0, 24)
    for start, stop in ((0, 1), (1, 14), (14, 24)):
        path = write_part(folder, digests[start:stop], [each[start:stop] for each in stored])
        assert len(tables._open_part(path).row_groups) == -(-(stop - start) // 4)
    table = FeatureTable(folder)
    assert len(table) == 24
    assert table.shapes == SHAPES
    assert_same_bits(table.read(digests), stored)
    order = [*np.random.default_rng(1).permutation(24)[:17].tolist(), 3, 3, 23, 0, 3]
    assert_same_bits(table.read([digests[index] for index in order]), [each[order] for each in stored])


def test_only_the_row_groups_of_the_chosen_images_are_read(tmp_path, small_groups, monkeypatch):
    digests = names(0, 16)
    write_part(UPath(tmp_path), digests, maps(16))
    table = FeatureTable(UPath(tmp_path))
    read = []
    original = tables.fastparquet.ParquetFile.to_pandas
    monkeypatch.setattr(
        tables.fastparquet.ParquetFile,
        "to_pandas",
        lambda self, **kwargs: read.append(len(self.row_groups)) or original(self, **kwargs),
    )
    assert_same_bits(table.read([digests[5], digests[6]]), [each[[5, 6]] for each in maps(16)])
    assert read == [1]


def test_a_table_says_which_images_it_holds(tmp_path):
    folder = UPath(tmp_path)
    write_part(folder, names(0, 3), maps(3))
    table = FeatureTable(folder)
    assert names(0, 1)[0] in table
    assert names(7, 1)[0] not in table
    empty = table.read([])
    assert [each.shape for each in empty] == [(0, *shape) for shape in SHAPES]


def test_the_same_images_make_the_same_file(tmp_path):
    first = write_part(UPath(tmp_path / "a"), names(0, 3), maps(3))
    second = write_part(UPath(tmp_path / "b"), names(0, 3), maps(3))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert [file.name for file in (tmp_path / "a").iterdir()] == [first.name]
    assert write_part(UPath(tmp_path / "a"), names(0, 2), maps(2)).name != first.name


def test_an_image_in_two_parts_counts_once(tmp_path):
    folder = UPath(tmp_path)
    write_part(folder, names(0, 3), maps(3))
    write_part(folder, names(2, 3), [each[2:5] for each in maps(5)])
    table = FeatureTable(folder)
    assert len(table) == 5
    assert table.read(names(0, 5))[0].shape[0] == 5


def test_no_folder_is_an_empty_table(folder):
    table = FeatureTable(folder)
    assert len(table) == 0
    with pytest.raises(SprueError, match="has no features of image"):
        table.read(names(0, 1))


def test_a_missing_image_is_named(tmp_path):
    write_part(UPath(tmp_path), names(0, 3), maps(3))
    missing = names(9, 1)[0]
    with pytest.raises(SprueError, match=f"has no features of image {missing[:16]}; run the features stage again"):
        FeatureTable(UPath(tmp_path)).read([*names(0, 2), missing])


@pytest.mark.parametrize("damage", ["garbage", "empty", "head", "tail", "footer"])
def test_a_corrupt_part_is_named_and_says_what_to_do(tmp_path, damage):
    path = write_part(UPath(tmp_path), names(0, 3), maps(3))
    data = path.read_bytes()
    changed = {
        "garbage": b"not parquet at all",
        "empty": b"",
        "head": data[: len(data) // 2],
        "tail": data[len(data) // 2 :],
        "footer": data[:-300] + bytes(200) + data[-100:],
    }
    path.write_bytes(changed[damage])
    with pytest.raises(
        SprueError, match=rf"{path.name} is not a feature table; delete it and run the features stage again"
    ):
        FeatureTable(UPath(tmp_path)).read(names(0, 3))


def test_samples_are_read_view_by_view(tmp_path):
    stored, digests = maps(6), names(0, 6)
    write_part(UPath(tmp_path), digests, stored)
    table = FeatureTable(UPath(tmp_path))
    # The second sample shares an image with the first, in another view.
    samples = [(digests[4], digests[1], digests[0]), (digests[1], digests[5], digests[3])]
    read = table.read_samples(samples, 3)
    assert len(read) == 3 * len(SHAPES)
    rows = np.array([[4, 1, 0], [1, 5, 3]])
    assert_same_bits(read, [map_NCHW[rows[:, view]] for view in range(3) for map_NCHW in stored])
    assert [map_NCHW.shape for map_NCHW in table.read_samples([], 2)] == [(0, *shape) for shape in 2 * SHAPES]
    with pytest.raises(SprueError, match="run the features stage again"):
        table.read_samples([(digests[0], "0" * 64)], 2)


def test_maps_that_are_not_chosen_have_no_rows(tmp_path):
    write_part(UPath(tmp_path), names(0, 3), maps(3))
    first, second = FeatureTable(UPath(tmp_path)).read(names(1, 2), [1])
    assert first.shape == (0, *SHAPES[0])
    assert_same_bits([second], [maps(3)[1][1:]])
