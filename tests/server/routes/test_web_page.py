"""The page that browsers get at /, and the files that it loads."""

import gzip
import re
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

import server
from tests.server.running import SHARED_LOOP, Serve

pytestmark = SHARED_LOOP

PAGE = Path(server.__file__).parent / "web" / "page"
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}


def named_by(html: str) -> list[str]:
    """The files that a page loads."""
    return re.findall(r'<(?:script|link)[^>]* (?:src|href)="([^"]+)"', html)


@pytest.mark.parametrize("accept", ["*/*", "application/json", "", "application/octet-stream", "text/plain"])
async def test_everybody_but_browsers_gets_json(client: httpx.AsyncClient, accept: str) -> None:
    """Whatever a program accepts, unless it prefers HTML."""
    answer = await client.get("/", headers={"accept": accept})
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["status"] == "healthy"


async def test_a_browser_gets_the_page(client: httpx.AsyncClient) -> None:
    """With a policy that allows neither inline scripts nor other origins, and without any of them in it."""
    answer = await client.get("/", headers=BROWSER)
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "http" not in answer.text
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", answer.text)
    assert answer.headers["cache-control"] == "no-cache"
    assert "Accept" in answer.headers["vary"]


@pytest.mark.parametrize(("path", "headers"), [("/", {}), ("/tts", {"x-forwarded-prefix": "/tts"}), ("/tts/", {})])
async def test_its_files_are_found_below_any_path(
    client: httpx.AsyncClient, path: str, headers: dict[str, str]
) -> None:
    """Every file that the page names is below the path at which the browser has found the page."""
    html = (await client.get("/", headers=BROWSER | headers)).text
    files = named_by(html)
    assert len(files) > 5
    for file in files:
        url = urljoin(f"http://here{path}", file)
        assert url.startswith(f"http://here{path.rstrip('/')}/page/")
        found = await client.get(url.removeprefix(f"http://here{path.rstrip('/')}"))
        assert found.status_code == 200, file
        assert found.headers["content-type"].split(";")[0] == MEDIA_TYPES[Path(file).suffix]


async def test_every_import_leads_to_a_file(client: httpx.AsyncClient) -> None:
    """Modules name each other relatively, libraries included, and browsers keep what they got for good."""
    base = urljoin("/", named_by((await client.get("/", headers=BROWSER)).text)[0]).rpartition("/")[0] + "/"
    asked, names = set(), {"app.js"}
    while names:
        name = names.pop()
        asked.add(name)
        answer = await client.get(base + name)
        assert answer.status_code == 200, name
        assert "immutable" in answer.headers["cache-control"]
        found = re.findall(r'(?:\bfrom|\bimport)\s*\(?"(\.[^"]+)"', answer.text)
        names |= {urljoin("/" + name, other).lstrip("/") for other in found} - asked
    ours = {str(path.relative_to(PAGE)) for path in PAGE.rglob("*.js")} - {"theme-early.js"}
    assert ours <= asked, "a module that nothing loads"


async def test_caching_and_compression(client: httpx.AsyncClient) -> None:
    """A file is sent once, compressed where the client can read that; after an update the old address is checked."""
    url = urljoin("/", named_by((await client.get("/", headers=BROWSER)).text)[1])
    async with client.stream("GET", url, headers={"accept-encoding": "gzip"}) as answer:
        raw = b"".join([part async for part in answer.aiter_raw()])
    plain = await client.get(url, headers={"accept-encoding": "identity"})
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(raw) == plain.content
    assert "content-encoding" not in plain.headers
    etag = plain.headers["etag"]
    for address in (url, re.sub("/page/[0-9a-f]+/", "/page/older/", url), "/"):
        first = await client.get(address, headers=BROWSER)
        again = await client.get(address, headers=BROWSER | {"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert "immutable" not in first.headers["cache-control"]
    assert etag != first.headers["etag"]


@pytest.mark.parametrize(
    "name", ["nothing.js", "../docs/swagger.html", "vendor/VERSIONS.md", "vendor/redoc.standalone.js", ""]
)
async def test_no_other_file_is_served(client: httpx.AsyncClient, name: str) -> None:
    """Only the page's own files have an address."""
    answer = await client.get(f"/page/x/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


async def test_without_the_page(serve: Serve) -> None:
    """TTS_WEB_PAGE=false: browsers get the JSON, too, and no file is there."""
    client = await serve(web_page=False)
    assert (await client.get("/", headers=BROWSER)).json()["status"] == "healthy"
    assert (await client.get("/page/x/app.js")).status_code == 404


async def test_the_page_needs_no_key(serve: Serve) -> None:
    """It asks for the key itself; so it must load without one."""
    client = await serve(api_keys=["key"])
    answer = await client.get("/", headers=BROWSER | {"authorization": ""})
    assert answer.status_code == 200
    assert (await client.get(urljoin("/", named_by(answer.text)[0]), headers={"authorization": ""})).status_code == 200
