// The card below the text: what is heard now, its waveform, its figures, and what can be done with it.

import { Waveform } from "../audio/waveform.js";
import { CopyAs } from "./copy_as.js";
import { save } from "../components/files.js";
import { Icon } from "../components/icons.js";
import { strings } from "../strings.js";
import { html, useEffect, useShared, useState } from "../ui.js";

const WAITING = ["sending", "queued", "loading"];

function phaseText({ phase, place, detail, reason, error }) {
  const words = strings.phases[phase];
  if (phase === "queued") return words(place);
  if (phase === "loading") return words(detail);
  if (phase === "failed") return error.message;
  return (phase === "done" && strings.phases.reasons[reason]) || words;
}

/** The percentage in a model's detail ("38 %"), or null. */
function percentage(detail) {
  const found = /(\d+(?:\.\d+)?) ?%/.exec(detail ?? "");
  return found && Number(found[1]);
}

function Facts({ state }) {
  const { seconds } = strings.player;
  const facts = [
    [strings.player.firstAudio, state.firstAudio && seconds(state.firstAudio), "first-audio"],
    [strings.player.realTime, state.realTime && strings.player.factor(state.realTime), "real-time"],
    [strings.player.length, state.seconds && seconds(state.seconds), "length"],
    [strings.player.model, state.model, "model"],
    [strings.player.ignored, state.ignored, "ignored"],
  ];
  return html`<dl class="facts">
    ${facts.filter(([, value]) => value).map(([name, value, key]) => html`<div data-fact=${key}><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

export function PlayerCard({ speech }) {
  const state = useShared(speech.state);
  const [, redraw] = useState(0);
  const { player, peaks } = state;
  useEffect(() => {
    if (player) player.onchange = () => redraw((count) => count + 1);
  }, [player]);
  const playing = Boolean(player?.playing);
  const label = playing ? strings.player.pause : strings.player.play;
  const total = Math.max(player?.duration ?? 0, peaks?.duration ?? 0);
  const done = percentage(state.detail);
  return html`<section class="card player" aria-label=${strings.player.label} data-phase=${state.phase}>
    <div class="phase" role="status">
      ${WAITING.includes(state.phase) && html`<span class="spinner"></span>`}
      <span class=${state.phase === "failed" ? "problem" : "soft"}>${phaseText(state)}</span>
    </div>
    ${state.phase === "loading" && done !== null && html`<progress max="100" value=${done} aria-label=${phaseText(state)}></progress>`}
    <div class="player-row">
      <button
        type="button" class="primary round" aria-label=${label} disabled=${!player}
        onClick=${() => (playing ? player.pause() : player.play())}
      ><${Icon} name=${playing ? "pause" : "play"} /></button>
      <${Waveform} player=${player} peaks=${peaks} redraw=${() => redraw((count) => count + 1)} />
      <span class="clock figures">${strings.player.clock(player?.position ?? 0, total)}</span>
    </div>
    <${Facts} state=${state} />
    <div class="player-foot">
      <div class="tools">
        <button type="button" class="quiet" disabled=${!speech.blob} onClick=${() => save(speech.blob, `speech.${speech.format}`)}>
          <${Icon} name="download" />${strings.player.download}
        </button>
        ${speech.request && html`<${CopyAs} request=${speech.request} />`}
      </div>
    </div>
  </section>`;
}
