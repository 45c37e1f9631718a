"""DEPLOYING.md and the files that it names: settings, paths and times are those of the service."""

import copy
import os
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import pytest
import trustme
import yaml

from gpu_worker.keys.usage import AddUsage, Sums, UsageFile
from shared.protocol import FindUsage
from shared.settings import Settings, load_settings

ROOT: Final = Path(__file__).resolve().parents[1]
DEPLOYING: Final = (ROOT / ".github" / "DEPLOYING.md").read_text()
MANIFEST: Final[list[dict[str, Any]]] = list(
    yaml.safe_load_all((ROOT / ".github" / "kubernetes" / "tts.yaml").read_text())
)
SH: Final = "/bin/sh"
NGINX: Final = shutil.which("nginx") or ""


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


def snippets(language: str) -> list[str]:
    """The blocks of that language in the text."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", DEPLOYING, re.MULTILINE | re.DOTALL)
    assert found, language
    return found


class TestSnippets:
    """Each block is read by the program that it is for."""

    def test_every_block_is_tested(self) -> None:
        """There are no other languages."""
        assert set(re.findall(r"^```(\w+)$", DEPLOYING, re.MULTILINE)) == {"nginx", "caddy", "yaml", "sh"}

    @pytest.mark.skipif(not NGINX, reason="nginx is not installed (Debian: nginx-light)")
    def test_nginx(self, tmp_path: Path) -> None:
        """The server for https, in the file that it belongs to."""
        certificate = trustme.CA().issue_cert("tts.example")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
        (server,) = snippets("nginx")
        for name in ("chain.pem", "key.pem"):
            server = server.replace(f"/etc/ssl/tts/{name}", str(tmp_path / "both.pem"))
        config = (ROOT / ".github" / "proxies" / "nginx.conf").read_text()
        (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid;" + config.rstrip().removesuffix("}") + server + "}")
        done = subprocess.run(
            [NGINX, "-t", "-p", str(tmp_path), "-e", f"{tmp_path}/error.log", "-c", f"{tmp_path}/nginx.conf"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "syntax is ok" in done.stderr, done.stderr

    @pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed (Debian: caddy)")
    @pytest.mark.parametrize("text", [*snippets("caddy"), (ROOT / ".github" / "proxies" / "Caddyfile").read_text()])
    def test_caddy(self, tmp_path: Path, text: str) -> None:
        """The file of .github/proxies, too."""
        (tmp_path / "Caddyfile").write_text(text)
        environ = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
        command = ["caddy", "validate", "--adapter", "caddyfile", "--config", str(tmp_path / "Caddyfile")]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    @pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
    def test_prometheus(self, tmp_path: Path) -> None:
        """Its own file of rules is the one that the text names."""
        (text,) = snippets("yaml")
        rules = ROOT / "server" / "deploy" / "prometheus_rules.yaml"
        (tmp_path / "tts.key").write_text("sk-tts-key")
        text = text.replace("/etc/prometheus/prometheus_rules.yaml", str(rules)).replace(
            "/etc/prometheus", str(tmp_path)
        )
        (tmp_path / "prometheus.yml").write_text(text)
        command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCESS: 14 rules found" in done.stdout

    @pytest.mark.parametrize("script", snippets("sh"))
    def test_scripts_are_sound(self, script: str) -> None:
        """A shell can read them."""
        subprocess.run([SH, "-n", "-c", script], check=True)

    @pytest.mark.skipif(shutil.which("sqlite3") is None, reason="sqlite3 is not installed (Debian: sqlite3)")
    @pytest.mark.parametrize("log", ["", "elsewhere/audit.jsonl"])
    def test_backup(self, tmp_path: Path, log: str) -> None:
        """Voices, keys, usage that is still in its log, and the audit log are in the copy."""
        voices, usage = tmp_path / "voices", UsageFile(tmp_path / "usage.sqlite", days=1)
        today = datetime.now(UTC).date()
        usage.handle(AddUsage({(today, "key:alice", "m"): Sums(requests=3)}))
        audit = tmp_path / log if log else voices / "audit.jsonl"
        for file in (voices / "v1" / "voice.json", tmp_path / "keys.toml", audit, Path(f"{audit}.head")):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(file.name)
        variables = {
            "BACKUP": str(tmp_path / "copy"),
            "TTS_VOICES_DIR": str(voices),
            "TTS_KEYS_FILE": str(tmp_path / "keys.toml"),
            "TTS_USAGE_FILE": str(tmp_path / "usage.sqlite"),
            "TTS_AUDIT_LOG": str(audit) if log else "",
        }
        (script,) = [script for script in snippets("sh") if "$BACKUP" in script]
        subprocess.run([SH, "-eu", "-c", script], env=os.environ | variables, check=True)
        copy = tmp_path / "copy"
        assert (copy / "voices" / "v1" / "voice.json").read_text() == "voice.json"
        assert (copy / "keys.toml").read_text() == "keys.toml"
        assert {file.name for file in (copy / "audit").iterdir()} == {"audit.jsonl", "audit.jsonl.head"}
        assert copy.stat().st_mode & 0o077 == 0
        found = UsageFile(copy / "usage.sqlite", days=1).handle(FindUsage(since=today, until=today))
        assert found is not None
        assert [(row.key, row.requests) for row in found.rows] == [("key:alice", 3)]


def test_the_drop_in_for_a_cluster_fits_the_unit() -> None:
    """It replaces the command by one of the same environment, and takes back what only that one can do."""
    unit, drop_in = (
        [
            line.partition("=")
            for line in (ROOT / ".github" / "systemd" / name).read_text().splitlines()
            if line[:1] != "#"
        ]
        for name in ("tts.service", "tts-cluster.conf")
    )
    (command,) = [value for key, _, value in unit if key == "ExecStart"]
    assert [value for key, _, value in drop_in if key == "ExecStart"] == ["", f"{command} cluster"]
    assert ("ExecReload", "=", "") in drop_in
    assert {key: value for key, _, value in drop_in}["Type"] == "exec"
    assert {key: value for key, _, value in drop_in}["WatchdogSec"] == "0"


class TestKubernetes:
    """The manifest."""

    @pytest.mark.parametrize("object_", MANIFEST, ids=[one["kind"] for one in MANIFEST])
    @pytest.mark.parametrize("version", ["1.29", "1.37"])
    def test_the_schema(self, object_: dict[str, Any], version: str) -> None:
        """Kubernetes of that version takes it, and knows each field."""
        assert kubernetes_validate.validate(object_, version, strict=True) == version

    def test_the_schema_is_strict(self) -> None:
        """A field that is spelled wrong is found."""
        wrong = copy.deepcopy(of_kind("Service"))
        wrong["spec"]["port"] = wrong["spec"].pop("ports")
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, "1.37", strict=True)

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
