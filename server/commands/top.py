"""`top`: models, device memory, queue and streams of a running service, drawn again every second.

It reads /admin/vram and /admin/stats, which cost the GPU worker nothing.
"""

import argparse
import time
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server.commands.client import Client, ClientError, add_service_arguments, client_of
from server.commands.output import console, megabytes

_STATE_STYLES: Final = {"resident": "green", "loading": "yellow", "offloaded": "cyan", "unavailable": "red"}
_STREAM_STYLES: Final = {"generating": "green", "buffered": "cyan", "stalled": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often to draw."""
    parser.add_argument("--once", action="store_true", help="print once and exit")
    parser.add_argument(
        "--interval", type=_interval, default=1.0, metavar="S", help="seconds between updates (default: 1)"
    )
    add_service_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw until Ctrl-C, or once; returns the exit code."""
    client = client_of(arguments, admin=True)
    screen = console()
    if arguments.once:
        screen.print(view(client.get("/admin/vram"), client.get("/admin/stats")))
        return 0
    with Live(_view_or_error(client), console=screen, screen=screen.is_terminal, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(arguments.interval)
                live.update(_view_or_error(client), refresh=True)
        except KeyboardInterrupt:
            return 0


def view(vram: dict[str, Any], stats: dict[str, Any]) -> RenderableType:
    """The answers of /admin/vram and /admin/stats as tables; a missing value is shown as ? or left out."""
    parts = [_service(stats), _device(vram), _models(vram), _streams(stats)]
    if stats.get("replicas"):
        parts.insert(1, _replicas(stats, vram))
    return Group(*[piece for part in parts for piece in (part, Text())][:-1])


def _view_or_error(client: Client) -> RenderableType:
    """The view, or the error message: `top` goes on while the service restarts."""
    try:
        return view(client.get("/admin/vram"), client.get("/admin/stats"))
    except ClientError as error:
        return Text(str(error), style="red")


def _service(stats: dict[str, Any]) -> RenderableType:
    worker = stats.get("worker") or {}
    requests = stats.get("requests") or {}
    table = Table.grid(padding=(0, 3))
    replicas = stats.get("replicas") or []
    up = sum(not replica.get("error") for replica in replicas)
    table.add_row(
        Text("GPU workers" if replicas else "GPU worker", style="bold"),
        f"{up} of {len(replicas)}" if replicas else f"pid {worker.get('pid', '?')}",
        f"up {_duration(worker.get('uptime_s'))}",
        f"restarts {worker.get('restarts', 0)}",
    )
    table.add_row(
        Text("requests", style="bold"),
        f"running {stats.get('running', 0)} / {stats.get('slots', 0)}",
        f"queued {stats.get('queued', 0)}",
        f"buffered {stats.get('buffered', 0)}",
        f"stalled {stats.get('stalled', 0)}",
    )
    buffer = stats.get("audio_buffer") or {}
    used, budget = (megabytes(buffer.get(f"{kind}_bytes") or 0) for kind in ("used", "budget"))
    counts = "  ".join(f"{name} {count}" for name, count in requests.items())
    return Group(table, Text(f"{counts}   audio buffer {used} of {budget}"))


def _replicas(stats: dict[str, Any], vram: dict[str, Any]) -> RenderableType:
    """A row for each GPU worker of a cluster, with a bar for its device."""
    table = Table("node", "GPU", "", "memory", "running", "queued", "up", "restarts", "problem", box=None)
    devices = {replica.get("replica"): replica.get("device") or {} for replica in vram.get("replicas") or []}
    for replica in stats["replicas"]:
        device, worker = devices.get(replica.get("replica")) or {}, replica.get("worker") or {}
        total, used = device.get("total_bytes") or 0, device.get("used_bytes") or 0
        table.add_row(
            str(replica.get("node") or "?"),
            ",".join(replica.get("gpus") or []) or str(device.get("name", "?")),
            ProgressBar(total=max(total, 1), completed=used, width=20),
            f"{megabytes(used)} of {megabytes(total)}",
            f"{replica.get('running', 0)} / {replica.get('slots', 0)}",
            str(replica.get("queued") or ""),
            _duration(worker.get("uptime_s")),
            str(worker.get("restarts") or ""),
            Text(str(replica.get("error") or ""), style="red"),
        )
    return table


def _device(vram: dict[str, Any]) -> RenderableType:
    device = vram.get("device") or {}
    total, used = device.get("total_bytes") or 0, device.get("used_bytes") or 0
    table = Table.grid(padding=(0, 3))
    table.add_row(
        Text(str(device.get("name", "?")), style="bold"),
        ProgressBar(total=max(total, 1), completed=used, width=30),
        f"{megabytes(used)} of {megabytes(total)}",
        f"ours {megabytes(device.get('ours_bytes') or 0)}",
        f"others {megabytes(device.get('others_bytes') or 0)}",
        f"budget {megabytes(device.get('budget_bytes') or 0)}",
    )
    offloaded = (vram.get("host") or {}).get("offloaded_bytes") or 0
    shared = sum((vram.get("shared") or {}).values())
    table.add_row("", "", f"shared {megabytes(shared)}", f"offloaded to RAM {megabytes(offloaded)}", "", "")
    return table


def _models(vram: dict[str, Any]) -> RenderableType:
    table = Table("model", "state", "on device", "parts", "idle", "requests", "pinned", box=None)
    for model in vram.get("models") or []:
        parts = model.get("bytes") or {}
        state = str(model.get("state", "?"))
        table.add_row(
            str(model.get("id", "?")),
            Text(state, style=_STATE_STYLES.get(state, "dim")),
            megabytes(sum(parts.values())) if parts else "",
            "  ".join(f"{name} {megabytes(count)}" for name, count in parts.items()),
            _duration(model.get("idle_s")),
            str(model.get("references") or ""),
            "yes" if model.get("pinned") else "",
        )
    return table


def _streams(stats: dict[str, Any]) -> RenderableType:
    streams = stats.get("streams") or []
    table = Table("stream", "model", "client", "state", "age", "audio", "buffered", box=None)
    for stream in streams:
        state = str(stream.get("state", "?"))
        table.add_row(
            *(str(stream.get(name, "?")) for name in ("id", "model", "client")),
            Text(state, style=_STREAM_STYLES.get(state, "dim")),
            f"{stream.get('age_s') or 0:.1f} s",
            f"{stream.get('audio_s') or 0:.1f} s",
            f"{stream.get('buffered_s') or 0:.1f} s",
        )
    more = sum(stats.get(name) or 0 for name in ("running", "buffered", "queued")) - len(streams)
    return Group(table, Text(f"and {more} more", style="dim")) if streams and more > 0 else table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:  # noqa: PLR2004 -- a tenth of a second to an hour
        raise argparse.ArgumentTypeError(f"must be seconds, from 0.1 to 3600, not {text!r}")
    return seconds
