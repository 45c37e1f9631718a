// The state of the service for Watch: a stream of events, or polling where a proxy holds the stream back.

import { send } from "../service/api.js";
import { Shared } from "../ui.js";

/** Comments come every 10 s: a stream that is silent for longer is dead. */
const SILENT_MS = 25_000;
/** The first event comes at once, unless something in between keeps it. */
const FIRST_MS = 6_000;
const POLL_MS = 2_000;
/** So many polls come before the stream is tried again. */
const POLLS = 15;
const RETRY_MS = [500, 1_000, 2_000, 4_000];

const PATH = "admin/events";
const REFUSALS = [401, 403];

/** `state` is {how, event, at, error}; `at`: when the event came, in milliseconds of performance.now(). */
export class Feed {
  state = new Shared({ how: "connecting", event: null, at: 0, error: null });
  #stopped = new AbortController();

  /** Follow the service until `stop`, or until the key is refused. */
  async run() {
    let failures = 0;
    while (!this.#stopped.signal.aborted) {
      try {
        // Where no stream comes through, short answers may.
        if (!(await this.#stream().catch(unlessRefused))) await this.#poll();
        failures = 0;
        this.#set({ how: "reconnecting" });
      } catch (error) {
        if (this.#stopped.signal.aborted) return;
        if (REFUSALS.includes(error.status)) {
          this.#set({ how: "refused", error });
          return;
        }
        this.#set({ how: "lost", error });
        failures += 1;
      }
      await this.#pause(RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]);
    }
  }

  stop() {
    this.#stopped.abort();
  }

  /** Take one event, which counts as the state of this moment. */
  take(event, how = "live") {
    this.#set({ how, event, at: performance.now(), error: null });
  }

  #set(changes) {
    this.state.value = { ...this.state.value, ...changes };
  }

  /** Follow the stream to its end; false if it brought no event in time. */
  async #stream() {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    this.#stopped.signal.addEventListener("abort", stop);
    let timer;
    let seen = false;
    try {
      const answer = await send(PATH, { kind: "admin", signal: attempt.signal });
      timer = setTimeout(stop, FIRST_MS);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return seen;
        text += value;
        const end = text.lastIndexOf("\n\n");
        if (end < 0) continue;
        const event = latestEvent(text.slice(0, end));
        text = text.slice(end + 2);
        seen ||= event !== null;
        if (event !== null) this.take(event);
        if (seen) {
          clearTimeout(timer);
          timer = setTimeout(stop, SILENT_MS);
        }
      }
    } catch (error) {
      if (!attempt.signal.aborted) throw error;
      return seen;
    } finally {
      clearTimeout(timer);
      this.#stopped.signal.removeEventListener("abort", stop);
      attempt.abort();
    }
  }

  async #poll() {
    for (let polls = 0; polls < POLLS && !this.#stopped.signal.aborted; polls += 1) {
      const answer = await send(`${PATH}?once=true`, { kind: "admin", signal: this.#stopped.signal });
      this.take(latestEvent(await answer.text()), "polling");
      await this.#pause(POLL_MS);
    }
  }

  #pause(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#stopped.signal.addEventListener("abort", () => {
        clearTimeout(timer);
        resolve();
      }, { once: true });
    });
  }
}

function unlessRefused(error) {
  if (REFUSALS.includes(error.status)) throw error;
  return false;
}

/** The last event of a part of the stream, or null. A slow reader gets several at once. */
function latestEvent(text) {
  const line = text.split("\n").findLast((each) => each.startsWith("data: "));
  return line ? JSON.parse(line.slice(6)) : null;
}
