"""The report says what was measured, shows what went wrong, and needs no other file."""

import re
from html.parser import HTMLParser

import pytest

from sprue.evaluation.report import MEANINGS, class_report, overview


class Page(HTMLParser):
    """The words of a page, where its pictures are from, and what it leads to."""

    def __init__(self, html):
        super().__init__()
        self.words, self.sources, self.links, self.open = "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag in ("img", "script", "link", "iframe"):
            self.sources.append(named.get("src") or named.get("href"))
        if tag == "a":
            self.links.append(named["href"])

    def handle_data(self, data):
        self.words += " " + " ".join(data.split())


def report_of(bench, query="label < 2"):
    evaluation = bench.evaluate(bench.test.query(query))
    return evaluation, class_report(evaluation, bench.detector, {"dataset": "<b>tiles</b>"}, bench.root)


@pytest.mark.parametrize("name", ["bench", "bench_of_views"])
def test_a_page_holds_the_figures_and_the_pictures_themselves(name, request):
    bench = request.getfixturevalue(name)
    evaluation, report = report_of(bench)
    page = Page(report.page)
    assert set(evaluation.figures) <= set(MEANINGS)
    for name, figure in evaluation.figures.items():
        interval = f" {100 * figure.low:.1f} to {100 * figure.high:.1f}" if figure.low < figure.high else ""
        assert f" {100 * figure.value:.1f} %{interval} {MEANINGS[name]} " in " ".join(page.words.split()) + " "
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "dent" in page.words
    assert "<b>tiles</b>" in page.words  # as text: a name is no markup
    assert not re.search(r"\bnan\b", page.words)
    labels = evaluation.samples["label"].to_numpy()
    called = evaluation.predictions.is_anomalous_B
    wrong = [int((called & (labels == 0)).sum()), int((~called & (labels == 1)).sum())]
    charts = 4
    assert len(page.sources) == charts + sum(min(4, each) for each in wrong)
    assert page.words.count("There are none.") == wrong.count(0)


@pytest.mark.parametrize("query", ["label == 0", "label == 1", "mask_path == ''", "label == 7"])
def test_what_was_not_measured_is_left_out(bench, query):
    _, report = report_of(bench, query)
    page = Page(report.page)
    assert not re.search(r"\bnan\b", page.words)
    assert ("from the easiest to the hardest" in page.words) == (query != "label == 7" and query != "label == 0")


def test_the_overview_leads_to_every_class(bench, bench_of_views):
    _, tile = report_of(bench)
    _, box = report_of(bench_of_views, "label == 0")
    page = Page(overview("plant", [tile, box], alpha=0.05))
    assert page.links == ["tile/report.html", "box/report.html"]
    assert "on average over calibrations, at most 5 % of good parts" in page.words
    assert not re.search(r"\bnan\b", page.words)
