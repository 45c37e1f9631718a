// One speech from its request to its end: the audio as it arrives, its player, its peaks, and how it went.

import { getJson, send } from "../service/api.js";
import { FORMATS } from "../audio/formats.js";
import { canStream, ElementPlayer } from "../audio/element_player.js";
import { Peaks, peaksOf } from "../audio/peaks.js";
import { PcmPlayer } from "../audio/pcm_player.js";
import { wavHeader, wavOf } from "../audio/wav.js";
import { modelNow } from "../service/catalog.js";
import { strings } from "../strings.js";
import { Shared } from "../ui.js";

const POLL_MS = 500;

/** A request id that needs no secure context, as crypto.randomUUID does. */
function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * `request` is the body for POST v1/audio/speech. `state` changes while it goes on:
 * {phase, place, detail, firstAudio, realTime, seconds, reason, model, ignored, error, player, peaks}.
 */
export class Speech {
  blob = null;
  audioId = null; // of stored speech
  #abort = new AbortController();
  #parts = [];
  #audio;

  constructor(request, audio) {
    this.request = request;
    this.id = newId();
    this.format = request.response_format;
    this.#audio = audio;
    this.state = new Shared({ phase: "sending", player: null, peaks: null });
  }

  /** Ask for the speech and play it. It ends when the last byte has come, was stopped, or failed. */
  async run() {
    const began = performance.now();
    this.#poll();
    try {
      const answer = await send("v1/audio/speech", {
        method: "POST",
        json: this.request,
        headers: { "x-request-id": this.id },
        signal: this.#abort.signal,
      });
      this.rate = Number(answer.headers.get("x-sample-rate"));
      this.audioId = answer.headers.get("x-audio-url")?.split("/").at(-2) ?? null;
      this.#set({ model: answer.headers.get("x-model"), ignored: answer.headers.get("x-ignored") });
      await this.#receive(answer, began);
      await this.#complete("done");
    } catch (error) {
      if (error.name === "AbortError") await this.#complete("stopped");
      else await this.#fail(error);
    }
  }

  /** Stop both the making and the playing; what has come stays. */
  stop() {
    this.#abort.abort();
    this.state.value.player?.pause();
  }

  close() {
    this.#abort.abort();
    this.state.value.player?.close();
  }

  get over() {
    return ["done", "stopped", "failed"].includes(this.state.value.phase);
  }

  #set(changes) {
    this.state.value = { ...this.state.value, ...changes };
  }

  /** While nothing is heard, tell the place in the queue, or how far the model's load is. */
  async #poll() {
    const waits = () => ["sending", "queued", "loading"].includes(this.state.value.phase);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    while (waits() && !this.#abort.signal.aborted) {
      try {
        const about = await getJson(`v1/audio/speech/${this.id}`, { signal: this.#abort.signal });
        const model = await modelNow(about.model, this.#abort.signal);
        if (!waits()) return;
        if (about.status === "queued" && model.state !== "resident") {
          this.#set({ phase: "loading", detail: model.detail, model: about.model });
        } else if (about.status === "queued") {
          this.#set({ phase: "queued", place: about.queue_position, model: about.model });
        }
      } catch {
        // The request is not known yet, or has just ended: its own answer tells.
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }

  async #receive(answer, began) {
    const how = FORMATS[this.format].stream;
    const take = how === "pcm" ? this.#pcmTaker() : this.#fileTaker(how === "media");
    const reader = answer.body.getReader();
    let firstAt = 0;
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw await this.#broken();
      }
      if (piece.done) break;
      const now = performance.now();
      firstAt ||= now;
      const seconds = take(piece.value);
      this.#set({
        phase: "speaking",
        firstAudio: (firstAt - began) / 1000,
        seconds,
        realTime: seconds ? (now - firstAt) / 1000 / seconds : null,
      });
    }
  }

  /** The failure of a transfer that broke: the service knows the cause. */
  async #broken() {
    try {
      const { error } = await getJson(`v1/audio/speech/${this.id}`);
      if (error) return Object.assign(new Error(error.message), { field: error.param });
    } catch {
      // The service is gone, too.
    }
    return new Error(strings.errors.broken);
  }

  /** A function that takes bytes of pcm or wav, and returns the seconds so far. */
  #pcmTaker() {
    const peaks = new Peaks();
    let player = null;
    let rest = new Uint8Array(0);
    let headed = this.format === "pcm";
    return (bytes) => {
      let data = new Uint8Array(rest.length + bytes.length);
      data.set(rest);
      data.set(bytes, rest.length);
      rest = data;
      if (!headed) {
        const header = wavHeader(data);
        if (!header) return 0;
        this.rate = header.rate;
        data = data.subarray(header.start);
        headed = true;
      }
      const even = data.length - (data.length % 2);
      rest = data.slice(even);
      if (!even) return peaks.duration;
      const samples = new Int16Array(data.slice(0, even).buffer);
      this.#parts.push(samples);
      peaks.add(samples, this.rate);
      if (!player) {
        player = new PcmPlayer(this.rate);
        this.#set({ player, peaks });
        player.play();
      }
      player.append(samples);
      return peaks.duration;
    };
  }

  /** The same for encoded audio; its seconds are known where the browser plays it as it comes. */
  #fileTaker(streams) {
    const { type } = FORMATS[this.format];
    const player = new ElementPlayer(this.#audio);
    const streaming = streams && canStream(type);
    if (streaming) player.stream(type);
    let decodeAt = 0;
    let size = 0;
    return (bytes) => {
      this.#parts.push(bytes);
      size += bytes.length;
      if (streaming) {
        if (!this.state.value.player) {
          this.#set({ player });
          player.play();
        }
        player.append(bytes);
        if (size > decodeAt) {
          // What has come is decoded again whenever it has doubled: that costs twice the whole, and no more.
          decodeAt = Math.max(2 * size, 16384);
          this.#decode(new Blob(this.#parts, { type }));
        }
      } else this.waiting = player;
      return player.duration;
    };
  }

  async #decode(blob) {
    const peaks = await peaksOf(blob);
    if (peaks && peaks.duration > (this.state.value.peaks?.duration ?? 0)) this.#set({ peaks });
  }

  /** The end: make the file, tell the figures that only the service knows. */
  async #complete(phase) {
    const { player } = this.state.value;
    const { type } = FORMATS[this.format];
    const raw = { ulaw: "ulaw", alaw: "alaw" }[this.format];
    if (this.#parts.length) {
      this.blob = this.format === "wav" ? wavOf(this.#parts, this.rate) : new Blob(this.#parts, { type });
      this.playable = playable(this.blob, this.format, this.rate);
    }
    if (player instanceof PcmPlayer) player.finish();
    else if (player) player.finish(this.blob);
    else if (this.waiting && this.blob) {
      this.waiting.load(this.playable);
      this.#set({ player: this.waiting });
      if (phase === "done") this.waiting.play();
    }
    if (this.blob && !(player instanceof PcmPlayer)) await this.#decode(raw ? this.playable : this.blob);
    const seconds = this.state.value.peaks?.duration ?? this.state.value.seconds ?? 0;
    this.#set({ phase, seconds, reason: phase === "done" ? await this.#reason() : null });
  }

  async #reason() {
    try {
      return (await getJson(`v1/audio/speech/${this.id}`)).finish_reason;
    } catch {
      return null; // the service keeps the last 1,024 requests
    }
  }

  async #fail(error) {
    if (this.#parts.length) await this.#complete("failed");
    this.#set({ phase: "failed", error });
  }
}

/** A file that the browser can play: raw samples get a header. */
export function playable(blob, format, rate) {
  if (format === "pcm") return wavOf([blob], rate);
  if (format === "ulaw" || format === "alaw") return wavOf([blob], rate, format);
  return blob;
}
