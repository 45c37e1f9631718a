// The dialog that asks for a key, and the button in the bar that opens it or forgets the keys.

import { service } from "../service/catalog.js";
import { Dialog } from "./dialog.js";
import { Icon } from "./icons.js";
import { answer, ask, forget, keys, question } from "../service/keys.js";
import { strings } from "../strings.js";
import { html, useShared } from "../ui.js";

export function KeyDialog() {
  const open = useShared(question);
  if (!open) return null;
  const words = strings.keys[open.kind];
  const submit = (event) => {
    event.preventDefault();
    answer(new FormData(event.target).get("key").trim() || null);
  };
  return html`<${Dialog} title=${words.title} onClose=${() => answer(null)}>
    <form onSubmit=${submit} autocomplete="off">
      <p>${words.text}</p>
      ${open.message && html`<p class="problem" role="alert">${open.message}</p>`}
      <label class="field"><span>${words.label}</span>
        <input name="key" type="password" autofocus autocomplete="off" spellcheck=${false} required /></label>
      <p class="hint">${strings.keys.kept}</p>
      <div class="actions">
        <button type="button" class="quiet" onClick=${() => answer(null)}>${strings.cancel}</button>
        <button class="primary">${strings.keys.use}</button>
      </div>
    </form>
  </${Dialog}>`;
}

export function KeyButton() {
  const about = useShared(service);
  const { api, admin } = useShared(keys);
  if (!about?.requires.key && !about?.requires.admin_key) return null;
  const kind = about.requires.key ? "api" : "admin";
  const label = api || admin ? strings.keys.forget : strings.keys.enter;
  return html`<button
    class="quiet" aria-label=${label} title=${label} onClick=${() => (api || admin ? forget() : ask(kind, ""))}
  ><${Icon} name="key" /><span class="wide">${label}</span></button>`;
}
