"""The parts of the GPU worker: `build_worker` builds and connects them, here alone."""

import queue
import time
import uuid
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from gpu_worker.engines.factory import EngineFactory
from gpu_worker.heartbeat import Heartbeat
from gpu_worker.keys import AddUsage, LimitCounter, UsageFile, UsageFound, UsageLog
from gpu_worker.lifecycle import RequestBounds
from gpu_worker.live_settings import LiveSettings
from gpu_worker.requests import AudioBuffer, Ending, Request
from gpu_worker.residency import (
    Checkpoints,
    Mover,
    Progress,
    Residency,
    ResidencyOptions,
    cuda_capability,
    cuda_present,
    cuda_problem,
    open_probe,
)
from gpu_worker.scheduling import Scheduler
from gpu_worker.serial_thread import SerialThread
from gpu_worker.stats import Stats
from gpu_worker.transport import Transport
from gpu_worker.voices import ConsentStore, FolderWatch, ScanFolder, VoiceFiles, VoiceStore, VoiceWrite
from gpu_worker.worker import Command, Wake, Worker
from shared.access import folder_problem
from shared.audit import AuditLog
from shared.catalog import OPENAI_VOICES, ModelSpec, load_catalog
from shared.environment import NO_CUDA
from shared.log import set_log_level
from shared.protocol import DeviceMemory, FindUsage
from shared.settings import Settings, variable_of
from shared.text import MAX_RESPELLED

if TYPE_CHECKING:
    from shared.traces import Traces

DEFAULT_CONCURRENCY: Final = 64
"""Requests with a slot at once if TTS_MAX_CONCURRENCY is not set; each engine may have a lower bound."""

log = structlog.get_logger(__name__)


def build_worker(
    settings: Settings,
    transport: Transport,
    inbox: "queue.SimpleQueue[Command]",
    heartbeat: Heartbeat,
    *,
    restarts: int,
    traces: "Traces | None" = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Worker, Mover, list[SerialThread[Any]]]:
    """Build and connect all parts of the worker. The caller closes the parts with a thread.

    `variables` are those that `settings` came from; a reload changes some of them.
    """
    catalog = load_catalog()
    device = settings.default_device
    if device == "auto":
        problem = cuda_problem() if cuda_present() else NO_CUDA
        device = "cpu" if problem else "cuda"
        if problem and problem != NO_CUDA:
            log.warning("gpu_not_used", reason=problem)
    probe = open_probe(
        device,
        budget_bytes=_bytes(settings.vram_budget_mb),
        host_budget_bytes=_bytes(settings.host_budget_mb),
    )
    factory = EngineFactory(
        settings,
        catalog,
        device,
        capability=cuda_capability() if device == "cuda" else None,
        progress=lambda model, detail: inbox.put(Progress(model=model, detail=detail)),
        free_bytes=lambda: _free_bytes(probe.device()),
        cpu_budget_bytes=probe.device().budget_bytes if device == "cpu" else None,
        start_device=probe.start,
        wake=lambda: inbox.put(Wake()),
        interrupted=lambda: not inbox.empty(),
    )
    mover = Mover(catalog, factory.open, probe, inbox.put)
    checkpoints = Checkpoints(catalog, factory, inbox.put)
    voice_files = VoiceFiles(settings.voices_dir, AuditLog(settings.audit_path(), settings.audit_key_file).append)
    voice_writer = SerialThread[VoiceWrite | ScanFolder]("voices", lambda work: inbox.put(voice_files.handle(work)))
    usage_file = UsageFile(settings.usage_file, days=settings.usage_days)
    usage_writer = SerialThread[AddUsage | FindUsage]("usage", lambda work: _report(usage_file.handle(work), inbox))
    default_model = factory.default_model()
    if problem := folder_problem(settings.models_dir):
        log.warning("models_dir_unreadable", reason=f"{variable_of('models_dir')}: {problem}")
    factory.prepare()
    residency = Residency(
        [factory.estimated(spec) for spec in catalog],
        msgspec.convert(settings, ResidencyOptions, from_attributes=True),
        probe=probe,
        move=mover.submit,
        see_to_files=checkpoints.submit,
        clock=time.monotonic,
    )
    for spec in catalog:
        residency.handle(checkpoints.check(spec.id))
    log.info("default_model", model=default_model, device=probe.device().name)
    if problem := factory.problem_of(next(spec for spec in catalog if spec.id == default_model)):
        log.warning("default_model_unavailable", model=default_model, reason=problem)
    scheduler = Scheduler(settings.max_queue, time.monotonic)
    stats = Stats(
        boot_id=uuid.uuid4().hex,
        default_model=default_model,
        settings={**settings.worker_public(), "default_device": device},
        restarts=restarts,
        probe=probe,
        shared_bytes=factory.shared_bytes,
        clock=time.monotonic,
    )
    buffer = AudioBuffer(settings.audio_buffer_mb * 2**20, pause_s=settings.sentence_pause_ms / 1000)

    def apply(new: Settings) -> None:
        set_log_level(new.log_level)
        probe.set_budgets(_bytes(new.vram_budget_mb), _bytes(new.host_budget_mb))
        residency.use(msgspec.convert(new, ResidencyOptions, from_attributes=True))
        scheduler.max_queue = new.max_queue
        buffer.budget_bytes = new.audio_buffer_mb * 2**20
        worker.use(_request_bounds(new))
        stats.settings = {**new.worker_public(), "default_device": device, "default_model": default_model}

    worker = Worker(
        catalog=catalog,
        send=transport.send,
        inbox=inbox,
        scheduler=scheduler,
        residency=residency,
        voices=VoiceStore(voice_files, voice_writer.submit, settings.max_voices, reserved=_reserved_voices(catalog)),
        consents=ConsentStore(voice_files, voice_writer.submit, settings.max_voices),
        voices_folder=FolderWatch(voice_writer.submit),
        stats=stats,
        buffer=buffer,
        max_concurrency=settings.max_concurrency or DEFAULT_CONCURRENCY,
        bounds=_request_bounds(settings),
        limits=LimitCounter(time.monotonic, time.time, usage_file.characters_today(), usage_file.source),
        usage=UsageLog(usage_writer.submit, clock=time.monotonic, wall_clock=time.time),
        clock=time.monotonic,
        take_settings=LiveSettings(variables, apply).take,
        preload=factory.models_to_preload(default_model),
        on_turn=lambda: heartbeat.beat(ready=not residency.preloading),
        on_request_over=_span_maker(traces),
    )
    return worker, mover, [voice_writer, usage_writer]


def _request_bounds(settings: Settings) -> RequestBounds:
    return RequestBounds(
        stall_timeout_s=settings.stall_timeout_s,
        open_text_timeout_s=settings.open_text_timeout_s,
        max_input_chars=MAX_RESPELLED * settings.max_input_chars,
    )


def _span_maker(traces: "Traces | None") -> Callable[[Request, Ending], None]:
    if traces is None:
        return lambda _request, _ending: None
    from gpu_worker.request_traces import RequestTraces  # noqa: PLC0415 -- an optional extra

    return RequestTraces(traces, time.monotonic).record


def _report(found: UsageFound | None, inbox: "queue.SimpleQueue[Command]") -> None:
    if found is not None:
        inbox.put(found)


def _free_bytes(device: DeviceMemory) -> int:
    """Bytes of the device that this process may still take."""
    return min(device.free_bytes, device.budget_bytes - device.ours_bytes)


def _bytes(megabytes: int | None) -> int | None:
    return None if megabytes is None else megabytes * 2**20


def _reserved_voices(catalog: list[ModelSpec]) -> set[str]:
    """Names that a saved voice may not have: OpenAI's voices and the presets of the model family that clones voices."""
    names = set(OPENAI_VOICES)
    cloning = {spec.engine for spec in catalog if spec.task == "Base"}
    for spec in (spec for spec in catalog if spec.engine in cloning):
        names.update(name.casefold() for voice in spec.voices for name in (voice.id, voice.name))
    return names
