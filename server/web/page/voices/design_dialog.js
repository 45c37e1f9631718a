// Design a voice: describe it, listen, and save what was heard.

import { send } from "../service/api.js";
import { loadCatalog, models } from "../service/catalog.js";
import { Dialog } from "../components/dialog.js";
import { Field } from "../components/field.js";
import { Icon } from "../components/icons.js";
import { PlayerCard } from "../speak/player_card.js";
import { Speech } from "../speak/speech.js";
import { strings } from "../strings.js";
import { problemsOf, useSubmit } from "../components/submit.js";
import { html, useEffect, useRef, useShared, useState } from "../ui.js";

const words = strings.design;
const FIELDS = ["name", "prompt", "script_hint"];
/** The fields of a speech, by the names that they have in the request for a voice. */
const SPOKEN = { instructions: "prompt", input: "script_hint" };

/** The models that design voices and can speak. */
export function designers(list) {
  return (list ?? []).filter((model) => model.task === "VoiceDesign" && model.state !== "unavailable");
}

async function listen(model, fields, audio, show) {
  const request = { model: model.id, input: fields.script_hint, instructions: fields.prompt, response_format: "wav" };
  const speech = new Speech({ ...request, store: true }, audio);
  show(speech);
  await speech.run();
  const { error } = speech.state.value;
  if (error?.field !== "store") return speech;
  // This service keeps no audio. The voice can be heard all the same, and is then made anew.
  const unkept = new Speech(request, audio);
  show(unkept);
  await unkept.run();
  return unkept;
}

export function DesignDialog({ onClose }) {
  const [model] = designers(useShared(models));
  const [fields, setFields] = useState({ name: "", prompt: "", script_hint: words.script });
  const [speech, setSpeech] = useState(null);
  const [heard, setHeard] = useState(null);
  const [refusal, setRefusal] = useState(null);
  const [problems, busy, submit] = useSubmit(FIELDS, strings.errors);
  const audio = useRef(null);
  const open = useRef(null);
  const current = useRef(null);
  audio.current ??= new Audio();
  useEffect(() => () => current.current?.close(), []);
  const show = (next) => {
    current.current?.close();
    current.current = next;
    setSpeech(next);
  };
  // Speech of other words is not the voice that is described now.
  const set = (name) => (event) => {
    setFields({ ...fields, [name]: event.target.value });
    if (name !== "name") setHeard(null);
  };
  const hear = async () => {
    setRefusal(null);
    setHeard(null);
    const next = await listen(model, fields, audio.current, show);
    if (current.current !== next) return;
    const { error, phase } = next.state.value;
    if (error) setRefusal({ ...error, message: error.message, field: SPOKEN[error.field] ?? error.field });
    if (phase === "done") setHeard(next);
  };
  const save = (event) => {
    event.preventDefault();
    submit(async () => {
      const json = { ...fields, type: "prompt", ...(heard.audioId ? { audio_id: heard.audioId } : {}) };
      await send("v1/audio/voices", { method: "POST", json });
      await loadCatalog();
      onClose();
    });
  };
  const said = { ...problems, ...problemsOf(refusal, FIELDS, strings.errors) };
  return html`<${Dialog} title=${words.title} wide onClose=${onClose}>
    <form onSubmit=${save} ref=${open}>
      ${said[""] && html`<p class="problem" role="alert">${said[""]}</p>`}
      <${Field} label=${words.prompt} problem=${said.prompt}>
        <textarea name="prompt" rows="3" required maxlength="4096" placeholder=${strings.speak.designHint} value=${fields.prompt} onInput=${set("prompt")}></textarea>
      </${Field}>
      <${Field} label=${words.says} problem=${said.script_hint} hint=${words.saysHint}>
        <textarea name="script_hint" rows="2" required minlength="20" maxlength="400" value=${fields.script_hint} onInput=${set("script_hint")}></textarea>
      </${Field}>
      <div class="actions start">
        <button type="button" disabled=${!fields.prompt.trim() || (speech && !speech.over)} onClick=${hear}>
          <${Icon} name="play" size=${18} />${heard ? words.another : words.listen}
        </button>
      </div>
      ${speech && html`<${PlayerCard} key=${speech} speech=${speech} />`}
      <${Field} label=${strings.voices.name} problem=${said.name}>
        <input name="name" required maxlength="64" value=${fields.name} onInput=${set("name")} />
      </${Field}>
      <div class="actions">
        <button type="button" class="quiet" onClick=${onClose}>${strings.cancel}</button>
        <button class="primary" disabled=${busy || !heard}>${busy && html`<span class="spinner"></span>`}${words.save}</button>
      </div>
    </form>
  </${Dialog}>`;
}
