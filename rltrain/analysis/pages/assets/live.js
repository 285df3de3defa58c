// Asks the server whether the run has written more, and shows it: at once while nobody uses the completions'
// filters, else at the press of a button.
"use strict";
function watch(version) {
  const SECONDS = 3;
  let isUsed = false;
  const filters = document.getElementById("filters");
  if (filters) filters.addEventListener("input", () => { isUsed = true; });
  const button = document.createElement("button");
  button.id = "newer";
  button.type = "button";
  button.textContent = "new steps: show";
  button.style.cssText = "position:fixed;right:1rem;bottom:1rem;z-index:9";
  button.addEventListener("click", () => location.reload());
  async function ask() {
    try {
      const answer = await fetch("/version", { cache: "no-store" });
      const current = await answer.text();
      if (answer.ok && current !== version) {
        if (!isUsed) { location.reload(); return; }
        if (!button.isConnected) document.body.append(button);
      }
    } catch (error) {
      document.title = "ended: " + document.title.replace(/^ended: /, "");
      return;
    }
    setTimeout(ask, SECONDS * 1000);
  }
  setTimeout(ask, SECONDS * 1000);
}
