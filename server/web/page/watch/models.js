// Models with their state, their memory by purpose, their idle clock, and what an admin can do with them.

import { getJson } from "../service/api.js";
import { strings } from "../strings.js";
import { html, useState } from "../ui.js";

const words = strings.watch.models;
const { bytes, duration } = strings.watch.units;
const ORDER = ["resident", "loading", "offloaded", "absent", "unavailable"];
const KEEP = ["", "5m", "30m", "2h", "-1"];

export function ModelsCard({ event, since }) {
  const idle_timeout = event.cleanup.cleanup_enabled ? event.cleanup.idle_timeout : -1;
  const models = [...event.vram.models].sort((one, other) => ORDER.indexOf(one.state) - ORDER.indexOf(other.state));
  return html`<section class="card watch-models">
    <h2>${words.heading}</h2>
    <ul>${models.map((model) => html`<${Model} key=${model.id} model=${model} since=${since} timeout=${idle_timeout} isDefault=${model.id === event.stats.default_model} />`)}</ul>
  </section>`;
}

function Model({ model, since, timeout, isDefault }) {
  const [busy, setBusy] = useState("");
  const [error, setError] = useState("");
  const act = async (action, query = "") => {
    setBusy(action);
    setError("");
    try {
      await getJson(`admin/models/${encodeURIComponent(model.id)}/${action}${query}`, { method: "POST", kind: "admin" });
    } catch (failure) {
      setError(failure.message);
    } finally {
      setBusy("");
    }
  };
  const here = model.state === "resident" || model.state === "offloaded" || model.state === "loading";
  return html`<li data-model=${model.id} data-state=${model.state}>
    <div class="model-about"><div class="model-head">
      <h3>${model.id}</h3>
      <span class="tag state">${words.states[model.state]}</span>
      ${isDefault && html`<span class="tag">${words.default}</span>`}
      ${model.pinned && html`<span class="tag on">${words.pinned}</span>`}
      ${model.references > 0 && html`<span class="tag on">${words.references(model.references)}</span>`}
    </div>
    <${Memory} model=${model} />
    ${model.state === "resident" && html`<${IdleClock} model=${model} since=${since} timeout=${timeout} />`}
    ${model.detail && html`<p class="small soft detail">${model.detail}</p>`}
    ${error && html`<p class="problem" role="alert">${error}</p>`}</div>
    <div class="model-actions">
      ${busy === "load" || (model.state === "loading" && !busy) ? html`<span class="spinner" role="status" aria-label=${words.states.loading}></span>` : null}
      ${model.state !== "resident" && model.state !== "loading" && html`<button disabled=${busy || model.state === "unavailable"} aria-label=${words.loadOne(model.id)} onClick=${() => act("load")}>${words.load}</button>`}
      ${here && html`<button disabled=${busy} aria-label=${words.unloadOne(model.id)} onClick=${() => act("unload")}>${words.unload}</button>`}
      <button class="quiet" disabled=${busy} aria-pressed=${model.pinned} aria-label=${model.pinned ? words.unpinOne(model.id) : words.pinOne(model.id)}
        onClick=${() => act(model.pinned ? "unpin" : "pin")}>${model.pinned ? words.unpin : words.pin}</button>
      ${here && html`<label class="keep"><span>${words.keep}</span>
        <select disabled=${busy} aria-label=${words.keepOne(model.id)} value=${keptAs(model)} onChange=${(change) => act("load", `?keep_alive=${change.target.value}`)}>
          ${KEEP.map((time) => html`<option key=${time} value=${time}>${words.keeps[time]}</option>`)}
          ${keptAs(model) === "other" && html`<option value="other">${duration(model.keep_alive_s)}</option>`}
        </select></label>`}
    </div>
  </li>`;
}

function keptAs({ keep_alive_s: seconds }) {
  if (seconds === null) return "";
  if (seconds < 0) return "-1";
  return { 300: "5m", 1800: "30m", 7200: "2h" }[seconds] ?? "other";
}

function Memory({ model }) {
  const parts = Object.entries(model.bytes).filter(([, size]) => size > 0).sort((one, other) => other[1] - one[1]);
  if (model.host_bytes > 0) parts.push(["host", model.host_bytes]);
  if (!parts.length) return null;
  const whole = parts.reduce((sum, [, size]) => sum + size, 0);
  return html`<div class="model-memory">
    <div class="memory-bar thin" aria-hidden="true">${parts.map(([purpose, size]) => html`<span key=${purpose} class=${`purpose-${purpose}`} style=${{ width: `${(100 * size) / whole}%` }}></span>`)}</div>
    <ul class="legend">${parts.map(([purpose, size]) => html`<li key=${purpose} data-purpose=${purpose}><span class=${`dot purpose-${purpose}`}></span>${words.purposes[purpose] ?? purpose} <b>${bytes(size)}</b></li>`)}</ul>
  </div>`;
}

function IdleClock({ model, since, timeout }) {
  if (model.idle_s === null) return null;
  const idle_s = model.idle_s + since;
  const limit = model.keep_alive_s ?? timeout;
  if (model.pinned || limit < 0) return html`<p class="small soft idle">${words.idle(duration(idle_s))}</p>`;
  return html`<div class="idle small soft">
    <progress max="1" value=${Math.min(1, limit ? idle_s / limit : 1)} aria-label=${words.idleOne(model.id)}></progress>
    <span>${words.idleOf(duration(idle_s), duration(limit))}</span>
  </div>`;
}
