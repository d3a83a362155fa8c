"""A report in a real browser: what hovering and keys do, both themes, no error, no request but for the page itself."""

from __future__ import annotations

import json
import shutil

import pytest
from browser import Seen, background_of, open_browser, until

from hldm.app.report.build import build_report
from hldm.evaluation.evaluate import evaluate_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(trained_run, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    run = shutil.copytree(trained_run, folder / "small")
    (run / "evaluation.json").write_text(json.dumps(evaluate_run(run, draws=2, prompts=2, max_characters=20)))
    (folder / "report.html").write_text(build_report(run))
    return (folder / "report.html").as_uri()


@pytest.fixture
def seen(address):
    with open_browser(color_scheme="light") as browser:
        found = Seen(browser.new_page())
        found.page.goto(address)
        yield found
        assert found.errors == []
        assert found.requests == [address]  # nothing is loaded


def test_hovering_over_a_chunk_shows_what_it_cost(seen):
    page = seen.page
    first = page.locator("#detail").inner_text()
    page.locator("#c5").hover()
    shown = page.locator("#detail").inner_text()
    assert shown != first and "chunk 6 of" in shown and "latent" in shown and "nearest chunks" in shown
    assert page.locator("#detail .bar").count() == 4 and page.locator("#detail li").count() >= 1
    assert page.locator('.chunk[aria-selected="true"]').get_attribute("id") == "c5"
    assert page.locator("#plane .picked text").text_content() != ""  # it is shown on the map, too


def test_keys_move_among_the_chunks(seen):
    page = seen.page
    page.locator("#c0").focus()
    for key, expected in (("ArrowRight", "c1"), ("ArrowRight", "c2"), ("ArrowLeft", "c1"), ("Home", "c0")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == expected
    page.keyboard.press("ArrowDown")
    below = page.evaluate(
        "document.activeElement.getBoundingClientRect().top - c0.getBoundingClientRect().top"
    )
    assert below > 10
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.nextElementSibling") is None
    # one stop of the tab key for all chunks
    assert page.locator(".chunk[tabindex='0']").count() == 1


def test_the_whole_page_can_be_reached_by_the_tab_key(seen):
    page, reached = seen.page, set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.dataset.axis || ''"))
    assert {"theme", "c0", "find", "which", "play", "step", "seconds"} <= reached


def test_the_theme_follows_the_system_and_the_button(address):
    with open_browser(color_scheme="dark") as browser:
        page = browser.new_page()
        page.goto(address)
        assert background_of(page) < 60
        page.locator("#theme").click()
        assert background_of(page) > 200
        page.reload()
        assert background_of(page) > 200  # the choice is kept
        page.emulate_media(media="print", color_scheme="dark")
        page.locator("#theme").evaluate("button => document.documentElement.removeAttribute('data-theme')")
        assert background_of(page) > 200  # paper is white


def test_the_map_answers_keys_and_finds_chunks(seen):
    page = seen.page
    page.locator("#plane svg").focus()
    before = page.locator("#plane svg").get_attribute("aria-label")
    page.keyboard.press("ArrowRight")
    after = page.locator("#plane svg").get_attribute("aria-label")
    page.keyboard.press("ArrowLeft")
    assert before != after
    page.locator("#find").fill("the")
    assert (
        page.locator("#plane circle.found").count() == int(page.locator("#found").inner_text().split()[0]) > 0
    )


def test_a_latent_is_denoised_as_it_happens(seen):
    page = seen.page
    steps = page.locator("#frames tr").count()
    page.locator("#play").click()
    assert page.locator("#play").get_attribute("aria-pressed") == "true"
    at = lambda: int(page.locator("#step").input_value())  # noqa: E731
    until(lambda: 1 < at() < steps - 1)
    assert "step " in page.locator("#at").inner_text()
    until(lambda: at() == steps - 1)
    until(lambda: page.locator("#play").get_attribute("aria-pressed") == "false")
    last = page.locator("#frames tr").last
    assert page.locator("#becomes").inner_text() == last.locator("td").last.inner_text()
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#frames tr[aria-current='true'] td").first.inner_text() == str(steps - 2)
    page.locator("#which").select_option("1")
    assert page.locator("#at").inner_text().startswith("step 0 of")


def test_curves_change_their_axis(seen):
    page = seen.page
    assert "minutes" in page.locator(".charts svg:visible").first.text_content()
    page.locator("[data-axis='characters']").click()
    assert "characters read" in page.locator(".charts svg:visible").first.text_content()


@pytest.mark.parametrize("width", [360, 760, 1600])
def test_it_fits_the_width_of_the_window(address, width):
    with open_browser(viewport={"width": width, "height": 800}) as browser:
        page = browser.new_page()
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
