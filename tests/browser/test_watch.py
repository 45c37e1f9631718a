"""Watch: a service that loads, offloads, dies and comes back, as an admin sees it; and what it costs a browser."""

import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import ADMIN_KEY, OpenTab
from tests.browser.test_page import STORED, faults
from tests.system.residency_service import SMALL, checkpoints, model_paths
from tests.system.service import START_TIMEOUT_S, Service, eventually, running_service

MODEL = f"[data-model='{SMALL}']"

FED = """
const real = window.fetch;
window.fetch = (url, options) => {
    if (!String(url).endsWith("admin/events")) return real(url, options);
    const stream = new ReadableStream({start: controller => {
        window.feed = controller;
        options.signal.addEventListener("abort", () => controller.error(options.signal.reason));
    }});
    return Promise.resolve(new Response(stream, {headers: {"Content-Type": "text/event-stream"}}));
};
"""
"""In the place of the stream of events: one that the test fills."""

BURST = """async ([text, count]) => {
    const encoder = new TextEncoder();
    for (let i = 0; i < count; i += 1) {
        const event = JSON.parse(text);
        event.stats.running = i % 48;
        event.stats.audio_s += i;
        const stream = {model: "espeak-ng", client: "c", state: "generating", age_s: 1, audio_s: i, buffered_s: 0};
        event.stats.streams = Array.from({length: i % 10}, (_, n) => ({...stream, id: `${i}-${n}.x`}));
        for (const model of event.vram.models) model.state = ["resident", "loading"][i % 2];
        feed.enqueue(encoder.encode(`data: ${JSON.stringify(event)}\\n\\n`));
        await new Promise(resolve => { const {port1, port2} = new MessageChannel();
            port1.onmessage = resolve; port2.postMessage(0); });
    }
}"""
"""Events one after the other, each with other requests and other states, as fast as the page takes them."""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with an admin key and a small model."""
    paths = model_paths({SMALL: checkpoints()[SMALL]})
    settings = {"MODEL_PATHS": paths, "ADMIN_KEYS": ADMIN_KEY, "CLEANUP_INTERVAL": 0.2, "IDLE_TIMEOUT": 600}
    with running_service(tmp_path_factory.mktemp("watched"), **settings) as service:
        service.http.headers["authorization"] = f"Bearer {ADMIN_KEY}"
        yield service


def watch(page: Page, url: str) -> None:
    """Open the view, and wait until the first event is there."""
    page.goto(f"{url}#/watch")
    page.locator(".tiles").wait_for()


def happened(page: Page, kind: str, state: str = "") -> None:
    """Wait until this is in the list of what happened."""
    expect(page.locator(f"[data-activity={kind}]" + (f"[data-state={state}]" if state else "")).first).to_be_visible()


def test_a_load_and_an_offload(tab: OpenTab, watched: Service) -> None:
    """The key is asked for and kept nowhere; buttons act, and each change shows by itself."""
    page = tab(watched.url + "/").page
    page.goto(f"{watched.url}/#/watch")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Admin key").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_be_visible()
    dialog.get_by_label("Admin key").fill(ADMIN_KEY)
    page.keyboard.press("Enter")
    page.locator(".tiles").wait_for()
    assert ADMIN_KEY not in page.evaluate(STORED)

    expect(page.locator(MODEL)).to_have_attribute("data-state", "absent")
    page.get_by_role("button", name=f"Load {SMALL}").click()
    expect(page.locator(MODEL)).to_have_attribute("data-state", "resident")
    happened(page, "model", "resident")
    expect(page.locator(f"{MODEL} [data-purpose=weights]")).to_contain_text("MiB")
    expect(page.locator(".watch-memory .legend")).to_contain_text(SMALL)
    expect(page.locator(".watch-memory .device").get_by_text("budget", exact=False)).to_have_count(1)  # no figure twice
    page.get_by_role("button", name=f"Pin {SMALL}", exact=True).click()
    expect(page.locator(f"{MODEL} .model-head")).to_contain_text("pinned")
    page.get_by_role("button", name=f"Unpin {SMALL}").click()
    page.get_by_label(f"How long {SMALL} stays unused").select_option("5m")
    expect(page.locator(f"{MODEL} .idle")).to_contain_text("of 5:00")

    answer = watched.speech("Hello.", model=SMALL, max_new_tokens=2, keep_alive=0, response_format="pcm")
    assert answer.status_code == 200
    expect(page.locator(MODEL)).to_have_attribute("data-state", "offloaded")
    happened(page, "model", "offloaded")
    expect(page.locator("[data-requests=finished] dd")).to_have_text("1")
    expect(page.locator(f"[data-performance='{SMALL}'] caption")).to_contain_text("1 complete stream")

    page.get_by_role("button", name="Clean up now").click()
    expect(page.locator("[data-cleanup]")).not_to_have_attribute("data-cleanup", "")
    page.locator(".watch-settings summary").click()
    expect(page.locator(".settings-list")).to_contain_text("idle_timeout")
    page.locator(".watch-caches summary").click()
    page.locator("[data-cache=catalog]").get_by_role("button").click()
    expect(page.locator(".watch-caches [role=alert]")).to_have_count(0)
    page.get_by_role("button", name="Forget the key").click()
    expect(dialog.get_by_label("Admin key")).to_be_visible()


def test_requests_and_a_death(tab: OpenTab, open_service: Service) -> None:
    """A running request shows with its audio, which grows, and without its text; charts have their values in words.

    A GPU worker that was killed, and the one that follows it, show by themselves.
    """
    page = tab().page
    watch(page, open_service.url + "/")
    with open_service.stream("Nobody may read this here. " * 400, response_format="pcm") as answer:
        pieces = answer.iter_raw()
        next(pieces)
        row = page.locator("tr[data-stream]")
        expect(row).to_have_count(1)
        expect(row).to_contain_text("espeak-ng")
        assert "Nobody may" not in page.content()
    expect(page.locator("tr[data-stream]")).to_have_count(0)
    expect(page.get_by_role("img", name=re.compile("^Throughput: speech per second"))).to_be_visible()
    pid = open_service.worker_pid()
    expect(page.locator(".connection")).to_have_attribute("data-worker", str(pid))
    os.kill(pid, signal.SIGKILL)
    happened(page, "restarted")
    eventually(open_service.is_ready, START_TIMEOUT_S, "ready again")
    expect(page.locator(".connection")).to_have_attribute("data-worker", str(open_service.worker_pid()))
    expect(page.locator("[data-problem]")).to_have_count(0)
    expect(page.locator(".connection")).to_contain_text("started again")


def test_a_stream_that_is_held_back(tab: OpenTab, open_service: Service) -> None:
    """If a proxy holds the stream back until it ends, the view asks again and again."""
    page = tab(own={}).page  # a clock belongs to the whole profile
    page.add_init_script(FED)
    page.clock.install()
    page.goto(f"{open_service.url}/#/watch")
    page.locator("main h1").wait_for()
    page.clock.run_for(7_000)
    expect(page.locator(".connection")).to_have_attribute("data-how", "polling")
    page.locator(".tiles").wait_for()


@pytest.mark.soak
def test_many_events_grow_no_memory(tab: OpenTab, open_service: Service) -> None:
    """Events that each change everything, and minutes of samples: nodes and memory stay what they were.

    Of a thousand events that come at once, because the reader was slow, the last one counts.
    """
    opened = tab(own={})
    page = opened.page
    page.add_init_script(FED)
    page.clock.install()
    text = open_service.http.get("/admin/events", params={"once": "true"}).text.removeprefix("data: ")
    page.goto(f"{open_service.url}/#/watch")
    page.locator("main h1").wait_for()
    client = opened.context.new_cdp_session(page)

    def used_after_events() -> tuple[int, int]:
        page.evaluate(BURST, [text, 25])
        page.clock.run_for(8_000)
        client.send("HeapProfiler.collectGarbage")
        heap = client.send("Runtime.getHeapUsage")["usedSize"]
        return int(heap), int(page.evaluate("document.querySelectorAll('*').length"))

    used_after_events()
    heap, nodes = used_after_events()
    used_after_events()
    later, nodes_later = used_after_events()
    assert nodes_later == nodes
    assert later - heap < 1_000_000
    assert page.locator(".watch-activity li").count() == 60
    last = json.loads(text)
    last["stats"]["queued"] = 4321
    page.evaluate(
        "([text, last]) => feed.enqueue(new TextEncoder().encode(`data: ${text}\\n\\n`.repeat(1000) + last))",
        [json.dumps(json.loads(text)), f"data: {json.dumps(last)}\n\n"],
    )
    expect(page.locator("[data-tile=queued] dd").first).to_have_text("4,321")


def test_a_cluster(tab: OpenTab, open_service: Service) -> None:
    """Each GPU worker of a cluster has a row, also one that is gone, and each GPU a bar of its memory."""
    page = tab(own={}).page
    page.add_init_script(FED)
    text = open_service.http.get("/admin/events", params={"once": "true"}).text.removeprefix("data: ")
    event = json.loads(text)
    stats, vram = event["stats"], event["vram"]
    places = [("10.0.0.1", ["0"], None), ("10.0.0.1", ["1"], None), ("10.0.0.2", ["0"], "The GPU worker went away.")]
    shared = {
        name: stats[name] for name in ("worker", "accepting", "queued", "buffered", "stalled", "requests", "audio_s")
    }
    for number, (node, gpus, error) in enumerate(places):
        place = {"replica": f"r{number}", "node": node, "gpus": gpus, "error": error}
        running = {"running": number, "slots": 8}
        stats.setdefault("replicas", []).append({**shared, **place, **running})
        memory = {name: vram[name] for name in ("device", "shared", "host", "models")}
        vram.setdefault("replicas", []).append({**memory, **place})
    page.goto(f"{open_service.url}/#/watch")
    page.locator("main h1").wait_for()
    page.wait_for_function("window.feed")
    page.evaluate("event => feed.enqueue(new TextEncoder().encode(event))", f"data: {json.dumps(event)}\n\n")
    expect(page.locator("[data-replica]")).to_have_count(3)
    expect(page.locator("[data-replica=r1]")).to_contain_text("10.0.0.1, GPU 1")
    expect(page.locator("[data-replica=r1] .running")).to_have_text("1 / 8")
    expect(page.locator("[data-replica=r2][data-state=down]")).to_contain_text("went away")
    bars = page.locator(".watch-memory .device[data-place]:not([data-place=''])")
    assert [bars.nth(index).get_attribute("data-place") for index in range(bars.count())] == [
        "10.0.0.1, GPU 0",
        "10.0.0.1, GPU 1",
        "10.0.0.2, GPU 0",
    ]
    expect(page.locator(".connection")).to_contain_text("2 of 3 GPU workers")


def test_a_refused_stream_and_the_history(tab: OpenTab, open_service: Service) -> None:
    """If a proxy refuses the stream, the view asks again and again.

    Hours of samples keep ten minutes; counters of a new GPU worker begin anew, and no figure is negative.
    """
    page = tab().page
    page.route("**/admin/events", lambda route: route.abort())
    watch(page, open_service.url + "/")
    expect(page.locator(".connection")).to_have_attribute("data-how", "polling")
    page.locator(".tiles").wait_for()
    event: Any = json.loads(open_service.http.get("/admin/events", params={"once": "true"}).text.removeprefix("data: "))
    result = page.evaluate(
        """async event => {
            const app = document.querySelector("script[type=module]").src;
            const {History, SAMPLES} = await import(new URL("watch/history.js", app));
            const history = new History();
            for (let i = 0; i < 5_000; i += 1) {
                const worker = {...event.stats.worker, boot_id: `boot ${Math.floor(i / 1_000)}`};
                const stats = {...event.stats, worker, audio_s: (i % 1_000) * 3};
                history.add({...event, stats, problem: i % 100 === 99 ? "gone" : null}, i);
            }
            const lengths = [history.time, ...Object.values(history.series)].map(values => values.length);
            const throughput = history.series.throughput.filter(value => value !== null);
            return {SAMPLES, lengths, least: Math.min(...throughput), most: Math.max(...throughput)};
        }""",
        event,
    )
    assert set(result["lengths"]) == {result["SAMPLES"]}
    assert (result["least"], result["most"]) == (3, 3)


def test_everybody_can_read_it(tab: OpenTab, open_service: Service) -> None:
    """Axe finds no serious fault in either theme, with everything open; nothing is wider than the screen."""
    page = tab().page
    page.emulate_media(reduced_motion="reduce")
    watch(page, open_service.url + "/")
    for name in ("caches", "settings"):
        page.locator(f".watch-{name} summary").click()
    expect(page.locator(".watch-caches tbody tr").first).to_be_visible()
    expect(page.locator(".settings-list div").first).to_be_visible()
    looks: list[tuple[Any, int]] = [("light", 1280), ("dark", 360)]
    for theme, width in looks:
        page.emulate_media(color_scheme=theme)
        page.set_viewport_size({"width": width, "height": 800})
        assert faults(page) == []
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
