// A short preview of a voice: made once, kept in this browser, played in one place at a time.

import { send } from "../service/api.js";
import { pageError } from "../service/catalog.js";
import { Icon } from "../components/icons.js";
import { cachedPreview, keepPreview } from "./history.js";
import { strings } from "../strings.js";
import { html, Shared, useShared, useState } from "../ui.js";

/** The key of the preview that plays now, or "". */
const playing = new Shared("");
const audio = new Audio();
let url = "";

for (const name of ["pause", "ended", "error"]) audio.addEventListener(name, () => (playing.value = ""));

async function recorded(model, voice) {
  const text = strings.greetings[voice.language] ?? strings.greetings.default;
  const key = JSON.stringify([model, voice.id, voice.name, text]);
  const known = await cachedPreview(key);
  if (known) return known;
  const json = { model, voice: voice.id, input: text, response_format: "mp3" };
  const blob = await (await send("v1/audio/speech", { method: "POST", json })).blob();
  await keepPreview(key, blob);
  return blob;
}

export function PreviewButton({ model, voice }) {
  const key = `${model} ${voice.id}`;
  const now = useShared(playing);
  const [busy, setBusy] = useState(false);
  const plays = now === key;
  const toggle = async () => {
    if (plays) {
      audio.pause();
      return;
    }
    setBusy(true);
    try {
      const blob = await recorded(model, voice);
      URL.revokeObjectURL(url);
      url = URL.createObjectURL(blob);
      audio.src = url;
      await audio.play();
      playing.value = key;
    } catch (error) {
      if (error.name !== "AbortError") pageError.value = error;
    } finally {
      setBusy(false);
    }
  };
  const label = plays ? strings.voices.stopPreview(voice.name) : strings.voices.preview(voice.name);
  return html`<button class="quiet round" aria-label=${label} title=${label} disabled=${busy} data-plays=${plays} onClick=${toggle}>
    ${busy ? html`<span class="spinner"></span>` : html`<${Icon} name=${plays ? "stop" : "play"} />`}
  </button>`;
}
