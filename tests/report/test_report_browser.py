"""The report's page in a real browser: no messages, complete at every width, with working controls."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.report_runs import LONG, wide_study

from fedpriv.report.write import report_on

pytestmark = pytest.mark.xdist_group("report")

WIDTHS = (360, 768, 1440)

# Every visible element must be within the page, except those in scrolling boxes and inside pictures.
CUT_OFF = """
const scrolls = (node) => node && (/auto|scroll/.test(getComputedStyle(node).overflowX) || scrolls(node.parentElement));
const width = document.documentElement.clientWidth, found = [];
for (const node of document.querySelectorAll("body *")) {
  const box = node.getBoundingClientRect(), style = getComputedStyle(node);
  if (!box.width || style.visibility === "hidden" || node.ownerSVGElement || scrolls(node.parentElement)) continue;
  if (box.left < -0.5 || box.right > width + 0.5) found.push(`${node.tagName}#${node.id} ${box.left} to ${box.right}`);
  if (style.overflowX === "hidden" && node.scrollWidth > node.clientWidth + 1) found.push(`${node.tagName} hides`);
}
for (const text of document.querySelectorAll("svg text")) {
  const box = text.getBoundingClientRect(), out = text.ownerSVGElement.getBoundingClientRect();
  const cut = Math.max(out.left - box.left, box.right - out.right, out.top - box.top, box.bottom - out.bottom);
  if (box.width && cut > 2) found.push(`${text.textContent} is cut off by ${cut} px`);
}
return found;
"""

# Minimum contrast between text and background (Web Content Accessibility Guidelines 2.2, 1.4.3).
CONTRASTS = """
const parts = (text) => {
  const numbers = text.match(/-?[\\d.]+(e-?\\d+)?/g).map(Number);
  const scale = text.startsWith("color(") ? 255 : 1;
  return [...numbers.slice(0, 3).map((v) => v * scale), numbers[3] ?? 1];
};
const below = (node) => {
  if (!node) return [255, 255, 255];
  const [r, g, b, a] = parts(getComputedStyle(node).backgroundColor);
  if (a === 1) return [r, g, b];
  const under = below(node.parentElement);
  return [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
};
const light = (rgb) => {
  const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const found = [];
for (const node of document.querySelectorAll("main *, header *, footer *")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  if (!own || !node.getBoundingClientRect().width || node.ownerSVGElement) continue;
  const pair = [light(parts(getComputedStyle(node).color)), light(below(node))].sort((a, b) => b - a);
  const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
  if (contrast < 4.5) found.push(`${node.tagName} ${node.textContent.slice(0, 30)}: ${contrast}`);
}
return found;
"""

# Captures the files that the page would save, by name and content.
CATCH_SAVED = """
const blobs = new Map(), create = URL.createObjectURL;
window.saved = [];
URL.createObjectURL = (blob) => {
  const address = create(blob);
  blobs.set(address, blob);
  return address;
};
HTMLAnchorElement.prototype.click = function () {
  window.saved.push([this.download, blobs.get(this.href)]);
};
"""

LAST_SAVED = """
const [name, blob] = window.saved.pop(), done = arguments[0];
blob.text().then((text) => done([name, blob.type, text]));
"""


def show(browser: Any, page: Path, width: int = 1440, scheme: str = "light") -> None:
    """Open the page at a width and in a color scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.resolve().as_uri())
    until(browser, lambda: curves(browser))


def until(browser: Any, holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Return the result of `holds` as soon as it is true."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: holds())


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def many(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def curves(browser: Any) -> list[str]:
    """Return the settings of the drawn curves."""
    return browser.execute_script("return [...document.querySelectorAll('#chart .curve')].map(c => c.dataset.setting)")


def choose(browser: Any, selector: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(one(browser, selector)).select_by_value(value)


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def data(browser: Any) -> dict[str, Any]:
    return json.loads(browser.execute_script("return document.getElementById('data').textContent"))


def test_it_loads_without_a_word_on_the_console_and_asks_for_nothing(browser: Any, page: Path) -> None:
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    show(browser, page)
    for details in many(browser, "summary"):
        details.click()
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert page.resolve().as_uri() in asked
    assert [url for url in asked if url != page.resolve().as_uri() and not url.startswith("data:")] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_and_all_can_be_read(browser: Any, page: Path, width: int, scheme: str) -> None:
    show(browser, page, width, scheme)
    browser.execute_script("for (const box of document.querySelectorAll('details')) box.open = true")
    until(browser, lambda: many(browser, "#curve-table td"))
    across, wide = browser.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    )
    assert across <= wide == width
    assert browser.execute_script(CUT_OFF) == []
    assert browser.execute_script(CONTRASTS) == []


def test_a_large_study_with_long_names_is_whole_and_readable(browser: Any, tmp_path: Path) -> None:
    """Four methods, 48 trials, at three widths."""
    page = report_on(wide_study(), tmp_path)
    for width in (390, 768, 1440):
        show(browser, page, width)
        across = browser.execute_script("return document.documentElement.scrollWidth")
        assert across <= width
        assert browser.execute_script(CUT_OFF) == []
        hidden = browser.execute_script(
            "const box = document.querySelector('#best .scroll'); return box.scrollWidth > box.clientWidth + 1"
        )
        cue = one(browser, "#best .cue")
        assert cue.is_displayed() == hidden == (width < 1000)
        assert not hidden or "scroll sideways" in cue.text
        assert len(many(browser, "#chart .end")) == 8
    names = [node.text for node in many(browser, "#best tbody td:first-child")]
    assert names == [*LONG[::-1], *LONG[::-1]]
    assert [name in node.text for name, node in zip(names, many(browser, "#legend button"), strict=False)] == [True] * 8
    ends = [node.text for node in many(browser, "#chart .end")]
    values = [float(text.split(" %")[0]) for text in ends]
    assert sorted(values)[-1] == pytest.approx(90.2, abs=0.3)
    assert all(re.match(r"\d\d\.\d\d % \S", text) for text in ends)
    places = sorted(node.location["y"] for node in many(browser, "#chart .end"))
    assert all(after - before >= 10 for before, after in itertools.pairwise(places))


def test_the_vertical_range_can_be_chosen_and_a_setting_leads_to_its_runs(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    show(browser, report_on(wide_study(), tmp_path))
    drawn, whole = (lambda: one(browser, "#chart").text), one(browser, "#chart").text
    one(browser, "#y-low").send_keys("85")
    assert len(many(browser, "#chart .end")) == 1
    one(browser, "#whole").click()
    assert drawn() == whole
    one(browser, "#zoom").click()
    assert 30 < float(one(browser, "#y-low").get_attribute("value")) < 60
    assert drawn() != whole
    choose(browser, "#y-axis", "test_loss")
    assert one(browser, "#y-low").get_attribute("value") == ""
    choose(browser, "#y-axis", "test_accuracy")
    chart = one(browser, "#chart")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    drag = ActionChains(browser).move_to_element_with_offset(chart, 0, -60).click_and_hold()
    drag.move_by_offset(0, 80).release().perform()
    low, high = (float(one(browser, f"#y-{end}").get_attribute("value")) for end in ("low", "high"))
    assert 20 < low < high < 100
    ActionChains(browser).double_click(chart).perform()
    assert drawn() == whole
    link = one(browser, "#best tbody a")
    browser.execute_script("arguments[0].click()", link)
    runs = until(browser, lambda: [node for node in many(browser, "tr:target li") if node.is_displayed()])
    assert len(runs) == 3
    assert re.match(r"seed 0: 90\.\d\d %, \w{12}", runs[0].text)


def test_the_check_for_what_is_cut_off_finds_it(browser: Any, page: Path) -> None:
    show(browser, page, 360)
    browser.execute_script("document.querySelector('h1').style.width = '500px'")
    assert any("H1" in found for found in browser.execute_script(CUT_OFF))
    browser.execute_script("document.querySelector('h2').style.color = '#ccc'")
    assert any("H2" in found for found in browser.execute_script(CONTRASTS))


def test_a_click_on_the_legend_takes_a_curve_away_and_brings_it_back(browser: Any, page: Path) -> None:
    show(browser, page)
    before = curves(browser)
    key = one(browser, "#legend button")
    assert key.get_attribute("aria-pressed") == "true"
    key.click()
    assert key.get_attribute("aria-pressed") == "false"
    assert len(curves(browser)) == len(before) - 1
    key.click()
    assert curves(browser) == before
    one(browser, "#legend button:last-child").click()
    assert curves(browser) == []
    one(browser, "#legend button:nth-last-child(2)").click()
    assert curves(browser) == before


def test_pointing_at_a_curve_highlights_it_and_shows_its_values(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    show(browser, page)
    chart = one(browser, "#chart")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    # The last point of the first curve, in pixels of the chart.
    script = "const c = document.querySelector('#chart .curve'); const p = c.getPointAtLength(c.getTotalLength());"
    script += "const b = document.getElementById('chart').getBoundingClientRect();"
    x, y, middle_x, middle_y = browser.execute_script(script + "return [p.x, p.y, b.width / 2, b.height / 2]")
    ActionChains(browser).move_to_element_with_offset(chart, round(x - middle_x), round(y - middle_y)).perform()
    until(browser, lambda: many(browser, "#chart .curve.near"))
    near = [node.get_attribute("data-setting") for node in many(browser, "#chart .curve.near")]
    assert len(near) == 1
    curve = next(c for c in data(browser)["curves"] if str(c["setting"]) == near[0])
    shown = one(browser, "#readout").text
    assert f"test accuracy {100 * curve['values']['test_accuracy'][-1]:.2f} %" in shown
    assert f"round {curve['values']['round'][-1]}" in shown
    ActionChains(browser).move_to_element(one(browser, "#curves h2")).perform()
    until(browser, lambda: not many(browser, "#chart .curve.near"))
    assert "Point at a curve" in one(browser, "#readout").text


def test_the_keyboard_alone_reaches_every_value(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, page)
    browser.execute_script("document.getElementById('words').focus()")
    press(browser, Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "chart"
    press(browser, Keys.ARROW_UP)
    first = one(browser, "#readout").text
    press(browser, Keys.HOME)
    assert "round 0" in one(browser, "#readout").text
    press(browser, Keys.ARROW_RIGHT)
    assert "round 1" in one(browser, "#readout").text
    press(browser, Keys.ARROW_DOWN, Keys.END)
    assert one(browser, "#readout").text != first
    press(browser, Keys.ESCAPE, Keys.TAB, Keys.SPACE)
    assert browser.switch_to.active_element.get_attribute("aria-pressed") == "false"


def test_the_selectors_change_axes_and_curves(browser: Any, page: Path) -> None:
    show(browser, page)
    held = data(browser)["curves"]
    best = [curve for curve in held if curve["best"]]
    assert len(curves(browser)) == len(best) < len(held)
    choose(browser, "#which", "all")
    assert len(curves(browser)) == len(held)
    choose(browser, "#x-axis", "epsilon")
    assert "epsilon spent" in one(browser, "#chart").text
    assert len(curves(browser)) == sum("epsilon" in curve["values"] for curve in held)
    assert "no values of epsilon" in one(browser, "#readout").text
    choose(browser, "#x-axis", "simulated_seconds")
    assert len(curves(browser)) == sum("simulated_seconds" in curve["values"] for curve in held) == 2
    choose(browser, "#x-axis", "bytes")
    assert len(curves(browser)) == 2
    choose(browser, "#x-axis", "round")
    ticks = one(browser, "#chart").text
    choose(browser, "#y-axis", "test_loss")
    assert one(browser, "#chart").text != ticks
    one(browser, "#words").send_keys("beta=0.1")
    named = sum("beta=0.1" in curve["name"] for curve in held)
    assert len(curves(browser)) == named > 0
    one(browser, "#words").send_keys("no such setting")
    assert "Nothing to show" in one(browser, "#chart").text


def test_the_slider_changes_the_shares_and_the_selector_the_map(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, page)
    wanted = [cell.get_attribute("data-shares").split() for cell in many(browser, "#near-table [data-shares]")]
    assert len({tuple(row) for row in wanted}) > 1
    slider = one(browser, "#near")
    slider.send_keys(Keys.HOME)
    for step, words in enumerate(("1 point", "2 points", "5 points", "10 points")):
        shown = [node.text for node in many(browser, "#near-table .share")]
        assert shown == [f"{int(100 * float(row[step]) + 0.5)} %" for row in wanted]
        assert one(browser, "#near-text").text == words
        assert words in one(browser, "#near-table caption").text
        slider.send_keys(Keys.ARROW_RIGHT)
    maps = many(browser, "[data-map]")
    assert [node.is_displayed() for node in maps] == [number == 0 for number in range(len(maps))]
    choose(browser, "#map", "1")
    assert [node.is_displayed() for node in maps] == [number == 1 for number in range(len(maps))]


def test_what_is_saved_is_the_table_that_lies_beside_the_page(browser: Any, page: Path) -> None:
    """The link that a button clicks is caught in the page, because browser downloads arrive at any time."""
    show(browser, page)
    browser.execute_script(CATCH_SAVED)
    names = list(dict.fromkeys(node.get_attribute("data-table") for node in many(browser, "button[data-table]")))
    assert set(names) | {"curves"} == {file.stem for file in (page.parent / "tables").iterdir()}
    for name in names:
        button = one(browser, f"button[data-table={name}]")
        browser.execute_script("arguments[0].click()", button)
        file, kind, text = browser.execute_async_script(LAST_SAVED)
        assert (file, kind) == (f"{name}.csv", "text/csv")
        assert text.encode() == (page.parent / "tables" / file).read_bytes()


def test_without_scripts_all_numbers_are_there(browser: Any, page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page.resolve().as_uri())
        assert one(browser, "noscript svg, .drawn svg").is_displayed()
        assert not one(browser, "#legend").is_displayed()
        assert all(node.is_displayed() for node in many(browser, "[data-map]"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_paper_shows_every_row_and_no_controls(browser: Any, page: Path) -> None:
    show(browser, page, 794, "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not one(browser, ".controls").is_displayed()
    assert not one(browser, "button.csv").is_displayed()
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    box = "const box = document.querySelector('.tall'); return box.scrollHeight <= box.clientHeight + 1"
    assert browser.execute_script(box)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
