// Clone a voice from a recording.

import { send } from "../service/api.js";
import { loadCatalog } from "../service/catalog.js";
import { ConsentField } from "./consent_field.js";
import { Dialog } from "../components/dialog.js";
import { Field } from "../components/field.js";
import { RecordingField } from "./recording_field.js";
import { strings } from "../strings.js";
import { useSubmit } from "../components/submit.js";
import { html, useState } from "../ui.js";

const words = strings.clone;
const FIELDS = ["name", "audio_sample", "ref_text", "description", "consent"];

export function CloneDialog({ onClose }) {
  const [fields, setFields] = useState({ name: "", ref_text: "", description: "", consent: "" });
  const [recording, setRecording] = useState(null);
  const [allowed, setAllowed] = useState(false);
  const [problems, busy, submit] = useSubmit(FIELDS, strings.errors);
  const set = (name) => (event) => setFields({ ...fields, [name]: event.target.value });
  const save = (event) => {
    event.preventDefault();
    submit(async () => {
      const body = new FormData();
      for (const [name, value] of Object.entries(fields)) if (value) body.append(name, value);
      if (recording) body.append("audio_sample", recording.blob, recording.name);
      await send("v1/audio/voices", { method: "POST", body });
      await loadCatalog();
      onClose();
    });
  };
  return html`<${Dialog} title=${words.title} wide onClose=${onClose}>
    <form onSubmit=${save}>
      ${problems[""] && html`<p class="problem" role="alert">${problems[""]}</p>`}
      <${RecordingField} label=${words.recording} value=${recording} onChange=${setRecording} problem=${problems.audio_sample} />
      <${Field} label=${words.transcript} problem=${problems.ref_text} hint=${words.transcriptHint}>
        <textarea name="ref_text" rows="2" maxlength="4096" value=${fields.ref_text} onInput=${set("ref_text")}></textarea>
      </${Field}>
      <div class="pair">
        <${Field} label=${strings.voices.name} problem=${problems.name}>
          <input name="name" required maxlength="64" value=${fields.name} onInput=${set("name")} />
        </${Field}>
        <${Field} label=${strings.voices.description} problem=${problems.description}>
          <input name="description" maxlength="4096" value=${fields.description} onInput=${set("description")} />
        </${Field}>
      </div>
      <${ConsentField} value=${fields.consent} problem=${problems.consent} onChange=${(consent) => setFields({ ...fields, consent })} />
      <label class="choice"><input type="checkbox" name="allowed" required checked=${allowed} onChange=${(event) => setAllowed(event.target.checked)} />
        <span>${words.allowed}</span></label>
      <div class="actions">
        <button type="button" class="quiet" onClick=${onClose}>${strings.cancel}</button>
        <button class="primary" disabled=${busy || !recording}>${busy && html`<span class="spinner"></span>`}${words.save}</button>
      </div>
    </form>
  </${Dialog}>`;
}
