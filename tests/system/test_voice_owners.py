"""Saved voices of two keys in a running service, and the audit log that it leaves."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from gpu_worker.voices import VoiceFiles
from server.http.keys import digest_of
from shared.pcm import bytes_for
from tests.audio import tone, wav
from tests.system.service import environment, running_service


def as_key(name: str) -> dict[str, Any]:
    """The options of a request with that key."""
    return {"headers": {"authorization": f"Bearer {name}"}}


def test_two_keys_and_the_audit_log(tmp_path: Path) -> None:
    """Each key has a voice of one name and sees no other. Each change has a line, and a forged line shows."""
    keys = tmp_path / "keys.toml"
    keys.write_bytes(msgspec.toml.encode({name: {"hash": digest_of(name)} for name in ("alice", "bob")}))
    files = {"audio_sample": ("a.wav", wav(tone(2.0)), "audio/wav")}
    with running_service(tmp_path, KEYS_FILE=keys, DEFAULT_MODEL="espeak-ng") as service:
        voices = {
            name: service.http.post("/v1/audio/voices", data={"name": "Ada"}, files=files, **as_key(name)).json()["id"]
            for name in ("alice", "bob")
        }
        assert service.http.get(f"/v1/audio/voices/{voices['alice']}", **as_key("bob")).status_code == 404
        assert service.http.get("/v1/audio/voices/ada", **as_key("bob")).json()["id"] == voices["bob"]
        shared = service.http.post(f"/v1/audio/voices/{voices['alice']}", json={"shared": True}, **as_key("alice"))
        assert shared.json()["shared"] is True
        refused = service.http.delete(f"/v1/audio/voices/{voices['alice']}", **as_key("bob"))
        assert refused.json()["error"]["code"] == "insufficient_permissions"
        assert service.http.delete("/v1/audio/voices/ada", **as_key("bob")).json()["id"] == voices["bob"]
    kept = VoiceFiles(tmp_path / "voices")  # as the next GPU worker finds them
    (record,) = kept.records()
    assert (record.id, record.name, record.owner) == (voices["alice"], "Ada", "alice")
    assert len(kept.recording(record.id)) == bytes_for(2.0)
    log = tmp_path / "voices" / "audit.jsonl"
    entries = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
    assert [(entry["event"], entry["by"], entry["id"]) for entry in entries] == [
        ("voice.cloned", "key:alice", voices["alice"]),
        ("voice.cloned", "key:bob", voices["bob"]),
        ("voice.shared", "key:alice", voices["alice"]),
        ("voice.deleted", "key:bob", voices["bob"]),
    ]
    command = [sys.executable, "-m", "server", "audit", "verify"]
    variables = environment(VOICES_DIR=tmp_path / "voices")
    verified = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stdout.split(": ")[1][:8]) == (0, "4 lines,"), verified
    log.write_bytes(log.read_bytes().replace(b"key:bob", b"key:eve"))
    forged = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (forged.returncode, forged.stdout.startswith(f"{log}:2: it was changed")) == (1, True), forged
