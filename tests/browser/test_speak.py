"""Speak: what a person hears, sees and keeps."""

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import TIMEOUT_MS, OpenTab
from tests.system.service import Service, eventually

TEXT = "The harbour was quiet before the ferries came."
LONG = "Somebody had left a radio on, and it played to the gulls. " * 1600

SAMPLES = """async index => {
    const open = indexedDB.open("speech", 1);
    await new Promise(done => { open.onsuccess = done; });
    const all = open.result.transaction("speeches").objectStore("speeches").getAll();
    await new Promise(done => { all.onsuccess = done; });
    const {blob} = all.result.at(index);
    const buffer = await new OfflineAudioContext(1, 1, 24000).decodeAudioData(await blob.arrayBuffer());
    const samples = buffer.getChannelData(0);
    return {seconds: buffer.duration, loudest: samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0)};
}"""
"""The length and the loudest sample of a kept speech."""


def speak(page: Page, text: str = TEXT, **fields: str) -> None:
    """Write the text, set fields, and press Ctrl+Enter."""
    for name, value in fields.items():
        page.locator(f"select[name={name}]").select_option(value)
    page.locator("[name=input]").fill(text)
    page.locator("[name=language]").press("Control+Enter")


def phase(page: Page, name: str) -> None:
    """Wait until the player says so."""
    page.locator(f".player[data-phase={name}]").wait_for()


def position_of(page: Page) -> float:
    """The place of the player, in seconds."""
    return float(page.locator(".wave").get_attribute("aria-valuenow") or 0)


def reaches(page: Page, seconds: float) -> None:
    """Wait until more than so much was heard. Playwright's own wait would need eval, which the policy forbids."""
    eventually(lambda: position_of(page) > seconds, TIMEOUT_MS / 1000, f"{seconds} s were heard", pause_s=0.1)


def test_speech_is_heard(tab: OpenTab) -> None:
    """By WebAudio, by MediaSource and as a file: the clock runs to the end, and what was played is not silent."""
    page = tab().open()
    # The elements that play are not in the document.
    page.evaluate("""() => { const play = HTMLMediaElement.prototype.play;
        HTMLMediaElement.prototype.play = function () { window.element = this; return play.call(this); }; }""")
    for number, audio_format in enumerate(["wav", "mp3", "ulaw"], 1):
        speak(page, f"Take {number}.", response_format=audio_format)
        expect(page.locator(".history li")).to_have_count(number)
        phase(page, "done")
        reaches(page, 0.3)
        if audio_format != "wav":
            assert page.evaluate("element.currentTime") > 0.3
            assert page.evaluate("element.src").startswith("blob:")
        expect(page.get_by_role("button", name="Play", exact=True)).to_be_visible()  # it has come to its end
        seconds = float(page.locator(".wave").get_attribute("aria-valuemax") or 0)
        assert position_of(page) == pytest.approx(seconds, abs=0.2)
        assert 0.5 < seconds < 3
        for fact in ("first-audio", "length", "model"):
            expect(page.locator(f"[data-fact={fact}] dd")).not_to_be_empty()
        expect(page.locator(".player .phase")).to_have_text("Said in full")
        if audio_format != "ulaw":  # which no browser decodes without a header
            kept = page.evaluate(SAMPLES, -1)
            assert kept["seconds"] == pytest.approx(seconds, abs=0.2)
            assert kept["loudest"] > 0.05


def test_it_plays_while_it_is_made(tab: OpenTab, open_service: Service) -> None:
    """A long speech is heard before it is whole; a seek, a pause and the keyboard move what is heard."""
    page = tab().open()
    speak(page, LONG)
    phase(page, "speaking")
    reaches(page, 0.2)
    assert page.locator(".player").get_attribute("data-phase") == "speaking"
    page.get_by_role("button", name="Pause").click()
    wave = page.locator(".wave")
    wave.press("Home")
    assert position_of(page) == 0
    wave.press("ArrowRight")
    expect(wave).to_have_attribute("aria-valuenow", "2.00")
    page.get_by_role("button", name="Play", exact=True).click()
    reaches(page, 2.1)
    page.get_by_role("link", name="Voices").click()
    page.get_by_role("heading", name="Voices", exact=True).wait_for()
    page.get_by_role("link", name="Speak", exact=True).click()
    page.get_by_role("button", name="Stop").click()
    phase(page, "stopped")
    expect(page.get_by_role("button", name="Speak", exact=True)).to_be_visible()
    eventually(lambda: open_service.open_requests() == 0, 60, "the slot is free")
    assert open_service.stats()["requests"]["cancelled"] >= 1


def test_a_refusal_is_shown_at_its_field(tab: OpenTab) -> None:
    """In words, with the field marked and focused; a field under "more" is opened. The next try clears it.

    Characters are counted as the service counts them: an emoji is one.
    """
    page = tab().open()
    page.locator("[name=input]").fill("a😀b")
    expect(page.locator(".count .figures")).to_have_text("3 / 100,000")
    page.locator("[name=input]").fill("x" * 100_001)
    expect(page.locator(".count.over")).to_contain_text("1 characters too many")
    speak(page, "   ")
    text = page.locator("[name=input]")
    expect(text).to_have_attribute("aria-invalid", "true")
    expect(text).to_be_focused()
    expect(page.locator("#text-about")).to_contain_text("speakable")
    page.get_by_text("More", exact=True).click()
    page.evaluate("""() => { const select = document.querySelector('[name=sample_rate]');
        select.add(new Option('1', '1')); }""")
    page.locator("[name=sample_rate]").select_option("1")
    page.get_by_text("More", exact=True).click()
    speak(page)
    rate = page.locator("[name=sample_rate]")
    expect(rate).to_have_attribute("aria-invalid", "true")
    expect(rate).to_be_visible()
    described = rate.get_attribute("aria-describedby")
    expect(page.locator(f"#{described}")).to_contain_text("sample_rate")
    rate.select_option("8000")
    speak(page)
    phase(page, "done")
    expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_history_survives_a_reload(tab: OpenTab) -> None:
    """Speech can be heard again, used again and deleted; the draft and the settings are there, too."""
    page = tab().open()
    speak(page, "First words.")
    expect(page.locator(".history li")).to_have_count(1)
    page.get_by_role("button", name="English · American woman.").click()
    page.get_by_role("dialog").get_by_role("searchbox").fill("scottish")
    page.get_by_role("dialog").get_by_role("button", name="Callum English").click()
    speak(page, "Second words.", response_format="mp3")
    expect(page.locator(".history li")).to_have_count(2)
    page.reload()
    expect(page.locator(".history li")).to_have_count(2)
    expect(page.locator("[name=input]")).to_have_value("Second words.")
    expect(page.locator("button[name=voice]")).to_contain_text("Callum")
    page.get_by_role("button", name="Play again: First words.").click()
    reaches(page, 0.2)
    page.get_by_role("button", name="Use these settings again: First words.").click()
    expect(page.locator("[name=input]")).to_have_value("First words.")
    expect(page.locator("[name=response_format]")).to_have_value("wav")
    page.get_by_role("button", name="Delete: First words.").click()
    expect(page.locator(".history li")).to_have_count(1)
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("dialog").get_by_role("button", name="Clear").click()
    expect(page.locator(".history")).to_have_count(0)


def test_download_and_programs(tab: OpenTab, open_service: Service) -> None:
    """The file is whole, and each program is the request that was spoken."""
    opened = tab()
    opened.context.grant_permissions(["clipboard-read", "clipboard-write", "microphone"])
    page = opened.open()
    speak(page, 'It\'s said "so".')
    phase(page, "done")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).click()
    assert download.value.suggested_filename == "speech.wav"
    content = download.value.path().read_bytes()
    assert int.from_bytes(content[4:8], "little") + 8 == len(content)
    programs: dict[str, Any] = {}
    for name in ("curl", "Python", "JavaScript"):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        programs[name] = page.evaluate("navigator.clipboard.readText()")
        assert open_service.url in programs[name]
    assert '\'{"model":"espeak-ng","input":"It\'\\\'\'s said' in programs["curl"]
    compile(programs["Python"], "copied", "exec")
    assert re.search(r'response_format="wav"', programs["Python"])
    assert "await fetch(" in programs["JavaScript"]


def test_waiting_is_shown(tab: OpenTab) -> None:
    """A place in the queue, and a load with its progress, as the service tells them."""
    page = tab().open()
    about = {"status": "queued", "model": "espeak-ng", "queue_position": 3}
    model = {"state": "resident", "detail": ""}
    page.route("**/v1/audio/speech", lambda _: None)  # no answer
    page.route("**/v1/audio/speech/*", lambda route: route.fulfill(json=about))
    page.route("**/v1/models/*", lambda route: route.fulfill(json=model))
    speak(page)
    phase(page, "queued")
    expect(page.locator(".phase")).to_contain_text("Place 3")
    model.update(state="loading", detail="downloading, 38 % of 4.5 GB")
    phase(page, "loading")
    expect(page.locator(".phase")).to_contain_text("38 %")
    expect(page.locator("progress")).to_have_attribute("value", "38")
    page.get_by_role("button", name="Stop").click()
    phase(page, "stopped")


def test_live(tab: OpenTab, open_service: Service) -> None:
    """Clauses are heard while the next ones are typed; what was there before is not; "Finish" says the rest."""
    page = tab().open()
    page.locator("[name=input]").fill("This is old, and long enough to be noticed if it were spoken again by mistake. ")
    page.get_by_role("button", name="Live").click()
    text = page.locator("[name=input]")
    expect(text).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.type("One two three, four")
    reaches(page, 0.1)
    heard = float(page.locator(".wave").get_attribute("aria-valuemax") or 0)
    assert heard < 3, "the old text is spoken, too"
    page.keyboard.type(" five six.")
    page.get_by_role("button", name="Finish").click()
    phase(page, "done")
    assert float(page.locator(".wave").get_attribute("aria-valuemax") or 0) > heard
    expect(page.get_by_role("button", name="Speak", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Download", exact=True)).to_be_enabled()
    eventually(lambda: open_service.open_requests() == 0, 60, "all is said")
