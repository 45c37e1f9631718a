// Sets the chosen theme before the first paint. A classic script in the head: a module would run too late.
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that refuses storage follows the system's theme.
}
