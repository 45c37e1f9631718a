// Voices: the saved ones, which can be made, renamed, moved and deleted, and the presets of every model.

import { models, savedVoices, pageError } from "../service/catalog.js";
import { CloneDialog } from "./clone_dialog.js";
import { designers, DesignDialog } from "./design_dialog.js";
import { write } from "../speak/draft.js";
import { Icon } from "../components/icons.js";
import { PreviewButton } from "../speak/preview.js";
import { go } from "../router.js";
import { strings } from "../strings.js";
import { html, useShared, useState } from "../ui.js";
import { DeleteDialog, exportVoice, ImportDialog, RenameDialog } from "./voice_dialogs.js";
import { about, fits, Monogram, useVoices } from "../speak/voice_picker.js";

const words = strings.voices;

function use(model, voice) {
  write({ model, voice: voice.id });
  go("speak");
}

function Line({ voice, description }) {
  return html`<span class="voice-line"><${Monogram} name=${voice.name} />
    <span class="text"><span class="name">${voice.name}</span><span class="about">${description}</span></span></span>`;
}

function UseButton({ model, voice }) {
  return html`<button aria-label=${words.useOne(voice.name)} onClick=${() => use(model, voice)}>${words.use}</button>`;
}

function savedAbout(voice) {
  const kind = words.kinds[voice.type === "prompt" ? "design" : "clone"];
  const speaker = voice.model ? [] : [words.noSpeaker];
  const mine = voice.shared ? "" : words.notShared(voice.owner);
  return [kind, words.recorded(voice.seconds), mine, voice.description, ...speaker].filter(Boolean).join(" · ");
}

function SavedVoice({ voice, onAsk }) {
  const tool = (icon, label, action) => html`<button class="quiet" aria-label=${label} title=${label} onClick=${action}>
    <${Icon} name=${icon} size=${18} />
  </button>`;
  const move = () => exportVoice(voice).catch((error) => (pageError.value = error));
  return html`<li data-voice=${voice.id}>
    <${Line} voice=${voice} description=${savedAbout(voice)} />
    <span class="tools">
      ${voice.model && html`<${PreviewButton} model=${voice.model} voice=${voice} />`}
      ${tool("edit", words.renameOne(voice.name), () => onAsk({ Dialog: RenameDialog, voice }))}
      ${tool("download", words.exportOne(voice.name), move)}
      ${tool("trash", words.deleteOne(voice.name), () => onAsk({ Dialog: DeleteDialog, voice }))}
      ${voice.model && html`<${UseButton} model=${voice.model} voice=${voice} />`}
    </span>
  </li>`;
}

function SavedVoices({ search, onAsk }) {
  const saved = useShared(savedVoices);
  if (!saved) return null;
  const asPreset = (voice) => ({ ...voice, kind: voice.type === "prompt" ? "design" : "clone", language: "auto" });
  const found = saved.filter((voice) => fits(asPreset(voice), search));
  return html`<section class="card" aria-labelledby="saved-heading">
    <h2 id="saved-heading">${words.saved}</h2>
    ${saved.length === 0 && html`<p class="empty">${words.noneSaved}</p>`}
    ${saved.length > 0 && !found.length && html`<p class="empty">${words.none}</p>`}
    <ul class="voice-list">${found.map((voice) => html`<${SavedVoice} key=${voice.id} voice=${voice} onAsk=${onAsk} />`)}</ul>
  </section>`;
}

function Presets({ model, search }) {
  const voices = useVoices(model).filter((voice) => voice.kind === "preset" && fits(voice, search));
  if (!voices.length) return null;
  return html`<section class="card" aria-label=${model.name}>
    <div class="history-head"><h2>${model.name}</h2><span class="tag">${words.count(voices.length)}</span></div>
    <ul class="voice-list columns">
      ${voices.map(
        (voice) => html`<li key=${voice.id}>
          <${Line} voice=${voice} description=${about(voice)} />
          <span class="tools"><${PreviewButton} model=${model.id} voice=${voice} /><${UseButton} model=${model.id} voice=${voice} /></span>
        </li>`,
      )}
    </ul>
  </section>`;
}

export function View() {
  const list = useShared(models) ?? [];
  const [search, setSearch] = useState("");
  const [asked, setAsked] = useState(null);
  const close = () => setAsked(null);
  return html`<div class="view-head"><h1>${words.heading}</h1>
      <div class="actions">
        <button class="primary" onClick=${() => setAsked({ Dialog: CloneDialog })}><${Icon} name="mic" size=${18} />${words.clone}</button>
        ${designers(list).length > 0 &&
        html`<button onClick=${() => setAsked({ Dialog: DesignDialog })}><${Icon} name="wand" size=${18} />${words.design}</button>`}
        <button onClick=${() => setAsked({ Dialog: ImportDialog })}><${Icon} name="upload" size=${18} />${words.import}</button>
      </div>
    </div>
    <label class="search"><${Icon} name="search" /><span class="hidden-label">${words.search}</span>
      <input type="search" placeholder=${words.search} value=${search} onInput=${(event) => setSearch(event.target.value)} /></label>
    <${SavedVoices} search=${search} onAsk=${setAsked} />
    ${list
      .filter((model) => model.state !== "unavailable" && model.voices.length)
      .map((model) => html`<${Presets} key=${model.id} model=${model} search=${search} />`)}
    ${asked && html`<${asked.Dialog} voice=${asked.voice} onClose=${close} />`}`;
}
