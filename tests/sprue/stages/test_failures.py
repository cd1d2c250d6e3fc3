"""What a stage records of the classes that it could not do, and what later stages and commands make of it."""

import pytest
from upath import UPath

from sprue.errors import SprueError
from sprue.stages.failures import (
    Failure,
    all_failures,
    close_stage,
    failed_before,
    forget_failures,
    is_complete,
    read_failures,
    report,
    write_failures,
)


@pytest.fixture
def folder(tmp_path):
    """A dataset's part of the store after a run in which three classes failed."""
    folder = UPath(tmp_path / "parts")
    close_stage(folder, "manifest", {"toy": "too few"}, ["bottle", "pcb"])
    close_stage(folder, "features", {}, ["bottle", "pcb"])
    close_stage(folder, "fit", {"pcb": "the loss is not finite\nsee the log"}, ["bottle"])
    write_failures(folder, "evaluate", {"pcb": "of another plan"})
    write_failures(folder, "register", {"cup": "no metrics"})
    return folder


def test_later_stages_skip_what_failed_before(folder):
    assert failed_before(folder, "manifest") == set()
    assert failed_before(folder, "fit") == {"toy"}
    assert failed_before(folder, "evaluate") == {"toy", "pcb"}
    assert read_failures(folder, "search") == {}


def test_the_first_failure_of_a_class_counts(folder):
    assert all_failures(folder) == [
        Failure("cup", "register", "no metrics"),
        Failure("pcb", "fit", "the loss is not finite\nsee the log"),
        Failure("toy", "manifest", "too few"),
    ]
    assert [each.class_name for each in all_failures(folder, "search")] == ["toy"]


def test_the_report_is_a_table_and_says_what_to_type(folder):
    first, *table, last = report(folder, all_failures(folder)).splitlines()
    assert first == "3 classes of parts failed, the others are done"
    assert table == [
        "class  stage     reason",
        "cup    register  no metrics",
        "pcb    fit       the loss is not finite; see the log",
        "toy    manifest  too few",
    ]
    assert last.endswith(f"first type: rm {folder}/failures/fit.json")
    assert "rm" not in report(folder, all_failures(folder, "manifest")).splitlines()[-1].split()


def test_what_is_forgotten_is_tried_again(folder):
    assert is_complete(folder)
    forget_failures(folder)
    assert not is_complete(folder)
    # A stage without failures is not run again, and the manifest would refuse the same images.
    assert sorted(path.name for path in (folder / "failures").iterdir()) == ["features.json", "manifest.json"]
    forget_failures(folder)


def test_a_stage_that_leaves_no_class_fails(folder):
    with pytest.raises(SprueError, match=r"(?s)no class is left\nclass .*bottle +fit +lost.*toy +manifest +too few"):
        close_stage(folder, "fit", {"bottle": "lost"}, [])
    assert read_failures(folder, "fit") == {"bottle": "lost"}
