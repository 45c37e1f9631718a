// The small dialogs of a saved voice: rename, delete; and the import of one.

import { send } from "../service/api.js";
import { loadCatalog } from "../service/catalog.js";
import { Dialog } from "../components/dialog.js";
import { Field } from "../components/field.js";
import { save as saveFile } from "../components/files.js";
import { strings } from "../strings.js";
import { useSubmit } from "../components/submit.js";
import { html, useState } from "../ui.js";

const words = strings.voices;

function pathOf(voice) {
  return `v1/audio/voices/${encodeURIComponent(voice.id)}`;
}

export function RenameDialog({ voice, onClose }) {
  const [name, setName] = useState(voice.name);
  const [shared, setShared] = useState(voice.shared);
  const [problems, busy, submit] = useSubmit(["name"], strings.errors);
  const mark = voice.owner ? { shared } : {};
  const rename = (event) => {
    event.preventDefault();
    submit(async () => {
      await send(pathOf(voice), { method: "POST", json: { name, ...mark } });
      await loadCatalog();
      onClose();
    });
  };
  return html`<${Dialog} title=${words.renameTitle(voice.name)} onClose=${onClose}>
    <form onSubmit=${rename}>
      <${Field} label=${words.name} problem=${problems.name ?? problems[""]}>
        <input name="name" autofocus required maxlength="64" value=${name} onInput=${(event) => setName(event.target.value)} />
      </${Field}>
      ${voice.owner && html`<label class="choice"><input type="checkbox" name="shared" checked=${shared}
        onChange=${(event) => setShared(event.target.checked)} /><span>${words.shareWithAll}</span></label>`}
      <div class="actions">
        <button type="button" class="quiet" onClick=${onClose}>${strings.cancel}</button>
        <button class="primary" disabled=${busy}>${words.rename}</button>
      </div>
    </form>
  </${Dialog}>`;
}

export function DeleteDialog({ voice, onClose }) {
  const [problems, busy, submit] = useSubmit([], strings.errors);
  const remove = () =>
    submit(async () => {
      await send(pathOf(voice), { method: "DELETE" });
      await loadCatalog();
      onClose();
    });
  return html`<${Dialog} title=${words.deleteTitle(voice.name)} onClose=${onClose}>
    <p>${words.deleteText}</p>
    ${problems[""] && html`<p class="problem" role="alert">${problems[""]}</p>`}
    <div class="actions">
      <button class="quiet" onClick=${onClose}>${strings.cancel}</button>
      <button class="danger" disabled=${busy} onClick=${remove}>${words.remove}</button>
    </div>
  </${Dialog}>`;
}

export function ImportDialog({ onClose }) {
  const [file, setFile] = useState(null);
  const [name, setName] = useState("");
  const [problems, busy, submit] = useSubmit(["file", "name"], strings.errors);
  const take = (event) => {
    event.preventDefault();
    submit(async () => {
      const body = new FormData();
      body.append("file", file, file.name);
      if (name) body.append("name", name);
      await send("v1/audio/voice_files", { method: "POST", body });
      await loadCatalog();
      onClose();
    });
  };
  return html`<${Dialog} title=${words.importTitle} onClose=${onClose}>
    <form onSubmit=${take}>
      ${problems[""] && html`<p class="problem" role="alert">${problems[""]}</p>`}
      <${Field} label=${words.file} problem=${problems.file} hint=${words.fileHint}>
        <input name="file" type="file" accept=".voice" required onChange=${(event) => setFile(event.target.files[0] ?? null)} />
      </${Field}>
      <${Field} label=${words.otherName} problem=${problems.name}>
        <input name="name" maxlength="64" value=${name} onInput=${(event) => setName(event.target.value)} />
      </${Field}>
      <div class="actions">
        <button type="button" class="quiet" onClick=${onClose}>${strings.cancel}</button>
        <button class="primary" disabled=${busy || !file}>${words.import}</button>
      </div>
    </form>
  </${Dialog}>`;
}

/** Download a saved voice as one file. */
export async function exportVoice(voice) {
  const answer = await send(`v1/audio/voice_files/${encodeURIComponent(voice.id)}`);
  saveFile(await answer.blob(), `${voice.name.replace(/[\\/:*?"<>|]/g, "_")}.voice`);
}
