"""`python -m gpu_worker`: the worker process. `python -m gpu_worker download NAME …`: download weights.

`python -m gpu_worker compare MODEL`: what quantised weights change.

The process claims its address, has its parts built (see `wiring`), drains on a signal, and ends with its parent.
Exit codes: 0 drained, 1 the device is broken, 2 wrong settings, 3 another worker serves this address.
"""

import argparse
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Final

import structlog

from gpu_worker.cpu_threads import set_compute_threads
from gpu_worker.engines.base import JobError
from gpu_worker.engines.factory import GPU_EXTRA, EngineFactory
from gpu_worker.engines.faults import BrokenDeviceError
from gpu_worker.health import check
from gpu_worker.heartbeat import Heartbeat
from gpu_worker.residency import (
    cuda_capability,
    cuda_present,
    cuda_problem,
)
from gpu_worker.transport import Transport
from gpu_worker.wiring import build_worker
from gpu_worker.worker import Command, Drain
from shared.catalog import CatalogError, load_catalog
from shared.environment import NO_CUDA, environment, impossible_kernels, unknown_models, unusable_folders
from shared.log import set_up_logging
from shared.settings import Settings, SettingsError, load_settings, variable_of
from shared.sockets import AddressError, AlreadyRunningError, claim
from shared.stacks import write_stacks_on_signals
from shared.trace_settings import open_traces, tracing_problems

EXIT_BROKEN_DEVICE: Final = 1
EXIT_WRONG_SETTINGS: Final = 2
EXIT_ALREADY_RUNNING: Final = 3

_MOST_FRAMES: Final = 1000
"""Of a text that `compare` speaks."""

_MOVER_GRACE_S: Final = 1.0
"""How long the end of the process waits for a transition in flight. A load takes longer, and nothing needs its end."""

_WRITER_GRACE_S: Final = 3.0
"""How long the end of the process waits for a voice or the usage that is still being written after the drain."""

_PARENT_POLL_S: Final = 0.5
_PARENT_GRACE_S: Final = 2.0
"""How long the loop may take to end after the parent has died; then the process exits regardless."""

log = structlog.get_logger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run the worker or one of the commands; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gpu_worker",
        description="The GPU worker of the speech server: it owns the models. `python -m server` starts one.",
        epilog="Configured by TTS_* variables, also from .env; TTS_WORKER_URL=ipc:///private/dir/worker.ipc is needed.",
    )
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="end when this process ends (default: the current parent)"
    )
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="how many workers ran before this one, for the statistics"
    )
    parser.add_argument("--heartbeat", type=int, metavar="FD", help="the supervisor's pipe for signs of life")
    commands = parser.add_subparsers(dest="command")
    download = commands.add_parser("download", help="download the weights of models into TTS_MODELS_DIR")
    download.add_argument("names", nargs="+", metavar="NAME", help="0.6B-CustomVoice, or any id of the model")
    compare = commands.add_parser("compare", help="print what quantised weights change, on this machine")
    compare.add_argument("name", metavar="MODEL", help="0.6B-CustomVoice, or any id of a model whose weights are here")
    compare.add_argument(
        "--quantization", choices=("fp16", "int8", "fp8"), default="int8", help="how weights are kept (default: int8)"
    )
    compare.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where both are computed (default: cpu)"
    )
    compare.add_argument(
        "--texts", type=_texts, metavar="FILE", help="texts to speak, one a line (default: six sentences)"
    )
    compare.add_argument(
        "--frames", type=_frames, default=40, metavar="N", help="frames of each text, 80 ms each (default: 40)"
    )
    commands.add_parser("cuda", help="exit code 0 if there is a CUDA device to use, else 1")
    commands.add_parser("health", help="exit code 0 if the worker at TTS_WORKER_URL is alive, else 1")
    chosen = parser.parse_args(arguments)
    if chosen.command == "cuda":
        return 0 if cuda_present() else 1
    try:
        if chosen.command == "download":
            return _download(chosen.names, load_settings(environment()))
        if chosen.command == "compare":
            return _compare(chosen, load_settings(environment(), unknown_models))
        if chosen.command == "health":
            settings = load_settings(environment(), _no_address)
            return _health(str(settings.worker_url), settings.worker_token)
        checks = (_no_address, unknown_models, unusable_folders, impossible_kernels, _no_collector, _no_device)
        # A supervisor gives every setting; .env may have been changed since, and not be read yet.
        variables = dict(os.environ) if chosen.heartbeat is not None else environment()
        settings = load_settings(variables, *checks)
        return _serve(settings, variables, chosen.parent or os.getppid(), chosen.restarts, chosen.heartbeat)
    except ModuleNotFoundError as error:
        if chosen.command not in {"download", "compare"}:
            raise
        problem, code = f"{error}; {GPU_EXTRA}", EXIT_WRONG_SETTINGS
    except (SettingsError, CatalogError, AddressError) as error:
        is_running = isinstance(error, AlreadyRunningError)
        problem, code = str(error), EXIT_ALREADY_RUNNING if is_running else EXIT_WRONG_SETTINGS
    sys.stderr.write(f"{problem}\n")
    return code


def _no_address(settings: Settings) -> list[str]:
    if settings.worker_url is not None:
        return []
    return [f"{variable_of('worker_url')}: the worker needs an address, ipc:///private/dir/worker.ipc"]


def _no_collector(settings: Settings) -> list[str]:
    return tracing_problems(settings, os.environ)


def _no_device(settings: Settings) -> list[str]:
    variables = settings.needing_cuda()
    if not variables:
        return []
    problem = cuda_problem() if cuda_present() else NO_CUDA
    return [f"{variable}: {problem}; auto works without one" for variable in variables] if problem else []


def _download(names: list[str], settings: Settings) -> int:
    from gpu_worker.engines.qwen.checkpoint.download import download_models  # noqa: PLC0415 -- needs the gpu extra

    try:
        return download_models(names, load_catalog(), settings.models_dir)
    except LookupError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTINGS


def _compare(chosen: argparse.Namespace, settings: Settings) -> int:
    from gpu_worker.engines.qwen.checkpoint.download import published_model  # noqa: PLC0415 -- needs the gpu extra

    set_compute_threads(os.environ, settings.cpu_threads)
    catalog = load_catalog()
    try:
        spec = published_model(chosen.name, catalog)
    except LookupError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTINGS
    cuda = chosen.device == "cuda"
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as for the worker
    factory = EngineFactory(settings, catalog, chosen.device)
    problem = factory.problem_of(spec) or (cuda and (cuda_problem() if cuda_present() else NO_CUDA))
    if problem:
        sys.stderr.write(f"{spec.id}: {problem}\n")
        return EXIT_WRONG_SETTINGS
    from gpu_worker.engines.qwen import comparison, device_checks  # noqa: PLC0415 -- imports torch

    capability = cuda_capability() if cuda else None
    dtype = device_checks.dtype_on("cuda", settings.dtype, capability) if cuda else "float32"
    wanted = device_checks.Computation(
        device=chosen.device, capability=capability, dtype=dtype, quantization=chosen.quantization
    )
    if problems := device_checks.problems(wanted):
        sys.stderr.write("\n".join([*problems, ""]))
        return EXIT_WRONG_SETTINGS
    try:
        texts = chosen.texts or comparison.TEXTS
        directory, quantization = factory.checkpoint(spec), chosen.quantization
        found = comparison.compare(directory, quantization, texts, chosen.frames, device=chosen.device, dtype=dtype)
    except (JobError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTINGS
    beside = "bfloat16" if dtype == "auto" else dtype
    print(f"{spec.id}, {quantization} beside {beside}, {len(texts)} texts", *found.lines(), sep="\n")  # noqa: T201 -- its output
    return 0


def _texts(name: str) -> tuple[str, ...]:
    """The texts in a file for `compare`, one a line."""
    try:
        texts = tuple(filter(str.strip, Path(name).read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{name} is not UTF-8") from None
    if not texts:
        raise argparse.ArgumentTypeError(f"{name} has no text")
    return texts


def _frames(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_FRAMES:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {_MOST_FRAMES}, not {text!r}")
    return int(text)


def _health(url: str, token: str) -> int:
    problem = check(url, token)
    if problem is not None:
        sys.stderr.write(f"{problem}\n")
    return 0 if problem is None else 1


def _serve(
    settings: Settings, variables: Mapping[str, str], parent: int, restarts: int, heartbeat_pipe: int | None
) -> int:
    set_up_logging(settings.log_level, settings.log_format, "gpu_worker")
    write_stacks_on_signals()
    url = str(settings.worker_url)
    # NVML numbers devices by their place on the bus; CUDA by default puts the fastest first.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    set_compute_threads(os.environ, settings.cpu_threads)
    with claim(url):
        inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        transport = Transport(url, settings.worker_token, inbox.put)
        _drain_on_signals(inbox, settings.drain_timeout_s, supervised=heartbeat_pipe is not None)
        threading.Thread(target=_die_with_parent, args=(inbox, parent), name="parent", daemon=True).start()
        heartbeat = Heartbeat(heartbeat_pipe, settings.worker_timeout_s)
        traces = open_traces(settings, os.environ, "gpu_worker")
        with _ended_by_signals():
            worker, mover, writers = build_worker(
                settings, transport, inbox, heartbeat, restarts=restarts, traces=traces, variables=variables
            )
        transport.start()
        log.info("worker_ready", pid=os.getpid())
        try:
            worker.run()
        except BrokenDeviceError as error:
            log.critical("device_broken_new_process_needed", reason=str(error))
            return EXIT_BROKEN_DEVICE
        finally:
            heartbeat.stop()
            transport.stop()
            for writer in writers:
                writer.close(timeout_s=_WRITER_GRACE_S)
            if traces is not None:
                traces.close()
        mover.close(timeout_s=_MOVER_GRACE_S)
        log.info("drained")
    return 0


def _drain_on_signals(inbox: "queue.SimpleQueue[Command]", drain_timeout_s: float, *, supervised: bool) -> None:
    """Drain at the first signal; Ctrl-C after it does not wait for running requests, another SIGTERM changes nothing.

    SIGHUP ends a worker that runs alone, as a closed terminal does; a supervisor's main process reloads for it.
    """
    draining = False

    def drain(number: int, _frame: FrameType | None) -> None:
        nonlocal draining
        inbox.put(Drain(0.0 if draining and number == signal.SIGINT else drain_timeout_s))
        draining = True

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGINT, drain)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has SIGHUP ignored
        signal.signal(signal.SIGHUP, signal.SIG_IGN if supervised else drain)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the process at once: its parts are still being built, and nothing is to be drained.

    That imports torch, and for models that clone voices the official package: 12 s on two busy cores.
    """
    handlers = {number: signal.signal(number, lambda *_: os._exit(0)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _die_with_parent(inbox: "queue.SimpleQueue[Command]", parent: int) -> None:
    """End this process when its parent is gone: no other process would stop it."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    inbox.put(Drain(0.0))
    time.sleep(_PARENT_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    # Python's own end would take torch apart, and triton would write a list of what it leaks into the log.
    os._exit(exit_code)
