"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");
const termColors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const settings = {responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset"};

const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
// Plotly interprets some HTML and %{fields} in labels, so names from a run are escaped
const text = value => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
  .replace(/%\{/g, "%&#123;");

function axis(title, more) {
  return {title: {text: title, font: {size: 13}, standoff: 10}, gridcolor: color("line"), linecolor: color("quiet"),
    tickcolor: color("quiet"), zeroline: false, automargin: true, fixedrange: narrow.matches, ...more};
}

function layout(x, y, more) {
  return {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 48, r: 12, t: 12, b: 44},
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: color("ink")},
    hoverlabel: {bgcolor: color("paper"), bordercolor: color("line"), font: {color: color("ink"), size: 13},
      align: "left"},
    xaxis: x, yaxis: y, ...more};
}

function interval(value, low, high) {
  if (low === null || high === null) return {visible: false};
  return {type: "data", symmetric: false, array: [high - value], arrayminus: [value - low], thickness: 1.5, width: 0};
}

const filters = [...document.querySelectorAll(".filters select")];
const isShown = of => filters.every(({dataset: {field}, value}) => value === "*" || of(field) === value);

function drawFront(front, place) {
  const plot = document.getElementById("front-" + place);
  const points = front.points.filter(point => isShown(field => point[field]));
  plot.parentElement.hidden = points.length === 0;
  if (plot.parentElement.hidden) return;
  const traces = [{x: front.line.map(point => point[0]), y: front.line.map(point => point[1]), mode: "lines",
    line: {color: color("ink"), width: 1.2, dash: "dash"}, hoverinfo: "skip"}];
  for (const point of points) {
    const percent = value => value === null ? null : 100 * value;
    traces.push({x: [point.p50_ms], y: [percent(point.top1)], mode: "markers+text", cliponaxis: false,
      text: [text(point.name)], meta: point.name, textposition: "bottom right",
      textfont: {size: narrow.matches ? 12 : 13, color: color("ink")},
      marker: {size: 12, color: point.color, symbol: point.symbol, line: {width: 1.6, color: point.color}},
      error_x: {...interval(point.p50_ms, point.low_ms, point.high_ms), color: point.color},
      error_y: {...interval(percent(point.top1), percent(point.low), percent(point.high)), color: point.color},
      hovertemplate: "<b>" + text(point.name) + "</b><br>" +
        point.hover.map(([label, value]) => text(label) + ": " + text(value)).join("<br>") +
        "<extra></extra>"});
  }
  const x = axis("median latency of the image tower, ms", {type: "log", range: front.limits_ms.map(Math.log10),
    tickvals: front.ticks_ms, ticktext: front.ticks_ms.map(tick => String(Number(tick.toPrecision(3))))});
  const y = axis(text(front.headline) + " top-1, %", {range: front.limits_percent});
  const isNew = plot.data === undefined;
  Plotly.react(plot, traces, layout(x, y, {showlegend: false, hovermode: "closest"}), settings);
  if (isNew) plot.on("plotly_afterplot", () => placeLabels(plot));
  placeLabels(plot);
}

const sides = ["bottom right", "top left", "top right", "bottom left", "middle right", "middle left", "top center",
  "bottom center"];
const pen = document.createElement("canvas").getContext("2d");

// Place each name where it overlaps the least with markers, intervals and earlier names, inside the plot
function placeLabels(plot) {
  const area = plot.querySelector(".nsewdrag").getBoundingClientRect();
  const [x0, x1] = plot.layout.xaxis.range, [y0, y1] = plot.layout.yaxis.range;
  const toX = value => (Math.log10(value) - x0) / (x1 - x0) * area.width;
  const toY = value => (y1 - value) / (y1 - y0) * area.height;
  const points = plot.data.slice(1);
  const taken = [];
  for (const {x: [x], y: [y], error_x: across, error_y: along} of points) {
    taken.push([toX(x) - 9, toY(y) - 9, toX(x) + 9, toY(y) + 9]);
    if (across.array) taken.push([toX(x - across.arrayminus[0]), toY(y) - 2, toX(x + across.array[0]), toY(y) + 2]);
    if (along.array) taken.push([toX(x) - 2, toY(y + along.array[0]), toX(x) + 2, toY(y - along.arrayminus[0])]);
  }
  const line = plot.data[0];
  for (let i = 1; i < line.x.length; i++)
    for (let t = 0; t <= 1; t += 1 / 32) {
      const x = toX(line.x[i - 1]) * (1 - t) + toX(line.x[i]) * t;
      const y = toY(line.y[i - 1]) * (1 - t) + toY(line.y[i]) * t;
      taken.push([x - 2, y - 2, x + 2, y + 2]);
    }
  const common = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) *
    Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const chosen = points.map(point => {
    const size = point.textfont.size, x = toX(point.x[0]), y = toY(point.y[0]);
    pen.font = size + "px " + plot.layout.font.family;
    const width = pen.measureText(point.meta).width;
    let best = null;
    for (const side of sides) {
      const [vertical, horizontal] = side.split(" ");
      const left = horizontal === "left" ? x - 9 - width : horizontal === "right" ? x + 9 : x - width / 2;
      const top = vertical === "top" ? y - 9 - size : vertical === "bottom" ? y + 9 : y - size / 2;
      const box = [left, top, left + width, top + size];
      const outside = width * size - common(box, [0, 0, area.width, area.height]);
      const cost = taken.reduce((sum, other) => sum + common(box, other), 2 * outside);
      if (best === null || cost < best.cost) best = {side, box, cost};
    }
    taken.push(best.box);
    return best.side;
  });
  if (chosen.some((side, i) => side !== points[i].textposition))
    Plotly.restyle(plot, {textposition: chosen}, points.map((_, i) => i + 1));
}

function drawHistogram(histogram, place) {
  const shown = histogram.rows.filter(row => {
    const point = data.fronts.flatMap(front => front.points).find(point => point.name === row.name);
    return !point || isShown(field => point[field]);
  });
  const plot = document.getElementById("histogram-" + place);
  plot.parentElement.hidden = shown.length === 0;
  if (plot.parentElement.hidden) return;
  const traces = shown.map((row, i) => ({x: histogram.edges, y: [...row.share.map(share => 100 * share), 0],
    name: text(row.name), mode: "lines", line: {color: row.color, width: 1.5, shape: "hv",
      dash: ["solid", "dash", "dot", "dashdot"][i % 4]}, hovertemplate: "%{x:.3g} ms: %{y:.1f} %"}));
  Plotly.react(plot, traces, layout(axis("ms", {type: "log"}), axis("% of queries", {rangemode: "tozero"}),
    {showlegend: true, legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, hovermode: "closest",
      margin: {l: 40, r: 12, t: 36, b: 44}}), settings);
}

function drawLoss(curve, place) {
  const line = (name, y, style) => ({x: curve.step, y, name: text(name), mode: "lines", line: style,
    hovertemplate: "%{y:.4g}"});
  const traces = [line("loss", curve.loss, {color: color("ink"), width: 2})];
  const terms = Object.entries(curve.terms);
  if (terms.length > 1)
    terms.forEach(([name, y], i) => traces.push(line(name, y, {color: termColors[i % termColors.length], width: 1.5})));
  Plotly.react("loss-" + place, traces, layout(axis("step"), axis("", {rangemode: "tozero"}),
    {showlegend: traces.length > 1, legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, hovermode: "x unified",
      margin: {l: 40, r: 12, t: 36, b: 44}}), settings);
}

function drawSpeed() {
  const traces = data.curves.map((curve, i) => ({x: curve.step, y: curve.images_per_s, name: text(curve.stage),
    mode: "lines", line: {color: termColors[i % termColors.length], width: 1.5}, hovertemplate: "%{y:,.0f}"}));
  Plotly.react("speed", traces, layout(axis("step"), axis("", {rangemode: "tozero"}),
    {showlegend: true, legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, hovermode: "x unified",
      margin: {l: 40, r: 12, t: 36, b: 44}}), settings);
}

function draw() {
  data.fronts.forEach(drawFront);
  data.histograms.forEach(drawHistogram);
  data.curves.forEach(drawLoss);
  if (data.curves.length) drawSpeed();
}

function filter() {
  for (const row of document.querySelectorAll("table:not(.plain) tbody tr"))
    row.hidden = !isShown(field => row.dataset[field]);
  for (const answer of document.querySelectorAll(".example li")) {
    const models = [...answer.querySelectorAll("span")];
    for (const model of models) model.hidden = !isShown(field => model.dataset[field]);
    answer.hidden = models.every(model => model.hidden);
  }
  data.fronts.forEach(drawFront);
  data.histograms.forEach(drawHistogram);
}

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const ascending = head.getAttribute("aria-sort") !== "ascending";
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const isNumber = head.classList.contains("number");
  const key = row => row.cells[column].dataset.key;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
    const order = isNumber ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b));
    return ascending ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table:not(.plain)"))
  [...table.tHead.rows[0].cells].forEach((cell, column) =>
    cell.firstElementChild.addEventListener("click", () => sortBy(table, column)));
for (const choice of filters) choice.addEventListener("change", filter);
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
draw();
