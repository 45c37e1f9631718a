// Speak: write a text, hear it while it is made.

import { models, service } from "../service/catalog.js";
import { chosenModel, draft, EMPTY, requestOf, write } from "./draft.js";
import { keepSpeech } from "./history.js";
import { HistoryList } from "./history_list.js";
import { Icon } from "../components/icons.js";
import { LiveSpeech } from "./live.js";
import { PlayerCard } from "./player_card.js";
import { Replay } from "./replay.js";
import { SettingsForm } from "./settings_form.js";
import { Speech } from "./speech.js";
import { strings } from "../strings.js";
import { problemsOf } from "../components/submit.js";
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

/** The buttons below the text: speak or stop; while it is live, finish or stop. */
function Buttons({ busy, live, onSpeak, onStop, onLive, onFinish }) {
  const button = (kind, icon, label, action) => html`<button class=${kind} onClick=${action}>
    <${Icon} name=${icon} size=${18} />${label}
  </button>`;
  if (live) return html`${button("danger", "stop", words.stop, onStop)}${button("primary", "check", words.finish, onFinish)}`;
  if (busy) return button("danger", "stop", words.stop, onStop);
  return html`<button class="quiet" title=${words.liveHint} onClick=${onLive}><${Icon} name="live" size=${18} />${words.live}</button>
    ${button("primary", "speak", words.button, onSpeak)}`;
}

function Manuscript({ problem, live, onType, ...buttons }) {
  const fields = useShared(draft);
  const limit = useShared(service)?.limits.input_chars;
  const used = [...fields.input].length;
  const over = limit ? used - limit : 0;
  const type = ({ target }) => {
    write({ input: target.value });
    onType(target.value, target.selectionEnd);
  };
  return html`<section class=${`card manuscript ${live ? "live" : ""}`}>
    <label class="hidden-label" for="text">${words.text}</label>
    <textarea
      id="text" name="input" value=${fields.input} placeholder=${words.placeholder} autofocus
      aria-invalid=${problem ? "true" : undefined} aria-describedby="text-about" dir="auto"
      onInput=${type}
    ></textarea>
    ${!fields.input && html`<p class="examples"><span class="hint">${words.tryOne}</span>
      ${Object.entries(words.examples).map(([name, text]) => html`<button class="quiet" onClick=${() => write({ input: text })}>${name}</button>`)}</p>`}
    <div id="text-about">${problem && html`<p class="problem">${problem}</p>`}</div>
    <div class="manuscript-foot">
      <span class=${over > 0 ? "count over" : "count"}>
        <span class="hidden-label">${words.countLabel}: </span>
        <span class="figures">${words.count(used, limit)}</span>${over > 0 && ` – ${words.over(over)}`}
      </span>
      <span class="right">
        <span class="hint keys-hint"><kbd>Ctrl</kbd> <kbd>Enter</kbd> ${words.keyHint}</span>
        <${Buttons} live=${live} ...${buttons} />
      </span>
    </div>
  </section>`;
}

/** The phase of `speech`, "" without one; the component renders again only when it changes. */
function usePhase(speech) {
  const [phase, setPhase] = useState("");
  useEffect(() => {
    setPhase(speech?.state.value.phase ?? "");
    return speech?.state.subscribe((state) => setPhase(state.phase));
  }, [speech]);
  return phase;
}

export function View() {
  const fields = useShared(draft);
  useShared(models);
  const speech = useShared(current);
  const [problems, setProblems] = useState({});
  usePhase(speech);
  const form = useRef(null);
  const model = chosenModel(fields);
  const live = speech instanceof LiveSpeech && !speech.over ? speech : null;
  const busy = Boolean(speech && !speech.over);

  useEffect(() => {
    const [name] = Object.keys(problems);
    if (name) form.current.querySelector(`[name="${name}"]`)?.focus();
  }, [problems]);

  const speak = async () => {
    if (!model || busy) return;
    setProblems({});
    const next = new Speech(requestOf(draft.value, model), audio);
    await show(next);
    setProblems(problemsOf(next.state.value.error, Object.keys(EMPTY), strings.errors));
    await keep(next);
  };
  const begin = () => {
    if (!model) return;
    setProblems({});
    const { input, ...config } = requestOf(draft.value, model);
    const next = new LiveSpeech(config, input);
    current.value?.close();
    current.value = next;
    const ended = next.state.subscribe(({ phase, error }) => {
      if (phase === "live") return;
      ended();
      if (error) setProblems(problemsOf(error, Object.keys(EMPTY), strings.errors));
    });
    form.current.querySelector("textarea").focus();
  };
  const replay = (kept) => {
    setProblems({});
    show(new Replay(kept, audio));
  };
  const finish = () => live.finish(draft.value.input);
  const keys = (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.target.closest("dialog")) return;
    event.preventDefault();
    if (live) finish();
    else speak();
  };
  const reuse = ({ request }) => {
    write({ ...EMPTY, ...Object.fromEntries(Object.entries(request).map(([name, value]) => [name, name === "speed" ? value : String(value)])) });
    form.current.querySelector("textarea").focus();
  };

  return html`<h1 class="hidden-label">${words.heading}</h1>
    <div class="speak" ref=${form} onKeyDown=${keys}>
      <div class="speak-main">
        <${Manuscript}
          problem=${problems.input} busy=${busy} live=${live} onSpeak=${speak} onStop=${() => speech.stop()} onLive=${begin}
          onType=${(text, caret) => live?.type(text, caret)} onFinish=${finish}
        />
        ${speech && html`<${PlayerCard} key=${speech} speech=${speech} />`}
        <${HistoryList} onReplay=${replay} onReuse=${reuse} />
      </div>
      <${SettingsForm} model=${model} problems=${problems} />
    </div>`;
}
