// A field for a recording: a file that is chosen or dropped, or the microphone.

import { fitting, secondsOf } from "../audio/convert.js";
import { canRecord, Recording } from "../audio/microphone.js";
import { service } from "../service/catalog.js";
import { Icon } from "../components/icons.js";
import { strings } from "../strings.js";
import { html, useEffect, useId, useRef, useShared, useState } from "../ui.js";

const words = strings.recording;

function Meter({ recording, most, onEnd }) {
  const [, redraw] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => {
      if (recording.seconds >= most) onEnd();
      else redraw((count) => count + 1);
    }, 80);
    return () => clearInterval(timer);
  }, [recording]);
  return html`<div class="meter">
    <span class="live-dot" aria-hidden="true"></span>
    <meter min="0" max="1" low="0.05" high="0.95" optimum="0.5" value=${recording.level} aria-label=${words.level}></meter>
    <span class="figures small" role="timer">${words.seconds(recording.seconds)} / ${most} s</span>
  </div>`;
}

/** Plays what was chosen. */
function Heard({ blob }) {
  const [url, setUrl] = useState("");
  useEffect(() => {
    const made = URL.createObjectURL(blob);
    setUrl(made);
    return () => URL.revokeObjectURL(made);
  }, [blob]);
  return url && html`<audio controls src=${url} aria-label=${words.heard}></audio>`;
}

/** `value` is {blob, name, seconds} or null. */
export function RecordingField({ label, value, onChange, problem }) {
  const limits = useShared(service)?.limits;
  const [recording, setRecording] = useState(null);
  const [fieldError, setFieldError] = useState("");
  const [over, setOver] = useState(false);
  const input = useRef(null);
  const running = useRef(null);
  const id = useId();
  running.current = recording;
  useEffect(() => () => running.current?.cancel(), []);

  const take = async ({ blob, name }, length = null) => {
    setFieldError("");
    const fit = await fitting(blob, name, limits.recording_bytes);
    const seconds = length ?? (await secondsOf(blob));
    if (seconds !== null && (seconds < limits.recording_min_s || seconds > limits.recording_max_s)) {
      setFieldError(words.wrongLength(seconds, limits.recording_min_s, limits.recording_max_s));
      onChange(null);
    } else onChange({ ...fit, seconds });
  };
  const choose = (files) => files.length && take({ blob: files[0], name: files[0].name });
  const begin = async () => {
    setFieldError("");
    onChange(null);
    try {
      setRecording(await Recording.begin());
    } catch (error) {
      setFieldError(error.name === "NotAllowedError" ? words.refused : words.noMicrophone);
    }
  };
  const end = async () => {
    const { seconds } = recording;
    setRecording(null);
    take(await recording.end(), seconds);
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    choose(event.dataTransfer.files);
  };
  const shown = fieldError || problem;
  return html`<div class="field" role="group" aria-labelledby=${`${id}-label`} aria-describedby=${`${id}-about`}>
    <span class="label" id=${`${id}-label`}>${label}</span>
    <div
      class=${`recording ${over ? "over" : ""}`} onDragOver=${(event) => {
        event.preventDefault();
        setOver(true);
      }} onDragLeave=${() => setOver(false)} onDrop=${drop}
    >
      ${recording
        ? html`<${Meter} recording=${recording} most=${limits.recording_max_s} onEnd=${end} />
            <button type="button" class="danger" onClick=${end}><${Icon} name="stop" size=${18} />${words.end}</button>`
        : html`<div class="ways">
            <button type="button" onClick=${() => input.current.click()}><${Icon} name="upload" size=${18} />${words.file}</button>
            ${canRecord() && html`<button type="button" onClick=${begin}><${Icon} name="mic" size=${18} />${words.microphone}</button>`}
          </div>
          ${value
            ? html`<${Heard} blob=${value.blob} />
                <p class="hint">${value.name}${value.seconds !== null && ` · ${words.seconds(value.seconds)}`}</p>`
            : html`<p class="hint">${words.drop}</p>`}`}
      <input
        ref=${input} class="hidden-label" type="file" accept="audio/*,video/webm,.w64,.caf,.amr" tabindex="-1"
        aria-label=${label} aria-invalid=${shown ? "true" : undefined} onChange=${(event) => {
          choose(event.target.files);
          event.target.value = "";
        }}
      />
    </div>
    <div id=${`${id}-about`}>
      ${shown && html`<p class="problem" role="alert">${shown}</p>`}
      <p class="hint">${limits && words.limits(limits.recording_min_s, limits.recording_max_s)} ${!canRecord() && words.needsHttps}</p>
    </div>
  </div>`;
}
