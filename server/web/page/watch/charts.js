// The charts of Watch: one uPlot each, drawn again once a second, in the colours of the theme.

import { strings } from "../strings.js";
import { theme } from "../theme.js";
import { html, useEffect, useRef, useShared, useState } from "../ui.js";
import uPlot from "../vendor/uplot.js";
import { SAMPLES } from "./history.js";

const words = strings.watch.charts;
const HEIGHT = 132;
const dark = matchMedia("(prefers-color-scheme: dark)");

/** title, series by name with their colours, and how a value is written. */
const CHARTS = [
  { name: "throughput", series: { throughput: "--series-1" }, unit: "times", area: true },
  { name: "requests", series: { running: "--series-1", queued: "--series-2" }, unit: "count" },
  { name: "memory", series: { ours: "--series-1", others: "--series-3" }, unit: "bytes", area: true },
  { name: "firstAudio", series: { firstAudio50: "--series-1", firstAudio95: "--series-2" }, unit: "seconds" },
  { name: "realTime", series: { realTime50: "--series-1", realTime95: "--series-2" }, unit: "factor" },
  { name: "batch", series: { batch50: "--series-1", batch95: "--series-2" }, unit: "count" },
];

export function Charts({ history, samples }) {
  const now = useShared(theme);
  const [system, setSystem] = useState(dark.matches);
  useEffect(() => {
    const changed = () => setSystem(dark.matches);
    dark.addEventListener("change", changed);
    return () => dark.removeEventListener("change", changed);
  }, []);
  return html`<section class="watch-charts" aria-label=${words.heading}>
    ${CHARTS.map((chart) => html`<${Chart} key=${`${chart.name} ${now} ${system}`} chart=${chart} history=${history} samples=${samples} />`)}
  </section>`;
}

function Chart({ chart, history, samples }) {
  const place = useRef(null);
  const plot = useRef(null);
  const [index, setIndex] = useState(null);
  const names = Object.keys(chart.series);
  const write = strings.watch.units[chart.unit];

  useEffect(() => {
    const element = place.current;
    const made = new uPlot(optionsOf(chart, element, setIndex), history.columns(names), element);
    plot.current = made;
    const observer = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height: HEIGHT }));
    observer.observe(element);
    return () => {
      observer.disconnect();
      made.destroy();
    };
  }, []);

  useEffect(() => plot.current?.setData(history.columns(names)), [samples]);

  const at = index ?? history.time.length - 1;
  const values = names.map((name) => history.series[name][at] ?? null);
  const spoken = names.map((name, i) => `${words.series[name]} ${write(values[i])}`);
  return html`<figure class="card chart">
    <figcaption><h3>${words[chart.name]}</h3>
      <dl>${names.map((name, i) => html`<div key=${name} data-series=${name}>
        <dt><span class=${`dot ${chart.series[name].slice(2)}`}></span>${words.series[name]}</dt><dd>${write(values[i])}</dd>
      </div>`)}</dl>
    </figcaption>
    <div class="plot" ref=${place} role="img" aria-label=${`${words[chart.name]}: ${spoken.join(", ")}`}></div>
  </figure>`;
}

function optionsOf(chart, element, setIndex) {
  const colour = (name) => {
    element.style.color = `var(${name})`;
    const value = getComputedStyle(element).color;
    element.style.color = "";
    return value;
  };
  const short = strings.watch.axes[chart.unit];
  const axis = { stroke: colour("--soft"), font: `11px ${getComputedStyle(element).fontFamily}`, ticks: { show: false } };
  const lines = { stroke: colour("--line"), width: 1 };
  return {
    width: element.clientWidth,
    height: HEIGHT,
    padding: [8, 24, 0, 0],
    legend: { show: false },
    cursor: { sync: { key: "watch" }, drag: { x: false, y: false }, points: { size: 7 } },
    scales: {
      x: { range: (_plot, first) => window(first) },
      y: { range: (_plot, low, high) => [0, Math.max(high ?? 0, MINIMUM[chart.unit]) * 1.1] },
    },
    axes: [
      { ...axis, size: 24, grid: { show: false }, space: 90, values: (_plot, times) => times.map(strings.watch.clock) },
      { ...axis, size: 54, gap: 4, grid: lines, space: 36, values: (_plot, values) => values.map(short), ...(chart.unit === "bytes" ? { incrs: POWERS } : {}) },
    ],
    series: [
      {},
      ...Object.entries(chart.series).map(([name, variable]) => ({
        stroke: colour(variable),
        width: 2,
        fill: chart.area ? faint(colour(variable)) : undefined,
        points: { show: false },
        label: name,
      })),
    ],
    hooks: { setCursor: [(plot) => setIndex(plot.cursor.idx ?? null)] },
  };
}

/** Steps between the lines of bytes: powers of two. */
const POWERS = Array.from({ length: 34 }, (_, power) => 2 ** (power + 12));

/** The times shown: all that is remembered, and a minute at least. */
function window(first) {
  const now = Date.now() / 1000;
  return [Math.max(now - SAMPLES, Math.min(first ?? now, now - 60)), now];
}

/** An empty chart still has a scale. */
const MINIMUM = { times: 1, count: 1, bytes: 1, seconds: 0.1, factor: 0.5 };

/** Canvases of some browsers know no color-mix. */
function faint(colour) {
  return colour.replace("rgb(", "rgba(").replace(")", ", 0.14)");
}
