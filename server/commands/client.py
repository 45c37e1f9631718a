"""How the command line talks to a running service: plain HTTP with the standard library, errors as their message.

It knows the contract's error envelope and nothing of any endpoint.
"""

import argparse
import http.client
import ipaddress
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, Final

from shared.environment import environment
from shared.settings import load_settings

CONNECT_TIMEOUT_S: Final = 10.0
SPEECH_TIMEOUT_S: Final = 600.0
"""How long nothing may arrive: a model may have to be loaded, or fetched, before it speaks."""

_MAX_ERROR_BYTES: Final = 65_536


class ClientError(Exception):
    """The service cannot be reached, or refused; the message is fit for a terminal."""


class UsageError(Exception):
    """The command line makes no sense; the message is fit for a terminal."""


class Client:
    """One service at `url` (with or without OpenAI's /v1), spoken to with `key` where it wants one."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.authorization = f"Bearer {key}" if key else None
        # A proxy of the environment is for the outside world, not for this machine.
        proxies = urllib.request.ProxyHandler({}) if _is_local(self.url) else urllib.request.ProxyHandler()
        self._opener = urllib.request.build_opener(proxies)

    def get(self, path: str) -> Any:
        """The JSON that `path` answers with."""
        with self.open(path, timeout_s=CONNECT_TIMEOUT_S) as answer:
            try:
                return json.load(answer)
            except (ValueError, http.client.HTTPException) as error:
                raise ClientError(f"{self.url}{path} does not answer with JSON; is it this server?") from error
            except OSError as error:
                raise ClientError(f"{self.url} broke off its answer: {error or type(error).__name__}") from error

    def open(self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> http.client.HTTPResponse:
        """The answer to a GET, or with `body` to a POST, to be read as it arrives; ClientError if it is an error."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        try:
            request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 -- the user's own URL
            if self.authorization:  # for this service, and for nobody whom it sends us on to
                request.add_unredirected_header("Authorization", self.authorization)
            if request.type not in {"http", "https"}:
                raise ClientError(f"{self.url}: a service is reached over http:// or https://")
            answer: http.client.HTTPResponse = self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise ClientError(_message_of(error.code, error.read(_MAX_ERROR_BYTES))) from None
        except urllib.error.URLError as error:
            raise ClientError(
                f"{self.url} cannot be reached: {error.reason}. Is it running (python -m server)?"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise ClientError(f"{self.url} does not answer: {error or type(error).__name__}") from None
        except ValueError as error:
            raise ClientError(f"{self.url}: {error}") from None
        return answer


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the service is."""
    group = parser.add_argument_group("the service")
    group.add_argument("--url", help="where it listens (default: as TTS_HOST and TTS_PORT say, http://127.0.0.1:8000)")
    group.add_argument("--key", help="its API key (default: the first of TTS_API_KEYS or TTS_ADMIN_KEYS)")


def client_of(arguments: argparse.Namespace, *, admin: bool = False) -> Client:
    """The service that the arguments, or else the settings, name; SettingsError where these are wrong."""
    if arguments.url is not None and arguments.key is not None:
        return Client(arguments.url, arguments.key)
    settings = load_settings(environment())
    keys = [*settings.admin_keys, *settings.api_keys] if admin else [*settings.api_keys, *settings.admin_keys]
    if arguments.url is not None:
        # A key of this machine's service is not for others.
        return Client(arguments.url, arguments.key or (keys[0] if keys and _is_local(arguments.url) else ""))
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 -- nothing is bound
    url = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    return Client(url, arguments.key or (keys[0] if keys else ""))


def _is_local(url: str) -> bool:
    try:
        host = urllib.parse.urlsplit(url).hostname or ""
    except ValueError as error:
        raise ClientError(f"{url}: {error}") from None
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _message_of(status: int, body: bytes) -> str:
    """What the error envelope says, or as much of another answer as fits a line."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace").strip()[:200]
    return f"{message} (HTTP {status})"
