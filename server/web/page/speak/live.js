// Live: speaks while a person types, over the WebSocket v1/audio/speech/stream. Each clause is spoken once it is complete.

import { Failure, urlOf } from "../service/api.js";
import { Peaks } from "../audio/peaks.js";
import { PcmPlayer } from "../audio/pcm_player.js";
import { wavOf } from "../audio/wav.js";
import { ask, keys } from "../service/keys.js";
import { strings } from "../strings.js";
import { Shared } from "../ui.js";

const PAUSE_MS = 1500;
const NORMAL = 1000;

/** The same shape as Speech: `state` has phase, player, peaks, seconds, firstAudio, model and error. */
export class LiveSpeech {
  request = null;
  format = "wav";
  blob = null;
  state = new Shared({ phase: "live", player: null, peaks: new Peaks() });
  #config;
  #socket = null;
  #ready = false;
  #waiting = []; // messages for when the configuration holds
  #sent; // what of the text was sent, or was there before
  #pause = 0;
  #leaving = false;
  #firstSentAt = 0;
  #parts = [];
  #rest = new Uint8Array(0);

  /** `config` is a request for speech without its text; `text` is there already, and is not spoken. */
  constructor(config, text) {
    this.#config = config;
    this.#sent = text;
  }

  get over() {
    return ["done", "stopped", "failed"].includes(this.state.value.phase);
  }

  /** The text is now `text`. What was changed in the middle is not said again. */
  type(text, caret) {
    let same = 0;
    while (same < text.length && text[same] === this.#sent[same]) same += 1;
    if (same < this.#sent.length) this.#sent = caret < text.length ? text : text.slice(0, same);
    clearTimeout(this.#pause);
    // The last word may still grow.
    const upTo = text.search(/\S+$/);
    this.#speakUpTo(text, upTo < 0 ? text.length : upTo);
    this.#pause = setTimeout(() => this.#flush(text), PAUSE_MS);
  }

  /** No more text comes: say the rest, and end. */
  finish(text) {
    clearTimeout(this.#pause);
    this.#speakUpTo(text, text.length);
    this.#leaving = true;
    if (!this.#socket) {
      this.#end("done");
      return;
    }
    this.#send({ type: "input.done" });
    this.#send({ type: "session.close" });
  }

  /** Be silent at once. */
  stop() {
    if (this.over) {
      this.state.value.player?.pause();
      return;
    }
    this.state.value.player?.pause();
    this.#end("stopped");
  }

  close() {
    if (!this.over) this.#end("stopped");
    this.state.value.player?.close();
  }

  #set(changes) {
    this.state.value = { ...this.state.value, ...changes };
  }

  /** After a pause in typing the clause counts as complete. */
  #flush(text) {
    this.#speakUpTo(text, text.length);
    if (this.#socket) this.#send({ type: "input.commit" });
  }

  #speakUpTo(text, end) {
    const piece = text.slice(this.#sent.length, end);
    if (!piece) return;
    this.#sent = text.slice(0, end);
    if (!piece.trim() && !this.#socket) return;
    this.#firstSentAt ||= performance.now();
    this.#send({ type: "input.text", text: piece });
  }

  #send(message) {
    if (!this.#socket) this.#connect();
    if (this.#ready) this.#socket.send(JSON.stringify(message));
    else this.#waiting.push(message);
  }

  #connect() {
    const socket = new WebSocket(urlOf("v1/audio/speech/stream").replace(/^http/, "ws"));
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#ready = false;
    socket.onopen = () => {
      const key = keys.value.api || keys.value.admin;
      const config = { ...this.#config, response_format: "pcm", split_granularity: "clause" };
      socket.send(JSON.stringify({ type: "session.config", ...config, ...(key ? { api_key: key } : {}) }));
    };
    socket.onmessage = ({ data }) => {
      if (socket !== this.#socket) return;
      if (typeof data === "string") this.#take(JSON.parse(data));
      else this.#hear(new Uint8Array(data));
    };
    socket.onclose = ({ code }) => {
      if (socket === this.#socket) this.#closed(code);
    };
  }

  #take(message) {
    if (message.type === "session.configured") {
      this.rate = message.sample_rate;
      this.#set({ model: message.model, ignored: message.ignored.join(", ") });
      this.#ready = true;
      for (const waiting of this.#waiting.splice(0)) this.#socket.send(JSON.stringify(waiting));
    } else if (message.type === "error") {
      this.error = new Failure(message.message, { code: message.code, field: message.param });
    }
  }

  async #closed(code) {
    const { error } = this;
    const silent = error?.code === "request_timeout" && this.#ready && !this.#leaving;
    this.error = null;
    this.#socket = null;
    this.#ready = false;
    if (silent) return; // no key was pressed for a while: the next word opens another socket
    if (error?.code === "invalid_api_key" && (await ask("api", keys.value.api ? error.message : ""))) {
      this.#connect();
      return;
    }
    if (this.over) return;
    if (code === NORMAL) this.#end("done");
    else this.#end("failed", error ?? new Failure(strings.errors.broken));
  }

  #hear(bytes) {
    const data = new Uint8Array(this.#rest.length + bytes.length);
    data.set(this.#rest);
    data.set(bytes, this.#rest.length);
    const even = data.length - (data.length % 2);
    this.#rest = data.slice(even);
    if (!even) return;
    const samples = new Int16Array(data.slice(0, even).buffer);
    this.#parts.push(samples);
    const { peaks } = this.state.value;
    peaks.add(samples, this.rate);
    let { player } = this.state.value;
    if (!player) {
      player = new PcmPlayer(this.rate);
      player.play();
    }
    player.append(samples);
    const firstAudio = this.state.value.firstAudio ?? (performance.now() - this.#firstSentAt) / 1000;
    this.#set({ player, firstAudio, seconds: peaks.duration });
  }

  #end(phase, error = null) {
    clearTimeout(this.#pause);
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
    if (this.#parts.length) this.blob = wavOf(this.#parts, this.rate);
    this.state.value.player?.finish();
    this.#set({ phase, error, reason: phase === "done" ? "stop" : null });
  }
}
