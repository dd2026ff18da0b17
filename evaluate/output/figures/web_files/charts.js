// Shared by the pages: elements, numbers as text, charts, light and dark. Text only ever becomes text nodes.
"use strict";

// ---------------------------------------------------------------- elements

function h(name, given = {}, ...inside) {
  return dress(document.createElement(name), given, inside);
}
function s(name, given = {}, ...inside) {
  return dress(document.createElementNS("http://www.w3.org/2000/svg", name), given, inside);
}
function dress(element, given, inside) {
  for (const [key, value] of Object.entries(given)) {
    if (key.startsWith("aria-") && typeof value === "boolean") { element.setAttribute(key, String(value)); continue; }
    if (value === undefined || value === null || value === false) continue;
    if (key === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
    else if (key === "vars") for (const [name, one] of Object.entries(value)) element.style.setProperty(`--${name}`, one);
    else if (key === "value") element.value = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...inside.flat(Infinity).filter((part) => part !== null && part !== undefined && part !== false));
  return element;
}
const $ = (id) => document.getElementById(id);

const number = (value, digits = 3) => value === null || value === undefined || Number.isNaN(value) ? "\u2013"
  : value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(Math.max(1, digits - 2)) : String(Number(value.toPrecision(digits)));
const whole = (value) => value.toLocaleString("en");
const share = (value) => value === 0 ? "0" : value >= 1e-5 ? `${Number((100 * value).toPrecision(value >= 0.1 ? 3 : 2))} %` : `${(100 * value).toExponential(0)} %`;

// Characters that are invisible or change the direction of text are written out; joiners inside words stay.
const UNSEEN = /[\p{Cc}\p{Zl}\p{Zp}\p{Co}\p{Cn}\p{Cs}]|(?![\u200c\u200d])\p{Cf}/gu;
const LONG = 80;
function visible(text) {
  return text.replace(UNSEEN, (letter) => letter === "\n" ? "\u21b5" : letter === "\t" ? "\u2192" : letter === "\r" ? "\u240d"
    : `\u27e8${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`);
}
function brief(text, most = LONG) {
  if (text.length <= most) return visible(text);
  const letters = Array.from(text.slice(0, most));
  return `${visible(letters.slice(0, most - 20).join(""))}\u2026(${whole(text.length)} characters)`;
}

// ---------------------------------------------------------------- charts

// The plots' colours, in their order, with the ink for their black.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "var(--ink)"];
const colourOf = (place) => COLOURS[place % COLOURS.length];
const DASHES = [null, "6 3", "2 3", "6 3 2 3"]; // for lines, when all colours are taken
const dashOf = (place) => DASHES[Math.floor(place / COLOURS.length) % DASHES.length];
const swatch = (colour, dash) => s("svg", { class: "swatch", viewBox: "0 0 22 6", "aria-hidden": true }, s("line", { class: "line", vars: { c: colour }, "stroke-dasharray": dash, x1: 0, x2: 22, y1: 3, y2: 3 }));
let W = innerWidth < 600 ? 340 : 520, H = 260;

function bars(counts, options) {
  // options: edges (labels by bar), log, title(i), height, hot
  const height = options.height ?? 120, foot = 18, width = options.width ?? W;
  const size = options.log ? (count) => Math.log10(count + 1) : (count) => count;
  const most = Math.max(...counts.map(size), 1e-9), step = width / counts.length;
  const chart = s("svg", { viewBox: `0 0 ${width} ${height + foot}`, role: "img", "aria-label": options.label });
  counts.forEach((count, place) => {
    const tall = size(count) / most * (height - 14);
    const bar = s("rect", { class: `bar ${options.hot?.(place) ? "hot" : ""}`, x: place * step + .5, width: Math.max(step - 1, .5), y: height - tall, height: count ? Math.max(tall, 1) : 0, rx: 1 });
    bar.append(s("title", {}, options.title(place)));
    chart.append(bar);
  });
  chart.append(s("line", { class: "grid", x1: 0, x2: width, y1: height, y2: height }));
  for (const [place, text, anchor] of options.ticks) chart.append(s("text", { x: place * step, y: height + 14, "text-anchor": anchor ?? "middle" }, text));
  if (options.top) chart.append(s("text", { x: width, y: 9, "text-anchor": "end" }, options.top));
  return chart;
}

const LEAST_TICKS = 3;
function even(low, high) {
  const unit = 10 ** Math.floor(Math.log10((high - low) / 4)), ticksAt = (step) => {
    const ticks = [];
    for (let value = Math.ceil(low / step) * step; value <= high; value += step) ticks.push(Number(value.toPrecision(10)));
    return ticks;
  };
  return [10, 5, 2, 1].map((one) => ticksAt(one * unit)).find((ticks) => ticks.length >= LEAST_TICKS) ?? []; // none if there is no value to draw
}

function axis(values, log) {
  const clean = values.filter((value) => value !== null && Number.isFinite(value) && (!log || value > 0));
  let low = Math.min(...clean), high = Math.max(...clean);
  if (log) { low = Math.log10(low); high = Math.log10(high); }
  const apart = high - low > 1e-9 * Math.abs(high) ? high - low : 0; // ticks between neighbouring doubles would never advance
  const pad = apart * .12 || Math.abs(high) * .1 || .5;
  low -= pad; high += pad;
  const scale = (value) => ((log ? Math.log10(value) : value) - low) / (high - low);
  const ticks = [];
  if (log) {
    for (let power = Math.floor(low); power <= high; power++) for (const one of [1, 2, 5]) {
      const value = one * 10 ** power;
      if (scale(value) >= 0 && scale(value) <= 1) ticks.push(value);
    }
    if (ticks.length < LEAST_TICKS) return { scale, ticks: even(10 ** low, 10 ** high) };
  } else ticks.push(...even(low, high));
  return { scale, ticks };
}

function frame(x, y, names, label) {
  const width = W, height = H, left = 46, foot = 34;
  const chart = s("svg", { viewBox: `0 0 ${width} ${height + foot}`, role: "img", "aria-label": label });
  const px = (value) => left + x.scale(value) * (width - left - 10), py = (value) => 8 + (1 - y.scale(value)) * (height - 8);
  const digits = (ticks) => { // enough to tell neighbours apart
    const apart = Math.min(...ticks.slice(1).map((tick, place) => tick - ticks[place])), most = Math.max(...ticks.map(Math.abs));
    return Math.max(3, Math.min(7, Math.floor(Math.log10(most)) - Math.floor(Math.log10(apart)) + 1)) || 3;
  };
  for (const tick of y.ticks) chart.append(s("line", { class: "grid", x1: left, x2: width, y1: py(tick), y2: py(tick) }), s("text", { x: left - 6, y: py(tick) + 4, "text-anchor": "end" }, number(tick, digits(y.ticks))));
  for (const tick of x.ticks) chart.append(s("line", { class: "grid", x1: px(tick), x2: px(tick), y1: 8, y2: height }), s("text", { x: px(tick), y: height + 15, "text-anchor": "middle" }, number(tick, digits(x.ticks))));
  chart.append(s("text", { x: width, y: height + 31, "text-anchor": "end" }, names[0]), s("text", { x: 0, y: height + 31 }, names[1]));
  return { chart, px, py };
}

function scatter(points, names) {
  const x = axis(points.map((point) => point.x), true), y = axis(points.flatMap((point) => [point.y, point.low ?? point.y, point.high ?? point.y]), false);
  const { chart, px, py } = frame(x, y, [`${names[0]}, log scale`, names[1]], `${names[1]} against ${names[0]}`);
  let last = -Infinity; // names of close points are stacked; one that would end up far from its point shows on hover only
  for (const point of [...points].sort((a, b) => b.y - a.y)) {
    let below = Math.max(py(point.y) + 4, last + 13);
    const group = s("g", { vars: { c: point.colour } });
    if (point.low !== null && point.low !== undefined) group.append(s("line", { class: "whisker", x1: px(point.x), x2: px(point.x), y1: py(point.low), y2: py(point.high) }));
    const mark = s("circle", { class: "point", cx: px(point.x), cy: py(point.y), r: 6 });
    mark.append(s("title", {}, `${point.name}: ${names[0]} ${number(point.x)}, ${names[1]} ${number(point.y, 4)}`));
    const turn = px(point.x) > W * .7, wide = 7 * Math.min(point.name.length, 30), left = px(point.x) + (turn ? -10 - wide : 10);
    while (points.some((one) => px(one.x) > left - 8 && px(one.x) < left + wide + 8 && Math.abs(py(one.y) + 4 - below) < 11)) below += 13;
    group.append(mark);
    if (below < py(point.y) + 40) {
      group.append(s("text", { class: "name", x: px(point.x) + (turn ? -10 : 10), y: below, "text-anchor": turn ? "end" : "start" }, brief(point.name, 30)));
      last = below;
    }
    chart.append(group);
  }
  return chart;
}

const FEWEST_OF_CURVE = 10; // points: with fewer, each has a mark, so that the line between them does not pass for data
// Each of `series` has a name, a colour, x and y; for several seeds y is the median, and low and high are the range.
// `chosen` is the step that is shown at first, if any.
function lines(series, names, chosen) {
  const log = names[2] === "log";
  const x = axis(series.flatMap((one) => one.x), false), y = axis(series.flatMap((one) => [...one.y, ...one.low ?? [], ...one.high ?? []]), log);
  const { chart, px, py } = frame(x, y, names, `${names[1]} by ${names[0]}`);
  const isDrawn = (value) => Number.isFinite(value) && (!log || value > 0);
  const path = (points) => points.map(([a, b]) => `${px(a).toFixed(1)},${py(b).toFixed(1)}`).join(" ");
  for (const one of series.filter((one) => one.low)) {
    const places = one.x.map((_, place) => place).filter((place) => isDrawn(one.low[place]) && isDrawn(one.high[place]));
    chart.append(s("polygon", { class: "band", vars: { c: one.colour }, points: path([...places.map((place) => [one.x[place], one.high[place]]), ...places.reverse().map((place) => [one.x[place], one.low[place]])]) }));
  }
  for (const one of series) {
    const points = one.x.map((value, place) => [value, one.y[place]]).filter(([, value]) => isDrawn(value));
    const line = s("g", { vars: { c: one.colour } }, s("title", {}, one.name));
    if (points.length > 1) line.append(s("polyline", { class: "line", "stroke-dasharray": one.dash, points: path(points) }));
    if (points.length < FEWEST_OF_CURVE) line.append(...points.map(([a, b]) => s("circle", { class: "point", cx: px(a), cy: py(b), r: 4 })));
    chart.append(line);
  }
  return readable(chart, series, px, names[0], chosen);
}

// Show a chart's values at a step, under the pointer or by the arrow keys. `data-step` survives when a chart is redrawn.
function readable(chart, series, px, unit, chosen) {
  const steps = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  const cross = s("line", { class: "cross", y1: 8, y2: H }), readout = h("p", { class: "readout", "aria-live": "polite" });
  let at = -1;
  const show = (place) => {
    at = Math.max(0, Math.min(steps.length - 1, place));
    const step = chart.dataset.step = steps[at];
    for (const side of ["x1", "x2"]) cross.setAttribute(side, px(step));
    cross.style.visibility = "visible";
    readout.textContent = `${unit} ${whole(step)}: ` + series.map((one) => {
      const here = one.x.indexOf(step);
      if (here < 0 || one.y[here] === null) return null;
      return `${brief(one.name, 30)} ${number(one.y[here], 4)}${one.low ? ` (${number(one.low[here])} to ${number(one.high[here])})` : ""}`;
    }).filter((text) => text !== null).join(", ");
  };
  const hide = () => { at = -1; delete chart.dataset.step; cross.style.visibility = "hidden"; readout.textContent = ""; };
  const nearest = (wanted) => steps.reduce((best, step, place) => Math.abs(px(step) - wanted) < Math.abs(px(steps[best]) - wanted) ? place : best, 0);
  const follow = (event) => {
    const box = chart.getBoundingClientRect();
    show(nearest((event.clientX - box.left) / box.width * W));
  };
  const keys = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") hide();
    if (by === undefined) return;
    event.preventDefault();
    show(at < 0 && Number.isFinite(by) ? steps.length - 1 : at + by);
  };
  chart.append(cross);
  chart.setAttribute("tabindex", "0");
  for (const [event, act] of Object.entries({ pointermove: follow, pointerleave: hide, blur: hide, keydown: keys })) chart.addEventListener(event, act);
  if (chosen !== undefined) show(nearest(px(chosen)));
  return h("div", { class: "chart" }, chart, readout);
}
const chooser = (label, choices, chosen, act) => h("select", { "aria-label": label, on: { change: (event) => act(event.target.value) } }, choices.map(([key, text]) => h("option", { value: key, selected: key === chosen }, text)));

// ---------------------------------------------------------------- light and dark

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.dispatchEvent(new Event("theme"));
}
function turnTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("saemill:theme", theme); } catch { /* not remembered */ }
  setTheme(theme);
}
function beginTheme() {
  let theme = null;
  try { theme = localStorage.getItem("saemill:theme"); } catch { /* none is stored */ }
  setTheme(theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
}
