// Plays samples while they arrive, with WebAudio: every piece is scheduled behind the one before it.

const LEAD_S = 0.06;

/** A player of 16-bit samples at one rate. `onchange` is called when it starts, stops or ends. */
export class PcmPlayer {
  onchange = () => {};
  playing = false;
  complete = false;
  #context;
  #rate;
  #pieces = []; // {samples, start}: `start` in seconds of the speech
  #samples = 0;
  #scheduled = []; // {node, at, start, seconds}: `at` on the context's clock
  #next = 0; // the index of the first piece that is not scheduled
  #clock = 0; // when the next piece begins, on the context's clock
  #position = 0; // where it stands while it does not play

  constructor(rate) {
    this.#rate = rate;
    // A context at the speech's own rate: pieces resampled one by one would click at their edges.
    this.#context = new AudioContext({ sampleRate: rate, latencyHint: "interactive" });
  }

  get duration() {
    return this.#samples / this.#rate;
  }

  get position() {
    if (!this.playing) return this.#position;
    const now = this.#context.currentTime;
    let current = null;
    for (const piece of this.#scheduled) if (piece.at <= now) current = piece;
    if (!current) return this.#position;
    return Math.min(current.start + Math.min(now - current.at, current.seconds), this.duration);
  }

  /** Add samples; they are heard in their turn if it plays. */
  append(samples) {
    this.#pieces.push({ samples, start: this.duration });
    this.#samples += samples.length;
    if (this.playing) this.#schedule();
  }

  /** All samples have come. */
  finish() {
    this.complete = true;
    this.#checkEnd();
  }

  async play() {
    if (this.playing) return;
    if (this.complete && this.#position >= this.duration - 0.01) this.#position = 0;
    await this.#context.resume();
    this.playing = true;
    this.#start(this.#position);
    this.onchange();
  }

  pause() {
    if (!this.playing) return;
    this.#position = this.position;
    this.playing = false;
    this.#silence();
    this.onchange();
  }

  /** Go on at `position`, in seconds. */
  seek(position) {
    const to = Math.max(0, Math.min(position, this.duration));
    this.#silence();
    this.#position = to;
    if (this.playing) this.#start(to);
    this.onchange();
  }

  close() {
    this.playing = false;
    this.#silence();
    this.#context.close();
  }

  #start(position) {
    this.#position = position;
    this.#clock = this.#context.currentTime + LEAD_S;
    const index = this.#pieces.findIndex((piece) => position < piece.start + piece.samples.length / this.#rate);
    this.#next = index < 0 ? this.#pieces.length : index;
    this.#schedule(position);
  }

  #schedule(from = 0) {
    const context = this.#context;
    for (; this.#next < this.#pieces.length; this.#next += 1) {
      const piece = this.#pieces[this.#next];
      const skipped = Math.min(Math.max(0, Math.round((from - piece.start) * this.#rate)), piece.samples.length - 1);
      const samples = piece.samples.subarray(skipped);
      const buffer = context.createBuffer(1, samples.length, this.#rate);
      const channel = buffer.getChannelData(0);
      for (let i = 0; i < samples.length; i += 1) channel[i] = samples[i] / 32768;
      const node = context.createBufferSource();
      node.buffer = buffer;
      node.connect(context.destination);
      // After an underrun the speech goes on now, not in the past.
      this.#clock = Math.max(this.#clock, context.currentTime + 0.01);
      node.start(this.#clock);
      node.onended = () => this.#checkEnd();
      const seconds = samples.length / this.#rate;
      this.#scheduled.push({ node, at: this.#clock, start: piece.start + skipped / this.#rate, seconds });
      this.#clock += seconds;
    }
    // Of what was heard, the last piece alone still tells the position.
    const now = context.currentTime;
    while (this.#scheduled.length > 1 && this.#scheduled[1].at <= now) this.#scheduled.shift();
  }

  #silence() {
    for (const { node } of this.#scheduled) {
      node.onended = null;
      node.stop();
      node.disconnect();
    }
    this.#scheduled = [];
  }

  #checkEnd() {
    if (!this.playing || !this.complete || this.#context.currentTime < this.#clock - 0.005) return;
    this.playing = false;
    this.#silence();
    this.#position = this.duration;
    this.onchange();
  }
}
