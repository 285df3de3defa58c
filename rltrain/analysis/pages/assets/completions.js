// The browser of completions: prompts on one side, the completions of one prompt on the other, and filters.
"use strict";
const completions = (() => {
  const PAGE = 100; // prompts listed at a time
  let groups = [], list = [], shown = PAGE, current = null;
  const field = (id) => document.getElementById(id);
  const number = (id) => (field(id).value === "" ? null : Number(field(id).value));
  const inside = (value, low, high) =>
    (low === null && high === null)
    || (value !== null && (low === null || value >= low) && (high === null || value <= high));

  function make(tag, className, ...content) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...content);
    return element;
  }

  function readFilters() {
    return {
      stage: field("stage").value, fromStep: number("step-low"), toStep: number("step-high"),
      fromScore: number("score-low"), toScore: number("score-high"),
      fromLength: number("length-low"), toLength: number("length-high"),
      ungraded: field("ungraded").checked, turned: field("turned").checked, cut: field("cut").checked,
      text: field("text").value.toLowerCase(),
    };
  }

  const wholeText = (completion) => (completion.turns ? completion.turns.join("\n") : completion.text);

  function keeps(filters, group, completion) {
    return inside(completion.score, filters.fromScore, filters.toScore)
      && inside(completion.tokens, filters.fromLength, filters.toLength)
      && (!filters.ungraded || completion.ungraded !== null)
      && (!filters.cut || completion.finish === "length")
      && (!filters.text || wholeText(completion).toLowerCase().includes(filters.text)
        || group.prompt.toLowerCase().includes(filters.text));
  }

  const ORDERS = {
    "rate-up": (left, right) => (left.rate ?? left.mean ?? -Infinity) - (right.rate ?? right.mean ?? -Infinity),
    "rate-down": (left, right) => (right.rate ?? right.mean ?? -Infinity) - (left.rate ?? left.mean ?? -Infinity),
    "spread": (left, right) => (right.spread ?? -1) - (left.spread ?? -1),
    "step-up": (left, right) => left.step - right.step,
    "step-down": (left, right) => right.step - left.step,
  };

  function refresh() {
    const filters = readFilters();
    list = [];
    let total = 0;
    for (const group of groups) {
      if (filters.stage && group.stage !== filters.stage) continue;
      if (!inside(group.step, filters.fromStep, filters.toStep) || (filters.turned && !group.turned)) continue;
      const kept = group.completions.filter((completion) => keeps(filters, group, completion));
      if (kept.length) { list.push({ group, kept }); total += kept.length; }
    }
    const order = ORDERS[field("order").value];
    const colours = tokens.isOn() ? ({ group }) => Number(tokens.has(group)) : () => 0;
    list.sort((left, right) => colours(right) - colours(left) || order(left.group, right.group)
      || left.group.step - right.group.step);
    shown = PAGE;
    field("count").textContent = `${list.length} prompts, ${total} completions`;
    current = list.length ? list[0].group : null;
    drawPrompts();
    drawGroup();
  }

  function rateOf(group) {
    const share = group.rate ?? group.mean;
    const bar = make("span", "rate", make("i", ""));
    bar.firstChild.style.width = `${Math.max(0, Math.min(1, share ?? 0)) * 100}%`;
    const right = group.rate === null ? null : Math.round(group.rate * group.completions.length);
    const words = group.rate !== null ? `${right} of ${group.completions.length} right`
      : group.mean !== null ? `mean reward ${charts.format(group.mean)}` : "not graded";
    return [bar, make("span", "small", words)];
  }

  function drawPrompts() {
    const panel = field("prompts");
    const rows = list.slice(0, shown).map(({ group }) => {
      const kind = `${group.stage === "eval" ? ", held-out" : ""}${group.turned ? ", turned right" : ""}`;
      const where = `step ${group.step}${kind}${tokens.isOn() && tokens.has(group) ? ", coloured" : ""}`;
      const row = make("button", "", make("span", "line", group.prompt.replace(/\s+/g, " ")), ...rateOf(group),
        make("span", "small faint", ` ${where}`));
      row.type = "button";
      row.setAttribute("aria-current", String(group === current));
      row.addEventListener("click", () => {
        current = group;
        panel.querySelectorAll("[aria-current=true]").forEach((other) => other.setAttribute("aria-current", "false"));
        row.setAttribute("aria-current", "true");
        drawGroup();
        if (matchMedia("(max-width: 700px)").matches) field("group").scrollIntoView({ behavior: "smooth" });
      });
      return row;
    });
    if (list.length > shown) {
      const more = make("button", "faint", `${list.length - shown} more`);
      more.addEventListener("click", () => { shown += PAGE; drawPrompts(); });
      rows.push(more);
    }
    panel.replaceChildren(...(rows.length ? rows : [make("p", "faint", "No completion passes these filters.")]));
  }

  // A colour was chosen: prompts whose tokens have that number come first.
  function recolour() {
    if (current === null || !tokens.isOn() || tokens.has(current)) drawGroup();
    else refresh();
  }

  function drawGroup() {
    const panel = field("group");
    if (current === null) { panel.replaceChildren(); return; }
    const entry = list.find(({ group }) => group === current);
    const hidden = current.completions.length - entry.kept.length;
    const heading = make("h3", "", `${current.id}, step ${current.step} `, ...rateOf(current));
    const note = hidden ? make("p", "small faint", `${hidden} more completions do not pass the filters.`) : "";
    panel.replaceChildren(heading, make("pre", "", current.prompt), ...entry.kept.map(drawCompletion), note);
  }

  const SOURCES = ["policy", "policy at another temperature", "reference model", "data set's answer"];

  function drawCompletion(completion) {
    const bar = make("div", "bar");
    if (completion.correct === true) bar.append(make("span", "mark good", "right"));
    if (completion.correct === false) bar.append(make("span", "mark bad", "wrong"));
    if (completion.ungraded !== null) bar.append(make("span", "mark bad", `ungraded: ${completion.ungraded}`));
    else bar.append(make("b", "", `reward ${charts.format(completion.score)}`));
    for (const [name, value] of Object.entries(completion.parts)) {
      if (name === "correct" || name.endsWith("/correct")) continue;
      bar.append(make("span", "chip", `${name} ${charts.format(value)}`));
    }
    const finish = completion.finish === "length" ? "cut at the limit" : completion.finish;
    const facts = [`${completion.tokens} tokens`, finish, `weights ${completion.version}`];
    if (completion.source) facts.push(SOURCES[completion.source] ?? `source ${completion.source}`);
    bar.append(make("span", "small faint", facts.join(", ")));
    return make("div", "completion", bar, ...drawText(completion), ...drawExtra(completion.extra || {}));
  }

  function drawText(completion) {
    if (tokens.isOn() && completion.tokenNumbers) return [tokens.draw(completion)];
    if (!completion.turns) return [make("pre", "", completion.text || "(empty)")];
    return completion.turns.map((turn, index) =>
      make("div", "turn", make("span", "small faint", `turn ${index + 1}`), make("pre", "", turn || "(empty)")));
  }

  function drawExtra(extra) {
    return Object.entries(extra).map(([name, text]) =>
      make("details", "", make("summary", "small", name), make("pre", "", text)));
  }

  function mount(records) {
    groups = records;
    const ids = ["stage", "order", "step-low", "step-high", "score-low", "score-high", "length-low", "length-high",
      "ungraded", "turned", "cut", "text"];
    tokens.mount(groups, recolour);
    for (const id of ids) {
      const event = field(id).tagName === "SELECT" ? "change" : "input"; // WebDriver sends a list "change"
      field(id).addEventListener(event, refresh);
    }
    field("clear").addEventListener("click", () => { field("filters").reset(); tokens.choose(); refresh(); });
    refresh();
  }

  return { mount };
})();
