// Light or dark: the system's choice until the reader presses the switch, which this browser remembers.
"use strict";
const theme = (() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  let chosen = null;
  try { chosen = localStorage.getItem("rltrain-theme"); } catch { /* a browser may keep nothing for files */ }
  const current = () => chosen || (system.matches ? "dark" : "light");
  const apply = () => {
    document.documentElement.dataset.theme = current();
    listeners.forEach((listener) => listener());
  };
  const toggle = () => {
    chosen = current() === "dark" ? "light" : "dark";
    try { localStorage.setItem("rltrain-theme", chosen); } catch { /* as above */ }
    apply();
  };
  system.addEventListener("change", apply);
  apply();
  return { toggle, onChange: (listener) => listeners.push(listener) };
})();
document.addEventListener("DOMContentLoaded", () => {
  document.getElementById("theme").addEventListener("click", theme.toggle);
});
