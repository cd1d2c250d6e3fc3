"""The documentation site is built without a warning, is complete, and needs no network to be read."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sprue.cli import main
from sprue.config import FLOW_SETTINGS, DatasetSettings, Settings

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""What a browser loads when it opens a page."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """Collects what a page loads."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name == LOADED.get(tag) and value]


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text())
        assert loads.found
        assert not [each for each in loads.found if re.match(r"(\w+:)?//", each)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style


def test_formulas_need_no_script(site):
    assert "<math" in (site / "reference/metrics.html").read_text()
    for page in site.rglob("*.html"):
        assert 'class="arithmatex"' not in page.read_text(), page


def test_every_command_is_described(site):
    text = (site / "reference/cli.html").read_text()
    for name in main.commands:
        assert f'id="sprue-{name}"' in text


def test_every_setting_is_described(site):
    text = (site / "reference/configuration.html").read_text()
    sections = {name: field.annotation for name, field in DatasetSettings.model_fields.items() if name != "flow"}
    settings = [("flow", model) for model in FLOW_SETTINGS.values()]
    settings += [
        (name, kind) for name, kind in sections.items() if isinstance(kind, type) and issubclass(kind, Settings)
    ]
    assert len(settings) > 8
    for section, model in settings:
        for name in model.model_fields:
            assert f"<code>{section}.{name}</code>" in text


def test_every_route_is_described(site):
    from sprue.serving.app import app

    text = (site / "reference/http.html").read_text()
    for path in app.openapi()["paths"]:
        assert path in text
