"""Voices: hear them, clone them from a file and from the microphone, rename, move and delete them."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import NAMED_KEY, TIMEOUT_MS, OpenTab
from tests.system.service import Service, eventually


def saved(service: Service) -> dict[str, dict[str, object]]:
    """The saved voices by name."""
    return {voice["name"]: voice for voice in service.http.get("/v1/audio/voices").json()["uploaded_voices"]}


def clone(page: Page, name: str, *, file: Path | None = None) -> tuple[str, float]:
    """Fill in the dialog, with a file or two seconds of the microphone; the voice is in the list then.

    The name and the length of the recording as the dialog has shown them.
    """
    page.get_by_role("button", name="Clone a voice").click()
    dialog = page.get_by_role("dialog")
    if file is None:
        dialog.get_by_role("button", name="Record", exact=True).click()
        # Chromium's fake microphone beeps once a second.
        expect(dialog.get_by_role("timer")).to_contain_text(re.compile(r"([2-9]|\d\d)\.\d s /"))
        dialog.get_by_role("button", name="Stop").click()
    else:
        dialog.locator("input[type=file]").set_input_files(file)
    expect(dialog.get_by_label("The recording")).to_be_visible()
    ((shown, seconds),) = re.findall(r"(\S+) · (\d+\.\d) s", dialog.locator(".recording").inner_text())
    dialog.get_by_label("What is said in it").fill("A story." if file else "")
    dialog.get_by_label("Name", exact=True).fill(name)
    dialog.get_by_label("This is my voice").check()
    dialog.get_by_role("button", name="Save the voice").click()
    expect(dialog).to_have_count(0)
    expect(page.locator("[data-voice]", has_text=name)).to_be_visible()
    return shown, float(seconds)


def test_previews_and_use(tab: OpenTab) -> None:
    """A voice is found and heard; the second time it comes from this browser. "Use" brings it to Speak."""
    page = tab().open("voices")
    made = []
    page.on("request", lambda request: made.append(request.url) if request.method == "POST" else None)
    page.get_by_role("searchbox").fill("scottish")
    expect(page.locator(".voice-list li")).to_have_count(1)
    page.evaluate("""() => { const play = HTMLMediaElement.prototype.play; window.plays = 0;
        HTMLMediaElement.prototype.play = function () {
            window.plays += 1; window.element = this; this.playbackRate = 4; return play.call(this); }; }""")
    for heard in ("plays === 1 && element.ended", "plays === 2 && element.ended"):
        page.get_by_role("button", name="Listen to Callum").click()
        eventually(lambda script=heard: page.evaluate(script), TIMEOUT_MS / 1000, "it is heard", pause_s=0.1)
    assert len(made) == 1
    page.get_by_role("button", name="Speak with Callum").click()
    expect(page.locator("button[name=voice]")).to_contain_text("Callum")


def test_from_a_file_to_another_name(tab: OpenTab, open_service: Service, recording: Path, tmp_path: Path) -> None:
    """Clone, refuse a taken name at its field, rename, export, delete with a question, import."""
    page = tab().open("voices")
    unknown = tmp_path / "grandma.voicemail"  # the page makes a WAV of what it does not know
    unknown.write_bytes(recording.read_bytes())
    assert clone(page, "Grandma", file=unknown)[0] == "grandma.voicemail.wav"
    assert saved(open_service)["Grandma"]["in_context"] is True
    page.get_by_role("button", name="Rename Grandma").click()
    name = page.get_by_role("dialog").get_by_label("Name")
    name.fill("alloy")
    page.get_by_role("dialog").get_by_role("button", name="Rename").click()
    expect(name).to_have_attribute("aria-invalid", "true")
    name.fill("Nonna")
    page.get_by_role("dialog").get_by_role("button", name="Rename").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export Nonna").click()
    assert download.value.suggested_filename == "Nonna.voice"
    download.value.save_as(tmp_path / "a.voice")
    page.get_by_role("button", name="Delete Nonna").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert set(saved(open_service)) == {"Nonna"}
    page.get_by_role("button", name="Delete Nonna").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("[data-voice]")).to_have_count(0)
    page.get_by_role("button", name="Import").click()
    page.get_by_role("dialog").locator("[name=file]").set_input_files(tmp_path / "a.voice")
    page.get_by_role("dialog").get_by_label("Another name").fill("Nonna Maria")
    page.get_by_role("dialog").get_by_role("button", name="Import").click()
    expect(page.locator("[data-voice]")).to_contain_text("Nonna Maria")
    open_service.http.delete("/v1/audio/voices/Nonna Maria").raise_for_status()


def test_recordings(tab: OpenTab, open_service: Service, tmp_path: Path, recording: Path) -> None:
    """One of the microphone is one that the service takes, and as long as it was shown.

    The page says that one is too short before anything is sent; a file without sound is refused at its field.
    """
    page = tab().open("voices")
    _, seconds = clone(page, "Beep")
    assert saved(open_service)["Beep"]["seconds"] == pytest.approx(seconds, abs=1.5)
    open_service.http.delete("/v1/audio/voices/Beep").raise_for_status()
    page.get_by_role("button", name="Clone a voice").click()
    dialog = page.get_by_role("dialog")
    short = tmp_path / "short.wav"
    short.write_bytes(recording.read_bytes()[: 44 + 2 * 12_000])
    dialog.locator("input[type=file]").set_input_files(short)
    expect(dialog.get_by_role("alert")).to_contain_text("It must have 1 to 60 s")
    expect(dialog.get_by_role("button", name="Save the voice")).to_be_disabled()
    wrong = tmp_path / "wrong.wav"
    wrong.write_bytes(b"no audio" * 1000)
    dialog.locator("input[type=file]").set_input_files(wrong)
    dialog.get_by_label("Name", exact=True).fill("Nobody")
    dialog.get_by_label("This is my voice").check()
    dialog.get_by_role("button", name="Save the voice").click()
    expect(dialog.get_by_role("alert")).to_be_visible()
    expect(dialog.locator("input[type=file]")).to_have_attribute("aria-invalid", "true")


def test_consents(tab: OpenTab, keyed_service: Service, recording: Path) -> None:
    """A service that requires a consent has it recorded in the dialog, and the clone names it.

    The voice is for its key alone, until its owner lets every key speak with it.
    """
    opened = tab(keyed_service.url + "/")
    page = opened.page
    page.goto(f"{opened.url}#/voices")
    page.get_by_role("dialog").get_by_label("API key").fill(NAMED_KEY)
    page.get_by_role("button", name="Use this key").click()
    page.get_by_role("button", name="Clone a voice").click()
    dialog = page.get_by_role("dialog")
    dialog.locator("input[type=file]").set_input_files(recording)
    dialog.get_by_label("Name", exact=True).fill("Grandma")
    dialog.get_by_label("This is my voice").check()
    dialog.get_by_role("button", name="Save the voice").click()
    expect(dialog.get_by_label("Recorded consent")).to_have_attribute("aria-invalid", "true")
    dialog.get_by_role("button", name="Record a consent").click()
    dialog.get_by_label("Speaker", exact=True).fill("Maria")
    dialog.locator(".nested input[type=file]").set_input_files(recording)
    dialog.get_by_role("button", name="Keep this consent").click()
    expect(dialog.get_by_label("Recorded consent")).to_contain_text("Maria")
    dialog.get_by_role("button", name="Save the voice").click()
    expect(page.locator("[data-voice]")).to_contain_text("Grandma")
    expect(page.locator("[data-voice]")).to_contain_text("for maria alone")
    page.get_by_role("button", name="Rename Grandma").click()
    dialog.get_by_label("Every key may speak with it").check()
    dialog.get_by_role("button", name="Rename").click()
    expect(page.locator("[data-voice]")).not_to_contain_text("for maria alone")


DESIGNER = {
    "id": "qwen3-tts-1.7b-voicedesign",
    "name": "A designer",
    "task": "VoiceDesign",
    "aliases": [],
    "voices": [],
}


def test_a_design_is_heard_before_it_is_saved(tab: OpenTab, recording: Path) -> None:
    """The description is spoken and kept, and what was heard is saved, not made anew.

    The model is too large for this test: its answers are ours, and the requests are what the page really sends.
    """
    page = tab().open()
    sent: list[dict[str, object]] = []
    facts = {"languages": ["english"], "state": "resident", "instructions": True, "sampling": True}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [DESIGNER | facts], "models": []}))
    headers = {"x-model": DESIGNER["id"], "x-sample-rate": "24000", "x-audio-url": "/v1/audio/speech/5f/audio"}

    def speech(route: object) -> None:
        sent.append(route.request.post_data_json)  # type: ignore[attr-defined]
        route.fulfill(body=recording.read_bytes(), headers=headers)  # type: ignore[attr-defined]

    page.route("**/v1/audio/speech", speech)
    page.reload()
    page.get_by_role("link", name="Voices").click()
    page.get_by_role("button", name="Design a voice").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Save this voice")).to_be_disabled()
    dialog.get_by_label("Description of the voice").fill("An old sailor.")
    dialog.get_by_role("button", name="Listen").click()
    dialog.get_by_role("button", name="Listen to another one").wait_for()
    assert (sent[0]["instructions"], sent[0]["store"]) == ("An old sailor.", True)
    for _ in range(2):
        dialog.locator(".player button.round").click()  # play or pause, which must not send the form
    dialog.get_by_label("Name", exact=True).fill("Sailor")
    page.route("**/v1/audio/voices", lambda route: (sent.append(route.request.post_data_json), route.fulfill(json={})))
    dialog.get_by_role("button", name="Save this voice").click()
    expect(dialog).to_have_count(0)
    new = sent[1]
    assert (new["audio_id"], new["prompt"], new["name"], new["type"]) == ("5f", "An old sailor.", "Sailor", "prompt")
    assert new["script_hint"] == sent[0]["input"]
