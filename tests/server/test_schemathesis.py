"""The API against its OpenAPI document: generated valid and invalid requests for every operation."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.app import create_app
from shared.protocol import (
    Call,
    CleanupPass,
    Failed,
    FindVoice,
    ModelStatus,
    Reply,
    SavedVoice,
    SpeechOutcome,
    VoiceConsent,
)
from shared.settings import Settings
from tests.fakes import FakeWorker
from tests.server.running import listening

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
PASS = CleanupPass(timestamp=1.0, vram_before_bytes=2, vram_after_bytes=1, models_checked=[], models_unloaded=[])


SPEECH = SpeechOutcome(id="r.1", client="", status="speaking", model="espeak-ng", voice="en-us")
CONSENT = VoiceConsent(id="cons_1", name="C", language="en", created_at=1)
VOICE = SavedVoice(id="v", name="V", kind="clone", created_at=1, seconds=2.0, in_context=True)


def _answer(call: Call, _payload: bytes | None) -> Reply | Failed:
    """Every call works, except that no saved voice is found."""
    if isinstance(call.action, FindVoice):
        return Failed(id=call.id, code="voice_not_found", message="no")
    resident = ModelStatus(id="espeak-ng", state="resident")
    return Reply(id=call.id, cleanup=PASS, voice=VOICE, speech=SPEECH, model=resident, consent=CONSENT)


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An application in another thread: schemathesis blocks its own."""
    path: Path = tmp_path_factory.mktemp("schema")
    with FakeWorker(path / "w.ipc", chunks=1) as worker:
        worker.on_call = _answer
        found: list[str] = []
        up, down = threading.Event(), threading.Event()

        async def serve() -> None:
            async with listening(create_app(Settings(worker_url=worker.url, audio_store_dir=path / "audio"))) as url:
                found.append(url)
                up.set()
                await asyncio.to_thread(down.wait)

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        assert up.wait(10)
        yield found[0]
        down.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_every_operation_answers_as_described(base_url: str, mode: GenerationMode) -> None:
    """No answer is a 500, and each has a status, a media type and a body that the document describes.

    An example is a request over HTTP. There are thirty operations, so each gets an eighth of the usual examples.
    """
    schema = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    examples = hypothesis.settings().max_examples // 8
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 19
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # any string is a valid path
        if operation.path == "/admin/events":
            continue  # its answer has no end

        @hypothesis.settings(max_examples=examples, suppress_health_check=list(HealthCheck))
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)

        check()
