// Puts charts and completions of one run into the page.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const list = [...data.charts];
  if (data.law) {
    const { entropy, reward, fit, text } = data.law;
    list.push({
      title: "Reward against entropy", unit: "", about: text, x: entropy, xLabel: "entropy, nats",
      lines: [{ label: "step", values: reward, dots: true }, { label: "law", values: fit }],
    });
  }
  charts.mount(document.getElementById("charts"), list);
  const more = document.getElementById("more");
  more.addEventListener("toggle", () => charts.mount(document.getElementById("others"), data.others), { once: true });
  charts.connectControls();
  if (data.timeline) timeline.mount(data.timeline);
  if (data.lanes) lanes.mount(data.lanes);
  if (data.groups.length) completions.mount(data.groups);
})();
