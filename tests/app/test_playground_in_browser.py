"""The playground in a real browser, served by a real process: writes, redraws, holds, chooses, stops; two tabs."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from browser import Seen, background_of, open_browser, until
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address():
    # the shipped model: one that has hardly been trained may end its document at any chunk
    command = [sys.executable, "-m", "hldm", "playground", "--run", "small", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        assert "is at http://127.0.0.1:" in line
        yield line.split(" is at ")[1].split()[0]
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=20)
        assert process.returncode == 0 and "the playground is closed" in said and complained == ""


@pytest.fixture
def browser():
    with open_browser() as found:
        yield found


@pytest.fixture
def seen(browser, address):
    found = Seen(browser.new_page())
    found.page.goto(address)
    yield found
    assert found.errors == []
    assert all(request.startswith(address) for request in found.requests)


def write(page, count: int) -> None:
    page.locator("#count").fill(str(count))
    page.locator("#write").click()
    until(lambda: page.locator("#stop").is_disabled())


def texts(page) -> list[str]:
    return page.locator(".chunk").all_text_contents()


def test_it_writes_chunk_by_chunk(seen):
    page = seen.page
    page.locator("#count").fill("200")
    page.locator("#write").click()
    until(lambda: page.locator(".chunk").count() > 2)
    assert page.locator("#write").is_disabled()  # it is still at it: chunks come one by one
    until(lambda: page.locator("#stop").is_disabled())
    count = page.locator(".chunk").count()
    assert f"{count} chunks" in page.locator("#said").inner_text() and page.locator("#wrong").is_hidden()
    assert count == 200 or page.locator(".end").count() == 1
    assert page.locator("#shown-prompt").inner_text() == "And the king said"


def test_a_chunk_is_redrawn_and_the_text_goes_on_from_there(seen):
    page = seen.page
    write(page, 12)
    before = texts(page)
    page.locator(".chunk").nth(4).click()
    assert page.locator("#chosen").is_visible() and page.locator("#bars .bar").count() == 4
    page.locator("#onward").uncheck()
    page.keyboard.press("r")
    until(lambda: page.locator("#stop").is_disabled() and page.locator(".chunk").count() == 5)
    after = texts(page)
    assert after[:4] == before[:4]
    for _ in range(5):  # one draw may fall on the same text
        if after[4] != before[4]:
            break
        page.keyboard.press("r")
        until(lambda: page.locator("#stop").is_disabled() and page.locator(".chunk").count() == 5)
        after = texts(page)
    assert after[4] != before[4]
    write(page, 3)
    assert texts(page)[:5] == after and page.locator(".chunk").count() >= 6


def test_a_latent_is_held_and_released(seen):
    page = seen.page
    write(page, 3)
    page.locator(".chunk").first.click()
    page.keyboard.press("h")
    assert page.locator("#held").is_visible()
    write(page, 4)
    assert page.locator(".held-one").count() >= 4 or page.locator(".end").count()
    page.locator("#release").click()
    assert page.locator("#held").is_hidden()
    held = page.locator(".held-one").count()
    if not page.locator(".end").count():
        write(page, 2)
        assert page.locator(".held-one").count() == held


def test_the_next_chunk_is_chosen_among_candidates(seen):
    page = seen.page
    page.locator("#many").fill("5")
    page.locator("#choose").click()
    until(lambda: page.locator("#candidates button").count() == 5)
    assert page.evaluate("document.activeElement.parentElement.id") == "candidates"
    wanted = page.locator("#candidates button").nth(2).inner_text()
    page.locator("#candidates button").nth(2).click()
    assert [text.replace(" ", "␣").replace("\n", "↵") for text in texts(page)] == [wanted]
    assert page.locator("#candidates").is_hidden()


def test_escape_stops_the_writing(seen):
    page = seen.page
    page.locator("#count").fill("400")
    page.locator("#steps").fill("60")
    page.keyboard.press("Control+Enter")
    until(lambda: page.locator(".chunk").count() > 1)
    page.keyboard.press("Escape")
    until(lambda: page.locator("#stop").is_disabled())
    count = page.locator(".chunk").count()
    assert count < 400 and "stopped after" in page.locator("#said").inner_text()
    assert page.locator("#wrong").is_hidden()


def test_two_tabs_write_at_once(browser, address):
    pages = [browser.new_page() for _ in range(2)]
    for page, prompt in zip(pages, ("In the beginning", "And it came"), strict=True):
        page.goto(address)
        page.locator("#prompt").fill(prompt)
        page.locator("#count").fill("60")
    for page in pages:
        page.locator("#write").click()
    for page in pages:
        until(lambda page=page: page.locator("#stop").is_disabled())
        assert page.locator("#wrong").is_hidden()
        assert page.locator(".chunk").count() == 60 or page.locator(".end").count() == 1
    # a third, which is closed in the middle, leaves the others alone
    third = browser.new_page()
    third.goto(address)
    third.locator("#count").fill("400")
    third.locator("#write").click()
    third.close()
    pages[0].locator("#clear").click()
    write(pages[0], 3)
    assert pages[0].locator(".chunk").count() >= 1 and pages[0].locator("#wrong").is_hidden()


def test_what_is_too_long_or_out_of_range_is_said_on_the_page(browser, address):
    seen = Seen(browser.new_page())
    page = seen.page
    page.goto(address)
    page.locator("#prompt").fill("long " * 60_000)
    page.locator("#write").click()
    until(lambda: page.locator("#wrong").is_visible())
    assert "take a shorter text" in page.locator("#wrong").inner_text()
    page.locator("#prompt").fill("short")
    page.locator("#top_p").fill("7")
    page.locator("#write").click()
    until(lambda: "top-p" in page.locator("#wrong").inner_text())
    page.locator("#top_p").fill("0.9")
    write(page, 2)
    assert page.locator("#wrong").is_hidden() and page.locator(".chunk").count() >= 1
    # the browser itself notes the 413 on its console; nothing else is wrong
    assert all("413" in error for error in seen.errors)


def test_another_sites_page_cannot_write_here(browser, address, tmp_path):
    (tmp_path / "evil.html").write_text("<title>evil</title>")
    page = browser.new_page()
    page.goto((tmp_path / "evil.html").as_uri())
    json = "{'Content-Type': 'application/json'}"
    for options in ("mode: 'no-cors', body: '{}'", f"headers: {json}, body: '{{}}'"):
        script = f"""async (address) => {{
            try {{ return (await fetch(address + 'write', {{method: 'POST', {options}}})).type; }}
            catch {{ return 'failed'; }}
        }}"""
        assert page.evaluate(script, address) in ("failed", "opaque")  # nothing of it can be read


def test_both_themes_and_a_narrow_window(address):
    with open_browser(color_scheme="dark", viewport={"width": 380, "height": 800}) as browser:
        page = browser.new_page()
        page.goto(address)
        assert background_of(page) < 60
        page.locator("#theme").click()
        assert background_of(page) > 200
        write(page, 10)
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
