"""Parts are named by what they cover, and appear whole."""

import pandas as pd

from sprue.scoring.parts import LARGEST_PART, PART_SAMPLES, PartSummary, divide, read_names, summaries, write_part
from sprue.scoring.samples import Sample
from sprue.store import location


def samples(count, state="1"):
    return [Sample(f"{number:06}.png", (f"{number:06}.png",), (state,)) for number in range(count)]


def test_a_change_concerns_one_part():
    before = divide(samples(20_000), "detector")
    assert [sample for part in before for sample in part.samples] == samples(20_000)
    sizes = [len(part.samples) for part in before]
    assert max(sizes) <= LARGEST_PART and PART_SAMPLES / 1.5 < sum(sizes) / len(sizes) < 1.5 * PART_SAMPLES

    def kept(changed):
        return len({part.name for part in before} & {part.name for part in divide(changed, "detector")})

    without = samples(20_000)
    del without[7_000]
    assert kept(without) >= len(before) - 2
    changed = samples(20_000)
    changed[7_000] = samples(7_001, state="2")[-1]
    assert kept(changed) == len(before) - 1
    more = [Sample("007000a.png", ("007000a.png",), ("1",)), *samples(20_000)]
    assert kept(sorted(more, key=lambda sample: sample.name)) >= len(before) - 2
    assert not {part.name for part in before} & {part.name for part in divide(samples(20_000), "another")}


def test_which_parts_are_made_again(tmp_path):
    folder = location(str(tmp_path / "scores"))
    table = pd.DataFrame({"sample": ["a.png", "ü.png"], "error": ["", "is damaged"]})
    whole = PartSummary(2, 1, {"ü.png": "is damaged"})
    written = {
        "part-1.parquet": whole,
        "part-2.parquet": PartSummary(2, 1, heatmaps=True),
        "part-3.parquet": PartSummary(2, 1, final=False),
    }
    paths = [folder / name for name in (*written, "part-4.parquet", "part-5.parquet")]
    assert summaries(paths, heatmaps=False) == {}
    for name, summary in written.items():
        write_part(folder / name, table, summary)
    (folder / "part-4.parquet").write_bytes((folder / "part-1.parquet").read_bytes()[:-20])
    assert summaries(paths, heatmaps=False) == {name: written[name] for name in ("part-1.parquet", "part-2.parquet")}
    assert summaries(paths, heatmaps=True) == {"part-2.parquet": written["part-2.parquet"]}
    assert read_names(folder / "part-1.parquet") == ["a.png", "ü.png"]
    assert read_names(folder / "part-4.parquet") == []
