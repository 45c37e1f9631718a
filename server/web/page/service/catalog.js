// What the service has: its name and limits, its models with their states, its voices.

import { getJson } from "./api.js";
import { Shared } from "../ui.js";

/** The answer of GET /, or null before it has come. */
export const service = new Shared(null);

/** The list of models, or null; `state` of each is as old as the list. */
export const models = new Shared(null);

/** The saved voices, or null. */
export const savedVoices = new Shared(null);

/** The error that the page shows above its view, or null: the lists could not be read, or a voice failed. */
export const pageError = new Shared(null);

const voicesByModel = new Map();

export async function loadService() {
  service.value = await getJson("./");
}

/** Read models and saved voices; `pageError` says if that failed. */
export async function loadCatalog() {
  try {
    const [listed, voices] = await Promise.all([getJson("v1/models"), getJson("v1/audio/voices")]);
    voicesByModel.clear();
    models.value = listed.data;
    savedVoices.value = voices.uploaded_voices;
    pageError.value = null;
  } catch (error) {
    pageError.value = error;
  }
}

/** The voices of a request for `model`: its presets and the saved ones that it can speak with. */
export async function voicesOf(model) {
  if (!voicesByModel.has(model)) {
    const loading = getJson(`v1/audio/voices?model=${encodeURIComponent(model)}`);
    voicesByModel.set(model, loading);
    loading.catch(() => voicesByModel.delete(model));
  }
  const { voices } = await voicesByModel.get(model);
  return voices.filter((voice) => voice.kind !== "openai");
}

/** The state of one model now: {state, detail, …}. */
export function modelNow(id, signal) {
  return getJson(`v1/models/${encodeURIComponent(id)}`, { signal });
}
