"""compose.yaml and the Dockerfile, read as text: their parts fit together. Docker is not needed."""

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from shared.settings import load_settings

ROOT: Final = Path(__file__).resolve().parents[1]
PAIRS: Final = [("server", "gpu_worker"), ("server-cpu", "gpu_worker-cpu")]

COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text()


def environment(service: str) -> dict[str, str]:
    """A container's variables, with compose's defaults for those that the caller may set."""
    return {name: filled_in(str(value)) for name, value in SERVICES[service]["environment"].items()}


def filled_in(text: str) -> str:
    """`text` with the default for each ${NAME:-default}, as compose fills it in if NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounts(service: str) -> dict[str, str]:
    """Volumes by the folders at which they are mounted."""
    pairs = (filled_in(volume).split(":") for volume in SERVICES[service]["volumes"])
    return {target: source for source, target in pairs}


def seconds(duration: str) -> int:
    """Seconds of a duration like 45s."""
    return int(duration.removesuffix("s"))


def test_plain_up_is_the_gpu_and_the_profile_any_machine() -> None:
    """`docker compose up` starts the GPU pair, which has no profile; `up server-cpu` starts the CPU pair alone."""
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    assert profiles == {"server": [], "gpu_worker": [], "server-cpu": ["cpu"], "gpu_worker-cpu": ["cpu"]}
    for server, worker in PAIRS:
        assert SERVICES[server]["depends_on"] == [worker]
        assert "depends_on" not in SERVICES[worker]
        assert SERVICES[server]["build"] == SERVICES[worker]["build"]
    assert [name for name, service in SERVICES.items() if "deploy" in service] == ["gpu_worker"]
    (device,) = SERVICES["gpu_worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert environment("gpu_worker-cpu")["TTS_DEFAULT_DEVICE"] == "cpu"


@pytest.mark.parametrize("pair", PAIRS)
def test_the_two_meet_in_a_private_volume(pair: tuple[str, str]) -> None:
    """Both know the worker by one address, in a volume that both mount."""
    addresses = {environment(service)["TTS_WORKER_URL"] for service in pair}
    (address,) = addresses
    folder = str(Path(address.removeprefix("ipc://")).parent)
    assert {mounts(service)[folder] for service in pair} == {"socket"}


@pytest.mark.parametrize("service", SERVICES)
def test_settings_are_valid(service: str) -> None:
    """Each container starts with these variables."""
    settings = load_settings(environment(service))
    assert settings.worker_url


@pytest.mark.parametrize("service", SERVICES)
def test_every_volume_can_be_written(service: str) -> None:
    """A named volume takes its owner from the folder in the image; the service's user owns every one of them."""
    assert "\nUSER tts\n" in DOCKERFILE
    owned = {
        folder
        for line in re.findall(r"install --directory --owner=tts (.*?)(?: \\)?\n", DOCKERFILE)
        for folder in line.split()
    }
    for folder, volume in mounts(service).items():
        assert volume in COMPOSE["volumes"]
        assert folder in owned


@pytest.mark.parametrize("pair", PAIRS)
def test_what_must_last_lies_in_volumes(pair: tuple[str, str]) -> None:
    """Weights, voices and usage outlive the container that owns them."""
    worker = pair[1]
    where = environment(worker)
    assert mounts(worker)[where["TTS_MODELS_DIR"]] == "models"
    assert mounts(worker)[where["TTS_VOICES_DIR"]] == "voices"
    assert mounts(worker)[str(Path(where["TTS_USAGE_FILE"]).parent)] == "usage"


@pytest.mark.parametrize("service", SERVICES)
def test_a_stop_lets_streams_end(service: str) -> None:
    """Docker kills only after the drain, and the 10 s that a load in flight is waited for."""
    drain_s = load_settings(environment(service)).drain_timeout_s
    assert seconds(SERVICES[service]["stop_grace_period"]) > drain_s + 10


@pytest.mark.parametrize("pair", PAIRS)
def test_each_service_has_its_own_health_check(pair: tuple[str, str]) -> None:
    """The server answers /health, and the worker's synthesis loop answers a Ping."""
    server, worker = (SERVICES[service]["healthcheck"] for service in pair)
    assert f":{environment(pair[0])['TTS_PORT']}/health" in server["test"][-1]
    assert worker["test"] == ["CMD", "python", "-m", "gpu_worker", "health"]


def test_ports_are_published_on_the_loopback() -> None:
    """No port is reachable from other machines."""
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8000:8000"] * 2


def test_every_source_of_the_image_exists() -> None:
    """Every COPY source exists, and .dockerignore excludes none."""
    kept_out = [line for line in (ROOT / ".dockerignore").read_text().split() if "*" not in line]
    sources = [source for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert list(ROOT.glob(source)), source
        assert source not in kept_out
