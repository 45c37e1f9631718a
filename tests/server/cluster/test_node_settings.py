"""Settings on their way to the nodes of a cluster: everything but the secrets, which each node has itself."""

from pathlib import Path
from typing import Final

import msgspec
import pytest

from server.cluster.node_settings import settings_for_nodes, settings_on_node
from shared.settings import Settings, SettingsError, load_settings, variable_of

SECRETS: Final = {"TTS_API_KEYS": "sk-user", "TTS_ADMIN_KEYS": "sk-admin", "TTS_WORKER_TOKEN": "hush-token"}


def test_secrets_stay_out_of_what_ray_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument of a deployment names them, and has none of their values; the node's environment has these."""
    settings = load_settings({**SECRETS, "TTS_PORT": "8001"})
    argument = settings_for_nodes(settings)
    sent = msgspec.json.encode(argument).decode()
    assert not any(value in sent for value in SECRETS.values())
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    found = settings_on_node(argument)
    assert (found.api_keys, found.admin_keys, found.worker_token, found.port) == (
        ["sk-user"],
        ["sk-admin"],
        "hush-token",
        8001,
    )


@pytest.mark.parametrize("missing", SECRETS)
def test_a_node_without_a_secret_does_not_start(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """It would be open to everybody. The error names the variable."""
    argument = settings_for_nodes(load_settings(SECRETS))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(SettingsError, match=missing) as caught:
        settings_on_node(argument)
    assert not any(value in str(caught.value) for value in SECRETS.values())


def test_paths_are_those_of_the_folder_of_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The processes of Ray have folders of their own."""
    monkeypatch.chdir(tmp_path)
    argument = settings_for_nodes(Settings(voices_dir=Path("voices"), model_paths={"a": Path("weights")}))
    assert argument.variables[variable_of("voices_dir")] == str(tmp_path / "voices")
    assert settings_on_node(argument).model_paths == {"a": tmp_path / "weights"}
