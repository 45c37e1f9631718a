// The GPU workers of a cluster, one by one: where each runs, and what it does.

import { strings } from "../strings.js";
import { html } from "../ui.js";

const words = strings.watch.replicas;
const { duration } = strings.watch.units;

export function ReplicasCard({ event, since }) {
  const { replicas } = event.stats;
  if (!replicas?.length) return null;
  return html`<section class="card watch-replicas">
    <h2>${words.heading}</h2>
    <div class="scroll" tabindex="0" role="region" aria-label=${words.heading}><table>
      <thead><tr>${Object.entries(words.columns).map(([column, label]) => html`<th key=${column} scope="col" class=${column}>${label}</th>`)}</tr></thead>
      <tbody>${replicas.map((replica) => html`<${Replica} key=${replica.replica} replica=${replica} since=${since} />`)}</tbody>
    </table></div>
  </section>`;
}

function Replica({ replica, since }) {
  const { worker } = replica;
  return html`<tr data-replica=${replica.replica} data-state=${replica.error ? "down" : "up"}>
    <td class="state"><span class="tag">${replica.error ? words.down : words.up}</span></td>
    <td class="place">${words.place(replica.node, replica.gpus)}</td>
    <td class="running">${replica.running} / ${replica.slots}</td>
    <td class="queued">${replica.queued}</td>
    <td class="buffered">${replica.buffered}</td>
    <td class="failed">${replica.requests.failed.toLocaleString()}</td>
    <td class="uptime">${duration(worker.uptime_s + since)}</td>
    <td class="restarts">${worker.restarts}</td>
    <td class="error">${replica.error ?? ""}</td>
  </tr>`;
}
