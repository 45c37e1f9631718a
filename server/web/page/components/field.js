// A labelled field. Its problem stands below it, and screen readers read it.

import { cloneElement } from "../vendor/preact.js";
import { html, useId } from "../ui.js";

/** `children` is one control. `aside` is shown behind the label, `hint` below the control. */
export function Field({ label, problem, hint, aside, children }) {
  const id = useId();
  const about = [problem && `${id}-problem`, hint && `${id}-hint`].filter(Boolean).join(" ");
  const control = cloneElement(children, {
    id,
    "aria-invalid": problem ? "true" : undefined,
    "aria-describedby": about || undefined,
  });
  return html`<div class="field">
    <div class="label"><label for=${id}>${label}</label>${aside}</div>
    ${control}
    ${problem && html`<p class="problem" id=${`${id}-problem`}>${problem}</p>`}
    ${hint && html`<p class="hint" id=${`${id}-hint`}>${hint}</p>`}
  </div>`;
}
