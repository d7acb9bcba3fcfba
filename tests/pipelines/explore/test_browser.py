"""The explorer clicked through in headless Chromium: every page, by mouse, keyboard and on a phone.

With OVREF_SCREENSHOTS=FOLDER it leaves the pictures of the documentation there.
"""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from explorer_server import served
from PIL import Image

from ovref.contract import Dropped
from ovref.identity import spec_identity
from ovref.records import Caption, ImageRecord, Reference
from ovref.reduce.collection import reduce_collection
from ovref.reduce.spec import ReduceSpec
from ovref.storage.file_store import Store
from ovref.storage.steps import open_step
from ovref_inference import ReferenceCollection
from ovref_inference.encoders import load_text_encoder
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.reports import Report
from ovref_pipelines.explore.library import Library
from ovref_pipelines.live import Live
from scene_collections import EMBED, image_record

pytestmark = pytest.mark.slow
SCENES = 80
SCREENSHOTS = os.environ.get("OVREF_SCREENSHOTS")
MOST_BYTES = 150_000


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail("this test needs Chromium, as the system package `chromium` has it")
    return found


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A build of drawn scenes with their true masks, embedded and reduced by the miniature."""
    folder = tmp_path_factory.mktemp("scenes")
    store, steps, parents = Store.open(str(folder / "out")), {}, []
    for name in ("captions", "prompts", "images", "references"):
        identity = {"stages": [spec_identity(EMBED)]} if name == "references" else {"drawn": name}
        steps[name] = open_step(store, name, identity, parents)
        parents = [steps[name].fingerprint]
    images = [image_record(seed) for seed in range(SCENES)]
    answers = list(EMBED.build()(iter(images)))
    captions = [Caption(key=i.key, text=i.caption, source="drawn") for i in images]
    records = {"captions": captions, "prompts": captions, "images": images}
    records["references"] = [one for one in answers if isinstance(one, Reference)]
    drops = [one for one in answers if isinstance(one, Dropped)]
    for name, step in steps.items():
        step.commit(
            "000000", records[name], inputs=SCENES, drops=drops if name == "references" else ()
        )
        step.finish(["000000"])
    assert isinstance(images[0], ImageRecord)
    store.write("build.json", b'{"output": "out"}')
    reduce_collection(
        steps["references"], ReduceSpec(), embed=EMBED, texts=load_text_encoder(EMBED.text),
        output=store.child("collection"), work=folder / "work",
    )  # fmt: skip
    return folder / "out"


@pytest.fixture
def pages(output, tmp_path):
    """Opens the explorer of a copy of the build in a window of this size: (page, explorer)."""
    from playwright.sync_api import sync_playwright

    place = tmp_path / "runs" / "demo"
    shutil.copytree(output, place)
    with served(Library(str(place))) as explorer, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        trouble = []

        def open_page(width=1280, height=800, dark=False):
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
            )
            page = context.new_page()
            page.set_default_timeout(120_000)
            page.on("pageerror", lambda error: trouble.append(str(error)))
            page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
            base = str(explorer.client.base_url)
            own = (base, "blob:", "data:")
            page.on(
                "request", lambda r: None if r.url.startswith(own) else trouble.append(r.url)
            )
            page.goto(explorer.url)
            page.wait_for_selector(".list a")
            assert "token" not in page.url
            return page, explorer

        yield open_page
        browser.close()
        assert trouble == []


def until(page, condition):
    """Waits for a condition. Playwright's own waiting needs `eval`, which the page forbids."""
    for _ in range(1200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never came true: {condition}")


def shot(page, name):
    """Waits for the pictures in view, and keeps what is seen where that was asked for."""
    until(
        page,
        "[...document.images].every("
        "image => image.complete || image.getBoundingClientRect().top > innerHeight)",
    )
    page.wait_for_timeout(400)
    if SCREENSHOTS:
        picture = Image.open(io.BytesIO(page.screenshot()))
        path = Path(SCREENSHOTS) / f"explore_{name}.webp"
        picture.save(path, "WEBP", quality=80, method=6)
        assert path.stat().st_size < MOST_BYTES


def test_nouns_references_and_marks(pages):
    page, explorer = pages()
    page.wait_for_selector(".tile")
    collection = explorer.library.open().collection
    shot(page, "nouns")
    page.keyboard.press("/")
    page.keyboard.type("hou")
    until(page, "document.querySelectorAll('.list a').length === 1")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:text-is('house')")
    count = len(collection.references_of("house"))
    assert f"{count} references" in page.inner_text(".head")
    page.keyboard.press("Escape")
    for key, layer in (("3", "heatmap"), ("4", "crop"), ("1", "image"), ("2", "mask")):
        page.keyboard.press(key)
        assert f"/{layer}?" in page.get_attribute(".tile img", "src")
    page.click("text=Prototypes")
    page.wait_for_selector("h2:has-text('prototypes')")
    shot(page, "prototypes")
    page.reload()
    page.wait_for_selector(".tile")

    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    first = page.evaluate("document.activeElement.dataset.id")
    page.keyboard.press("Enter")
    page.wait_for_selector("#sheet[open] h1")
    assert f"reference {first}" in page.inner_text("#sheet h1")
    assert page.locator("#sheet .trio img").count() == 3
    assert page.locator("#sheet .tile").count() == 8
    shot(page, "reference")
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    assert page.inner_text("#marked") == "1 marked"
    page.fill("#reason", "cut off")
    page.click("#marks .danger")
    page.wait_for_selector(f".tile[data-id='{first}']", state="detached")
    with ReferenceCollection.open(explorer.library.collection_url) as now:
        assert int(first) not in now.references_of("house") and len(now) == len(collection) - 1
    page.click("nav >> text=Deleted")
    page.wait_for_selector("h2:has-text('cut off (1)')")
    shot(page, "deleted")
    page.click("text=Undo")
    page.wait_for_selector("text=None. Mark references")
    with ReferenceCollection.open(explorer.library.collection_url) as now:
        assert len(now) == len(collection)
    page.click("nav >> text=Build")
    page.wait_for_selector("text=The collection is published.")
    assert page.locator(".step").count() == 4


def test_a_build_is_watched_while_it_runs(pages):
    page, explorer = pages()
    store = explorer.library.build.store
    Path(store.url.removeprefix("file://"), "references", "complete.json").unlink()
    seconds = iter(range(0, 1000, 10))
    progress = Progress("references", stream=io.StringIO(), clock=lambda: next(seconds))
    progress.begin(total=1, done=0, records_to_go=SCENES, workers=1)
    progress.working(1)
    page.click("nav >> text=Build")
    for done in (20, 60):
        progress.report(Report(shard="000000", done=done, dropped=0))
        counts = progress.counts()
        Live(store).watch([counts])
        page.wait_for_selector(f".step:has-text('{done} of {SCENES} records')")
        assert f"{counts['records_per_second']:.3g}"[:3] in page.inner_text(".step:last-of-type")
    assert page.inner_text(".verdict") == "running"


def test_coverage_and_a_photograph_with_its_reasons(pages, tmp_path):
    page, _ = pages()
    page.click("nav >> text=Coverage")
    page.fill("textarea", "house\ngrass\nsky\ncar\nqwertz")
    page.click("text=Check")
    page.wait_for_selector("td:text-is('qwertz')")
    assert page.inner_text("tr:nth-child(2)").split("\t")[:2] == ["qwertz", "none"]
    page.wait_for_selector("th:text-is('nearest class')")  # measured after the counts are there
    assert page.inner_text("tr:nth-child(2)").split("\t")[:2] == ["qwertz", "none"]
    shot(page, "coverage")

    photograph = tmp_path / "scene.png"
    Image.fromarray(np.asarray(image_record(500).image_hwc())).resize((256, 256)).save(photograph)
    page.click("nav >> text=Segment")
    page.set_input_files("input[type=file]", str(photograph))
    nouns = sorted({region.noun.text for region in image_record(500).regions} | {"house", "car"})
    page.fill("textarea", ", ".join(nouns))
    page.check("input[value=freeda]")
    page.click("button.main")
    page.wait_for_selector("figure h2:text-is('freeda')")
    assert page.locator(".results > figure").count() == 2
    buttons = page.locator(".results > figure >> nth=0 >> .overlay button")
    assert buttons.count() >= 2
    buttons.nth(1).click(force=True)
    why = page.inner_text(".results > figure >> nth=0 >> .why h2")
    assert why.split(",")[0] in nouns and "of the image" in why
    assert page.locator(".results > figure >> nth=0 >> .why .tile").count() >= 6
    page.evaluate("document.querySelector('.results').scrollIntoView()")
    shot(page, "segment")
    # VOCSeg compares with texts, which this collection of DINOv2 features cannot: it says so.
    for method, on in (("fossil", False), ("freeda", False), ("vocseg", True)):
        page.set_checked(f"input[value={method}]", on)
    page.click("button.main")
    page.wait_for_selector("figure h2:text-is('vocseg')")
    assert "image tower of its own text encoder" in page.inner_text(".results > figure")
    page.keyboard.press("?")
    page.wait_for_selector("#sheet[open] >> text=mark as bad")
    page.keyboard.press("Escape")
    page.click("nav >> text=Filtered")
    page.wait_for_selector("td:text-is('repeated_key')")


def test_on_a_phone_in_the_dark(pages):
    page, _ = pages(width=390, height=780, dark=True)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    # The vocabulary first, then the gallery in its place, and back.
    page.goto(page.url.partition("#")[0] + "#/nouns")
    page.wait_for_selector(".list a")
    page.click(".list a >> nth=2")
    page.wait_for_selector("h1")
    assert not page.is_visible(".words")
    shot(page, "phone")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    page.click("text=← all nouns")
    page.wait_for_selector(".words", state="visible")
    for name in ("Coverage", "Segment", "Deleted", "Build"):
        page.click(f"nav >> text={name}")
        page.wait_for_selector("h1")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
