// Which view is shown: the part of the address behind `#/`.

import { Shared } from "./ui.js";

function current() {
  const [name, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { name: name || "speak", parameters: Object.fromEntries(new URLSearchParams(query)) };
}

export const route = new Shared(current());

addEventListener("hashchange", () => {
  route.value = current();
});

/** Show a view; `parameters` become part of the address. */
export function go(name, parameters = {}) {
  const query = new URLSearchParams(parameters).toString();
  location.hash = `#/${name}${query && `?${query}`}`;
}
