"""The files of https: each mistake is one sentence."""

import os
from pathlib import Path

import pytest
import trustme

from server.processes import tls_problems
from shared.settings import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates and keys, good and bad."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ours", "other"):
        cert = trustme.CA().issue_cert("localhost")
        cert.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        cert.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / "text").write_text("no PEM at all")
    os.mkfifo(folder / "pipe")
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 -- trustme brings it

    key = serialization.load_pem_private_key((folder / "ours.key").read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    form = serialization.PrivateFormat.PKCS8
    (folder / "locked.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))
    return folder


@pytest.mark.parametrize(
    ("cert", "key", "problem"),
    [
        ("ours.pem", "ours.key", None),
        ("ours.pem", "other.key", "TTS_TLS_KEY: {}/other.key is the key of another certificate"),
        ("ours.pem", "text", "TTS_TLS_KEY: {}/text is no key in PEM"),
        ("text", "ours.key", "TTS_TLS_CERT: {}/text is no certificate in PEM"),
        ("ours.pem", "locked.key", "TTS_TLS_KEY: {}/locked.key is encrypted; granian needs it without a password"),
        ("none.pem", "ours.key", "TTS_TLS_CERT: {}/none.pem cannot be read by"),
        ("ours.pem", ".", "TTS_TLS_KEY: {} cannot be read by"),
        ("pipe", "ours.key", "TTS_TLS_CERT: {}/pipe cannot be read by"),
        ("ours.pem", "pipe", "TTS_TLS_KEY: {}/pipe cannot be read by"),
    ],
)
def test_mistakes(folder: Path, cert: str, key: str, problem: str | None) -> None:
    """The file at fault is named; good files have none."""
    problems = tls_problems(Settings(tls_cert=folder / cert, tls_key=folder / key))
    if problem is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert problems[0].startswith(problem.format(folder))


def test_one_without_the_other() -> None:
    """A certificate without its key would mean http."""
    file = Path("/etc/tts/file.pem")
    for settings in (Settings(tls_cert=file), Settings(tls_key=file)):
        assert tls_problems(settings) == ["TTS_TLS_CERT, TTS_TLS_KEY: https needs both"]
    assert tls_problems(Settings()) == []
