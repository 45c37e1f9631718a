// Starts the page: the frame around the views, the dialog for keys, the theme.

import { loadCatalog, loadService, service, pageError } from "./service/catalog.js";
import { KeyButton, KeyDialog } from "./components/key_dialog.js";
import { Icon } from "./components/icons.js";
import { route } from "./router.js";
import { strings } from "./strings.js";
import { THEMES, theme } from "./theme.js";
import { urlOf } from "./service/api.js";
import { html, render, useEffect, useRef, useShared, useState } from "./ui.js";

/** The views in the order of the tabs; each module exports `View`. */
const VIEWS = {
  speak: () => import("./speak/view.js"),
  voices: () => import("./voices/view.js"),
  watch: () => import("./watch/view.js"),
};

function Tabs({ current }) {
  return html`<nav class="tabs" aria-label=${strings.nav.label}>
    ${Object.keys(VIEWS).map(
      (name) => html`<a href=${`#/${name}`} aria-current=${name === current ? "page" : undefined}>
        <${Icon} name=${name} /><span>${strings.nav[name]}</span>
      </a>`,
    )}
  </nav>`;
}

function ThemeButton() {
  const now = useShared(theme);
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  const label = strings.theme.button(strings.theme[now], strings.theme[next]);
  return html`<button class="quiet" aria-label=${label} title=${label} onClick=${() => (theme.value = next)}>
    <${Icon} name=${{ auto: "auto", light: "sun", dark: "moon" }[now]} />
  </button>`;
}

function ErrorNotice() {
  const error = useShared(pageError);
  if (!error) return null;
  return html`<div class="notice" role="alert">
    <p>${error.message}</p>
    <button onClick=${loadCatalog}>${strings.again}</button>
  </div>`;
}

function App() {
  const { name, parameters } = useShared(route);
  const about = useShared(service);
  const current = name in VIEWS ? name : "speak";
  const [view, setView] = useState(null);
  const main = useRef(null);
  const first = useRef(true);

  useEffect(() => {
    document.title = strings.title(strings.nav[current], about?.service);
  }, [current, about]);

  useEffect(() => {
    let left = false;
    VIEWS[current]().then(({ View }) => {
      if (left) return;
      setView({ name: current, View });
      if (!first.current) main.current.focus({ preventScroll: true });
      first.current = false;
    });
    return () => {
      left = true;
    };
  }, [current]);

  return html`
    <a class="skip" href="#main" onClick=${(event) => {
      event.preventDefault();
      main.current.focus();
    }}>${strings.skip}</a>
    <header class="bar">
      <a class="brand" href="#/speak"><span class="brand-mark"><${Icon} name="speak" size=${22} /></span>
        <span>${about?.service ?? strings.service}</span></a>
      <${Tabs} current=${current} />
      <div class="bar-tools">
        <a class="quiet button" href=${urlOf("docs")} aria-label=${strings.docs}><${Icon} name="docs" /><span class="wide">${strings.docs}</span></a>
        <${KeyButton} />
        <${ThemeButton} />
      </div>
    </header>
    <main id="main" ref=${main} tabindex="-1">
      <${ErrorNotice} />
      ${view && html`<${view.View} key=${view.name} parameters=${parameters} />`}
    </main>
    <${KeyDialog} />
  `;
}

render(html`<${App} />`, document.getElementById("app"));
loadService().catch((error) => (pageError.value = error));
loadCatalog();
