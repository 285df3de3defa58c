// Puts the charts of a comparison into the page.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const laws = Object.entries(data.laws).map(([method, { entropy, reward, fit, text }]) => ({
    title: `Reward against entropy, ${method}`, unit: "", about: `first seed; ${text}`, x: entropy,
    xLabel: "entropy, nats",
    lines: [{ label: "step", values: reward, dots: true }, { label: "law", values: fit }],
  }));
  charts.mount(document.getElementById("charts"), [...data.charts, ...laws]);
  charts.connectControls();
})();
