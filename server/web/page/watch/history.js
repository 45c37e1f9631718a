// What Watch remembers: a sample a second for the charts, and what has happened. Both are bounded.

/** Ten minutes. */
export const SAMPLES = 600;
export const MAX_ACTIVITY = 60;
/** Throughput is that of so many seconds. */
const THROUGHPUT_S = 5;

const SERIES = [
  "throughput", "running", "queued", "firstAudio50", "firstAudio95", "realTime50", "realTime95",
  "batch50", "batch95", "ours", "others",
];

export class History {
  time = [];
  series = Object.fromEntries(SERIES.map((name) => [name, []]));
  #audio = [];

  /** Add the state of this moment; `now` in seconds. */
  add(event, now) {
    const { stats, vram } = event;
    const down = event.problem !== null || stats === null;
    const window = down ? null : busiest(event.performance);
    this.time.push(now);
    this.#audio.push(down ? null : { boot: stats.worker.boot_id, seconds: stats.audio_s });
    const values = {
      throughput: down ? null : this.#throughput(),
      running: down ? null : stats.running,
      queued: down ? null : stats.queued,
      firstAudio50: window?.first_audio_s.p50 ?? null,
      firstAudio95: window?.first_audio_s.p95 ?? null,
      realTime50: window?.real_time_factor.p50 ?? null,
      realTime95: window?.real_time_factor.p95 ?? null,
      batch50: window?.batch_size.p50 ?? null,
      batch95: window?.batch_size.p95 ?? null,
      ours: down ? null : vram.device.ours_bytes,
      others: down ? null : vram.device.others_bytes,
    };
    for (const name of SERIES) this.series[name].push(values[name]);
    if (this.time.length > SAMPLES) {
      for (const values of [this.time, this.#audio, ...Object.values(this.series)]) values.shift();
    }
  }

  /** The columns of a chart: the times, and the series of these names. */
  columns(names) {
    return [this.time, ...names.map((name) => this.series[name])];
  }

  #throughput() {
    const last = this.time.length - 1;
    const first = Math.max(0, last - THROUGHPUT_S);
    const [before, after] = [this.#audio[first], this.#audio[last]];
    if (before === null || before.boot !== after.boot || first === last) return null;
    return Math.max(0, (after.seconds - before.seconds) / (this.time[last] - this.time[first]));
  }
}

/** The last minute of the model that has most to do, or null. */
export function busiest(performance) {
  const minutes = performance.map((model) => model.windows[0]);
  return minutes.reduce((most, each) => (each.batch_size.count > (most?.batch_size.count ?? 0) ? each : most), null);
}

/** The changes from one event to the next: [{kind, …}], for the words of strings.js. */
export function activityBetween(before, after) {
  if (before === null) return [];
  const found = [];
  const [was, is] = [before.problem, after.problem];
  if (was === null && is !== null) found.push({ kind: "lost" });
  const [old, now] = [before.stats?.worker, after.stats?.worker];
  if (now && old && now.boot_id !== old.boot_id) found.push({ kind: "restarted", restarts: now.restarts, pid: now.pid });
  else if (was !== null && is === null) found.push({ kind: "back" });
  const states = new Map((before.vram?.models ?? []).map((model) => [model.id, model.state]));
  for (const model of after.vram?.models ?? []) {
    const state = states.get(model.id);
    if (state !== undefined && state !== model.state) found.push({ kind: "model", model: model.id, state: model.state });
  }
  const done = after.cleanup;
  if (done?.timestamp && done.timestamp !== before.cleanup?.timestamp && done.models_unloaded.length) {
    found.push({ kind: "cleanup", freed: done.vram_freed_mb, models: done.models_unloaded });
  }
  return found;
}
