// Voices: all voices of the service, with search and previews.

import { models } from "../catalog.js";
import { Icon } from "../icons.js";
import { write } from "../draft.js";
import { PreviewButton } from "../preview.js";
import { go } from "../router.js";
import { strings } from "../strings.js";
import { html, useShared, useState } from "../ui.js";
import { about, fits, Monogram, useVoices } from "../voice_picker.js";

const words = strings.voices;

function use(model, voice) {
  write({ model: model.id, voice: voice.id });
  go("speak");
}

function ModelVoices({ model, search }) {
  const voices = useVoices(model).filter((voice) => fits(voice, search));
  if (!voices.length) return null;
  return html`<section class="card">
    <h2>${model.name}</h2>
    <ul class="voice-list">
      ${voices.map(
        (voice) => html`<li key=${voice.id}>
          <span class="voice-line"><${Monogram} name=${voice.name} />
            <span class="text"><span class="name">${voice.name}</span><span class="about">${about(voice)}</span></span></span>
          <${PreviewButton} model=${model.id} voice=${voice} />
          <button aria-label=${words.useOne(voice.name)} onClick=${() => use(model, voice)}>${words.use}</button>
        </li>`,
      )}
    </ul>
  </section>`;
}

export function View() {
  const list = useShared(models) ?? [];
  const [search, setSearch] = useState("");
  return html`<div class="view-head"><h1>${words.heading}</h1>
      <label class="search"><${Icon} name="search" /><span class="hidden-label">${words.search}</span>
        <input type="search" placeholder=${words.search} value=${search} onInput=${(event) => setSearch(event.target.value)} /></label>
    </div>
    ${list.filter((model) => model.state !== "unavailable").map((model) => html`<${ModelVoices} key=${model.id} model=${model} search=${search} />`)}`;
}
