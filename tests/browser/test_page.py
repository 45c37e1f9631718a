"""The whole page: keys, themes, paths, accessibility, and the size of a first visit."""

import re
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import ADMIN_KEY, KEY, OpenTab
from tests.browser.test_speak import phase, speak

FIRST_LOAD_BYTES = 300_000

STORED = """async () => {
    const rows = [];
    for (const {name} of await indexedDB.databases()) {
        const open = indexedDB.open(name);
        await new Promise(done => { open.onsuccess = done; });
        for (const store of open.result.objectStoreNames) {
            const all = open.result.transaction(store).objectStore(store).getAll();
            await new Promise(done => { all.onsuccess = done; });
            rows.push(...all.result);
        }
        open.result.close();
    }
    return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, rows]);
}"""
"""Everything that the browser keeps for the page."""


def test_keys_below_a_path(tab: OpenTab, below_a_path: str) -> None:
    """A service with keys behind a proxy that shows it below a path: the key is asked for, used, and kept nowhere."""
    opened = tab(below_a_path)
    page = opened.page
    page.goto(below_a_path)
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("API key")).to_be_focused()
    dialog.get_by_label("API key").fill("wrong")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog.get_by_role("alert")).to_contain_text("does not know this API key")
    dialog.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("select[name=model]")).to_contain_text("eSpeak")
    speak(page)
    phase(page, "done")
    expect(page.locator(".history li")).to_have_count(1)
    stored = page.evaluate(STORED)
    assert "harbour" in stored
    for secret in (KEY, ADMIN_KEY):
        assert secret not in stored
    page.reload()
    expect(dialog.get_by_label("API key")).to_be_visible()
    dialog.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Forget the key").click()
    speak(page)
    expect(dialog.get_by_label("API key")).to_be_visible()
    page.keyboard.press("Escape")
    phase(page, "failed")
    expect(page.locator(".player .phase")).to_contain_text("needs an API key")
    page.get_by_role("link", name="API").click()
    expect(page).to_have_url(re.compile(r"/tts/docs$"))


def test_first_load(tab: OpenTab) -> None:
    """A browser fetches few bytes before the page can be used; a second visit fetches no file again."""
    opened = tab(own={})
    sizes: list[int] = []
    opened.page.on("requestfinished", lambda request: sizes.append(request.sizes()["responseBodySize"]))
    opened.open()
    assert 10_000 < sum(sizes) <= FIRST_LOAD_BYTES
    opened.page.goto("about:blank")
    opened.open()
    fetched = """performance.getEntriesByType("resource").filter(entry => entry.name.includes("/page/"))
        .map(entry => entry.transferSize)"""
    again = opened.page.evaluate(fetched)
    assert (len(again) > 10, sum(again)) == (True, 0)


def test_by_keyboard(tab: OpenTab) -> None:
    """The first Tab leads past the bar, and a late answer moves no focus; a dialog gives the focus back."""
    opened = tab()
    held: list[Route] = []

    def hold(route: Route) -> None:
        if route.request.resource_type == "fetch":
            held.append(route)
        else:
            route.continue_()

    opened.page.route(opened.url, hold)
    page = opened.open("voices")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    held.pop().continue_()
    expect(page).to_have_title(re.compile("^Voices ."))
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.keyboard.press("Tab")
    button = page.get_by_role("button", name="Clone a voice")
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(button).to_be_focused()


def test_themes(tab: OpenTab) -> None:
    """As the system has it, and as the person has chosen, which a reload keeps."""
    opened = tab()
    opened.page.emulate_media(color_scheme="dark")
    page = opened.open()

    def background() -> Any:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark = background()
    for name, expected in (("light", False), ("dark", True)):
        page.get_by_role("button", name=re.compile("^Theme")).click()
        assert (background() == dark) is expected, name
        page.reload()
        assert (background() == dark) is expected, name


TRANSITIONS_END = """async () => {
    const transitions = document.getAnimations().filter(one => one instanceof CSSTransition);
    await Promise.allSettled(transitions.map(one => one.finished));
}"""


def faults(page: Page) -> list[str]:
    """The serious faults of accessibility that axe finds once no colour changes any more."""
    page.evaluate(TRANSITIONS_END)
    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:200]} {node.get('failureSummary', '')}"
        for fault in found
        if fault["impact"] in {"serious", "critical"}
        for node in fault["nodes"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility(tab: OpenTab, theme: Any) -> None:
    """Each view with something in it, and the dialogs; what looks alike in both themes is looked at in one."""
    opened = tab()
    opened.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    page = opened.open()
    speak(page, "Hello.")
    expect(page.locator(".history li")).to_have_count(1)
    page.get_by_text("More", exact=True).click()
    speak(page, " ")
    expect(page.locator("[aria-invalid=true]")).to_be_visible()
    assert faults(page) == []
    page.locator("button[name=voice]").click()
    expect(page.get_by_role("dialog").locator("li").first).to_be_visible()
    if theme == "light":
        assert faults(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Voices").click()
    expect(page.locator(".voice-list li").first).to_be_visible()
    if theme == "dark":
        assert faults(page) == []
    page.get_by_role("button", name="Clone a voice").click()
    page.get_by_role("button", name="Record a consent").click()
    assert faults(page) == []


def test_a_phone(tab: OpenTab) -> None:
    """Nothing is wider than the screen, and the tabs are at the bottom of it."""
    page = tab(own={"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}).open()
    speak(page, "Hello.")
    expect(page.locator(".history li")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("link", name="Voices").click()
    expect(page.locator(".voice-list li").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.get_by_role("navigation").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] == pytest.approx(740, abs=2)
