"""The inspection page in headless Chromium, on the real service."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from sprue.cli import main
from sprue.data.labelled import read_labelled
from sprue.inference.calibration import Calibration
from sprue.release.reviews import ReviewStore, read_review
from sprue.serving import inspection
from sprue.serving.keys import add_key

expect.set_options(timeout=30_000)  # 5 s are too few on a busy machine

AXE = Path(__file__).parent / "axe" / "axe.min.js"
SOURCES = inspection.PAGE


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, with a camera that shows a pattern."""
    chromium = shutil.which("chromium")
    assert chromium, "install Debian's package chromium"
    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(plant: Any) -> dict[str, Path]:
    """Images of bricks: a good one, one with a defect, and the same as a JPEG that a camera held upright."""
    images = {"good": plant.image("brick", 1), "defective": plant.defective("brick", 1)}
    paths = {name: plant.folder / f"{name}.png" for name in images}
    for name, image in images.items():
        image.save(paths[name])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    paths["turned"] = plant.folder / "turned.jpg"
    images["defective"].save(paths["turned"], exif=exif)
    return paths


@pytest.fixture
def open_page(plant: Any, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page with a key; fails on a script's error, and on a request to anywhere else."""
    own, contexts, problems = str(plant.client.base_url), [], []
    key = plant.client.headers["authorization"].removeprefix("Bearer ")

    def note(request: Any) -> None:
        if not request.url.startswith((f"{own}/", f"blob:{own}/")):
            problems.append(f"a request to {request.url}")

    def open_(key: str | None = key, **context: Any) -> Page:
        contexts.append(
            browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1280, "height": 900}} | context)
        )
        page = contexts[-1].new_page()
        page.on("request", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if "Content Security" in said.text else None)
        if key:
            page.add_init_script(f"sessionStorage.setItem('sprue.key', {json.dumps(key)})")
        page.goto(own)
        if key:
            expect(page.locator("#class option")).not_to_have_count(0)
        return page

    yield open_
    for each in contexts:
        each.close()
    assert problems == []


def choose(page: Page, *paths: Path, name: str = "textures.brick") -> None:
    page.select_option("#class", name)
    page.set_input_files("#files", list(paths))


def violations(page: Page) -> list[str]:
    """What axe-core finds that is serious or critical."""
    page.evaluate(AXE.read_text())
    result = page.evaluate("axe.run()")
    assert len(result["passes"]) > 10
    return [
        f"{found['id']}: {node['html']}"
        for found in result["violations"]
        if found["impact"] in ("serious", "critical")
        for node in found["nodes"]
    ]


def test_a_key_is_asked_for_and_stays_in_the_tab(plant: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(key=None)
    dialog = page.get_by_role("dialog", name="Key of the service")
    expect(dialog).to_be_visible()
    assert violations(page) == []
    dialog.get_by_label("Key").fill("sprue_wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-problem")).to_have_text("The service does not know this key.")
    dialog.get_by_label("Key").fill(add_key(plant.keys, "inspector", ["score"]))
    dialog.get_by_role("button", name="Use").click()
    expect(page.locator("#class option")).to_have_text(["textures.brick", "textures.gräs 2"])
    assert "sprue_" not in page.evaluate("JSON.stringify(localStorage) + location.href + document.cookie")
    page.get_by_role("tab", name="Review").click()
    expect(page.get_by_role("alert").first).to_have_text("This key may not do that; it needs the scope “review”.")
    page.get_by_role("tab", name="Inspect").click()
    expect(page.get_by_role("alert").first).to_be_empty()


def test_a_decision_in_words_numbers_and_a_map(
    plant: Any, files: dict[str, Path], open_page: Callable[..., Page]
) -> None:
    page, detector = open_page(), plant.detectors["brick"]
    for name, words in (("good", "Good part"), ("defective", "Defect suspected")):
        choose(page, files[name])
        expected = detector.predict([Image.open(files[name])], plant.engine)
        expect(page.locator("#inspect-facts .decision")).to_contain_text(words)
        expect(page.locator("#announcement")).to_contain_text(f"{name}.png: {words}. p-value")
        assert bool(expected.is_anomalous_B[0]) == (name == "defective")
        shown = page.locator("#inspect-facts dd").first.inner_text()
        assert float(shown) == pytest.approx(expected.p_value_B[0], rel=1e-3)
    outlined = page.evaluate(
        """() => {
            const canvas = document.querySelectorAll("#inspect-viewer canvas")[2];
            const [x, y] = [canvas.width / 200, canvas.height / 160];
            const count = (...box) => canvas.getContext("2d").getImageData(...box).data.filter((each) => each).length;
            return [count(130 * x, 10 * y, 60 * x, 60 * y), count(0, 0, 100 * x, 160 * y)];
        }"""
    )
    assert outlined[0] > 5 * outlined[1]
    heat, outline = (page.locator("#inspect-viewer canvas").nth(index) for index in (1, 2))
    page.locator("#inspect").get_by_label("Outline").uncheck()
    expect(outline).to_be_hidden()
    page.locator("#inspect").get_by_label("Heat map").fill("40")
    expect(heat).to_have_css("opacity", "0.4")


def test_the_map_is_the_services(plant: Any, files: dict[str, Path], open_page: Callable[..., Page]) -> None:
    image, detector = Image.open(files["defective"]), plant.detectors["brick"]
    answer = plant.post("brick", image, params={"maps": "true"}).json()
    found = open_page().evaluate(
        "async (map) => { const maps = await import('/page/maps.js');"
        " return [...maps.upsample(maps.decode(map), 200, 160)]; }",
        answer["maps"][0],
    )
    expected_HW = detector.predict([image], plant.engine).anomaly_map(0, (160, 200))
    np.testing.assert_allclose(np.reshape(found, (160, 200)), expected_HW, rtol=2e-3, atol=1e-3)


def test_a_camera_s_rotation_is_ignored_as_by_the_service(
    files: dict[str, Path], open_page: Callable[..., Page]
) -> None:
    page = open_page()
    choose(page, files["turned"])
    expect(page.locator("#inspect-facts .decision")).to_be_visible()
    assert page.locator("#inspect-viewer canvas").first.evaluate("(each) => [each.width, each.height]") == [200, 160]


@pytest.mark.parametrize("guarantee", ["marginal", "conditional"])
def test_another_alpha_decides_as_the_service_would(open_page: Callable[..., Page], guarantee: Any) -> None:
    scores = np.sort(np.random.default_rng(0).normal(size=150)).tolist()
    alphas, score = [0.001, 0.004, 1 / 151, 0.01, 0.05, 8 / 151, 0.06, 0.11, 0.2, 0.5], scores[-8]
    found = open_page().evaluate(
        "async ([calibration, score, alphas]) => { const { decide } = await import('/page/calibration.js');"
        " return alphas.map((alpha) => { const { threshold, isAnomalous } = decide(calibration, score, alpha);"
        " return [Number.isFinite(threshold) ? threshold : null, isAnomalous]; }); }",
        [{"scores": scores, "guarantee": guarantee, "confidence": 0.95}, score, alphas],
    )
    base = Calibration(tuple(scores), 0.05, 0.0, 1.0, 1.0, guarantee=guarantee)
    for alpha, (threshold, is_anomalous) in zip(alphas, found, strict=True):
        expected = replace(base, alpha=alpha)
        assert (threshold if threshold is not None else np.inf) == expected.threshold, alpha
        assert is_anomalous == bool(expected.is_anomalous(np.array([score]))[0]), alpha


def test_the_slider_says_what_another_alpha_would_do(files: dict[str, Path], open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, files["defective"])
    slider, result = page.locator(".what-if input"), page.locator(".what-if output")
    expect(result).to_contain_text("This is the alpha that decides.")
    slider.fill("0")
    expect(result).to_have_text(re.compile("^20 calibration parts are too few for this alpha"))
    expect(page.locator("#inspect-facts .decision")).to_contain_text("Defect suspected")


def test_image_and_map_zoom_together(files: dict[str, Path], open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, files["good"])
    stage = page.locator("#inspect-viewer .stage")
    boxes = lambda: [page.locator("#inspect-viewer canvas").nth(index).bounding_box() for index in (0, 1)]  # noqa: E731
    expect(stage).to_be_visible()
    before = boxes()
    stage.hover()
    page.mouse.wheel(0, -200)
    stage.focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    after = boxes()
    assert after[0] == after[1] and after[0]["width"] == pytest.approx(1.25**2 * before[0]["width"], rel=0.01)
    page.keyboard.press("0")
    assert boxes() == before


def test_errors_name_the_file_and_the_other_files_are_inspected(
    plant: Any, files: dict[str, Path], open_page: Callable[..., Page]
) -> None:
    page = open_page()
    (plant.folder / "notes.png").write_text("no image")
    choose(page, plant.folder / "notes.png", files["good"], files["defective"])
    expect(page.locator("#problem")).to_have_text(
        "notes.png is not an image that the service reads (PNG, JPEG, BMP, TIFF, WebP)."
    )
    expect(page.locator("#samples li")).to_have_count(2)
    page.locator("#samples button").last.click()
    expect(page.locator("#inspect-facts h2")).to_have_text("good.png")
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator("#result")).to_be_hidden()


@pytest.mark.usefixtures("boxes")
def test_a_class_that_is_left_shows_nothing_of_itself(
    plant: Any, files: dict[str, Path], open_page: Callable[..., Page]
) -> None:
    """Nor does the page stay busy, whatever comes late."""
    plant.decision(plant.post("brick", Image.open(files["defective"])))
    page, late = open_page(), []
    page.route(re.compile(r"textures\.brick/(score|decisions)"), lambda route: late.append(route))
    choose(page, files["good"])
    expect(page.locator("body")).to_have_attribute("aria-busy", "true")
    page.get_by_role("tab", name="Last decisions").click()
    page.select_option("#class", "parcels.box")
    expect(page.locator("#last-empty")).to_be_visible()
    assert len(late) == 2
    for each in late:
        with page.expect_response(each.request.url):
            each.continue_()
    expect(page.locator("body")).not_to_have_attribute("aria-busy", "true")
    page.evaluate("new Promise((done) => setTimeout(done, 200))")
    expect(page.locator("#last-list li")).to_have_count(0)
    expect(page.locator("#samples li")).to_have_count(0)


def test_images_are_pasted_dropped_and_taken(files: dict[str, Path], open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.select_option("#class", "textures.brick")
    send = """([kind, data]) => {
        const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], `${kind}.png`, { type: "image/png" }));
        document.dispatchEvent(kind === "paste" ? new ClipboardEvent("paste", { clipboardData: transfer })
            : new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
    }"""
    for kind in ("paste", "drop"):
        page.evaluate(send, [kind, base64.b64encode(files["good"].read_bytes()).decode()])
        expect(page.locator("#inspect-facts h2")).to_have_text(f"{kind}.png")
    page.get_by_role("button", name="Take with the camera").click()
    page.get_by_role("button", name="Take image").click()
    expect(page.locator("#inspect-facts h2")).to_have_text(re.compile(r"^Camera .*\.png$"))
    page.get_by_role("button", name="Close camera").click()
    expect(page.locator("#camera-view")).to_be_hidden()


def test_several_views(plant: Any, boxes: Any, open_page: Callable[..., Page]) -> None:
    detector, samples = boxes
    samples[0][1].paste((255, 255, 255), (20, 20, 90, 90))
    paths = [plant.folder / f"part {view}.png" for view in detector.views]
    for path, image in zip(paths, samples[0], strict=True):
        image.save(path)
    page = open_page()
    choose(page, paths[0], name="parcels.box")
    expect(page.locator("#problem")).to_contain_text("has 3 images (0-top, 1-left, 2-right); 1 were given")
    choose(page, *reversed(paths), name="parcels.box")
    expected = detector.predict([samples[0]], plant.engine)
    expect(page.get_by_role("group", name="Views").get_by_role("button", pressed=True)).to_have_text("1-left")
    score = float(page.locator("#inspect-facts dd").nth(1).inner_text())
    assert score == pytest.approx(float(expected.score_B[0]), rel=1e-3)


def test_verdicts_are_stored_and_exported(
    plant: Any, files: dict[str, Path], open_page: Callable[..., Page], tmp_path: Path
) -> None:
    answer = plant.post("gräs 2", Image.open(files["defective"]), headers={"X-Station": "line-7"})
    assert answer.json()["is_anomalous"]
    decision = plant.decision(answer)
    reviews, page = ReviewStore(plant.decisions.folder), open_page()
    page.select_option("#class", "textures.gräs 2")
    page.get_by_role("tab", name="Last decisions").click()
    card = page.locator("#last-list li").filter(has_text="line-7")
    expect(card).to_contain_text("Defect suspected")
    expect(card.locator("canvas")).to_be_visible()
    page.get_by_role("tab", name="Review").click()
    expect(page.locator("#queue-count")).to_have_text("1 to review")
    expect(page.locator("#review-facts dl")).to_contain_text("line-7")
    page.keyboard.press("b")
    box = page.locator("#review-viewer canvas").first.bounding_box()
    at = [(box["x"] + x / 200 * box["width"], box["y"] + y / 160 * box["height"]) for x, y in ((140, 40), (180, 40))]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=5)
    page.mouse.up()
    page.keyboard.down(" ")  # the same by keys: three times by the brush's radius, 5 pixels
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.up(" ")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("group", name="Arrow keys move the brush")).to_be_focused()
    page.keyboard.press("g")
    expect(page.locator("#problem")).to_have_text(re.compile("^A good part has no defect"))
    page.keyboard.press("d")
    expect(page.locator("#reviewed")).to_contain_text("Saved: Defective, everything")
    expect(page.locator("#queue-count")).to_have_text(re.compile("^Nothing to review"))
    review = read_review(reviews.reviewed(decision.at.date())[decision.key])
    assert (review.verdict, review.reviewer, review.decision) == ("defective", "everything", decision)
    mask_HW = np.asarray(Image.open(io.BytesIO(reviews.read_file(review.masks[0]))).convert("L"))
    assert mask_HW.shape == (160, 200) and mask_HW[40, 160] == 255 and mask_HW[100:].max() == 0
    assert mask_HW[57, 180] == 255 and mask_HW[62, 180] == 0
    assert 0.01 < (mask_HW > 0).mean() < 0.05

    queue = plant.client.get("/v1/classes/gräs 2/decisions", params={"queue": True}).json()["decisions"]
    assert queue == []
    (listed,) = plant.client.get("/v1/classes/gräs 2/decisions").json()["decisions"]
    assert listed["review"]["verdict"] == "defective" and listed["request_id"] == decision.request_id
    done = CliRunner().invoke(
        main, ["--store", str(plant.folder / "store"), "reviews", "export", "gräs 2", str(tmp_path / "set"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["samples"] == {"good": 0, "defective": 1}
    (tmp_path / "set" / "good").mkdir()
    shutil.copy(files["good"], tmp_path / "set" / "good")
    assert [each.label for each in read_labelled(tmp_path / "set", ("",))] == [1, 0]


def test_reviews_that_can_not_be_kept_are_refused(plant: Any, files: dict[str, Path]) -> None:
    decision = plant.decision(plant.post("brick", Image.open(files["defective"])))
    line = {"Authorization": f"Bearer {add_key(plant.keys, 'line-8', ['score'])}"}
    url = "/v1/classes/brick/reviews"
    review = {"key": decision.key, "at": decision.at.isoformat(), "verdict": "good"}
    digest = decision.images[0]
    for path in ("/v1/classes/brick/decisions", f"/v1/images/{digest}?at={decision.at:%Y-%m-%dT%H:%M:%SZ}"):
        assert plant.client.get(path, headers=line).status_code == 403
    image = plant.client.get(f"/v1/images/{digest}", params={"at": review["at"]})
    assert image.content and image.headers["content-type"] == "application/octet-stream"
    assert (
        plant.client.get(f"/v1/images/{'0' * 64}", params={"at": review["at"]}).json()["error"]["code"] == "image_gone"
    )
    assert plant.client.post(url, json=review, headers=line).status_code == 403
    assert plant.post("brick", Image.open(files["good"]), params={"record": "false"}, headers=line).status_code == 403
    text = {"content": json.dumps(review), "headers": {"Content-Type": "text/plain"}}
    whole = io.BytesIO()
    Image.new("L", Image.open(files["defective"]).size, 255).save(whole, "PNG")
    mask, other, cut = (
        base64.b64encode(each).decode()
        for each in (whole.getvalue(), plant.image("brick").resize((20, 20)).tobytes(), whole.getvalue()[:60])
    )
    never = "0001-01-01T00:00:00+14:00"
    answer = plant.client.get(f"/v1/images/{digest}", params={"at": never})
    assert answer.json()["error"]["code"] == "image_gone"
    for arguments, status, code in (
        (text, 415, "not_json"),
        ({"json": review | {"verdict": "perhaps"}}, 422, "invalid_request"),
        ({"json": review | {"key": "0" * 32}}, 422, "not_reviewable"),
        ({"json": review | {"at": never}}, 422, "not_reviewable"),
        ({"json": review | {"masks": [mask]}}, 422, "not_reviewable"),
        ({"json": review | {"masks": [other], "verdict": "defective"}}, 422, "not_reviewable"),
        ({"json": review | {"masks": [cut], "verdict": "defective"}}, 422, "not_reviewable"),
        ({"json": review | {"masks": ["A" * 6 * 2**20]}}, 413, "too_many_bytes"),
    ):
        answer = plant.client.post(url, **arguments)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert not any(each.decision == decision for each in ReviewStore(plant.decisions.folder).latest("textures.brick"))


def test_looking_again_records_nothing(plant: Any, files: dict[str, Path]) -> None:
    image = Image.open(files["defective"])
    quiet = plant.post("brick", image, params={"record": "false"})
    recorded = plant.decision(plant.post("brick", image))
    rows = plant.client.get("/v1/classes/brick/decisions").json()["decisions"]
    identifiers = [row["request_id"] for row in rows]
    assert recorded.request_id in identifiers and quiet.headers["x-request-id"] not in identifiers


@pytest.mark.parametrize(
    "look", [{}, {"color_scheme": "dark", "locale": "de-DE", "viewport": {"width": 820, "height": 1180}}]
)
def test_axe_finds_nothing_serious(
    plant: Any, files: dict[str, Path], open_page: Callable[..., Page], look: dict[str, Any]
) -> None:
    plant.decision(plant.post("brick", Image.open(files["defective"])))
    page = open_page(**look)
    choose(page, files["good"], files["defective"])
    expect(page.locator("#samples li")).to_have_count(2)
    assert violations(page) == []
    for tab, shown in (("last", "#last-list canvas"), ("review", "#review-facts dl")):
        page.locator(f"#tab-{tab}").click()
        expect(page.locator(shown).first).to_be_visible()
        assert violations(page) == []


def test_tabs_language_and_colours_by_keyboard(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Inspect")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Last decisions")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Last decisions")).to_be_visible()
    page.get_by_label("Language").select_option("de")
    expect(page.get_by_role("tab", name="Letzte Entscheidungen")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "de" and page.title() == "Letzte Entscheidungen – sprue"
    page.get_by_label("Farben").select_option("dark")
    expect(page.locator("body")).to_have_css("background-color", "rgb(20, 25, 31)")
    page.reload()
    expect(page.get_by_label("Farben")).to_have_value("dark")
    expect(page.get_by_role("tabpanel", name="Letzte Entscheidungen")).to_be_visible()


def test_the_languages_have_the_same_texts_and_no_others_are_used() -> None:
    english, german = (json.loads((SOURCES / f"texts.{name}.json").read_text()) for name in ("en", "de"))
    values = lambda texts: {key: set(re.findall(r"{\w+}", text)) for key, text in texts.items()}  # noqa: E731
    assert values(english) == values(german)
    sources = "".join(path.read_text() for path in SOURCES.iterdir() if path.suffix in (".js", ".html"))
    used = set(
        re.findall(r'data-(?:text|label)="([\w.]+)"|"data-(?:text|label)": "([\w.]+)"|\bt\(\s*"([\w.]+)"', sources)
    )
    missing = {key for keys in used for key in keys if key} - set(english)
    assert not missing


def test_the_page_may_load_nothing_from_elsewhere(plant: Any) -> None:
    answer = plant.client.get("/", headers={"Authorization": ""})
    policy = dict(each.strip().split(" ", 1) for each in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    sources = {path: path.read_text() for path in SOURCES.iterdir()}
    assert not [path.name for path, text in sources.items() if re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)]
    for path in sources:
        assert plant.client.get(f"/page/{path.name}").status_code == 200
