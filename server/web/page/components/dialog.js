// A modal dialog on the browser's own <dialog>, which keeps the focus inside and closes at Escape.

import { Icon } from "./icons.js";
import { strings } from "../strings.js";
import { html, useEffect, useId, useRef } from "../ui.js";

export function Dialog({ title, onClose, wide = false, children }) {
  const element = useRef(null);
  const id = useId();
  useEffect(() => {
    const dialog = element.current;
    const before = document.activeElement;
    dialog.showModal();
    return () => {
      dialog.close();
      before?.focus?.();
    };
  }, []);
  const cancel = (event) => {
    event.preventDefault();
    onClose();
  };
  // A click on the dialog itself is one beside its content.
  const beside = (event) => event.target === element.current && onClose();
  return html`<dialog
    ref=${element} class=${wide ? "wide-dialog" : ""} aria-labelledby=${id} onCancel=${cancel} onMouseDown=${beside}
  ><div class="dialog-content">
    <header><h2 id=${id}>${title}</h2>
      <button type="button" class="quiet" aria-label=${strings.close} onClick=${onClose}><${Icon} name="close" /></button>
    </header>
    ${children}
  </div></dialog>`;
}
