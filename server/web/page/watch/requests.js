// The requests that are open now, and what has happened lately.

import { strings } from "../strings.js";
import { html } from "../ui.js";

const words = strings.watch.requests;
const { duration, seconds } = strings.watch.units;

export function RequestsCard({ event, since }) {
  const { stats } = event;
  const hidden = stats.running + stats.queued + stats.buffered - stats.streams.length;
  return html`<section class="card watch-requests">
    <h2>${words.heading}</h2>
    <dl class="facts">
      ${["running", "queued", "buffered", "stalled"].map((kind) => html`<div key=${kind} data-requests=${kind}><dt>${words.counts[kind]}</dt><dd>${stats[kind]}${kind === "running" ? ` / ${stats.slots}` : ""}</dd></div>`)}
      ${["finished", "failed", "cancelled", "rejected"].map((kind) => html`<div key=${kind} data-requests=${kind}><dt>${words.counts[kind]}</dt><dd>${stats.requests[kind].toLocaleString()}</dd></div>`)}
    </dl>
    ${stats.streams.length === 0
      ? html`<p class="soft empty">${words.none}</p>`
      : html`<div class="scroll" tabindex="0" role="region" aria-label=${words.heading}><table>
          <thead><tr>${["state", "model", "age", "audio", "buffered", "client", "id"].map((column) => html`<th key=${column} scope="col" class=${column}>${words.columns[column]}</th>`)}</tr></thead>
          <tbody>${stats.streams.map((stream) => html`<${Stream} key=${stream.id} stream=${stream} since=${since} />`)}</tbody>
        </table></div>`}
    ${hidden > 0 && html`<p class="small soft">${words.more(hidden)}</p>`}
  </section>`;
}

function Stream({ stream, since }) {
  return html`<tr data-stream=${stream.state}>
    <td class="state"><span class="tag">${words.states[stream.state]}</span></td>
    <td class="model">${stream.model}</td>
    <td class="age">${duration(stream.age_s + since)}</td>
    <td class="audio">${seconds(stream.audio_s)}</td>
    <td class="buffered">${seconds(stream.buffered_s)}</td>
    <td class="client">${stream.client}</td>
    <td class="id" title=${stream.id}>${stream.id.slice(0, 16)}</td>
  </tr>`;
}

export function ActivityCard({ entries }) {
  return html`<section class="card watch-activity">
    <h2>${words.activity.heading}</h2>
    ${entries.length === 0 && html`<p class="soft empty">${words.activity.none}</p>`}
    <ol>${entries.map((each) => html`<li key=${each.id} data-activity=${each.kind} data-state=${each.state}>
      <time>${strings.watch.clock(each.at)}</time><span>${words.activity[each.kind](each)}</span></li>`)}</ol>
  </section>`;
}
