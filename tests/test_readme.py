"""README.md, the documents in .github and .env.example: their commands run, and their names and links exist."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import soundfile

from server.http.keys import digest_of, read_entries
from shared.catalog import load_catalog
from shared.settings import Settings, load_settings, variable_of
from shared.settings_reload import LIVE_VARIABLES
from tests.system.service import Service

ROOT: Final = Path(__file__).resolve().parents[1]
README: Final = (ROOT / "README.md").read_text()
DOCUMENTS: Final = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md")))}
CHANGELOG: Final = ROOT / "CHANGELOG.md"
HERE: Final = "http://127.0.0.1:8000"
"""The address of the README's service."""

GPU_COMMANDS: Final = re.compile(r"audio_sample|type=prompt|qwen3-tts|gpu_worker download")
"""Found in the commands that need published weights."""


def blocks(language: str) -> list[str]:
    """The README's code in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The README's shell commands, one a line, without comments."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line]


def commands_with(beginning: str) -> list[str]:
    """The commands that begin like that and need no published weights."""
    return [line for line in commands() if line.startswith(beginning) and not GPU_COMMANDS.search(line)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service, as `make serve` starts it."""
    service = Service(tmp_path_factory.mktemp("service"))
    try:
        yield service.wait_ready()
    finally:
        service.kill()


def run(command: list[str], service: Service, directory: Path) -> str:
    """The command's output, with our service in the place of the README's."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
    environ |= {"PYTHONPATH": str(ROOT), "TTS_PORT": str(service.port), "NO_PROXY": "127.0.0.1"}
    ended = subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def bash(line: str, service: Service, directory: Path) -> str:
    """As `run`, for a shell command; the audio for a player goes to a file."""
    line = line.replace(HERE, service.url).replace(".venv/bin/python", sys.executable)
    line = line.replace("ffplay -nodisp -autoexit -", "cat > heard.mp3")
    return run(["bash", "-o", "pipefail", "-c", line], service, directory)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(service: Service, tmp_path: Path) -> None:
    """The README's first request gives an mp3."""
    (line,) = commands_with("curl")
    bash(line, service, tmp_path)
    assert soundfile.info(tmp_path / "hello.mp3").duration > 0.5


def test_openai_sdk(service: Service, tmp_path: Path) -> None:
    """The program with OpenAI's client runs as shown."""
    program, _ = blocks("python")
    run([sys.executable, "-c", program.replace(HERE, service.url)], service, tmp_path)
    assert soundfile.info(tmp_path / "speech.ogg").duration > 0.5


def test_websocket(service: Service, tmp_path: Path) -> None:
    """The program that sends a text in pieces runs as shown."""
    _, program = blocks("python")
    run(
        [sys.executable, "-c", program.replace(HERE.replace("http", "ws"), service.url.replace("http", "ws"))],
        service,
        tmp_path,
    )
    assert (tmp_path / "live.pcm").stat().st_size > 0.5 * 48_000


def test_command_line(service: Service, tmp_path: Path) -> None:
    """Every subcommand runs as shown."""
    outputs = {}
    for line in commands_with(".venv/bin/python -m server"):
        name = line.split()[3]
        outputs[name] = bash(line + (" --once" if name == "top" else ""), service, tmp_path)
    assert outputs.keys() == {"say", "voices", "top", "key"}
    assert "alloy" in outputs["voices"]
    (key,) = read_entries(tmp_path / "keys.toml").values()
    assert key.hash == digest_of(outputs["key"].strip())
    for file in ("evening.mp3", "heard.mp3"):
        assert soundfile.info(tmp_path / file).duration > 0.5


def test_every_command_is_tested() -> None:
    """A command that no test covers fails here: run it in this file, or add it to the list below."""
    elsewhere = ("make ", "docker compose ")  # see test_make_targets, and test_containers.py
    tested = [line for line in commands() if not GPU_COMMANDS.search(line) and not line.startswith(elsewhere)]
    assert sorted(tested) == sorted([*commands_with("curl"), *commands_with(".venv/bin/python -m server")])


def test_every_setting_with_a_value_is_valid() -> None:
    """The service takes each setting that the README sets, in a command or in its text."""
    named = re.findall(r"(TTS_\w+)=([^\s`,]\S*?)(?=[\s`])", README)
    assert {"TTS_MODEL_REPLICAS", "TTS_QUANTIZATION"} <= {name for name, _ in named}
    for name, value in named:
        load_settings({name: value})


def test_weights_are_named_as_the_catalogue_does() -> None:
    """Every size and task is a published model's, and every model of the table is in the catalogue."""
    published = [spec for spec in load_catalog() if spec.hf_id]
    sizes = set(re.findall(r"\b(?:0\.6B|1\.7B)-\w+", README))
    assert sizes == {spec.hf_id.partition("12Hz-")[2] for spec in published}
    named = set(re.findall(r"`(qwen3-tts-[\w.-]+)`", README))
    assert named == {spec.id for spec in published}


def test_make_targets() -> None:
    """Every `make` command of the README and of CONTRIBUTING is a target."""
    text = README + (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))
    assert {"serve", "test"} <= named <= targets


def test_endpoints(service: Service) -> None:
    """Every GET endpoint that the documents name answers 200."""
    named = [path for text in DOCUMENTS.values() for path in re.findall(r"`GET (/(?!v1/audio/speech/)[^`]*)`", text)]
    assert "/ready" in named
    for path in named:
        with service.http.stream("GET", path) as answer:  # a stream of events has no end
            assert answer.status_code == 200, path


def test_linked_files() -> None:
    """Every linked file exists."""
    for document, text in DOCUMENTS.items():
        for target in re.findall(r"\]\(([^)#:]+)", text):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_named_files() -> None:
    """Every file and folder of the project that the text names exists, also in commands."""
    for document, text in DOCUMENTS.items():
        for path in re.findall(r"(?<![\w/.])(?:server|gpu_worker|shared|tests|models)/[\w./-]*\w", text):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def anchors(document: Path) -> set[str]:
    """The links that GitHub makes of the document's headings."""
    headings = re.findall(r"^##+ (.*)", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_linked_headings() -> None:
    """Every linked heading exists, in the document itself or in another one."""
    for document, text in DOCUMENTS.items():
        for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
            target = document.parent / file if file else document
            assert anchor in anchors(target), f"{document.name}: {file}#{anchor}"


def test_settings_exist() -> None:
    """Every setting that the documents name is one."""
    known = {variable_of(field.name) for field in msgspec.structs.fields(Settings)}
    for document, text in DOCUMENTS.items():
        assert set(re.findall(r"\bTTS_\w+", text)) <= known, document.name


OF_OTHERS: Final = {"base_url", "convert_realtime", "stop_grace_period", "bytes_free"}
"""Names that are not ours: of OpenAI's and ElevenLabs' clients, of Compose, and an example."""


def test_named_codes_and_log_events() -> None:
    """Every error code, event of the log and field that the documents name is in the code."""
    code = "".join(
        path.read_text() for part in ("server", "gpu_worker", "shared") for path in (ROOT / part).rglob("*.py")
    )
    known = set(re.findall(r"[a-z_]+", code)) | OF_OTHERS
    for document, text in DOCUMENTS.items():
        named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text))
        assert {name for name in named if not name.startswith("tts_")} <= known, document.name


def test_named_metrics(service: Service) -> None:
    """Every metric that the documents and the changelog name is in /metrics."""
    served = set(re.findall(r"^# TYPE (\w+)", service.http.get("/metrics").text, re.MULTILINE))
    for document, text in {**DOCUMENTS, CHANGELOG: CHANGELOG.read_text()}.items():
        assert set(re.findall(r"`(tts_\w+)`", text)) - {"tts_port"} <= served, document.name


def example() -> list[tuple[bool, str, str]]:
    """.env.example's settings: whether it is commented out, name, value."""
    lines = re.findall(r"^(# )?(TTS_\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    return [(bool(comment), name, value) for comment, name, value in lines]


def test_env_example_lists_every_setting() -> None:
    """Each setting once, and no other name."""
    assert sorted(name for _, name, _ in example()) == sorted(
        variable_of(field.name) for field in msgspec.structs.fields(Settings)
    )


def test_env_example_says_what_a_reload_takes() -> None:
    """The list at its beginning has the settings that are marked so, and no other."""
    head = (ROOT / ".env.example").read_text().partition("# ---")[0]
    assert set(re.findall(r"TTS_\w+", head)) == LIVE_VARIABLES


def test_env_example_shows_the_defaults() -> None:
    """A copy of the file changes nothing. A commented setting has no default, and an example that is valid."""
    assert load_settings({name: value for comment, name, value in example() if not comment}) == Settings()
    default = {variable_of(field.name): getattr(Settings(), field.name) for field in msgspec.structs.fields(Settings)}
    for comment, name, value in example():
        unset: Any = default[name] in (None, {}, [], "")
        if comment:
            assert unset, name
            assert load_settings({name: value}) != Settings()
        else:
            assert unset == (value == ""), name
