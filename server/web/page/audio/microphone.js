// Recording with the microphone, and how loud it is.

const TYPES = ["audio/webm;codecs=opus", "audio/mp4", "audio/ogg;codecs=opus"];
const ENDINGS = { "audio/webm": "webm", "audio/mp4": "m4a", "audio/ogg": "ogg" };

/** Whether this page may ask for the microphone: browsers let only pages of https and of this machine do so. */
export function canRecord() {
  return Boolean(navigator.mediaDevices?.getUserMedia && self.MediaRecorder);
}

/** One recording. `level` is the loudness now (0 to 1), `seconds` the length so far. */
export class Recording {
  #stream;
  #recorder;
  #context;
  #analyser;
  #samples;
  #parts = [];
  #began = performance.now();

  /** Ask for the microphone, and begin. */
  static async begin() {
    const stream = await navigator.mediaDevices.getUserMedia({
      // A voice is cloned from what was said, not from what a telephone makes of it.
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true },
    });
    return new Recording(stream);
  }

  constructor(stream) {
    this.#stream = stream;
    const mimeType = TYPES.find((type) => MediaRecorder.isTypeSupported(type));
    this.#recorder = new MediaRecorder(stream, { mimeType, audioBitsPerSecond: 128_000 });
    this.#recorder.ondataavailable = ({ data }) => this.#parts.push(data);
    this.#recorder.start();
    this.#context = new AudioContext();
    this.#analyser = this.#context.createAnalyser();
    this.#context.createMediaStreamSource(stream).connect(this.#analyser);
    this.#samples = new Float32Array(this.#analyser.fftSize);
  }

  get level() {
    this.#analyser.getFloatTimeDomainData(this.#samples);
    return Math.min(1, this.#samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0));
  }

  get seconds() {
    return (performance.now() - this.#began) / 1000;
  }

  /** End, and give the microphone back: {blob, name}. */
  async end() {
    await new Promise((resolve) => {
      this.#recorder.onstop = resolve;
      this.#recorder.stop();
    });
    this.cancel();
    const type = this.#recorder.mimeType.split(";")[0];
    return { blob: new Blob(this.#parts, { type }), name: `recording.${ENDINGS[type] ?? "webm"}` };
  }

  /** Give the microphone back. */
  cancel() {
    for (const track of this.#stream.getTracks()) track.stop();
    if (this.#context.state !== "closed") this.#context.close();
  }
}
