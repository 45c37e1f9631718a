// The icons of the page: strokes on a grid of 24.

import { html } from "../ui.js";

const PATHS = {
  play: "M8 5.5v13l10.5-6.5z",
  pause: "M8 5.5v13M16 5.5v13",
  stop: "M7 7h10v10H7z",
  download: "M12 4v11m-4.5-4.5L12 15l4.5-4.5M5 19.5h14",
  upload: "M12 15V4M7.5 8.5 12 4l4.5 4.5M5 19.5h14",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  trash: "M5 7h14M10 7V4.5h4V7m-7.5 0 1 12.5h9l1-12.5M10.5 11v5M13.5 11v5",
  edit: "m5 19 .8-4L15.5 5.3a1.6 1.6 0 0 1 2.3 0l.9.9a1.6 1.6 0 0 1 0 2.3L9 18.2z",
  search: "M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13m4.8-1.7L20 20",
  close: "M6 6l12 12M18 6 6 18",
  mic: "M12 14.5a3 3 0 0 0 3-3V7a3 3 0 0 0-6 0v4.500a3 3 0 0 0 3 3M6 11.500a6 6 0 0 0 12 0M12 17.500V21",
  key: "M14.5 4.500a5 5 0 1 1-3.800 8.200L4.500 19v.5h3v-2h2v-2h2l1.200-1.300M15.500 8.500h.01",
  sun: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8M12 3v1.500M12 19.500V21M4.500 12H3M21 12h-1.500M6.700 6.700 5.600 5.600M18.400 18.400l-1.100-1.100M17.300 6.700l1.100-1.100M5.600 18.400l1.100-1.100",
  moon: "M19.500 14.500A8 8 0 0 1 9.500 4.500a8 8 0 1 0 10 10",
  auto: "M12 20a8 8 0 1 0 0-16 8 8 0 0 0 0 16M12 4v16M12 8h3.500M12 12h4M12 16h3.500",
  speak: "M4 10v4M8 6.500v11M12 9v6M16 5v14M20 10v4",
  voices: "M12 11.500a3.500 3.500 0 1 0 0-7 3.500 3.500 0 0 0 0 7M5 20c.6-3.600 3.400-5.500 7-5.500s6.400 1.900 7 5.500",
  watch: "M3.500 12h4l2.500-6 4 12 2.500-6h4",
  docs: "M6 4h8.500L18 7.500V20H6zM14 4v4h4M9 12h6M9 15.500h6",
  more: "M6 9.500l6 6 6-6",
  live: "M12 13.500a1.500 1.500 0 1 0 0-3 1.500 1.500 0 0 0 0 3M8.500 15.500a5 5 0 0 1 0-7M15.500 8.500a5 5 0 0 1 0 7M5.700 18.300a9 9 0 0 1 0-12.600M18.300 5.700a9 9 0 0 1 0 12.600",
  add: "M12 5v14M5 12h14",
  wand: "M5 19 15 9M17 3.500v4M15 5.500h4M19.500 11v3M18 12.500h3M9.500 4.500v2.500M8.250 5.750h2.500",
  check: "M5 12.500l4.500 4.500L19 7.500",
};

/** An icon; it says nothing to screen readers, so its button needs a label. */
export function Icon({ name, size = 20 }) {
  return html`<svg
    class="icon" width=${size} height=${size} viewBox="0 0 24 24" aria-hidden="true" focusable="false"
  ><path d=${PATHS[name]} /></svg>`;
}
