// What is written and chosen in Speak. It is kept in localStorage, so that it survives a reload.

import { models } from "../service/catalog.js";
import { Shared } from "../ui.js";

const KEY = "draft";

export const EMPTY = {
  input: "",
  model: "",
  voice: "",
  instructions: "",
  language: "auto",
  response_format: "wav",
  speed: 1,
  sample_rate: "",
  input_format: "",
  seed: "",
  temperature: "",
  top_k: "",
  top_p: "",
  repetition_penalty: "",
  max_new_tokens: "",
};

const NUMBERS = ["sample_rate", "seed", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"];
export const SAMPLING = ["seed", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"];

function stored() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

export const draft = new Shared({ ...EMPTY, ...stored() });

draft.subscribe((value) => {
  try {
    localStorage.setItem(KEY, JSON.stringify(value));
  } catch {
    // Without storage, or without room in it, the draft lasts as long as the page.
  }
});

/** Change fields of the draft. */
export function write(changes) {
  draft.value = { ...draft.value, ...changes };
}

/** The model of the draft, or the service's default one; null before the list has come. */
export function chosenModel(fields) {
  const list = models.value ?? [];
  return (
    list.find((model) => model.id === fields.model) ??
    list.find((model) => model.aliases.includes("gpt-4o-mini-tts")) ??
    list[0] ??
    null
  );
}

/** The body of a request: the fields that say something, as `model` takes them. */
export function requestOf(fields, model) {
  const body = { model: model.id, input: fields.input, response_format: fields.response_format };
  if (fields.voice && model.task !== "VoiceDesign") body.voice = fields.voice;
  if (fields.instructions && (model.instructions || model.task === "VoiceDesign")) body.instructions = fields.instructions;
  if (fields.language !== "auto") body.language = fields.language;
  if (Number(fields.speed) !== 1) body.speed = Number(fields.speed);
  if (fields.input_format) body.input_format = fields.input_format;
  for (const name of NUMBERS) {
    if (fields[name] === "" || (SAMPLING.includes(name) && !model.sampling)) continue;
    body[name] = Number(fields[name]);
  }
  return body;
}
