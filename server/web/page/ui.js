// The view library of all modules, and values that several components watch.

import { h, render } from "./vendor/preact.js";
import { useEffect, useState } from "./vendor/preact-hooks.js";
import htm from "./vendor/htm.js";

export { render };
export * from "./vendor/preact-hooks.js";

export const html = htm.bind(h);

/** A value with subscribers. */
export class Shared {
  #value;
  #subscribers = new Set();

  constructor(value) {
    this.#value = value;
  }

  get value() {
    return this.#value;
  }

  set value(value) {
    if (Object.is(value, this.#value)) return;
    this.#value = value;
    for (const subscriber of [...this.#subscribers]) subscriber(value);
  }

  /** Call `subscriber` at each change; returns a function that ends this. */
  subscribe(subscriber) {
    this.#subscribers.add(subscriber);
    return () => this.#subscribers.delete(subscriber);
  }
}

/** The value of a Shared; the component renders again when it changes. */
export function useShared(shared) {
  const [, redraw] = useState(0);
  useEffect(() => {
    let seen = shared.value;
    const check = () => {
      if (!Object.is(seen, shared.value)) {
        seen = shared.value;
        redraw((count) => count + 1);
      }
    };
    redraw((count) => count + 1); // the value may have changed between render and effect
    return shared.subscribe(check);
  }, [shared]);
  return shared.value;
}
