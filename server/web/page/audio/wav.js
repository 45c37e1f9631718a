// WAV headers: reading that of a stream, and writing one before samples that the browser is to play.

const PCM = 1;
const A_LAW = 6;
const MU_LAW = 7;

/** A WAV file of `parts`: 16-bit PCM, or G.711 as `codec` "alaw" or "ulaw". */
export function wavOf(parts, rate, codec = "pcm") {
  const bytes = parts.reduce((sum, part) => sum + (part.byteLength ?? part.size), 0);
  const width = codec === "pcm" ? 2 : 1;
  const header = new DataView(new ArrayBuffer(44));
  const name = (at, text) => [...text].forEach((letter, i) => header.setUint8(at + i, letter.charCodeAt(0)));
  name(0, "RIFF");
  header.setUint32(4, 36 + bytes, true);
  name(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, { pcm: PCM, alaw: A_LAW, ulaw: MU_LAW }[codec], true);
  header.setUint16(22, 1, true);
  header.setUint32(24, rate, true);
  header.setUint32(28, rate * width, true);
  header.setUint16(32, width, true);
  header.setUint16(34, 8 * width, true);
  name(36, "data");
  header.setUint32(40, bytes, true);
  return new Blob([header.buffer, ...parts], { type: "audio/wav" });
}

/** Where the samples of a WAV begin, and their rate: {start, rate}; null while the header is not whole. */
export function wavHeader(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 12;
  let rate = 0;
  while (at + 8 <= bytes.length) {
    const name = String.fromCharCode(...bytes.subarray(at, at + 4));
    const size = view.getUint32(at + 4, true);
    if (name === "data") return { start: at + 8, rate };
    if (name === "fmt ") {
      if (at + 16 > bytes.length) return null;
      rate = view.getUint32(at + 12, true);
    }
    at += 8 + size + (size % 2);
  }
  return null;
}
