// The settings beside the text: model, voice, how to speak, format, and under "more" what few people change.

import { RATES, FORMATS } from "../audio/formats.js";
import { models } from "../service/catalog.js";
import { draft, SAMPLING, write } from "./draft.js";
import { Field } from "../components/field.js";
import { Icon } from "../components/icons.js";
import { strings } from "../strings.js";
import { html, useEffect, useShared, useState } from "../ui.js";
import { VoiceButton } from "./voice_picker.js";

const words = strings.speak;
const UNDER_MORE = ["sample_rate", "input_format", ...SAMPLING];
const LIMITS = {
  seed: { min: 0, step: 1 },
  temperature: { min: 0, max: 2, step: 0.05 },
  top_k: { min: 0, max: 4096, step: 1 },
  top_p: { min: 0.01, max: 1, step: 0.01 },
  repetition_penalty: { min: 0.5, max: 2, step: 0.05 },
  max_new_tokens: { min: 1, max: 8192, step: 1 },
};

function set(name) {
  return (event) => write({ [name]: event.target.value });
}

function ModelField({ model, problem }) {
  const known = useShared(models) ?? [];
  const list = [...known].sort((a, b) => (a.state === "unavailable") - (b.state === "unavailable"));
  // A voice of one model means nothing to another one.
  const choose = (event) => write({ model: event.target.value, voice: "" });
  return html`<${Field} label=${words.model} problem=${problem}>
    <select name="model" value=${model?.id} onChange=${choose}>
      ${list.map(
        (each) => html`<option value=${each.id} disabled=${each.state === "unavailable"}>
          ${each.name}${each.state === "resident" ? "" : ` – ${words.states[each.state]}`}
        </option>`,
      )}
    </select>
  </${Field}>`;
}

function Instructions({ model, fields, problem }) {
  const designs = model.task === "VoiceDesign";
  if (!designs && !model.instructions) return null;
  return html`<${Field} label=${designs ? words.design : words.instructions} problem=${problem}>
    <textarea
      name="instructions" rows="3" maxlength="4096" value=${fields.instructions} onInput=${set("instructions")}
      placeholder=${designs ? words.designHint : words.instructionsHint}
    ></textarea>
  </${Field}>`;
}

function More({ model, fields, problems }) {
  const rates = RATES[FORMATS[fields.response_format].rates];
  const [open, setOpen] = useState(UNDER_MORE.some((name) => fields[name] !== ""));
  const faulty = UNDER_MORE.some((name) => problems[name]);
  useEffect(() => {
    if (faulty) setOpen(true);
  }, [faulty]);
  return html`<details open=${open} onToggle=${(event) => setOpen(event.target.open)}>
    <summary><${Icon} name="more" size=${16} />${words.more}</summary>
    <div class="more">
      <div class="pair">
        <${Field} label=${words.sampleRate} problem=${problems.sample_rate}>
          <select name="sample_rate" value=${fields.sample_rate} onChange=${set("sample_rate")}>
            <option value="">${words.unchanged}</option>
            ${rates.map((rate) => html`<option value=${String(rate)}>${strings.hertz(rate)}</option>`)}
          </select>
        </${Field}>
        <${Field} label=${words.reading} problem=${problems.input_format}>
          <select name="input_format" value=${fields.input_format} onChange=${set("input_format")}>
            ${Object.entries(words.readings).map(([value, name]) => html`<option value=${value}>${name}</option>`)}
          </select>
        </${Field}>
      </div>
      ${model.sampling && html`<div class="pair">
        ${SAMPLING.map(
          (name) => html`<${Field} label=${words[name]} problem=${problems[name]}>
            <input
              name=${name} type="number" inputmode="decimal" ...${LIMITS[name]} value=${fields[name]}
              placeholder=${words.byModel} onInput=${set(name)}
            />
          </${Field}>`,
        )}
      </div>`}
    </div>
  </details>`;
}

/** `problems` are words by the name of a field. */
export function SettingsForm({ model, problems }) {
  const fields = useShared(draft);
  const formatOf = (event) => {
    const rates = RATES[FORMATS[event.target.value].rates];
    const fits = !fields.sample_rate || rates.includes(Number(fields.sample_rate));
    write({ response_format: event.target.value, ...(fits ? {} : { sample_rate: "" }) });
  };
  return html`<section class="card settings" aria-label=${words.settings}>
    <${ModelField} model=${model} problem=${problems.model} />
    ${model && html`
      ${model.task !== "VoiceDesign" && html`<${VoiceButton} model=${model} problem=${problems.voice} />`}
      <${Instructions} model=${model} fields=${fields} problem=${problems.instructions} />
      <div class="pair">
        <${Field} label=${words.language} problem=${problems.language}>
          <select name="language" value=${fields.language} onChange=${set("language")}>
            <option value="auto">${words.auto}</option>
            ${model.languages.map((name) => html`<option value=${name}>${strings.languageName(name)}</option>`)}
          </select>
        </${Field}>
        <${Field} label=${words.format} problem=${problems.response_format}>
          <select name="response_format" value=${fields.response_format} onChange=${formatOf}>
            ${Object.entries(FORMATS).map(([value, { name }]) => html`<option value=${value}>${name}</option>`)}
          </select>
        </${Field}>
      </div>
      <${Field}
        label=${words.speed} problem=${problems.speed} aside=${html`<output>${Number(fields.speed).toFixed(2)}×</output>`}
      >
        <input name="speed" type="range" min="0.25" max="4" step="0.05" value=${fields.speed} onInput=${set("speed")} />
      </${Field}>
      <${More} model=${model} fields=${fields} problems=${problems} />
    `}
  </section>`;
}
