// Colours the tokens of a completion by one of their numbers. Entropy is never negative: one colour, stronger
// for more. The others have two colours, around the value that means nothing was done.
"use strict";
const tokens = (() => {
  const COLOURS = 8; // of page.css; a version has the colour of its number modulo this
  const NEUTRAL = { entropy: 0, advantage: 0, weight: 1, engine: 0, reference: 0, clip: 0, touched: 0 };
  const UNITS = { entropy: "nats", advantage: "", weight: "", engine: "nats", reference: "nats", clip: "updates", touched: "updates" };
  let choice = "";
  let scales = {}; // number -> distance from its neutral value that has the full colour

  // The 98th percentile of the distances, so that a single outlier does not make all other tokens pale.
  function findScale(groups, name) {
    const distances = [];
    for (const { completions } of groups) {
      for (const { tokenNumbers } of completions) {
        for (const value of tokenNumbers?.[name] || []) {
          if (value !== null) distances.push(Math.abs(value - NEUTRAL[name]));
        }
      }
    }
    distances.sort((left, right) => left - right);
    return distances[Math.floor(distances.length * 0.98)] || distances[distances.length - 1] || 1;
  }

  function background(name, value) {
    if (value === null || value === undefined) return "transparent";
    if (name === "version") return `color-mix(in srgb, var(--c${value % COLOURS}) 45%, transparent)`;
    const share = Math.min(1, Math.abs(value - NEUTRAL[name]) / scales[name]);
    const hue = value >= NEUTRAL[name] ? "--c1" : "--c0";
    return `color-mix(in srgb, var(${hue}) ${Math.round(share * 65)}%, transparent)`;
  }

  function describe(numbers, index) {
    const parts = Object.keys(NEUTRAL).filter((name) => numbers[name])
      .map((name) => `${name} ${charts.format(numbers[name][index])}`);
    if (numbers.version) parts.push(`weights ${numbers.version[index]}`);
    return `token ${index + 1}: ${parts.join(", ")}`;
  }

  function draw(completion) {
    const numbers = completion.tokenNumbers;
    const panel = document.createElement("pre");
    panel.className = "tokens";
    numbers.text.forEach((text, index) => {
      const token = document.createElement("span");
      const isOut = numbers.weight[index] === 0;
      token.className = isOut ? "token out" : "token";
      token.textContent = text === "" ? "\u00b7" : text;
      token.title = describe(numbers, index);
      token.style.background = background(choice, numbers[choice]?.[index]);
      panel.append(token);
    });
    const rest = completion.tokens - numbers.text.length;
    if (rest > 0) panel.append(` [${rest} more tokens without numbers]`);
    const line = document.createElement("div");
    line.className = "small faint";
    panel.addEventListener("pointerover", ({ target }) => { if (target.title) line.textContent = target.title; });
    const whole = document.createElement("div");
    whole.append(panel, line);
    return whole;
  }

  function showLegend() {
    const legend = document.getElementById("legend");
    legend.hidden = choice === "";
    if (choice === "") return;
    if (choice === "version") {
      legend.textContent = "a colour for each version of the weights that sampled; point at a token for its number";
      return;
    }
    const swatch = (value) => {
      const box = document.createElement("i");
      box.style.background = background(choice, value);
      return box;
    };
    const neutral = NEUTRAL[choice], scale = scales[choice];
    const low = neutral - scale, high = neutral + scale;
    const ends = ["entropy", "clip", "touched"].includes(choice) ? [] : [swatch(low), ` ${charts.format(low)} or less `];
    const unit = UNITS[choice] && ` ${UNITS[choice]}`;
    legend.replaceChildren(...ends, swatch(neutral), ` ${neutral} `, swatch(high),
      ` ${charts.format(high)} or more${unit}`, "; struck out: no part of the loss; a dot: a token without text of its own;",
      " point at a token, or touch it, to see its numbers");
  }

  function choose() {
    const select = document.getElementById("colour");
    choice = select ? select.value : "";
    if (select) showLegend();
  }

  function mount(groups, redraw) {
    const select = document.getElementById("colour");
    if (!select) return;
    for (const name of Object.keys(NEUTRAL)) scales[name] = findScale(groups, name);
    const has = (name) => groups.some(({ completions }) => completions.some((one) => one.tokenNumbers?.[name]));
    for (const option of [...select.options]) if (option.value && !has(option.value)) option.remove();
    select.addEventListener("change", () => { choose(); redraw(); });
  }

  const has = ({ completions }) => completions.some(({ tokenNumbers }) => tokenNumbers?.[choice]);

  return { mount, choose, draw, has, isOn: () => choice !== "" };
})();
