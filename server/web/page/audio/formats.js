// The formats that a request can have, and how the page plays each.

/** `stream`: "pcm" with WebAudio, "media" with MediaSource where the browser can; null: once whole. */
export const FORMATS = {
  wav: { name: "WAV", stream: "pcm", type: "audio/wav", rates: "all" },
  mp3: { name: "MP3", stream: "media", type: "audio/mpeg", rates: "all" },
  opus: { name: "Opus", stream: null, type: "audio/ogg", rates: "opus" },
  aac: { name: "AAC", stream: "media", type: "audio/aac", rates: "all" },
  flac: { name: "FLAC", stream: null, type: "audio/flac", rates: "all" },
  pcm: { name: "PCM", stream: "pcm", type: "audio/pcm", rates: "all" },
  ulaw: { name: "G.711 µ-law", stream: null, type: "audio/basic", rates: "g711" },
  alaw: { name: "G.711 A-law", stream: null, type: "audio/x-alaw-basic", rates: "g711" },
};

export const RATES = {
  all: [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000],
  opus: [8000, 12000, 16000, 24000, 48000],
  g711: [8000],
};
