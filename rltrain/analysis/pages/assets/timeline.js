// Where the time of a run goes: stacked phases over all steps, and below, the phases of a few steps one after
// the other.
"use strict";
const timeline = (() => {
  const WIDTH = 1000, LANE = 28, BINS = 250; // of the drawings, whose width is stretched to that of the page
  let data = null, first = 0;
  const field = (id) => document.getElementById(id);
  const count = () => Math.min(Number(field("time-count").value), data.steps.length);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const seconds = (value) => `${charts.format(Number(value.toPrecision(3)))} s`;

  function draw(tag, settings) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(settings)) element.setAttribute(name, value);
    return element;
  }

  const bar = (phase, x, y, width, height) =>
    draw("rect", { x, y, width, height, style: `fill: var(--c${phase % 8})` });

  function drawOverview() {
    const size = Math.ceil(data.steps.length / BINS);
    const bins = [];
    for (let start = 0; start < data.steps.length; start += size) {
      const part = data.seconds.slice(start, start + size);
      bins.push(data.phases.map((_, phase) => sum(part.map((row) => row[phase])) / part.length));
    }
    const heights = bins.map(sum).sort((left, right) => left - right);
    const highest = heights[heights.length - 1] || 1;
    const usual = heights[Math.floor(0.97 * (heights.length - 1))] || highest;
    const top = highest > 1.5 * usual ? usual : highest; // a few long steps do not flatten all others
    const width = WIDTH / bins.length;
    const bars = [];
    bins.forEach((means, bin) => {
      let y = 100;
      means.forEach((mean, phase) => {
        const height = Math.min(y, 100 * mean / top);
        y -= height;
        if (height > 0) bars.push(bar(phase, bin * width, y, width * 1.02, height));
      });
    });
    const chosen = draw("rect", { class: "chosen", y: 0, height: 100 });
    field("time-overview").replaceChildren(...bars, chosen);
    field("time-first").textContent = `step ${data.steps[0]}`;
    field("time-last").textContent = `step ${data.steps[data.steps.length - 1]}`;
    field("time-top").textContent = `height: ${seconds(top)} a step${top < highest ? ", longer ones are cut" : ""}`;
  }

  function drawLanes() {
    const number = count();
    first = Math.max(0, Math.min(first, data.steps.length - number));
    field("time-from").value = data.steps[first];
    const rows = data.seconds.slice(first, first + number);
    const span = sum(rows.map(sum)) || 1;
    const lanes = field("time-lanes");
    const height = LANE * data.phases.length;
    const parts = [];
    let x = 0;
    rows.forEach((row, place) => {
      if (place) parts.push(draw("line", { x1: x, x2: x, y1: 0, y2: height }));
      row.forEach((value, phase) => {
        const width = WIDTH * value / span;
        if (value <= 0) return;
        const box = bar(phase, x, LANE * phase + 4, Math.max(width, 1), LANE - 8);
        const share = Math.round(100 * value / sum(row));
        box.dataset.note = `step ${data.steps[first + place]}: ${data.phases[phase]} ${seconds(value)}, ${share} % of the step`;
        parts.push(box);
        x += width;
      });
    });
    lanes.setAttribute("viewBox", `0 0 ${WIDTH} ${height}`);
    lanes.style.height = `${height}px`;
    lanes.replaceChildren(...parts);
    const last = data.steps[first + number - 1];
    field("time-span").textContent = number > 1 ? `steps ${data.steps[first]} to ${last}: ${seconds(span)}`
      : `step ${last}: ${seconds(span)}`;
    const chosen = field("time-overview").lastChild;
    chosen.setAttribute("x", WIDTH * first / data.steps.length);
    chosen.setAttribute("width", Math.max(3, WIDTH * number / data.steps.length));
  }

  function move(place) {
    first = place;
    drawLanes();
  }

  function mount(given) {
    data = given;
    const whole = sum(data.total) || 1;
    field("time-names").replaceChildren(...data.phases.map((name, phase) => {
      const row = document.createElement("div");
      const colour = document.createElement("i");
      colour.style.background = `var(--c${phase % 8})`;
      row.append(colour, `${name} ${Math.round(100 * data.total[phase] / whole)} %`);
      return row;
    }));
    first = Math.floor(data.steps.length / 2);
    drawOverview();
    drawLanes();
    const overview = field("time-overview");
    overview.addEventListener("click", (event) => {
      const box = overview.getBoundingClientRect();
      move(Math.floor((event.clientX - box.left) / box.width * data.steps.length - count() / 2));
    });
    field("time-lanes").addEventListener("pointerover", ({ target }) => {
      if (target.dataset.note) field("time-note").textContent = target.dataset.note;
    });
    field("time-count").addEventListener("change", drawLanes);
    field("time-from").addEventListener("change", () => {
      const wanted = Number(field("time-from").value);
      const place = data.steps.findIndex((step) => step >= wanted);
      move(place < 0 ? data.steps.length : place);
    });
    field("time-earlier").addEventListener("click", () => move(first - count()));
    field("time-later").addEventListener("click", () => move(first + count()));
  }

  return { mount };
})();
