"""The certificate and the key of https: whether granian will be able to use them."""

import ssl
from pathlib import Path

from shared.access import read_bytes, unreadable
from shared.settings import Settings, variable_of


def tls_problems(settings: Settings) -> list[str]:
    """The problems of the files that TTS_TLS_CERT and TTS_TLS_KEY name."""
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None or key is None:
        return [] if cert is key else [f"{variable_of('tls_cert')}, {variable_of('tls_key')}: https needs both"]
    if problem := _problem_of_certificate(cert):
        return [f"{variable_of('tls_cert')}: {problem}"]
    if problem := _problem_of_key(cert, key):
        return [f"{variable_of('tls_key')}: {problem}"]
    return []


def _problem_of_certificate(cert: Path) -> str | None:
    try:
        read_bytes(cert)
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert)
    except ssl.SSLError:
        return f"{cert} is no certificate in PEM"
    except OSError as error:
        return unreadable(cert, error)
    return None


def _problem_of_key(cert: Path, key: Path) -> str | None:
    try:
        read_bytes(key)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_refuse_password)
    except _EncryptedKeyError:
        return f"{key} is encrypted; granian needs it without a password"
    except ssl.SSLError as error:
        is_key = error.reason == "KEY_VALUES_MISMATCH"
        return f"{key} is the key of another certificate" if is_key else f"{key} is no key in PEM"
    except OSError as error:
        return unreadable(key, error)
    return None


class _EncryptedKeyError(Exception):
    """The key asks for a password."""


def _refuse_password() -> str:
    raise _EncryptedKeyError
