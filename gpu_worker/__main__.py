"""`python -m gpu_worker`: the worker process. `python -m gpu_worker download NAME …`: fetch weights.

It claims its address, wires the parts, obeys signals, drains, and dies with its parent.
Exit codes: 0 drained, 1 the device is broken, 2 wrong settings, 3 another worker serves this address.
"""

import argparse
import os
import queue
import signal
import sys
import threading
import time
import uuid
from types import FrameType
from typing import Any, Final

import structlog

from gpu_worker.engines.factory import GPU_EXTRA, EngineFactory
from gpu_worker.engines.faults import BrokenDeviceError
from gpu_worker.health import check
from gpu_worker.requests import Request
from gpu_worker.residency import Checkpoints, Mover, Progress, Residency, ResidencyOptions, cuda_present, open_probe
from gpu_worker.scheduler import Scheduler
from gpu_worker.serial_thread import SerialThread
from gpu_worker.stats import Stats
from gpu_worker.transport import Transport
from gpu_worker.voices import VoiceFiles, VoiceStore, VoiceWrite
from gpu_worker.worker import Drain, Wake, Worker
from shared.catalog import OPENAI_VOICES, CatalogError, ModelSpec, load_catalog
from shared.environment import NO_CUDA, environment, unknown_models, wrong_places
from shared.log import set_up_logging
from shared.protocol import DeviceMemory
from shared.settings import Settings, SettingsError, load_settings, variable_of
from shared.sockets import AddressError, AlreadyRunningError, claim

EXIT_BROKEN_DEVICE: Final = 1
EXIT_WRONG_SETTINGS: Final = 2
EXIT_ALREADY_RUNNING: Final = 3

DEFAULT_CONCURRENCY: Final = 64
"""Requests with a slot at once, where TTS_MAX_CONCURRENCY does not say; each engine has its own bound below that."""

_LOADER_GRACE_S: Final = 10.0
"""How long the end waits for a load in flight."""

_WRITER_GRACE_S: Final = 3.0
"""How long the end waits for a voice that is being written, where the drain was not long enough for it."""

_PARENT_POLL_S: Final = 0.5
_PARENT_GRACE_S: Final = 2.0
"""How long the loop may take to end after its parent has died, before the process is ended under it."""

log = structlog.get_logger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run the worker, or fetch weights; the answer is the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gpu_worker",
        description="The GPU worker of the speech server: it owns the models. `python -m server` starts it by itself.",
        epilog="Configured by TTS_* variables, also from .env; TTS_WORKER_URL=ipc:///private/dir/worker.ipc is needed.",
    )
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="the process to end with (default: the one that is the parent now)"
    )
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="how many workers there were before, for the statistics"
    )
    commands = parser.add_subparsers(dest="command")
    fetch = commands.add_parser("download", help="fetch the weights of models into TTS_MODELS_DIR")
    fetch.add_argument("names", nargs="+", metavar="NAME", help="0.6B-CustomVoice, a model's id or its hub id")
    commands.add_parser("cuda", help="look for a CUDA device that it may use; exit code 1 if there is none")
    commands.add_parser("health", help="ask the worker at TTS_WORKER_URL whether it is alive; exit code 1 if not")
    chosen = parser.parse_args(arguments)
    if chosen.command == "cuda":
        return 0 if cuda_present() else 1
    try:
        if chosen.command == "download":
            return _download(chosen.names, load_settings(environment()))
        if chosen.command == "health":
            settings = load_settings(environment(), _no_address)
            return _health(str(settings.worker_url), settings.worker_token)
        settings = load_settings(environment(), _no_address, unknown_models, wrong_places, _no_device)
        return _serve(settings, str(settings.worker_url), chosen.parent or os.getppid(), chosen.restarts)
    except (SettingsError, CatalogError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTINGS


def _no_address(settings: Settings) -> list[str]:
    if settings.worker_url is not None:
        return []
    return [f"{variable_of('worker_url')}: the worker needs an address, ipc:///private/dir/worker.ipc"]


def _no_device(settings: Settings) -> list[str]:
    if settings.default_device != "cuda" or cuda_present():
        return []
    return [f"{variable_of('default_device')}: {NO_CUDA}"]


def _download(names: list[str], settings: Settings) -> int:
    try:
        from gpu_worker.engines.qwen.checkpoint.download import download_models  # noqa: PLC0415 -- needs the gpu extra
    except ImportError as error:
        sys.stderr.write(f"{error}; {GPU_EXTRA}\n")
        return EXIT_WRONG_SETTINGS
    try:
        return download_models(names, load_catalog(), settings.models_dir)
    except LookupError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTINGS


def _health(url: str, token: str) -> int:
    problem = check(url, token)
    if problem is not None:
        sys.stderr.write(f"{problem}\n")
    return 0 if problem is None else 1


def _serve(settings: Settings, url: str, parent: int, restarts: int) -> int:
    set_up_logging(settings.log_level, settings.log_format, "gpu_worker")
    # NVML numbers devices by their place on the bus; CUDA, left to itself, puts the fastest first.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        lock = claim(url)
    except AddressError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_ALREADY_RUNNING if isinstance(error, AlreadyRunningError) else EXIT_WRONG_SETTINGS
    with lock:
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        transport = Transport(url, settings.worker_token, inbox.put)
        # Building imports torch where a model needs it, which takes seconds: the end may come before they are over.
        _obey_signals(inbox, settings.drain_timeout_s)
        threading.Thread(target=_die_with_parent, args=(inbox, parent), name="parent", daemon=True).start()
        worker, loader, fetcher, writer = build_worker(settings, transport, inbox, restarts=restarts)
        transport.start()
        loader.start()
        fetcher.start()
        writer.start()
        log.info("ready to be asked", pid=os.getpid())
        try:
            worker.run()
        except BrokenDeviceError as error:
            log.critical("the device is broken in this process; a new one is needed", reason=str(error))
            return EXIT_BROKEN_DEVICE
        finally:
            transport.stop()
            writer.close(timeout_s=_WRITER_GRACE_S)
        loader.close(timeout_s=_LOADER_GRACE_S)
        log.info("drained")
    return 0


def build_worker(
    settings: Settings, transport: Transport, inbox: "queue.SimpleQueue[Any]", *, restarts: int
) -> tuple[Worker, Mover, Checkpoints, SerialThread[VoiceWrite]]:
    """The only place where the worker's parts are wired together; the caller starts those that have a thread."""
    catalog = load_catalog()
    device = settings.default_device
    if device == "auto":
        device = "cuda" if cuda_present() else "cpu"
    probe = open_probe(
        device,
        budget_bytes=_bytes(settings.vram_budget_mb),
        host_budget_bytes=_bytes(settings.host_budget_mb),
    )
    registry = EngineFactory(
        settings,
        catalog,
        device,
        progress=lambda model, detail: inbox.put(Progress(model=model, detail=detail)),
        room=lambda: _room(probe.device()),
        start_device=probe.start,
        wake=lambda: inbox.put(Wake()),
    )
    loader = Mover(catalog, registry.open, probe, inbox.put)
    fetcher = Checkpoints(catalog, registry, inbox.put)
    voice_files = VoiceFiles(settings.voices_dir)
    writer = SerialThread[VoiceWrite]("voices", lambda write: inbox.put(voice_files.write(write)))
    default_model = registry.default_model()
    registry.prepare()
    options = ResidencyOptions(
        idle_timeout_s=settings.idle_timeout_s,
        host_idle_timeout_s=settings.host_idle_timeout_s,
        cleanup_interval_s=settings.cleanup_interval_s,
        cleanup_enabled=settings.cleanup_enabled,
    )
    residency = Residency(
        [registry.estimated(spec) for spec in catalog],
        options,
        probe=probe,
        move=loader.submit,
        see_to_files=fetcher.submit,
        clock=time.monotonic,
    )
    for spec in catalog:
        residency.handle(fetcher.check(spec.id))
    log.info("default model", model=default_model, device=probe.device().name)
    if problem := registry.problem_of(next(spec for spec in catalog if spec.id == default_model)):
        log.warning("the default model cannot speak, so the service is not ready", model=default_model, reason=problem)
    worker = Worker(
        catalog=catalog,
        send=transport.send,
        inbox=inbox,
        scheduler=Scheduler[Request](settings.max_queue),
        residency=residency,
        voices=VoiceStore(voice_files, writer.submit, settings.max_voices, reserved=_reserved_voices(catalog)),
        reporter=Stats(
            boot_id=uuid.uuid4().hex,
            default_model=default_model,
            settings={**settings.of_worker(), "default_device": device},
            restarts=restarts,
            probe=probe,
            shared_bytes=registry.shared_bytes,
            clock=time.monotonic,
        ),
        max_concurrency=settings.max_concurrency or DEFAULT_CONCURRENCY,
        stall_timeout_s=settings.stall_timeout_s,
        clock=time.monotonic,
        preload=registry.models_to_preload(default_model),
    )
    return worker, loader, fetcher, writer


def _room(device: DeviceMemory) -> int:
    """Bytes of the device that this process may still take."""
    return min(device.free_bytes, device.budget_bytes - device.ours_bytes)


def _bytes(megabytes: int | None) -> int | None:
    return None if megabytes is None else megabytes * 2**20


def _reserved_voices(catalog: list[ModelSpec]) -> set[str]:
    """Names that a saved voice may not take, since they mean a preset one of the family that clones voices."""
    names = set(OPENAI_VOICES)
    cloning = {spec.engine for spec in catalog if spec.task == "Base"}
    for spec in (spec for spec in catalog if spec.engine in cloning):
        names.update(name.casefold() for voice in spec.voices for name in (voice.id, voice.name))
    return names


def _obey_signals(inbox: "queue.SimpleQueue[Any]", drain_timeout_s: float) -> None:
    def drain(_signal: int, _frame: FrameType | None) -> None:
        inbox.put(Drain(drain_timeout_s))

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGINT, drain)


def _die_with_parent(inbox: "queue.SimpleQueue[Any]", parent: int) -> None:
    """End this process when whoever started it is gone: nobody would ever stop it otherwise."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    inbox.put(Drain(0.0))
    time.sleep(_PARENT_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
