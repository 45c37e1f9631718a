"""The settings that a reload takes, those that need a restart, and a mistake, which changes nothing."""

import msgspec
import pytest

from shared.settings import Settings, SettingsError, variable_of
from shared.settings_reload import LIVE_VARIABLES, WORKER_LIVE_VARIABLES, reload_settings

IN_FORCE = {"TTS_MAX_QUEUE": "8", "TTS_API_KEYS": "a", "TTS_PORT": "8000", "PATH": "/bin"}


def test_what_must_be_live() -> None:
    """Keys, limits, timeouts, budgets, the log's level, origins, aliases and pronunciations; the address is not."""
    for name in ("API_KEYS", "ADMIN_KEYS", "KEYS_FILE", "CORS_ORIGINS", "MODEL_ALIASES", "PRONUNCIATIONS"):
        assert f"TTS_{name}" in LIVE_VARIABLES - WORKER_LIVE_VARIABLES
    for name in ("IDLE_TIMEOUT", "CLEANUP_ENABLED", "VRAM_BUDGET_MB", "MAX_QUEUE", "LOG_LEVEL"):
        assert f"TTS_{name}" in WORKER_LIVE_VARIABLES
    assert not {"TTS_HOST", "TTS_PORT", "TTS_WORKER_URL", "TTS_DTYPE"} & LIVE_VARIABLES
    assert WORKER_LIVE_VARIABLES < LIVE_VARIABLES


def test_no_secret_goes_to_the_gpu_worker() -> None:
    """Neither a key nor a token."""
    secret = {variable_of(field.name) for field in msgspec.structs.fields(Settings)}
    secret -= {f"TTS_{name.upper()}" for name in Settings().public()}
    assert "TTS_API_KEYS" in secret
    assert secret.isdisjoint(WORKER_LIVE_VARIABLES)


def test_changes_are_told_apart() -> None:
    """One that is taken, one that needs a restart and keeps its value, one that is spelled anew, one that is gone."""
    found = {"TTS_MAX_QUEUE": " 8 ", "TTS_PORT": "9000", "TTS_IDLE_TIMEOUT": "60", "TTS_CORS_ORIGINS": "*"}
    new = reload_settings(IN_FORCE, found)
    assert new.changed == ["TTS_API_KEYS", "TTS_CORS_ORIGINS", "TTS_IDLE_TIMEOUT"]
    assert new.needs_restart == ["TTS_PORT"]
    assert (new.settings.port, new.settings.idle_timeout_s, new.settings.api_keys) == (8000, 60, [])
    assert new.variables == found | {"TTS_PORT": "8000"}


def test_what_needs_a_restart_is_named_until_it_comes() -> None:
    """Also by a later reload: the running value is still the old one."""
    found = IN_FORCE | {"TTS_PORT": "9000"}
    new = reload_settings(IN_FORCE, found)
    assert reload_settings(new.variables, found).needs_restart == ["TTS_PORT"]
    assert reload_settings(new.variables, IN_FORCE).needs_restart == []


def test_every_mistake_is_named() -> None:
    """Wrong values of both kinds, unknown variables and what the checks find."""
    with pytest.raises(SettingsError) as raised:
        reload_settings(IN_FORCE, {"TTS_MAX_QUEUE": "x", "TTS_PORT": "0", "TTS_PROT": "1"}, lambda _: ["no such file"])
    assert [problem.partition(":")[0] for problem in raised.value.problems] == [
        "TTS_PROT",
        "TTS_MAX_QUEUE",
        "TTS_PORT",
        "no such file",
    ]
