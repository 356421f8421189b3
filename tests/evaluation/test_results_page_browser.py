"""index.html in Chromium, opened from the disk. Skipped without the browser, but failed with REQUIRE_BROWSER=1."""

import io
import os
import shutil
import time
from itertools import product

import numpy as np
import pages
import pytest
from PIL import Image

from evaluation.curves import charts

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "needs chromium and chromedriver: apt-get install chromium chromium-driver"
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER) and os.environ.get("REQUIRE_BROWSER") != "1", reason=MISSING)
BLUE, ORANGE = (86, 180, 233), (230, 159, 0)  # missed and label, added and output


class Page:
    """The browser with one page."""

    def __init__(self, driver):
        self.driver = driver

    def resize(self, width, height=900):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def darken(self, dark):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, address, width=1280, height=1600):
        self.resize(width, height)
        self.darken(False)
        self.driver.get(address)

    def run(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def click(self, selector):
        self.find(selector).click()

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def slide(self, selector, value):
        self.run(f"(() => {{ const s = document.querySelector('{selector}'); s.value = {value};"
                 " s.dispatchEvent(new Event('input', {bubbles: true})); })()")  # fmt: skip

    def text(self, selector):
        return self.run("document.querySelector(arguments[0]).textContent.trim()", selector)

    def order(self):
        return self.run("[...document.querySelectorAll('.card')].filter(c => !c.hidden).map(c => c.dataset.image)")

    def shot(self, selector):
        """Colours (H, W, 3) of an element on the screen."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return np.asarray(Image.open(io.BytesIO(self.find(selector).screenshot_as_png)).convert("RGB")).astype(int)

    def picture(self, selector, size=pages.SIZE):
        """Colours (size, size, 3) shown at the middle of each pixel of the image."""
        shown = self.shot(selector)
        places = [((np.arange(size) + 0.5) * length / size).astype(int) for length in shown.shape[:2]]
        return shown[np.ix_(*places)]

    def wait_for(self, condition):
        end = time.monotonic() + 10
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def wait_for_layers(self, selector):
        self.wait_for(f"document.querySelector('{selector} .layer')")


@pytest.fixture(scope="session")
def browser():
    assert CHROMIUM and DRIVER, MISSING
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-extensions",
    ):
        options.add_argument(argument)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser):
    """A page whose console must be empty in the end."""
    browser.get_log("browser")
    yield Page(browser)
    assert browser.get_log("browser") == []


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """Address of a page of three images of two classes; image k is k px off, the last is partly annotated."""
    return pages.write_two_classes(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """Address of a page of one image of three classes."""
    return pages.write_three_classes(tmp_path_factory.mktemp("three"))


def is_near(colours, colour, tolerance=60):
    return np.abs(colours - np.array(colour)).max(-1) < tolerance


def only(page, *layers):
    """Show these layers and no others."""
    boxes = "[...document.querySelectorAll('[data-layer]')]"
    page.run(f"{boxes}.forEach(box => box.checked !== arguments[0].includes(box.dataset.layer) && box.click())", layers)


def open_card(page, address, image, *layers):
    """Open a page, show these layers and no others, and return where the picture of an image is."""
    page.open(address)
    page.wait_for_layers(f"#image-{image}")
    only(page, *layers)
    return f"#image-{image} .stage"


def test_cards_are_sorted_by_any_score_filtered_and_led_to(page, two):
    page.open(two)
    assert page.order() == ["0002", "0001", "0000"] and page.find("#sort").get_property("value") == "pixel_error"
    page.click("#direction")
    assert page.order() == ["0000", "0001", "0002"] and page.text("#direction") == "best first"
    page.click(".fold > summary")
    page.click(".by[data-score=dice_cell]")
    assert page.order() == ["0002", "0001", "0000"] and page.text("#direction") == "worst first"
    page.click(".by[data-score=loss]")
    assert page.order() == ["0001", "0002", "0000"]  # of equals, the order is as before
    assert page.run("document.querySelector('.by[aria-pressed=true]').dataset.score") == "loss"
    assert page.run("document.querySelectorAll('#chart circle').length") == 3
    page.find("#filter").send_keys("CELL_b")
    assert page.order() == ["0001"] and page.text("#count") == "1 of 3"
    page.press(*["\ue003"] * 6)  # backspace
    page.click("#chart a:nth-of-type(3) circle")
    assert page.run("document.querySelector('.card.found').dataset.image") == "0000"


def test_threshold_changes_mask_and_error_as_the_scores_say(page, two):
    stage = open_card(page, two, "0001", "output-fill")
    assert page.text("#image-0001 .live") == f"pixel error {100 * 40 / 64**2:.2f} % at threshold 0.50"
    output = pages.scene(1)[2]
    for threshold in (127, 29, 30, 199, 200):
        page.slide("#threshold", threshold)
        shown = page.picture(stage)
        assert np.array_equal(shown[..., 0] > shown[..., 2], output > threshold), threshold
    missed = 400 / 64**2
    assert page.text("#image-0001 .live") == f"pixel error {100 * missed:.2f} % at threshold 0.79"
    page.click(".jump:nth-of-type(2)")
    assert page.text("#threshold-value") == "0.70" and page.text("#threshold-flag") == "--threshold 0.70"


def test_errors_are_coloured_where_label_and_output_differ(page, two):
    stage = open_card(page, two, "0001", "errors")
    shown = page.picture(stage)
    _, label, output = pages.scene(1)
    assert np.array_equal(is_near(shown, BLUE), (label == 1) & (output < 128))
    assert np.array_equal(is_near(shown, ORANGE), (label == 0) & (output > 128))
    only(page)
    assert (page.picture(stage) == 120).all()
    only(page, "veil")
    shown = page.picture("#image-0002 .stage")
    assert (shown[:, :40] == 120).all() and (shown[:, 40:] != 120).all() and np.unique(shown[:, 40:]).size > 1
    page.click("[data-layer=veil]")
    assert (page.picture("#image-0002 .stage") == 120).all()


def test_objects_are_coloured_by_what_became_of_them(page, tmp_path):
    address = pages.write_two_classes(tmp_path, 8)  # the square of image k is k px off: from 7 px on it is missed
    stage = open_card(page, address, "0007", "errors")
    page.click("[data-layer=objects]")
    assert not page.find("[data-layer=errors]").is_selected()
    label, found = pages.scene(7)[1] == 1, pages.scene(7)[2] == 200
    shown = page.picture(stage)
    assert np.array_equal(is_near(shown, (0, 114, 178)), label) and label.any()
    assert np.array_equal(is_near(shown, (213, 94, 0)), found & ~label)
    counts = "objects: 0 matched, 1 missed (0 split), 1 added (0 merged)"
    assert page.text("#image-0007 .objects-of") == counts
    assert is_near(page.picture("#image-0006 .stage"), (0, 158, 115))[16:36, 14:34].all()
    legend = "[...document.querySelectorAll('label:has([data-layer=objects]) .key')].map(key => key.textContent)"
    assert page.run(legend) == ["7 matched", "1 missed", "1 added", "0 split", "0 merged"]


def test_contrast_brightens_the_input_alone_and_is_reset(page, two):
    stage = open_card(page, two, "0001", "output-fill")
    plain, inside = page.picture(stage), pages.scene(1)[2] > 127
    page.slide("#contrast", 1)
    shown = page.picture(stage)
    assert (shown[~inside] == 240).all() and page.text("#contrast-value") == "\u00d72"
    page.press("{", "{", "{")
    assert page.text("#contrast-value") == "\u00d70.71"
    page.click("#contrast-reset")
    assert np.array_equal(page.picture(stage), plain)


def test_meaning_of_a_score_opens_by_keyboard(page, two):
    page.open(two)
    page.click(".fold > summary")
    page.run("document.querySelector('.meaning > summary').focus()")
    height = page.find(".meaning").rect["height"]
    page.press("\ue007")  # Enter
    assert page.find(".meaning").rect["height"] > height + 10


@pytest.mark.parametrize(("width", "seen"), [(1280, 300), (400, 250)])
def test_pictures_lie_in_the_first_screen(page, tmp_path, width, seen):
    curves = charts({name: [(1, 0.5), (2, 0.4)] for name in ("loss/val", "pixel_error", "dice/cell")})
    page.open(pages.write_two_classes(tmp_path, charts={"unet": curves}), width, 800)
    assert page.run("document.querySelector('.card .stage').getBoundingClientRect().top") < 800 - seen


def test_outlines_follow_the_borders_of_label_and_output(page, two):
    stage = open_card(page, two, "0001", "output-line")
    shown = page.shot(stage)
    scale = shown.shape[0] / pages.SIZE
    rows, columns = np.nonzero(is_near(shown, ORANGE, 10))
    for found, first, last in ((rows, 16, 36), (columns, 9, 29)):
        assert (found.min(), found.max() + 1) == pytest.approx((first * scale, last * scale), abs=1)
    inside = shown[round(18 * scale) : round(34 * scale), round(11 * scale) : round(27 * scale)]
    assert (inside == 120).all()
    only(page, "label-line")
    shown = page.shot(stage)
    assert np.nonzero(is_near(shown, BLUE, 10))[1].min() == pytest.approx(8 * scale, abs=1)


def test_wipe_uncovers_the_output(page, two):
    stage = open_card(page, two, "0001")
    page.slide("#image-0001 .wipe", 50)
    shown, output = page.picture(stage)[:50, :, 0], pages.scene(1)[2][:50]  # above the scale bar
    assert np.array_equal(shown[:, :31], output[:, :31]) and (shown[:, 33:] == 120).all()


def test_large_view_zooms_all_panels_and_is_steered_by_keys(page, two):
    page.open(two)
    page.click("#image-0002 .stage")
    assert page.text("#large-title") == "cell_c2.tif"
    assert page.run("document.querySelectorAll('.panels figure').length") == 4
    errors, size = page.shot(".panels figure:last-child .stage"), page.run("sizes()")
    middle, scale = errors.shape[0] / 2, size["imageWidth"] / pages.SIZE
    left = (size["width"] - size["imageWidth"]) / 2
    below = errors[round(middle + 10 * scale) : round(middle + 30 * scale)]  # rows 42 to 62, without a square
    valid, unknown = (below[:, round(left + a * scale) : round(left + b * scale)] for a, b in ((1, 39), (41, 63)))
    assert (valid == valid[0, 0]).all() and np.unique(unknown).size > 1  # of the veil
    page.press("\ue014")  # right arrow
    assert page.text("#large-title") == "cell_b1.tif"
    page.press("\ue012", "\ue012")  # left arrow, of which the second one has no effect
    assert page.text("#large-title") == "cell_c2.tif"
    layers = "[...document.querySelectorAll('.panels :is(.input, .label-shown)')]"
    size = f"{layers}.map(layer => getComputedStyle(layer).backgroundSize)"
    before = page.run(size)
    page.press("+")
    after = page.run(size)
    assert len({*after}) == 1 and len(after) == 3
    assert float(after[0].split("px")[0]) == pytest.approx(1.5 * float(before[0].split("px")[0]), rel=1e-3)
    page.press("0")
    assert page.run(size) == before
    page.press("]")
    assert page.text("#threshold-value") == "0.52"
    page.press("?")
    assert page.run("document.querySelector('#help').open")
    page.press("?")
    page.press("o")
    assert not page.find("[data-layer=output-line]").is_selected()
    page.press("\ue00c")  # Escape
    page.wait_for("!document.querySelector('#large').open && document.querySelector('main .toolbar')")
    assert page.run("document.activeElement.closest('.card').dataset.image") == "0002"


def test_classes_are_switched_on_and_off(page, three):
    stage = open_card(page, three, "0000", "label-fill")
    shown = page.picture(stage)
    plain = (shown == 120).all(-1)
    assert plain[:8].all() and not plain[8:56, 8:56].any()
    page.click("[data-class='1']")
    plain = (page.picture(stage) == 120).all(-1)
    assert not plain[20:40, 20:40].any() and np.count_nonzero(~plain) == 400
    page.click("[data-class='1']")
    only(page, "errors")
    shown = page.picture(stage)
    green, white, magenta = (182, 255, 0), (255, 255, 255), (255, 42, 212)
    assert is_near(shown, green, 80)[20:40, 30:40].all()  # another class
    assert is_near(shown, white, 80)[8:56, 48:56].all() and (shown[:56, :30] == 120).all()
    only(page, "output-line")
    shown = page.shot(stage)
    middle = shown[shown.shape[0] * 30 // 64]  # crosses the border of the cell, and that of the nucleus in it
    columns = np.flatnonzero(is_near(middle, magenta, 10)) * 64 / len(middle)
    assert {int(column + 0.5) for column in columns} == {8, 20, 30, 48}


def test_annotation_ends_in_grey_and_without_an_outline(page, tmp_path):
    stage = open_card(page, pages.write_three_classes(tmp_path, 30), "0000", "label-line")
    shown = page.shot(stage)
    middle = shown[shown.shape[0] * 25 // 64]  # crosses the left borders of the cell and of the nucleus in it
    columns = np.flatnonzero(is_near(middle, (255, 255, 255), 10)) * 64 / len(middle)
    assert {int(column + 0.5) for column in columns} == {8, 20}
    page.click(stage)
    grey = (page.shot(".panels figure:nth-child(2) .stage") == 128).all(-1).sum()
    assert grey == pytest.approx(page.run("sizes().imageWidth") ** 2 * 34 / 64, rel=0.02)


def test_curves_stand_next_to_the_scores(page, tmp_path):
    curves = charts({name: [(1, 0.5), (2, 0.4)] for name in ("loss/val", "pixel_error", "dice/cell")})
    page.open(pages.write_two_classes(tmp_path, charts={"unet": curves}))
    page.click(".fold > summary")
    places = [page.find(selector).rect for selector in (".scores", "figure:nth-child(1)", "figure:nth-child(2)")]
    left, top = [place["x"] for place in places], [place["y"] for place in places]
    assert left == sorted(left) and top[1] == top[2] < top[0] + places[0]["height"]


def test_page_fits_every_window_and_is_accessible(page, two, three):
    from axe_core_python.selenium import Axe

    for address in (two, three):
        page.open(address)
        page.click(".fold > summary")
        page.click(".meaning > summary")
        for dark, width in product((False, True), (400, 1280, 2500)):
            page.darken(dark)
            page.resize(width)
            assert page.run("document.documentElement.scrollWidth") <= width
            background = page.run("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") != dark
        if address == three:
            page.click(".card .stage")
        for dark in (False, True):
            page.darken(dark)
            assert page.run("document.querySelector('#large').scrollWidth") <= 2500
            found = Axe().run(page.driver, options={"resultTypes": ["violations"]})["violations"]
            found = [violation for violation in found if violation["impact"] != "minor"]
            assert not found, [(v["id"], node["html"]) for v in found for node in v["nodes"]]


def test_scores_and_layers_are_made_only_near_the_window(page, tmp_path):
    page.open(pages.write_two_classes(tmp_path, 60, annotated=1.0), 800, 600)
    first, last = (f"#image-{page.order()[at]}" for at in (0, -1))
    page.wait_for_layers(first)
    assert 0 < page.run("document.querySelectorAll('.card .wiped').length") < 30
    assert page.run("document.querySelectorAll('.card .about').length") < 30
    assert page.run(f"document.querySelectorAll('{last} *').length") < 5
    page.run(f"document.querySelector('{last}').scrollIntoView()")
    page.wait_for_layers(last)
    page.wait_for(f"!document.querySelector('{first} .layer')")
    assert page.text(f"{last} .about") == f"image {last[-4:]}, 0{last[-4:]}.npy, 64 x 64 px"
    scores = "[...document.querySelectorAll(`${arguments[0]} dl div`)].map(row => row.textContent)"
    assert page.run(scores, last) == ["loss0.1000", "pixel_error0.0000", "dice_cell1.0000"]


def test_unlabelled_image_shows_input_and_output(page, tmp_path):
    stage = open_card(page, pages.write_unlabelled(tmp_path), "0000", "errors", "label-line", "output-fill")
    shown, output = page.picture(stage), pages.scene(0)[2]
    assert np.array_equal(shown[..., 0] > shown[..., 2], output > 127)
    page.click(".card .stage")
    captions = "[...document.querySelectorAll('.panels figcaption')].map(caption => caption.textContent)"
    assert page.run(captions) == ["input with layers", "output"]


def test_prediction_page_fits_every_window_and_is_accessible(page, tmp_path):
    from axe_core_python.selenium import Axe

    address = pages.write_prediction(tmp_path)
    stage = open_card(page, address, "0001", "objects")
    assert page.order() == ["0001", "0000"] and page.text("#image-0001 h3") == "a_very_long_…f_an_image_1"
    inside = pages.scene(0)[1] == 1
    assert is_near(page.picture(stage), (197, 147, 36), 5)[inside].all()  # 70 % of the orange over grey 120
    only(page)
    assert (page.picture(stage) == 120).all()
    scores = "[...document.querySelectorAll('#image-0001 dl div')].map(row => row.textContent)"
    assert page.run(scores) == ["uncertainty0.6000", "objects2", "median_area400.0"]
    page.click(".fold > summary")
    for is_large, dark, width in product((False, True), (False, True), (400, 1280)):
        page.resize(width)
        page.darken(dark)
        if is_large and not page.run("document.querySelector('#large').open"):
            page.click(stage)
            assert page.run("document.querySelectorAll('.panels figure').length") == 1
            assert (page.picture(".panels .stage")[32, 32] == 120).all()
        assert page.run("document.documentElement.scrollWidth") <= width
        found = Axe().run(page.driver, options={"resultTypes": ["violations"]})["violations"]
        found = [violation for violation in found if violation["impact"] != "minor"]
        assert not found, [(v["id"], node["html"]) for v in found for node in v["nodes"]]


def test_database_page_fits_every_window_and_is_accessible(page, tmp_path, monkeypatch):
    from axe_core_python.selenium import Axe
    from conftest import write_stacks

    from run_make_database import main

    monkeypatch.chdir(tmp_path)
    write_stacks(tmp_path / "datasets" / "em", num=10, shape=(48, 64), values=(0, 128, 255))
    assert main(["--class_names", "background,a very long name of a class of cells,cell"]) == 0
    page.open((tmp_path / "datasets" / "em" / "index.html").as_uri())
    assert page.run("document.querySelectorAll('.pairs figure').length") == 10
    assert page.run("[...document.images].every(image => image.complete && image.naturalWidth === 64)")
    flat = "getComputedStyle(document.querySelector('.flat')).opacity"
    assert page.run(flat) == "0"
    page.click("#flat")
    assert page.run(flat) == "1"
    for dark, width in product((False, True), (400, 1280)):
        page.darken(dark)
        page.resize(width)
        assert page.run("document.documentElement.scrollWidth") <= width
        violations = Axe().run(page.driver, options={"resultTypes": ["violations"]})["violations"]
        violations = [violation for violation in violations if violation["impact"] != "minor"]
        assert not violations, [(v["id"], node["html"]) for v in violations for node in v["nodes"]]
