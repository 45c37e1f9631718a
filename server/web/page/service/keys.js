// The API key and the admin key. They are kept in the memory of this tab and nowhere else.
//
// `ask` opens the dialog of components/key_dialog.js and waits for its answer.

import { Shared } from "../ui.js";

export const keys = new Shared({ api: "", admin: "" });

/** The open question, or null: {kind: "api" | "admin", message, resolve}. */
export const question = new Shared(null);

let asking = null;

/** Ask for a key; true if one was given. Callers at the same time share one dialog. */
export function ask(kind, message) {
  asking ??= new Promise((resolve) => {
    question.value = { kind, message, resolve };
  }).finally(() => {
    asking = null;
  });
  return asking;
}

/** Answer the open question: a key, or null if the person has none. */
export function answer(key) {
  const { kind, resolve } = question.value;
  if (key) keys.value = { ...keys.value, [kind]: key };
  question.value = null;
  resolve(Boolean(key));
}

/** Forget both keys. */
export function forget() {
  keys.value = { api: "", admin: "" };
}
