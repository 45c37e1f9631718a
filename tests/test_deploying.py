"""DEPLOYING.md and the files that it names: settings, paths and times are those of the service."""

import re
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import yaml

from shared.settings import Settings, load_settings, variable_of

ROOT: Final = Path(__file__).resolve().parents[1]
DEPLOYING: Final = (ROOT / ".github" / "DEPLOYING.md").read_text()
MANIFEST: Final[list[dict[str, Any]]] = list(
    yaml.safe_load_all((ROOT / ".github" / "kubernetes" / "tts.yaml").read_text())
)
KNOWN: Final = {variable_of(field.name) for field in msgspec.structs.fields(Settings)}


def of_kind(kind: str) -> dict[str, Any]:
    """The one object of that kind."""
    (found,) = [one for one in MANIFEST if one["kind"] == kind]
    return found


@pytest.fixture
def pod() -> dict[str, Any]:
    """The pod's specification."""
    spec: dict[str, Any] = of_kind("Deployment")["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    """The only container."""
    (found,) = pod["containers"]
    container: dict[str, Any] = found
    return container


def test_settings_exist() -> None:
    """Every setting that the text names is one."""
    named = set(re.findall(r"TTS_\w+", DEPLOYING))
    assert named
    assert named <= KNOWN


class TestKubernetes:
    """The manifest."""

    def test_settings_are_valid(self, container: dict[str, Any]) -> None:
        """The service starts with these variables."""
        variables = {one["name"]: one["value"] for one in container["env"]}
        assert all(isinstance(value, str) for value in variables.values())
        settings = load_settings(variables)
        assert settings.keys_file is not None

    def test_what_must_last_lies_in_the_volume(self, pod: dict[str, Any], container: dict[str, Any]) -> None:
        """Weights, voices and usage are below its mount; every mount has a volume."""
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == volumes.keys()
        claim = volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"]
        assert of_kind("PersistentVolumeClaim")["metadata"]["name"] == claim
        settings = load_settings({one["name"]: one["value"] for one in container["env"]})
        for path in (settings.models_dir, settings.voices_dir, settings.audio_store_dir, settings.usage_file):
            assert Path("/data") in path.parents
        assert settings.keys_file is not None
        assert str(settings.keys_file.parent) in mounts

    def test_a_stop_lets_streams_end(self, pod: dict[str, Any], container: dict[str, Any]) -> None:
        """The pod is killed only after the drain, and the 10 s that a load in flight is waited for."""
        settings = load_settings({one["name"]: one["value"] for one in container["env"]})
        assert pod["terminationGracePeriodSeconds"] > settings.drain_timeout_s + 10

    def test_probes_ask_for_what_there_is(self, container: dict[str, Any]) -> None:
        """/health decides on a restart, /ready on traffic, at the port of the service."""
        paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
        assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
        (port,) = container["ports"]
        assert port["containerPort"] == Settings().port
        assert {container[name]["httpGet"]["port"] for name in paths} == {port["name"]}

    def test_the_parts_find_each_other(self, pod: dict[str, Any], container: dict[str, Any]) -> None:
        """Selectors match labels, and the user is the image's."""
        deployment, service = of_kind("Deployment")["spec"], of_kind("Service")["spec"]
        assert (
            deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"] == service["selector"]
        )
        assert service["ports"][0]["targetPort"] == container["ports"][0]["name"]
        dockerfile = (ROOT / "Dockerfile").read_text()
        assert f"--uid {pod['securityContext']['runAsUser']} tts" in dockerfile

    def test_one_pod_has_the_gpu(self, container: dict[str, Any]) -> None:
        """A rolling update would need a second GPU, and the volume twice."""
        deployment = of_kind("Deployment")["spec"]
        assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
