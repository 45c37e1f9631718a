// Percentiles of the last minutes, and the caches with their hits.

import { getJson } from "../service/api.js";
import { strings } from "../strings.js";
import { html, useEffect, useState } from "../ui.js";

const words = strings.watch.figures;
const { bytes, seconds } = strings.watch.units;
const MEASURES = ["first_audio_s", "queue_wait_s", "real_time_factor", "batch_size"];
const REFRESH_MS = 5_000;

export function PerformanceCard({ event }) {
  const [minutes, setMinutes] = useState(15);
  const { performance } = event;
  return html`<section class="card watch-performance">
    <div class="card-head"><h2>${words.heading}</h2>
      <div class="segments" role="group" aria-label=${words.window}>
        ${[1, 15, 60].map((each) => html`<button key=${each} aria-pressed=${each === minutes} onClick=${() => setMinutes(each)}>${words.minutes(each)}</button>`)}
      </div></div>
    ${performance.length === 0 && html`<p class="soft empty">${words.none}</p>`}
    <div class="by-model">${performance.map((model) => html`<${Model} key=${model.id} id=${model.id} window=${model.windows.find((each) => each.minutes === minutes)} />`)}</div>
  </section>`;
}

function Model({ id, window }) {
  const write = { first_audio_s: seconds, queue_wait_s: seconds };
  const share = (count) => (window.streams ? words.share(window.streams - count, window.streams) : "–");
  return html`<div class="scroll" data-performance=${id} tabindex="0" role="region" aria-label=${id}><table>
      <caption>${id} <span class="soft">${words.streams(window.streams)}</span></caption>
      <thead><tr><th scope="col"></th>${["p50", "p95", "p99"].map((name) => html`<th key=${name} scope="col">${name}</th>`)}</tr></thead>
      <tbody>${MEASURES.map((measure) => html`<tr key=${measure}><th scope="row">${words.measures[measure]}</th>
        ${["p50", "p95", "p99"].map((name) => html`<td key=${name}>${window[measure][name] === null ? "–" : (write[measure] ?? String)(window[measure][name])}</td>`)}</tr>`)}</tbody>
    </table>
    <dl class="facts">${Object.entries(window.underruns).map(([buffer, count]) => html`<div key=${buffer}><dt>${words.continuous(buffer)}</dt><dd>${share(count)}</dd></div>`)}</dl></div>`;
}

/** Whatever is behind a path, read when it is first shown and every few seconds while it is. */
function useAnswer(path, shown) {
  const [answer, setAnswer] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => {
    if (!shown) return undefined;
    const leaving = new AbortController();
    const read = () =>
      getJson(path, { kind: "admin", signal: leaving.signal }).then(
        (found) => {
          setAnswer(found);
          setError("");
        },
        (failure) => leaving.signal.aborted || setError(failure.message),
      );
    read();
    const timer = setInterval(read, REFRESH_MS);
    return () => {
      clearInterval(timer);
      leaving.abort();
    };
  }, [path, shown]);
  return { answer, error };
}

export function CachesCard() {
  const [open, setOpen] = useState(false);
  const [problem, setProblem] = useState("");
  const { answer, error } = useAnswer("admin/cache", open);
  const empty = (name) =>
    getJson(`admin/cache/${name}`, { method: "DELETE", kind: "admin" }).then(() => setProblem(""), (failure) => setProblem(failure.message));
  return html`<details class="card watch-caches" onToggle=${(event) => setOpen(event.target.open)}>
    <summary><h2>${words.caches.heading}</h2></summary>
    ${(error || problem) && html`<p class="problem" role="alert">${problem || error}</p>`}
    ${answer && html`<div class="scroll" tabindex="0" role="region" aria-label=${words.caches.heading}><table>
      <thead><tr>${["name", "model", "entries", "bytes", "hits", "misses"].map((column) => html`<th key=${column} scope="col" class=${column}>${words.caches.columns[column]}</th>`)}<th><span class="hidden-label">${words.caches.empty}</span></th></tr></thead>
      <tbody>${answer.caches.map((cache) => html`<tr key=${cache.name + cache.model} data-cache=${cache.name}>
        <th scope="row">${words.caches.names[cache.name]}</th><td class="model">${cache.model}</td>
        <td>${cache.entries.toLocaleString()}</td><td>${cache.bytes === null ? "–" : bytes(cache.bytes)}</td>
        <td>${cache.hits.toLocaleString()}</td><td>${cache.misses.toLocaleString()}</td>
        <td><button class="quiet" aria-label=${words.caches.emptyOne(words.caches.names[cache.name], cache.model)} onClick=${() => empty(cache.name)}>${words.caches.empty}</button></td></tr>`)}</tbody>
    </table></div>`}
  </details>`;
}

export function SettingsCard({ boot }) {
  const [open, setOpen] = useState(false);
  const { answer, error } = useAnswer(`admin/config?boot=${boot}`, open);
  return html`<details class="card watch-settings" onToggle=${(event) => setOpen(event.target.open)}>
    <summary><h2>${words.settings}</h2></summary>
    ${error && html`<p class="problem" role="alert">${error}</p>`}
    ${answer && html`<dl class="settings-list">${Object.entries(answer).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${written(value)}</dd></div>`)}</dl>`}
  </details>`;
}

function written(value) {
  if (value === null || value === "" || (typeof value === "object" && !Object.keys(value).length)) return "–";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
