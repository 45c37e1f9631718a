// The waveform: a slider that shows the peaks, and what of them was heard.

import { strings } from "../strings.js";
import { html, useEffect, useRef } from "../ui.js";

const BAR = 3;
const GAP = 2;
const STEP_S = 2;
const SHORTEST_S = 4; // a speech that has just begun fills a part of the width, and grows

function draw(canvas, peaks, position, duration) {
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
  if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  const colours = getComputedStyle(canvas);
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  const count = Math.max(1, Math.floor((width + GAP) / (BAR + GAP)));
  const bars = peaks ? peaks.bars(count, duration) : new Array(count).fill(0);
  const heard = duration ? (position / duration) * count : 0;
  bars.forEach((level, i) => {
    const tall = Math.max(BAR, Math.sqrt(level) * height);
    pen.fillStyle = i < heard ? colours.color : colours.outlineColor;
    pen.beginPath();
    pen.roundRect(i * (BAR + GAP), (height - tall) / 2, BAR, tall, BAR / 2);
    pen.fill();
  });
}

/** `player` is null before anything can be heard. `redraw` is called whenever the clock beside it must change. */
export function Waveform({ player, peaks, redraw }) {
  const canvas = useRef(null);
  const total = () => Math.max(player?.duration ?? 0, peaks?.duration ?? 0);
  const shown = () => (player?.complete ? total() : Math.max(total(), SHORTEST_S));

  useEffect(() => {
    let frame = 0;
    let drawn = "";
    const step = () => {
      if (!canvas.current) return; // it has just left the page
      const position = player?.position ?? 0;
      const state = `${position.toFixed(2)} ${peaks?.levels.length} ${shown()} ${canvas.current.clientWidth} ${getComputedStyle(canvas.current).color}`;
      if (state !== drawn) {
        draw(canvas.current, peaks, position, shown());
        redraw();
        drawn = state;
      }
      frame = requestAnimationFrame(step);
    };
    step();
    return () => cancelAnimationFrame(frame);
  }, [player, peaks]);

  const seekTo = (event) => {
    const box = canvas.current.getBoundingClientRect();
    player.seek(((event.clientX - box.left) / box.width) * shown());
  };
  const keys = (event) => {
    const to = {
      ArrowLeft: player.position - STEP_S,
      ArrowRight: player.position + STEP_S,
      Home: 0,
      End: player.duration,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    player.seek(to);
  };
  const position = player?.position ?? 0;
  return html`<div
    class="wave" role="slider" tabindex=${player ? 0 : -1} aria-label=${strings.player.position}
    aria-disabled=${player ? undefined : "true"} aria-valuemin="0" aria-valuemax=${total().toFixed(2)}
    aria-valuenow=${position.toFixed(2)} aria-valuetext=${strings.player.at(position, total())}
    onPointerDown=${player && ((event) => {
      event.currentTarget.setPointerCapture(event.pointerId);
      seekTo(event);
    })}
    onPointerMove=${player && ((event) => event.buttons && seekTo(event))}
    onKeyDown=${player && keys}
  ><canvas ref=${canvas}></canvas></div>`;
}
