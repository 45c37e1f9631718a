// Watch: what the service does, as it does it. It needs an admin key where there are keys.

import { keys } from "../service/keys.js";
import { strings } from "../strings.js";
import { html, useEffect, useRef, useShared, useState } from "../ui.js";
import { Charts } from "./charts.js";
import { Feed } from "./feed.js";
import { CachesCard, PerformanceCard, SettingsCard } from "./figures.js";
import { activityBetween, busiest, History, MAX_ACTIVITY } from "./history.js";
import { MemoryCard } from "./memory.js";
import { ModelsCard } from "./models.js";
import { ReplicasCard } from "./replicas.js";
import { ActivityCard, RequestsCard } from "./requests.js";

const words = strings.watch;
const { count, duration, factor, seconds, times } = words.units;
const TICK_MS = 1_000;

/** Follows the service: its state, the number of samples so far, and what has happened. */
function useService(attempt) {
  const history = useRef(new History());
  const before = useRef(null);
  const [feed, setFeed] = useState(null);
  const [samples, setSamples] = useState(0);
  const [log, setLog] = useState([]);

  useEffect(() => {
    const newFeed = new Feed();
    const record = ({ event }) => {
      if (event === null || event === before.current) return;
      const found = activityBetween(before.current, event);
      before.current = event;
      if (found.length) setLog((old) => [...found.reverse().map((each) => ({ ...each, at: event.time, id: nextId() })), ...old].slice(0, MAX_ACTIVITY));
    };
    const unsubscribe = newFeed.state.subscribe(record);
    // A sample a second, whether events come or not: an idle service sends none.
    const timer = setInterval(() => {
      if (newFeed.state.value.event === null) return;
      history.current.add(newFeed.state.value.event, Date.now() / 1000);
      setSamples((number) => number + 1);
    }, TICK_MS);
    setFeed(newFeed);
    newFeed.run();
    return () => {
      newFeed.stop();
      unsubscribe();
      clearInterval(timer);
    };
  }, [attempt]);
  return { feed, history: history.current, samples, log };
}

let lastId = 0;
const nextId = () => (lastId += 1);

export function View() {
  const [attempt, setAttempt] = useState(0);
  const { admin } = useShared(keys);
  const key = useRef(admin);
  useEffect(() => {
    if (key.current && !admin) setAttempt((number) => number + 1); // the key was forgotten: ask again
    key.current = admin;
  }, [admin]);
  const { feed, history, samples, log } = useService(attempt);
  return html`<div class="watch">${feed && html`<${Dashboard} feed=${feed} history=${history} samples=${samples} log=${log} again=${() => setAttempt(attempt + 1)} />`}</div>`;
}

function Dashboard({ feed, history, samples, log, again }) {
  const { how, event, at, error } = useShared(feed.state);
  const since = event ? (performance.now() - at) / 1000 : 0;
  return html`
    <div class="view-head"><h1>${words.heading}</h1><${Connection} how=${how} event=${event} since=${since} /></div>
    ${how === "refused" && html`<div class="notice" role="alert"><p>${error.message}</p><button onClick=${again}>${strings.keys.enter}</button></div>`}
    ${how === "lost" && html`<div class="notice" role="alert"><p>${error.message}</p></div>`}
    ${event?.problem && html`<div class="notice" role="alert" data-problem><p>${event.problem}</p></div>`}
    ${event?.stats && html`
      <${Tiles} event=${event} history=${history} />
      <${ReplicasCard} event=${event} since=${since} />
      <${MemoryCard} event=${event} />
      <${ModelsCard} event=${event} since=${since} />
      <${Charts} history=${history} samples=${samples} />
      <div class="watch-pair"><${RequestsCard} event=${event} since=${since} /><${ActivityCard} entries=${log} /></div>
      <${PerformanceCard} event=${event} />
      <${CachesCard} />
      <${SettingsCard} boot=${event.stats.worker.boot_id} />`}
  `;
}

function Connection({ how, event, since }) {
  const worker = event?.stats?.worker;
  const replicas = event?.stats?.replicas ?? [];
  const gone = Boolean(event?.problem);
  return html`<p class="connection small" data-how=${how} data-worker=${gone ? "" : worker?.pid}>
    <span class="lamp" aria-hidden="true"></span><span role="status">${gone && how === "live" ? words.stale : words.how[how]}</span>
    ${worker && !gone && html`<span class="soft">${replicas.length
      ? words.replicas.count(replicas.filter((each) => !each.error).length, replicas.length)
      : words.worker(worker.pid, duration(worker.uptime_s + since), worker.restarts)}</span>`}
  </p>`;
}

function Tiles({ event, history }) {
  const { stats } = event;
  const minute = busiest(event.performance);
  const gapless = minute?.streams ? (minute.streams - minute.underruns["300"]) / minute.streams : null;
  const tiles = [
    ["running", words.tiles.of(count(stats.running), count(stats.slots))],
    ["queued", count(stats.queued)],
    ["throughput", times(history.series.throughput.at(-1) ?? null)],
    ["firstAudio", seconds(minute?.first_audio_s.p50 ?? null)],
    ["realTime", factor(minute?.real_time_factor.p50 ?? null)],
    ["gapless", gapless === null ? "–" : `${Math.round(gapless * 100)} %`],
  ];
  return html`<dl class="tiles">${tiles.map(([name, value]) => html`<div class="card" key=${name} data-tile=${name}>
    <dt>${words.tiles[name]}</dt><dd>${value}</dd><dd class="small soft">${words.tiles.about[name]}</dd></div>`)}</dl>`;
}
