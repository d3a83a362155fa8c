// The button that turns light into dark; the choice is kept where the browser allows it.
"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const wished = window.matchMedia("(prefers-color-scheme: dark)");
  const recall = () => { try { return localStorage.getItem("hldm-theme"); } catch { return null; } };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : wished.matches);
  const say = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
  };
  const kept = recall();
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("hldm-theme", root.dataset.theme); } catch { /* private windows keep nothing */ }
    say();
  });
  wished.addEventListener("change", say);
  say();
})();
