// The button that names the chosen voice, and the dialog with all voices of a model: search, listen, choose.

import { voicesOf } from "../service/catalog.js";
import { Dialog } from "../components/dialog.js";
import { draft, write } from "./draft.js";
import { Icon } from "../components/icons.js";
import { PreviewButton } from "./preview.js";
import { strings } from "../strings.js";
import { html, useEffect, useId, useShared, useState } from "../ui.js";

const words = strings.speak;

/** The voices of `model`, [] before they have come. */
export function useVoices(model) {
  const [voices, setVoices] = useState([]);
  useEffect(() => {
    let left = false;
    voicesOf(model.id).then((list) => left || setVoices(list), () => left || setVoices([]));
    return () => {
      left = true;
    };
  }, [model]);
  return voices;
}

export function about(voice) {
  const kind = voice.kind === "preset" ? [] : [strings.voices.kinds[voice.kind]];
  const language = voice.language === "auto" ? [] : [strings.languageName(voice.language)];
  return [...language, ...kind, voice.description].filter(Boolean).join(" · ");
}

/** Whether all words of the search are in the names or the description of the voice. */
export function fits(voice, search) {
  const shown = `${voice.id} ${voice.name} ${about(voice)}`.toLowerCase();
  return search.toLowerCase().split(/\s+/).every((word) => shown.includes(word));
}

const TONES = 6;

/** The first letter of a name, in a colour that the name always has. */
export function Monogram({ name }) {
  const letters = [...name];
  const tone = letters.reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 9973, 7) % TONES;
  return html`<span class=${`monogram tone-${tone}`} aria-hidden="true">${letters[0]?.toUpperCase()}</span>`;
}

function VoiceDialog({ model, voices, onClose }) {
  const [search, setSearch] = useState("");
  const fields = useShared(draft);
  const { id: chosen } = voices.find((voice) => voice.id === fields.voice) ?? voices[0];
  const found = voices.filter((voice) => fits(voice, search));
  const use = (voice) => {
    write({ voice: voice.id });
    onClose();
  };
  return html`<${Dialog} title=${words.chooseVoice} wide onClose=${onClose}>
    <label class="search"><${Icon} name="search" /><span class="hidden-label">${strings.voices.search}</span>
      <input type="search" autofocus placeholder=${strings.voices.search} value=${search} onInput=${(event) => setSearch(event.target.value)} /></label>
    <p class="hint" role="status">${found.length ? strings.voices.count(found.length) : strings.voices.none}</p>
    <ul class="voice-list">
      ${found.map(
        (voice) => html`<li key=${voice.id}>
          <button class="voice-button quiet" aria-pressed=${voice.id === chosen ? "true" : "false"} onClick=${() => use(voice)}>
            <${Monogram} name=${voice.name} />
            <span class="text"><span class="name">${voice.name}</span><span class="about">${about(voice)}</span></span>
            ${voice.id === chosen && html`<${Icon} name="check" />`}
          </button>
          <${PreviewButton} model=${model.id} voice=${voice} />
        </li>`,
      )}
    </ul>
  </${Dialog}>`;
}

export function VoiceButton({ model, problem }) {
  const voices = useVoices(model);
  const fields = useShared(draft);
  const [open, setOpen] = useState(false);
  const id = useId();
  const chosen = voices.find((voice) => voice.id === fields.voice) ?? voices[0];
  return html`<div class="field">
    <span class="label" id=${`${id}-label`}>${words.voice}</span>
    <button
      class="voice-button" id=${id} name="voice" aria-labelledby=${`${id}-label ${id}`} aria-haspopup="dialog"
      aria-invalid=${problem ? "true" : undefined} aria-describedby=${problem ? `${id}-problem` : undefined}
      disabled=${!voices.length} onClick=${() => setOpen(true)}
    >
      ${chosen
        ? html`<${Monogram} name=${chosen.name} />
            <span class="text"><span class="name">${chosen.name}</span><span class="about">${about(chosen)}</span></span>
            <${Icon} name="more" size=${16} />`
        : html`<span class="text">${words.noVoices}</span>`}
    </button>
    ${problem && html`<p class="problem" id=${`${id}-problem`}>${problem}</p>`}
    ${open && html`<${VoiceDialog} model=${model} voices=${voices} onClose=${() => setOpen(false)} />`}
  </div>`;
}
