"""The config file of Ray Serve, and KubeRay's manifest: Ray's own schemas take them, and they fit the settings."""

import warnings
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from server.__main__ import main
from shared.settings import load_settings

pytest.importorskip("ray", reason="Ray is not installed (extra cluster)")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's, on its import
    import ray
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.serve.schema import ServeDeploySchema

    from server.cluster import config
    from server.cluster.config import serve_config, to_yaml

ROOT: Final = Path(__file__).resolve().parents[3]
MANIFEST: Final[list[dict[str, Any]]] = list(
    yaml.safe_load_all((ROOT / ".github" / "kubernetes" / "rayservice.yaml").read_text())
)
KEY: Final = "key-of-an-admin"


@pytest.fixture
def service() -> dict[str, Any]:
    """The specification of the RayService."""
    (found,) = [one for one in MANIFEST if one["kind"] == "RayService"]
    spec: dict[str, Any] = found["spec"]
    return spec


@pytest.fixture
def pods(service: dict[str, Any]) -> list[dict[str, Any]]:
    """The specifications of the pods: of the head, and of the worker groups."""
    cluster = service["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


class TestConfig:
    """`python -m server cluster --print-config`."""

    @pytest.fixture
    def printed(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> str:
        """The output for a few settings."""
        monkeypatch.chdir(tmp_path)
        variables = {"HOST": "0.0.0.0", "PORT": "9000", "TLS_CERT": "/tls/c.pem", "TLS_KEY": "/tls/k.pem"}  # noqa: S104
        for name, value in {**variables, "ADMIN_KEYS": KEY, "MODEL_ALIASES": "a=espeak-ng"}.items():
            monkeypatch.setenv(f"TTS_{name}", value)
        assert main(["cluster", "--print-config", "--gpus", "4"]) == 0
        return capfd.readouterr().out

    def test_ray_takes_it(self, printed: str) -> None:
        """Serve's schema is satisfied; address and certificate are those of the settings."""
        deployed = ServeDeploySchema.model_validate(yaml.safe_load(printed))
        assert (deployed.http_options.host, deployed.http_options.port) == ("0.0.0.0", 9000)  # noqa: S104
        assert (deployed.http_options.ssl_certfile, deployed.http_options.ssl_keyfile) == ("/tls/c.pem", "/tls/k.pem")
        (application,) = deployed.applications
        module, name = application.import_path.split(":")
        assert (module, getattr(config, name)) == (config.__name__, config.application)

    def test_no_secret_in_it(self, printed: str) -> None:
        """Secret settings are named, and their values are not there."""
        assert KEY not in printed
        assert yaml.safe_load(printed)["applications"][0]["args"]["settings"]["secret"] == ["TTS_ADMIN_KEYS"]

    def test_the_application_has_the_settings(
        self, printed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Serve builds of the file what the command would have built, with the secrets of the node."""
        built: dict[str, Any] = {}
        monkeypatch.setattr(config, "build", lambda settings, **sizes: built.update(settings=settings, **sizes))
        arguments = yaml.safe_load(printed)["applications"][0]["args"]
        config.application({**arguments, "nodes": 2, "revision": 7})
        assert (built["gpus"], built["nodes"]) == (4, 2)
        settings = built["settings"]
        assert (settings.port, settings.admin_keys) == (9000, [KEY])
        assert settings.model_aliases == {"a": "espeak-ng"}
        assert settings.voices_dir == tmp_path / "models" / "voices"

    def test_wrong_settings(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        """A wrong setting is refused with its name, and nothing is printed."""
        monkeypatch.setenv("TTS_MAX_QUEUE", "none")
        assert main(["cluster", "--print-config"]) == 2
        out, problem = capfd.readouterr()
        assert out == ""
        assert "TTS_MAX_QUEUE" in problem


class TestRayService:
    """The manifest for KubeRay."""

    def test_its_config_is_that_of_its_settings(self, service: dict[str, Any]) -> None:
        """serveConfigV2 is what the command prints for these settings, and Ray's schema takes it."""
        written = yaml.safe_load(service["serveConfigV2"])
        ServeDeploySchema.model_validate(written)
        arguments = written["applications"][0]["args"]
        settings = load_settings(arguments["settings"]["variables"])
        made = serve_config(settings, gpus=arguments["gpus"], nodes=arguments["nodes"])
        assert written == yaml.safe_load(to_yaml(made))

    def test_ray_reads_its_nodes(self, service: dict[str, Any]) -> None:
        """As Ray's autoscaler reads them: a head without CPUs and GPUs, and as many GPUs as the config says."""
        cluster = {"metadata": {"name": "tts", "namespace": "default"}, "spec": service["rayClusterConfig"]}
        nodes = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
        head, workers = nodes["headgroup"], nodes["gpu"]
        assert head["resources"]["CPU"] == 0
        assert "GPU" not in head["resources"]
        arguments = yaml.safe_load(service["serveConfigV2"])["applications"][0]["args"]
        assert workers["resources"]["GPU"] * workers["max_workers"] == arguments["gpus"]
        assert 1 + workers["max_workers"] == arguments["nodes"]
        assert service["rayClusterConfig"]["rayVersion"].startswith(ray.__version__.rsplit(".", 1)[0])

    def test_what_settings_name_is_mounted(self, service: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        """Every path lies below a mount of every pod. What workers share is on the volume that many may write."""
        arguments = yaml.safe_load(service["serveConfigV2"])["applications"][0]["args"]
        settings = load_settings(arguments["settings"]["variables"])
        (claim,) = [one for one in MANIFEST if one["kind"] == "PersistentVolumeClaim"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        for pod in pods:
            (container,) = pod["containers"]
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert set(mounts.values()) == volumes.keys()
            shared = volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"]
            assert shared == claim["metadata"]["name"]
            for path in (settings.voices_dir, settings.audio_store_dir, settings.models_dir):
                assert Path("/shared") in path.parents
            assert "persistentVolumeClaim" not in volumes[mounts[str(settings.usage_file.parent)]]
            assert settings.keys_file is not None
            assert str(settings.keys_file.parent) in mounts
            assert {"name": "serve", "containerPort": settings.port} in container["ports"]
            assert pod["terminationGracePeriodSeconds"] > settings.drain_timeout_s + 10
        assert service["rayClusterDeletionDelaySeconds"] > settings.drain_timeout_s + 10

    def test_the_pods_are_those_of_the_image(self, pods: list[dict[str, Any]]) -> None:
        """One image, whose user they run as, and which has what KubeRay's probes call."""
        assert len({container["image"] for pod in pods for container in pod["containers"]}) == 1
        dockerfile = (ROOT / "Dockerfile").read_text()
        for pod in pods:
            assert f"--uid {pod['securityContext']['runAsUser']} tts" in dockerfile
        assert "install --yes --no-install-recommends wget" in dockerfile
