// Speak: write a text, hear it while it is made.

import { models, service } from "../catalog.js";
import { chosenModel, draft, EMPTY, requestOf, write } from "../draft.js";
import { keepSpeech } from "../history.js";
import { HistoryList } from "../history_list.js";
import { Icon } from "../icons.js";
import { PlayerCard } from "../player_card.js";
import { Replay } from "../replay.js";
import { SettingsForm } from "../settings_form.js";
import { Speech } from "../speech.js";
import { strings } from "../strings.js";
import { problemsOf } from "../submit.js";
import { html, Shared, useEffect, useRef, useShared, useState } from "../ui.js";

const words = strings.speak;

/** The speech that is heard, or was last; it goes on while other views are shown. */
const current = new Shared(null);
const audio = new Audio();

function show(speech) {
  current.value?.close();
  current.value = speech;
  return speech.run();
}

async function keep(speech) {
  const { phase, model, seconds, reason, firstAudio, realTime } = speech.state.value;
  if (phase !== "done" || !speech.blob) return;
  const { request, blob, rate } = speech;
  await keepSpeech({ at: Date.now(), request, model, seconds, reason, firstAudio, realTime, blob, rate });
}

function Manuscript({ problem, busy, onSpeak, onStop }) {
  const fields = useShared(draft);
  const limit = useShared(service)?.limits.input_chars;
  const used = [...fields.input].length;
  const over = limit ? used - limit : 0;
  const keys = (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    onSpeak();
  };
  return html`<section class="card manuscript">
    <label class="hidden-label" for="text">${words.text}</label>
    <textarea
      id="text" name="input" value=${fields.input} placeholder=${words.placeholder} autofocus
      aria-invalid=${problem ? "true" : undefined} aria-describedby="text-about" dir="auto"
      onInput=${(event) => write({ input: event.target.value })} onKeyDown=${keys}
    ></textarea>
    <div id="text-about">${problem && html`<p class="problem">${problem}</p>`}</div>
    <div class="manuscript-foot">
      <span class=${over > 0 ? "count over" : "count"}>
        <span class="hidden-label">${words.countLabel}: </span>
        <span class="figures">${words.count(used, limit)}</span>${over > 0 && ` – ${words.over(over)}`}
      </span>
      <span class="right">
        <span class="hint keys-hint"><kbd>Ctrl</kbd> <kbd>Enter</kbd> ${words.keyHint}</span>
        ${busy
          ? html`<button class="danger" onClick=${onStop}><${Icon} name="stop" size=${18} />${words.stop}</button>`
          : html`<button class="primary" onClick=${onSpeak}><${Icon} name="speak" size=${18} />${words.button}</button>`}
      </span>
    </div>
  </section>`;
}

export function View() {
  const fields = useShared(draft);
  useShared(models);
  const speech = useShared(current);
  const [problems, setProblems] = useState({});
  const [busy, setBusy] = useState(Boolean(speech && !speech.over));
  const form = useRef(null);
  const model = chosenModel(fields);

  useEffect(() => {
    const [name] = Object.keys(problems);
    if (name) form.current.querySelector(`[name="${name}"]`)?.focus();
  }, [problems]);

  const speak = async () => {
    if (!model || busy) return;
    setProblems({});
    setBusy(true);
    const next = new Speech(requestOf(draft.value, model), audio);
    await show(next);
    if (current.value === next) setBusy(false);
    setProblems(problemsOf(next.state.value.error, Object.keys(EMPTY), strings.errors));
    await keep(next);
  };
  const replay = (kept) => {
    setBusy(false);
    setProblems({});
    show(new Replay(kept, audio));
  };
  const reuse = ({ request }) => {
    write({ ...EMPTY, ...Object.fromEntries(Object.entries(request).map(([name, value]) => [name, name === "speed" ? value : String(value)])) });
    form.current.querySelector("textarea").focus();
  };

  return html`<h1 class="hidden-label">${words.heading}</h1>
    <div class="speak" ref=${form}>
      <div class="speak-main">
        <${Manuscript} problem=${problems.input} busy=${busy} onSpeak=${speak} onStop=${() => speech.stop()} />
        ${speech && html`<${PlayerCard} key=${speech} speech=${speech} />`}
        <${HistoryList} onReplay=${replay} onReuse=${reuse} />
      </div>
      <${SettingsForm} model=${model} problems=${problems} />
    </div>`;
}
