// Draws a run's log: the seeds of an SAE as their median and range, SAEs together. While the run trains, its data are
// loaded again and again as a script, because a page opened from disk may add scripts but read nothing else.

W = 340; H = 170;
const FIRST = ["loss", "explained_variance", "l0", "dead_share"], AXIS = ["tokens"], RELOAD_MS = 5000;
const SAID = { l0: "L0, training batch", explained_variance: "Explained variance, training batch", l1: "L1", lr: "Learning rate" };
const capital = (words) => words.slice(0, 1).toUpperCase() + words.slice(1);
let data, isApart = false, chosen = new Map(); // chosen steps, by chart
const off = new Set();

function saemill(fresh) {
  if (fresh.ended) location.reload();
  else if (fresh.course.written !== data.course.written) draw(fresh);
}

function reload() {
  const script = document.createElement("script");
  script.src = `live.js?${Date.now()}`;
  script.onload = script.onerror = () => { script.remove(); showAge(); setTimeout(reload, RELOAD_MS); };
  document.head.append(script);
}

// ---------------------------------------------------------------- SAEs and their seeds

function groups() {
  const found = new Map();
  for (const sae of data.saes) {
    const name = isApart ? sae.name : sae.group;
    if (!found.has(name)) found.set(name, { name, members: [] });
    found.get(name).members.push(sae);
  }
  return [...found.values()].map((group, place) => ({ ...group, colour: colourOf(place), dash: dashOf(place) }));
}
const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};
function series(group, metric) {
  const members = group.members.filter((sae) => sae.curves[metric]);
  if (!members.length) return null;
  const at = members.map((sae) => new Map(sae.steps.map((step, place) => [step, sae.curves[metric][place]])));
  const found = { name: group.name, colour: group.colour, dash: group.dash, x: [], y: [], low: [], high: [] };
  for (const step of members[0].steps) {
    const values = at.map((one) => one.get(step)).filter(Number.isFinite);
    if (values.length < members.length) continue;
    found.x.push(step); found.y.push(median(values)); found.low.push(Math.min(...values)); found.high.push(Math.max(...values));
  }
  if (members.length === 1) found.low = found.high = undefined;
  return found.x.length ? found : null;
}

// ---------------------------------------------------------------- the page

function draw(fresh) {
  data = fresh;
  const focused = document.activeElement?.closest?.("[data-keep]")?.dataset.keep;
  chosen = new Map([...document.querySelectorAll("[data-keep][data-step]")].map((chart) => [chart.dataset.keep, Number(chart.dataset.step)]));
  const all = groups(), shown = all.filter((group) => !off.has(group.name));
  $("live").replaceChildren(...[progress(), compared(shown), all.length && training(all, shown)].filter(Boolean));
  showAge();
  if (focused) [...document.querySelectorAll("[data-keep]")].find((one) => one.dataset.keep === focused)?.focus({ preventScroll: true });
}

function progress() {
  const course = data.course;
  if (!course) return null;
  const names = FIRST.filter((name) => data.saes.some((sae) => sae.curves[name]));
  const last = (sae, name) => sae.curves[name]?.findLast(Number.isFinite);
  return h("section", { class: "card" }, h("h2", {}, "Training"),
    h("progress", { max: course.steps, value: course.step, "aria-label": "steps taken" }),
    h("p", {}, `step ${whole(course.step)} of ${whole(course.steps)}, ${whole(Math.round(course.tokens_per_second))} tokens/s `, h("span", { class: "quiet", id: "heard" })),
    h("div", { class: "wide" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "SAE"), names.map((name) => h("th", { scope: "col" }, name.replaceAll("_", " "))))),
      h("tbody", {}, data.saes.map((sae) => h("tr", {}, h("td", {}, brief(sae.name, 40)), names.map((name) => h("td", {}, number(last(sae, name), 4)))))))));
}
function showAge() {
  if (!data.course || !$("heard")) return;
  const seconds = Math.max(0, Math.round(Date.now() / 1000 - data.course.written));
  const late = seconds > 60 + 10 * data.course.pause;
  $("heard").textContent = late ? `\u00b7 nothing new for ${whole(Math.round(seconds / 60))} minutes: if it was stopped, sae-train --resume continues it` : `\u00b7 written ${seconds} s ago`;
  $("heard").className = late ? "warn" : "quiet";
}

function training(all, shown) {
  const names = [...new Set(data.saes.flatMap((sae) => Object.keys(sae.curves)))].filter((name) => !AXIS.includes(name));
  if (!names.length) return h("section", { class: "card quiet" }, "The run's folder has no training log.");
  const is = (test) => names.filter((name) => !FIRST.includes(name) && test(name)).sort();
  const parts = [["", FIRST.filter((name) => names.includes(name))], ["Course", is((name) => !name.includes("/"))]];
  for (const part of new Set(is((name) => name.includes("/")).map((name) => name.split("/")[0]))) parts.push([part, is((name) => name.startsWith(`${part}/`))]);
  const unchanged = [];
  const sections = parts.map(([part, own]) => {
    const drawn = own.map((name) => [name, shown.map((group) => series(group, name)).filter(Boolean)]).filter(([name, found]) => {
      const values = found.flatMap((one) => one.y), isUnchanged = new Set(values).size === 1 && found.some((one) => one.x.length > 1);
      if (isUnchanged) unchanged.push(`${name} ${number(values[0], 4)}`);
      return values.length && !isUnchanged;
    });
    return drawn.length ? h("div", {}, part && h("h2", {}, capital(part)), h("div", { class: "curves" }, drawn.map(([name, found]) => curve(name, part, found)))) : null;
  });
  return h("section", { class: "card" }, h("div", { class: "row-of between" }, h("h2", {}, "Training curves"), seeds()), legend(all), sections,
    unchanged.length > 0 && h("p", { class: "small quiet" }, `Unchanged: ${unchanged.join(", ")}.`));
}
function curve(name, part, found) {
  const values = found.flatMap((one) => one.y), isWide = Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
  const own = part && name.includes("/") ? name.slice(part.length + 1) : name, title = SAID[own] ?? capital(own.replaceAll("_", " "));
  const drawn = lines(found, ["step", isWide ? "logarithmic" : "", isWide ? "log" : ""], chosen.get(name)), chart = drawn.firstChild;
  chart.setAttribute("aria-label", `${name} by step`);
  chart.dataset.keep = name;
  return h("div", {}, h("h3", {}, title), drawn);
}
function seeds() {
  if (new Set(data.saes.map((sae) => sae.group)).size === data.saes.length) return null;
  return h("button", { type: "button", "data-keep": "seeds", "aria-pressed": isApart, on: { click: () => { isApart = !isApart; off.clear(); draw(data); } } }, "each seed by itself");
}
function legend(all) {
  const seen = (group) => `${brief(group.name, 40)}${group.members.length > 1 ? ` (${group.members.length} seeds: median and range)` : ""}`;
  const turn = (name) => { if (off.has(name)) off.delete(name); else if (off.size < all.length - 1) off.add(name); draw(data); };
  return h("div", { class: "legend" }, all.map((group) => h("button", { type: "button", "data-keep": `sae ${group.name}`, "aria-pressed": !off.has(group.name), on: { click: () => turn(group.name) } }, swatch(group.colour, group.dash), seen(group))));
}

function compared(shown) {
  const points = shown.map((group) => {
    const found = group.members.filter((sae) => sae.l0 > 0 && Number.isFinite(sae.explained_variance)), y = found.map((sae) => sae.explained_variance);
    return found.length ? { name: group.name, colour: group.colour, x: median(found.map((sae) => sae.l0)), y: median(y), low: y.length > 1 ? Math.min(...y) : null, high: y.length > 1 ? Math.max(...y) : null } : null;
  }).filter(Boolean);
  if (points.length < 2) return null;
  W = innerWidth < 600 ? 340 : 620; H = 260;
  const chart = scatter(points, ["L0 (active latents per token)", "explained variance"]);
  W = 340; H = 170;
  return h("section", { class: "card" }, h("h2", {}, "Sparsity and fidelity"), chart, h("p", { class: "small quiet" }, data.course ? "As last logged." : data.is_measured ? "As measured by core." : "On the validation split, as measured by training."));
}

beginTheme();
$("theme").addEventListener("click", turnTheme);
document.addEventListener("keydown", (event) => {
  if (event.key === "t" && !event.ctrlKey && !event.metaKey && !event.altKey) turnTheme();
});
draw(JSON.parse($("data").textContent));
if (data.course) setTimeout(reload, RELOAD_MS);
document.documentElement.dataset.ready = "true";
