// Draws the charts of a page with uPlot. A chart is built when it comes into view; the cursors and the ranges
// of steps of all charts move together.
"use strict";
const charts = (() => {
  const built = new Map(); // element -> {data, plot}
  const state = { smooth: true, from: null, to: null };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const lineColour = (index) => colour(`--c${index % 8}`);
  const fade = (hex, share) => hex + Math.round(share * 255).toString(16).padStart(2, "0");

  function format(value) {
    if (value === null || value === undefined) return "-";
    const size = Math.abs(value);
    if (size >= 10000) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
    if (size !== 0 && size < 0.001) return value.toExponential(2).replace(/\.?0+e/, "e");
    return String(Number(value.toPrecision(4)));
  }

  function axes(xLabel, isLog) {
    const style = { stroke: colour("--faint"), font: "12px system-ui, sans-serif" };
    const grid = { stroke: colour("--rule"), width: 1 };
    const ticks = { stroke: colour("--rule"), width: 1, size: 4 };
    const values = (plot, marks) => marks.map((mark) => (mark === null ? "" : format(mark)));
    const isPower = (mark) => Math.abs(Math.log10(mark) - Math.round(Math.log10(mark))) < 1e-9;
    const wholePowers = (plot, marks) => (isLog ? marks.map((mark) => (isPower(mark) ? mark : null)) : marks);
    return [
      { ...style, grid, ticks, size: 34, label: xLabel, labelSize: 16, labelFont: style.font, values },
      { ...style, grid: { ...grid, filter: wholePowers }, ticks: { ...ticks, filter: wholePowers }, size: 60, values,
        filter: wholePowers },
    ];
  }

  // uPlot's columns and series of a chart: each line may bring its bounds (upper first, as bands need it) and
  // its smoothed curve.
  function columns(data) {
    const table = [data.x];
    const series = [{ label: data.xLabel || "step", value: (plot, value) => format(value) }];
    const bands = [];
    const hidden = { show: true, stroke: "transparent", width: 0, points: { show: false } };
    const companions = {}; // series of a curve -> its bounds and smoothed curve, which are shown and hidden with it
    data.lines.forEach((line, index) => {
      const parts = [];
      const stroke = lineColour(line.colour ?? index);
      const smoothed = state.smooth && line.smooth;
      const spanGaps = true;
      if (line.high) {
        const upper = table.push(line.high) - 1;
        const lower = table.push(line.low) - 1;
        series.push({ ...hidden, spanGaps }, { ...hidden, spanGaps });
        parts.push(upper, lower);
        bands.push({ series: [upper, lower], fill: fade(stroke, 0.18) });
      }
      companions[table.push(line.values) - 1] = parts;
      series.push({
        label: line.label,
        stroke: smoothed ? fade(stroke, 0.3) : stroke,
        legendColour: stroke,
        width: smoothed ? 1 : 1.6,
        spanGaps,
        paths: line.dots ? () => null : undefined,
        points: line.dots || line.sparse ? { show: true, size: line.dots ? 3 : 6, fill: stroke } : { show: false },
        value: (plot, value) => format(value),
      });
      if (smoothed) {
        parts.push(table.push(line.smooth) - 1);
        series.push({ stroke, width: 2, spanGaps, points: { show: false } });
      }
    });
    return { table, series, bands, companions };
  }

  function build(element, data) {
    const target = element.querySelector(".plot");
    const { table, series, bands, companions } = columns(data);
    const isStep = !data.xLabel;
    const options = {
      width: Math.max(240, target.clientWidth),
      height: 240,
      series,
      bands,
      axes: axes(data.xLabel || "step", data.log),
      scales: { x: { time: false }, y: data.log ? { distr: 3 } : { range: rangeOf } },
      cursor: { sync: isStep ? { key: "step", setSeries: false } : undefined, drag: { x: true, y: false } },
      legend: { live: true, markers: { stroke: (plot, index) => series[index].legendColour,
        fill: (plot, index) => series[index].legendColour, width: 1 } },
      hooks: {
        setSelect: [(plot) => isStep && zoom(plot)],
        setSeries: [(plot, index, change) => "show" in change
          && (companions[index] || []).forEach((part) => plot.setSeries(part, { show: change.show }))],
      },
    };
    target.replaceChildren();
    const plot = new uPlot(options, table, target);
    const rows = plot.root.querySelectorAll(".u-series");
    Object.values(companions).flat().forEach((part) => { rows[part].style.display = "none"; });
    plot.over.addEventListener("dblclick", () => isStep && setRange(null, null));
    built.set(element, { data, plot });
    if (isStep) showRange(plot, data);
  }

  function rangeOf(plot, low, high) {
    if (low === null) return [0, 1];
    if (low === high) return low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
    return uPlot.rangeNum(low, high, 0.1, true);
  }

  function zoom(plot) {
    const { left, width } = plot.select;
    if (width > 2) setRange(Math.round(plot.posToVal(left, "x")), Math.round(plot.posToVal(left + width, "x")));
  }

  function showRange(plot, data) {
    const first = data.x[0], last = data.x[data.x.length - 1];
    const min = state.from ?? first, max = state.to ?? last;
    plot.setScale("x", { min: Math.min(min, max), max: Math.max(min, max, min + 1) });
  }

  function setRange(from, to) {
    Object.assign(state, { from, to });
    const inputs = [document.getElementById("from"), document.getElementById("to")];
    [from, to].forEach((value, index) => { if (inputs[index]) inputs[index].value = value ?? ""; });
    for (const { data, plot } of built.values()) if (!data.xLabel) showRange(plot, data);
  }

  function rebuild() {
    for (const [element, { data, plot }] of built) { plot.destroy(); build(element, data); }
  }

  function mount(container, list) {
    const seen = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting && !built.has(target)) build(target, list[Number(target.dataset.chart)]);
      }
    }, { rootMargin: "200px" });
    const sized = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        const entry = built.get(target);
        const width = Math.max(240, target.querySelector(".plot").clientWidth);
        if (entry && entry.plot.width !== width) entry.plot.setSize({ width, height: 240 });
      }
    });
    list.forEach((data, index) => {
      const element = document.createElement("section");
      element.className = "chart card";
      element.dataset.chart = index;
      const title = document.createElement("h3");
      title.append(data.title, " ");
      const unit = document.createElement("span");
      unit.textContent = data.unit && data.unit !== "1" ? data.unit : "";
      title.append(unit);
      const about = document.createElement("div");
      about.className = "small faint";
      about.textContent = data.about;
      const plot = document.createElement("div");
      plot.className = "plot";
      element.append(title, about, plot);
      container.append(element);
      seen.observe(element);
      sized.observe(element);
    });
  }

  function connectControls() {
    const smooth = document.getElementById("smooth");
    if (smooth) smooth.addEventListener("change", () => { state.smooth = smooth.checked; rebuild(); });
    const number = (input) => (input.value === "" ? null : Number(input.value));
    const from = document.getElementById("from"), to = document.getElementById("to");
    for (const input of [from, to]) input.addEventListener("change", () => setRange(number(from), number(to)));
    document.getElementById("whole").addEventListener("click", () => setRange(null, null));
    theme.onChange(rebuild);
  }

  return { mount, connectControls, format, built, state };
})();
