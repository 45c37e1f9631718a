// The consent of a speaker: one that the service keeps, or one that is recorded now.

import { getJson, send } from "../service/api.js";
import { models, service } from "../service/catalog.js";
import { Field } from "../components/field.js";
import { RecordingField } from "./recording_field.js";
import { strings } from "../strings.js";
import { useSubmit } from "../components/submit.js";
import { html, useEffect, useShared, useState } from "../ui.js";

const words = strings.consent;

async function allConsents() {
  return (await getJson("v1/audio/voice_consents?limit=100")).data;
}

function NewConsent({ onMade }) {
  const [name, setName] = useState("");
  const [language, setLanguage] = useState(navigator.language || "en");
  const [recording, setRecording] = useState(null);
  const [problems, busy, submit] = useSubmit(["name", "language", "recording"], strings.errors);
  const save = () =>
    submit(async () => {
      const body = new FormData();
      body.append("name", name);
      body.append("language", language);
      if (recording) body.append("recording", recording.blob, recording.name);
      onMade(await (await send("v1/audio/voice_consents", { method: "POST", body })).json());
    });
  return html`<div class="nested">
    ${problems[""] && html`<p class="problem" role="alert">${problems[""]}</p>`}
    <p class="hint">${words.say}</p>
    <blockquote>${words.statement}</blockquote>
    <div class="pair">
      <${Field} label=${words.speaker} problem=${problems.name}>
        <input value=${name} onInput=${(event) => setName(event.target.value)} />
      </${Field}>
      <${Field} label=${words.language} problem=${problems.language}>
        <input value=${language} onInput=${(event) => setLanguage(event.target.value)} />
      </${Field}>
    </div>
    <${RecordingField} label=${words.recording} value=${recording} onChange=${setRecording} problem=${problems.recording} />
    <div class="actions"><button type="button" disabled=${busy || !recording || !name} onClick=${save}>${words.save}</button></div>
  </div>`;
}

/** `value` is the id of a consent or "". */
export function ConsentField({ value, onChange, problem }) {
  const required = useShared(service)?.requires.consent;
  useShared(models);
  const [list, setList] = useState([]);
  const [making, setMaking] = useState(false);
  useEffect(() => {
    allConsents().then(setList, () => setList([]));
  }, []);
  const made = (consent) => {
    setMaking(false);
    setList([consent, ...list]);
    onChange(consent.id);
  };
  return html`<div class="consent">
    <${Field} label=${words.label} problem=${problem} hint=${required ? words.required : words.optional}>
      <select value=${value} onChange=${(event) => onChange(event.target.value)}>
        <option value="">${words.none}</option>
        ${list.map((each) => html`<option value=${each.id}>${words.one(each)}</option>`)}
      </select>
    </${Field}>
    ${making
      ? html`<${NewConsent} onMade=${made} />`
      : html`<button type="button" class="quiet" onClick=${() => setMaking(true)}>${words.make}</button>`}
  </div>`;
}
