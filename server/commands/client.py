"""The HTTP client of the commands: the standard library alone, with each error as one message.

It knows the service's error envelope and no endpoint.
"""

import argparse
import functools
import http
import http.client
import ipaddress
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shared.environment import environment
from shared.settings import load_settings

CONNECT_TIMEOUT_S: Final = 10.0
SPEECH_TIMEOUT_S: Final = 600.0
"""The longest wait for the next byte: a model may have to be loaded, or downloaded, before it speaks."""

_MAX_ERROR_BYTES: Final = 65_536


class ClientError(Exception):
    """The service cannot be reached or refused the request; the message is for the user."""


class UsageError(Exception):
    """The arguments are wrong; the message is for the user."""


class Client:
    """A service at `url`, with or without OpenAI's /v1, and the API key for it."""

    def __init__(self, url: str, key: str = "", certificate: Path | None = None) -> None:
        """`certificate` is that of a service on this machine: it is taken whatever names it has, and no other is."""
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise ClientError(f"{url}: the URL must begin with http:// or https://")
        self.authorization = f"Bearer {key}" if key else None
        self._certificate = certificate
        # A proxy of the environment is not used for this machine.
        proxies = urllib.request.ProxyHandler({}) if is_local(self.url) else urllib.request.ProxyHandler()
        https = [urllib.request.HTTPSHandler(context=self.tls)] if self.url.startswith("https:") else []
        self._opener = urllib.request.build_opener(proxies, *https)

    @functools.cached_property
    def tls(self) -> ssl.SSLContext:
        """What is trusted; the certificates of this machine are read in 40 ms, so only where they are needed."""
        tls = ssl.create_default_context(cafile=self._certificate)
        if self._certificate is not None:
            tls.check_hostname = False
            tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it may be signed by an authority of its own
        return tls

    def get(self, path: str, *, listing: str = "") -> dict[str, Any]:
        """The JSON object that `path` answers, with a list of objects under the name `listing`; else ClientError."""
        with self.open(path, timeout_s=CONNECT_TIMEOUT_S) as answer:
            try:
                found = json.load(answer)
            except (ValueError, http.client.HTTPException) as error:
                raise ClientError(f"{self.url}{path} does not answer with JSON; is it this server?") from error
            except OSError as error:
                raise ClientError(f"{self.url} broke off its answer: {error or type(error).__name__}") from error
        entries = found.get(listing) if listing and isinstance(found, dict) else [found]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ClientError(f"{self.url}{path} answers with something else; is it this server?")
        return dict(found)

    def open(self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> http.client.HTTPResponse:
        """The response to a GET, or with `body` to a POST, for reading as it arrives; ClientError for an error."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        try:
            request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 -- the user's own URL
            if self.authorization:  # a redirect must not carry the key elsewhere
                request.add_unredirected_header("Authorization", self.authorization)
            answer: http.client.HTTPResponse = self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise ClientError(message_of(error.code, error.read(_MAX_ERROR_BYTES))) from None
        except urllib.error.URLError as error:
            raise unreachable(self.url, error.reason) from None
        except OSError as error:  # also a connection that ended without an answer
            raise ClientError(f"{self.url} does not answer: {error or type(error).__name__}") from None
        except http.client.HTTPException as error:
            raise ClientError(f"{self.url} does not answer with HTTP; does its URL begin with https://?") from error
        except ValueError as error:
            raise ClientError(f"{self.url}: {error}") from None
        return answer


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """The address and the key of the service."""
    group = parser.add_argument_group("the service")
    group.add_argument("--url", help="its address (default: TTS_HOST and TTS_PORT, or http://127.0.0.1:8000)")
    group.add_argument(
        "--key",
        type=_key,
        metavar="KEY|@FILE",
        help="its API key; @FILE reads it from a file, so that lists of processes do not show it "
        "(default: the first of TTS_API_KEYS or TTS_ADMIN_KEYS)",
    )


def _key(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text[1:]} cannot be read: {error}") from None


def client_of(arguments: argparse.Namespace, *, admin: bool = False) -> Client:
    """A client for the service that the arguments name, or else the settings; SettingsError if these are wrong."""
    if arguments.url is not None and arguments.key is not None:
        return Client(arguments.url, arguments.key)
    settings = load_settings(environment())
    keys = [*settings.admin_keys, *settings.api_keys] if admin else [*settings.api_keys, *settings.admin_keys]
    if arguments.url is not None:
        # The key of the service on this machine is not sent to others.
        return Client(arguments.url, arguments.key or (keys[0] if keys and is_local(arguments.url) else ""))
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}.get(settings.host, settings.host)  # noqa: S104 -- nothing is bound
    return Client(settings.url(host), arguments.key or (keys[0] if keys else ""), settings.tls_cert)


def unreachable(url: str, reason: object) -> ClientError:
    """The error where no connection was made."""
    if isinstance(reason, ssl.SSLCertVerificationError):
        why = f"its certificate is not trusted here ({reason.verify_message})"
        return ClientError(f"{url} cannot be reached: {why}. SSL_CERT_FILE names a file of certificates to trust.")
    return ClientError(f"{url} cannot be reached: {reason}. Is it running (python -m server)?")


def is_local(url: str) -> bool:
    """True if a URL is one of this machine. ClientError if it is none, or its port is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ClientError(f"{url}: {error}") from None
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def message_of(status: int, body: bytes) -> str:
    """The message of the error envelope, or the beginning of another body."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace").strip()[:200]
    needs_other_key = status in {http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN}
    return f"{message} (HTTP {status})" + ("; name a key with --key @FILE" if needs_other_key else "")
