"""The documented JavaScript example of nari.speech.v1, in a page of this server and in one of another site."""

from pathlib import Path

from playwright.sync_api import Browser

from tests.system.service import Service

EXAMPLE = (Path(__file__).parent / "nari_example.js").read_text()


def run(browser: Browser, page_url: str, service: Service) -> dict[str, object]:
    """The result of the example in a page."""
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(page_url)
        result: dict[str, object] = page.evaluate(EXAMPLE, service.url.replace("http", "ws", 1))
        return result
    finally:
        context.close()


def test_the_example_in_a_page_of_this_server(browser: Browser, open_service: Service) -> None:
    """Its events come in order, its PCM is speech, and the socket closes normally."""
    result = run(browser, f"{open_service.url}/health", open_service)
    events = list(result["events"])  # type: ignore[call-overload] # it is a list
    assert events[:2] == ["session.created", "request.configured"]
    # Speech may begin before the end of the text is acknowledged.
    assert sorted(events[2:-1]) == ["input_text.ack", "input_text.ack", "response.started"]
    assert events[-1] == "response.done"
    assert (result["code"], result["protocol"]) == (1000, "nari.speech.v1")
    assert int(str(result["bytes"])) > 24_000


def test_a_page_of_another_site_is_refused(browser: Browser, open_service: Service) -> None:
    """It opens no socket."""
    result = run(browser, "data:text/html,<p>another site</p>", open_service)
    assert (result["events"], result["bytes"], result["code"]) == ([], 0, 1006)
