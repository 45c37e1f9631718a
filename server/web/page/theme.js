// Light, dark, or as the system has it. The choice is kept in localStorage.

import { Shared } from "./ui.js";

export const THEMES = ["auto", "light", "dark"];

export const theme = new Shared(document.documentElement.dataset.theme ?? "auto");

theme.subscribe((value) => {
  if (value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
  try {
    localStorage.setItem("theme", value);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
});
