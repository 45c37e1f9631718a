// The loudness of a speech over time: what the waveform shows.

const BUCKET_S = 0.02;

/** The largest level (0 to 1) of each 20 ms, in the order of time. It grows while the speech is made. */
export class Peaks {
  levels = [];
  samples = 0;
  rate = 0;
  #open = 0;
  #filled = 0;

  /** Add 16-bit samples. */
  add(samples, rate) {
    this.rate = rate;
    this.samples += samples.length;
    const size = Math.round(rate * BUCKET_S);
    for (const sample of samples) {
      const level = Math.abs(sample) / 32768;
      if (level > this.#open) this.#open = level;
      if (++this.#filled === size) {
        this.levels.push(this.#open);
        this.#open = 0;
        this.#filled = 0;
      }
    }
  }

  get duration() {
    return this.rate ? this.samples / this.rate : 0;
  }

  /** The loudest level in each of `count` equal parts of `total` seconds; 0 where nothing is yet. */
  bars(count, total) {
    const each = total / BUCKET_S / count;
    return Array.from({ length: count }, (_, i) => {
      let level = 0;
      const end = Math.max(Math.floor((i + 1) * each), Math.floor(i * each) + 1);
      for (let at = Math.floor(i * each); at < end && at < this.levels.length; at += 1) {
        level = Math.max(level, this.levels[at]);
      }
      return level;
    });
  }
}

/** The peaks of an audio file, or null if this browser cannot decode it. */
export async function peaksOf(blob) {
  try {
    const context = new OfflineAudioContext(1, 1, 24000);
    const buffer = await context.decodeAudioData(await blob.arrayBuffer());
    const peaks = new Peaks();
    peaks.add(buffer.getChannelData(0).map((sample) => sample * 32767), buffer.sampleRate);
    return peaks;
  } catch {
    return null;
  }
}
