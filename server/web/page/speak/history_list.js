// "Heard before": the speeches that this browser keeps.

import { Dialog } from "../components/dialog.js";
import { save } from "../components/files.js";
import { clearHistory, forgetSpeech, loadHistory, speeches } from "./history.js";
import { Icon } from "../components/icons.js";
import { strings } from "../strings.js";
import { html, useEffect, useShared, useState } from "../ui.js";

const words = strings.history;

function Entry({ speech, onReplay, onReuse }) {
  const { input, voice, response_format: format } = speech.request;
  const facts = [voice, speech.model, strings.player.seconds(speech.seconds), strings.when(speech.at)];
  const tool = (name, label, action) => html`<button class="quiet" aria-label=${label} title=${label} onClick=${action}>
    <${Icon} name=${name} size=${18} />
  </button>`;
  return html`<li>
    <button class="round" aria-label=${words.replay(input)} onClick=${() => onReplay(speech)}><${Icon} name="play" /></button>
    <div>
      <p class="said" title=${input}>${input}</p>
      <p class="hint">${facts.filter(Boolean).join(" · ")}</p>
    </div>
    <div class="tools">
      ${tool("edit", words.reuse(input), () => onReuse(speech))}
      ${tool("download", words.download(input), () => save(speech.blob, `speech.${format}`))}
      ${tool("trash", words.remove(input), () => forgetSpeech(speech.id))}
    </div>
  </li>`;
}

export function HistoryList({ onReplay, onReuse }) {
  const list = useShared(speeches);
  const [asking, setAsking] = useState(false);
  useEffect(() => {
    loadHistory();
  }, []);
  if (!list.length) return null;
  const clear = () => {
    setAsking(false);
    clearHistory();
  };
  return html`<section class="card history" aria-labelledby="history-heading">
    <div class="history-head"><h2 id="history-heading">${words.heading}</h2>
      <button class="quiet" onClick=${() => setAsking(true)}>${words.clear}</button></div>
    <p class="hint">${words.kept}</p>
    <ul>${list.map((speech) => html`<${Entry} key=${speech.id} speech=${speech} onReplay=${onReplay} onReuse=${onReuse} />`)}</ul>
    ${asking && html`<${Dialog} title=${words.clearQuestion} onClose=${() => setAsking(false)}>
      <div class="actions">
        <button class="quiet" onClick=${() => setAsking(false)}>${strings.cancel}</button>
        <button class="danger" onClick=${clear}>${words.clear}</button>
      </div>
    </${Dialog}>`}
  </section>`;
}
