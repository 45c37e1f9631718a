// Memory of the device and of the host as one bar each, and the passes that free it.

import { getJson } from "../service/api.js";
import { strings } from "../strings.js";
import { html, useState } from "../ui.js";

const words = strings.watch.memory;
const placeOf = strings.watch.replicas.place;
const { bytes, mebibytes } = strings.watch.units;

const total = (sizes) => Object.values(sizes).reduce((sum, size) => sum + size, 0);

/** Parts of what is ours: models, what they share, and the rest of the process. */
function partsOf({ device, shared, models }) {
  const parts = models
    .map((model) => ({ label: model.id, size: total(model.bytes) }))
    .filter((part) => part.size > 0)
    .sort((one, other) => other.size - one.size)
    .map((part, index) => ({ ...part, colour: `series-${1 + (index % 5)}` }));
  const common = total(shared);
  if (common > 0) parts.push({ label: words.shared, size: common, colour: "part-shared" });
  const rest = device.ours_bytes - parts.reduce((sum, part) => sum + part.size, 0);
  if (rest > 0) parts.push({ label: words.process, size: rest, colour: "part-rest" });
  return parts;
}

function Bar({ label, whole, parts, budget }) {
  const percent = (size) => `${Math.min(100, (100 * size) / (whole || 1))}%`;
  const values = parts.map((part) => `${part.label} ${bytes(part.size)}`).join(", ");
  return html`<div class="memory-bar" role="img" aria-label=${`${label}: ${values}, ${words.budget} ${bytes(budget)}`}>
      ${parts.map((part) => html`<span key=${part.label} class=${part.colour} style=${{ width: percent(part.size) }} title=${`${part.label}: ${bytes(part.size)}`}></span>`)}
      ${budget < whole && html`<i style=${{ left: percent(budget) }} title=${`${words.budget}: ${bytes(budget)}`}></i>`}
    </div>
    <ul class="legend">${parts.map((part) => html`<li key=${part.label}><span class=${`dot ${part.colour}`}></span>${part.label} <b>${bytes(part.size)}</b></li>`)}
      <li><span class="dot budget"></span>${words.budget} <b>${bytes(budget)}</b></li></ul>`;
}

function Device({ vram, place = "" }) {
  const { device } = vram;
  const parts = [
    ...partsOf(vram),
    { label: words.others, size: device.others_bytes, colour: "part-others" },
    { label: words.free, size: device.free_bytes, colour: "part-free" },
  ];
  return html`<div class="device" data-device=${device.kind} data-place=${place}>
    <p class="device-head"><b>${device.name}</b>${place && html`<span class="small soft">${place}</span>`}
      <span class="figures">${words.used(bytes(device.used_bytes), bytes(device.total_bytes), bytes(device.ours_bytes))}</span></p>
    <${Bar} label=${place ? `${device.name}, ${place}` : device.name} whole=${device.total_bytes} parts=${parts} budget=${device.budget_bytes} />
  </div>`;
}

function Host({ host, buffer }) {
  const rest = host.total_bytes - host.free_bytes - host.ours_bytes;
  const parts = [
    { label: words.offloaded, size: host.offloaded_bytes, colour: "series-4" },
    { label: words.process, size: Math.max(0, host.ours_bytes - host.offloaded_bytes), colour: "part-rest" },
    { label: words.others, size: Math.max(0, rest), colour: "part-others" },
    { label: words.free, size: host.free_bytes, colour: "part-free" },
  ];
  return html`<div class="device" data-device="host">
    <p class="device-head"><b>${words.host}</b>
      <span class="figures">${words.buffer(bytes(buffer.used_bytes), bytes(buffer.budget_bytes))}</span></p>
    <${Bar} label=${words.host} whole=${host.total_bytes} parts=${parts} budget=${host.budget_bytes} />
  </div>`;
}

function Cleanup({ cleanup }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState("");
  const clean = async () => {
    setBusy(true);
    setError("");
    try {
      await getJson("admin/cleanup?trigger=true", { method: "POST", kind: "admin" });
    } catch (failure) {
      setError(failure.message);
    } finally {
      setBusy(false);
    }
  };
  const last = cleanup.timestamp
    ? words.lastPass(strings.watch.clock(cleanup.timestamp), mebibytes(cleanup.vram_before_mb), mebibytes(cleanup.vram_after_mb), cleanup.models_unloaded)
    : words.noPass;
  return html`<div class="cleanup">
    <p class="small soft" data-cleanup=${cleanup.timestamp ?? ""}>${cleanup.cleanup_enabled ? words.every(cleanup.cleanup_interval, cleanup.idle_timeout) : words.never} ${last}</p>
    <button disabled=${busy} onClick=${clean}>${words.clean}</button>
    ${error && html`<p class="problem" role="alert">${error}</p>`}
  </div>`;
}

export function MemoryCard({ event }) {
  const { vram, stats, cleanup } = event;
  return html`<section class="card watch-memory">
    <h2>${words.heading}</h2>
    ${vram.replicas?.length
      ? vram.replicas.map((replica) => html`<${Device} key=${replica.replica} vram=${replica} place=${placeOf(replica.node, replica.gpus)} />`)
      : html`<${Device} vram=${vram} />`}
    ${(vram.device.kind === "cuda" || vram.host.offloaded_bytes > 0) && html`<${Host} host=${vram.host} buffer=${stats.audio_buffer} />`}
    <${Cleanup} cleanup=${cleanup} />
  </section>`;
}
