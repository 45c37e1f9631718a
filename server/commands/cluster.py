"""`cluster`: the service as a Ray Serve application, on this machine or on a Ray cluster that runs.

It owns the order of start and stop: settings, Ray, application; then the application (drained), Ray.
Exit codes: 0 stopped; 1 Ray or the application could not start; 2 the settings are wrong, or the extra is missing.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Final

import structlog

from server.commands.client import UsageError
from server.commands.serve import WEB_CHECKS
from shared.catalog import CatalogError
from shared.environment import environment, unknown_models
from shared.log import set_up_logging
from shared.settings import PREFIX, Settings, SettingsError, load_settings, variable_of

EXIT_FAILED: Final = 1
EXIT_WRONG_SETTINGS: Final = 2

_NO_RAY: Final = "Ray is not installed; `make serve-cluster` installs it, or `pip install -e '.[cluster]'`\n"

_PROXY_MIDDLEWARES: Final = "server.cluster.proxy_middleware.middlewares"

log = structlog.get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where Ray runs."""
    parser.add_argument(
        "--address",
        metavar="auto|HOST[:PORT]",
        help="a Ray cluster that runs: of this machine (auto), or of HOST (default: start Ray here, for this machine)",
    )
    parser.add_argument(
        "--stop",
        action="store_true",
        help="with --address: let the running streams of the service end, take it away from the cluster, and exit",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the settings as a config of Ray Serve, without secrets, for `serve deploy` or KubeRay, and exit",
    )
    parser.add_argument(
        "--gpus",
        type=_number_from(0),
        metavar="N",
        help="with --print-config: the cluster's GPUs (default: counted when it deploys)",
    )
    parser.add_argument(
        "--nodes", type=_number_from(1), metavar="N", help="with --print-config: the cluster's nodes (likewise)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends the service, or print the config; returns the exit code, or raises UsageError."""
    _check(arguments)
    if arguments.print_config:
        return _print_config(arguments)
    try:
        environ = environment()
        settings = load_settings(environ, *WEB_CHECKS, _worker_problems)
    except (SettingsError, CatalogError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTINGS
    set_up_logging(settings.log_level, settings.log_format, "main")
    # The processes of a Ray that starts here inherit them, the secrets among them.
    os.environ.update({name: value for name, value in environ.items() if name.startswith(PREFIX)})
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if arguments.address is None:
        # Ray then takes the loopback for this node's address, and listens nowhere else. Ray reads both on its import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Serve's proxy would take the client's address from X-Forwarded-For; TTS_TRUSTED_PROXIES says who may tell it.
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
        # It starts within 5 s or not at all: a busy machine takes longer, and three such proxies end the start.
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        # Ray would run the whole service, GPU workers too, with niceness 15: any other program would come first.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # It would also put any x-request-id of a client into its log and its answers.
        os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", _PROXY_MIDDLEWARES)
    try:
        from server.cluster.deployment import Deployment, DeploymentError  # noqa: PLC0415 -- ray is an extra
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        sys.stderr.write(_NO_RAY)
        return EXIT_WRONG_SETTINGS
    deployment = Deployment(settings, arguments.address)
    try:
        deployment.connect()
        if arguments.stop:
            deployment.remove()
        else:
            stopping = _stopped_by_signals(deployment.hurry)
            if deployment.start(stopping):
                log.info("serving", url=settings.url(settings.host), address=arguments.address or "local")
                stopping.wait()
    except DeploymentError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    finally:
        deployment.stop()
    return 0


def _print_config(arguments: argparse.Namespace) -> int:
    """Print the config. Files and folders that the settings name are those of the cluster, and not looked at here."""
    try:
        settings = load_settings(environment(), unknown_models)
        from server.cluster.config import serve_config, to_yaml  # noqa: PLC0415 -- ray is an extra
    except (SettingsError, CatalogError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTINGS
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        sys.stderr.write(_NO_RAY)
        return EXIT_WRONG_SETTINGS
    sys.stdout.write(to_yaml(serve_config(settings, gpus=arguments.gpus, nodes=arguments.nodes)))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.print_config and (arguments.gpus, arguments.nodes) != (None, None):
        advice = f"{variable_of('replicas')} is the number of GPU workers"
        raise UsageError(f"--gpus and --nodes are for --print-config; {advice}")
    if arguments.stop and arguments.address is None:
        raise UsageError("--stop needs --address: the Ray cluster that has the service")


def _number_from(smallest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be a whole number, {smallest} or more, not {text!r}")
        return int(text)

    return number


def _worker_problems(settings: Settings) -> list[str]:
    """A GPU worker that runs already has one replica: two would count its slots and its memory twice."""
    if settings.worker_url is None or settings.replicas == 1:
        return []
    problem = f"only one replica can have a GPU worker that runs already; set {variable_of('replicas')}=1"
    return [f"{variable_of('worker_url')}: {problem}"]


def _stopped_by_signals(hurry: threading.Event) -> threading.Event:
    """Set by SIGTERM, Ctrl-C or SIGHUP; a Ctrl-C after one of them sets `hurry`.

    Call it once Ray runs, because Ray sets handlers of its own.
    """
    stopping = threading.Event()

    def note(number: int, _frame: FrameType | None) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            hurry.set()
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, note)
    return stopping
