// Plays encoded audio with an <audio> element: while it arrives where MediaSource takes the format, else once whole.

const MEDIA_SOURCE = self.ManagedMediaSource ?? self.MediaSource;

/** Whether this browser plays the type while it arrives. */
export function canStream(type) {
  return Boolean(MEDIA_SOURCE?.isTypeSupported(type));
}

/** The same methods as PcmPlayer, over the element `audio`. */
export class ElementPlayer {
  onchange = () => {};
  complete = false;
  #audio;
  #source = null;
  #buffer = null;
  #waiting = [];
  #url = null;
  #listeners = new AbortController();

  constructor(audio) {
    this.#audio = audio;
    for (const name of ["play", "pause", "ended", "durationchange", "seeked"]) {
      audio.addEventListener(name, () => this.onchange(), { signal: this.#listeners.signal });
    }
  }

  get playing() {
    return !this.#audio.paused && !this.#audio.ended;
  }

  get duration() {
    const { duration, buffered } = this.#audio;
    if (Number.isFinite(duration)) return duration;
    return buffered.length ? buffered.end(buffered.length - 1) : 0;
  }

  get position() {
    return this.#audio.currentTime;
  }

  /** Take pieces of `type` from now on, by `append`. */
  stream(type) {
    this.#source = new MEDIA_SOURCE();
    this.#audio.disableRemotePlayback = true; // ManagedMediaSource asks for it
    this.#show(URL.createObjectURL(this.#source));
    this.#source.addEventListener("sourceopen", () => {
      this.#buffer = this.#source.addSourceBuffer(type);
      this.#buffer.addEventListener("updateend", () => this.#feed());
      this.#feed();
    }, { once: true });
  }

  append(bytes) {
    this.#waiting.push(bytes);
    this.#feed();
  }

  /** The whole file has come. It replaces what was streamed only if the browser could not hold all of that. */
  finish(blob) {
    this.complete = true;
    if (!this.#source) this.#show(URL.createObjectURL(blob));
    this.#feed();
  }

  /** Play a whole file. */
  load(blob) {
    this.complete = true;
    this.#show(URL.createObjectURL(blob));
  }

  async play() {
    try {
      await this.#audio.play();
    } catch (error) {
      // A pause before the first sound, or a browser that waits for a click: the button stays on "play".
      if (error.name !== "AbortError" && error.name !== "NotAllowedError") throw error;
    }
  }

  pause() {
    this.#audio.pause();
  }

  seek(position) {
    this.#audio.currentTime = Math.max(0, Math.min(position, this.duration));
  }

  close() {
    this.#listeners.abort();
    this.#audio.pause();
    this.#audio.removeAttribute("src");
    this.#audio.load();
    if (this.#url) URL.revokeObjectURL(this.#url);
  }

  #show(url) {
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = url;
    this.#audio.src = url;
  }

  #feed() {
    const buffer = this.#buffer;
    if (!buffer || buffer.updating || this.#source.readyState !== "open") return;
    if (this.#waiting.length === 0) {
      if (this.complete) this.#source.endOfStream();
      return;
    }
    try {
      buffer.appendBuffer(this.#waiting[0]);
      this.#waiting.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      // The browser holds some minutes. What was heard long ago makes room for the rest.
      const heard = this.#audio.currentTime - 30;
      if (heard > 0) buffer.remove(0, heard);
      else this.#audio.addEventListener("timeupdate", () => this.#feed(), { once: true });
    }
  }
}
