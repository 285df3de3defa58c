// Who was busy when: a lane for the learner, the pushes and each worker, along the seconds of a run.
"use strict";
const lanes = (() => {
  const WIDTH = 1000, LANE = 28;
  let data = null, from = 0, end = 0;
  const field = (id) => document.getElementById(id);
  const span = () => Number(field("lanes-span").value) || end;
  const text = (value) => `${charts.format(Number(value.toPrecision(4)))} s`;

  function draw(tag, settings) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(settings)) element.setAttribute(name, value);
    return element;
  }

  function show() {
    const length = span();
    from = Math.max(0, Math.min(from, end - length));
    const parts = [];
    for (const [lane, kind, start, stop, facts] of data.bars) {
      if (stop < from || start > from + length) continue;
      const left = Math.max(0, WIDTH * (start - from) / length);
      const right = Math.min(WIDTH, WIDTH * (stop - from) / length);
      const box = draw("rect", {
        x: left, y: LANE * lane + 4, width: Math.max(right - left, 1.5), height: LANE - 8,
        style: `fill: var(--c${kind % 8})`,
      });
      box.dataset.note = `${data.lanes[lane]}: ${data.kinds[kind]} at ${text(start)}${facts ? `; ${facts}` : ""}`;
      parts.push(box);
    }
    const height = LANE * data.lanes.length;
    const picture = field("lanes-picture");
    picture.setAttribute("viewBox", `0 0 ${WIDTH} ${height}`);
    picture.style.height = `${height}px`;
    picture.replaceChildren(...parts);
    field("lanes-from").textContent = text(from);
    field("lanes-to").textContent = text(Math.min(end, from + length));
  }

  function move(share) {
    from += share * span();
    show();
  }

  function mount(given) {
    data = given;
    end = Math.max(...data.bars.map((bar) => bar[3]), 1e-3);
    field("lanes-names").replaceChildren(...data.lanes.map((name) => {
      const row = document.createElement("div");
      row.textContent = name;
      return row;
    }));
    field("lanes-kinds").replaceChildren(...data.kinds.map((name, kind) => {
      const item = document.createElement("span");
      const colour = document.createElement("i");
      colour.style.background = `var(--c${kind % 8})`;
      item.append(colour, name);
      return item;
    }));
    show();
    field("lanes-span").addEventListener("change", show);
    field("lanes-earlier").addEventListener("click", () => move(-0.8));
    field("lanes-later").addEventListener("click", () => move(0.8));
    field("lanes-picture").addEventListener("pointerover", ({ target }) => {
      if (target.dataset.note) field("lanes-note").textContent = target.dataset.note;
    });
  }

  return { mount };
})();
