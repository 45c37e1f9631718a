"""compose.yaml and the Dockerfile, by what they say: no Docker is needed to see whether their parts fit together."""

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
    """A container's variables, with compose's own defaults in the place of what the caller may set."""
    return {name: filled_in(str(value)) for name, value in SERVICES[service]["environment"].items()}


def filled_in(text: str) -> str:
    """What compose makes of ${NAME:-default} where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounts(service: str) -> dict[str, str]:
    """Volume by the folder it is mounted at."""
    pairs = (filled_in(volume).split(":") for volume in SERVICES[service]["volumes"])
    return {target: source for source, target in pairs}


def seconds(duration: str) -> int:
    """Seconds of a duration like 45s."""
    return int(duration.removesuffix("s"))


def test_plain_up_is_the_gpu_and_the_profile_any_machine() -> None:
    """`docker compose up` starts what has no profile; naming server-cpu brings its worker along, and no other."""
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
def test_settings_are_right(service: str) -> None:
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
def test_what_is_kept_lies_in_volumes(pair: tuple[str, str]) -> None:
    """Weights and voices outlive the container that owns them."""
    worker = pair[1]
    where = environment(worker)
    assert mounts(worker)[where["TTS_MODELS_DIR"]] == "models"
    assert mounts(worker)[where["TTS_VOICES_DIR"]] == "voices"


@pytest.mark.parametrize("service", SERVICES)
def test_a_stop_lets_streams_end(service: str) -> None:
    """Docker kills only after the drain, and the 10 s that a load in flight is waited for."""
    drain_s = load_settings(environment(service)).drain_timeout_s
    assert seconds(SERVICES[service]["stop_grace_period"]) > drain_s + 10


@pytest.mark.parametrize("pair", PAIRS)
def test_health_is_asked_of_each_for_itself(pair: tuple[str, str]) -> None:
    """The server's /health, and the worker's synthesis loop."""
    server, worker = (SERVICES[service]["healthcheck"] for service in pair)
    assert f":{environment(pair[0])['TTS_PORT']}/health" in server["test"][-1]
    assert worker["test"] == ["CMD", "python", "-m", "gpu_worker", "health"]


def test_no_stranger_gets_in() -> None:
    """Ports are published on the loopback alone."""
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8000:8000"] * 2


def test_the_image_is_made_of_what_is_here() -> None:
    """Every source that is copied into it exists, and none of it is kept out of the build."""
    kept_out = [line for line in (ROOT / ".dockerignore").read_text().split() if "*" not in line]
    sources = [source for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert list(ROOT.glob(source)), source
        assert source not in kept_out
