"""The page that shows images that look foreign beside typical ones of their class."""

import base64
import io
from collections.abc import Mapping

from jinja2 import Environment
from PIL import Image
from upath import UPath

from sprue.features.screening import Screening
from sprue.inference.images import open_image
from sprue.store import write_bytes

THUMBNAIL = 180
"""Longest side of an image on the page, in pixels."""

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ dataset }}: images that look foreign</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
section { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; width: 13rem; overflow-wrap: anywhere; }
figure.suspicious img { outline: 3px solid #d0352b; }
img { max-width: 100%; min-width: 3rem; image-rendering: auto; background: #eee; }
figcaption { font-size: 13px; }
</style>
<h1>{{ dataset }}: images that look foreign</h1>
{% if not classes %}
<p>None of the good training images does, apart from those that <code>manifest.keep</code> lists.</p>
{% else %}
<p>One such image among those for calibration can raise the threshold until no defect is found. Add the path of each to
<code>datasets.{{ dataset }}.manifest.drop</code> or <code>datasets.{{ dataset }}.manifest.keep</code> in
<code>params.yaml</code>, and run again. Until then the class is not trained.</p>
{% endif %}
{% for name, suspicious, typical in classes %}
<h2>{{ name }}</h2>
<section>
{% for each, image in suspicious %}
<figure class="suspicious"><img src="{{ image }}" alt="{{ each.path }}"><figcaption><code>{{ each.path }}</code><br>
{{ "%.1f" | format(each.distance) }} times as far from the others as is typical
{% if each.product %}
<br>looks like class {{ each.product }}
{% endif %}
</figcaption></figure>
{% endfor %}
</section>
<h3>Typical images of {{ name }}</h3>
<section>
{% for path, image in typical %}
<figure><img src="{{ image }}" alt="{{ path }}"><figcaption><code>{{ path }}</code></figcaption></figure>
{% endfor %}
</section>
{% endfor %}
</html>
""")


def write_page(path: UPath, dataset: str, root: UPath, screenings: Mapping[str, Screening]) -> None:
    """Writes a page that needs no other file; `root` is the dataset's folder."""
    classes = [
        (
            name,
            [(each, _data_url(root, each.path)) for each in screening.suspicious],
            [(typical, _data_url(root, typical)) for typical in screening.typical],
        )
        for name, screening in sorted(screenings.items())
        if screening.suspicious
    ]
    write_bytes(path, _PAGE.render(dataset=dataset, classes=classes).encode())


def _data_url(root: UPath, path: str) -> str:
    image = open_image((root / path).read_bytes(), path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
