// Recordings that the service would not take as they are: too large, or of a kind that it does not know.

import { wavOf } from "./wav.js";

const RATE = 24000;
const KNOWN = /\.(wav|flac|mp3|ogg|oga|opus|m4a|mp4|aac|webm|aiff?|au|caf|w64|amr|3gp)$/i;

/** The recording as it is if the service takes that, else as a WAV of one channel at 24 kHz. */
export async function fitting(file, name, mostBytes) {
  if (file.size <= mostBytes && KNOWN.test(name)) return { blob: file, name };
  try {
    const context = new OfflineAudioContext(1, 1, RATE);
    const buffer = await context.decodeAudioData(await file.arrayBuffer());
    const samples = new Int16Array(buffer.length);
    for (let channel = 0; channel < buffer.numberOfChannels; channel += 1) {
      const data = buffer.getChannelData(channel);
      for (let i = 0; i < samples.length; i += 1) {
        samples[i] += Math.max(-1, Math.min(1, data[i])) * (32767 / buffer.numberOfChannels);
      }
    }
    return { blob: wavOf([samples], RATE), name: `${name}.wav` };
  } catch {
    return { blob: file, name }; // the service says what is wrong with it
  }
}

/** The length of a recording in seconds; null if this browser cannot read it. */
export async function secondsOf(blob) {
  try {
    const context = new OfflineAudioContext(1, 1, RATE);
    return (await context.decodeAudioData(await blob.arrayBuffer())).duration;
  } catch {
    return null;
  }
}
