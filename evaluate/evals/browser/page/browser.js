// The latent browser. Data arrive as scripts that call saemill(name, value), because a page opened from disk may load
// scripts and nothing else. Corpus text only ever becomes text nodes: nothing here parses markup.
"use strict";

// ---------------------------------------------------------------- data

const BUILD = document.querySelector("meta[name=build]").content;
const arrived = new Map(); // name -> {promise, resolve}
const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };

function saemill(name, value) {
  arrived.get(name)?.resolve(unpack(value));
}

function load(name, fresh = false) {
  if (!arrived.has(name)) {
    const entry = {};
    entry.promise = new Promise((resolve, reject) => {
      entry.resolve = resolve;
      const script = document.createElement("script");
      const path = name.split("/").map(encodeURIComponent).join("/");
      script.src = `data/${path}.js?${fresh ? Date.now() : BUILD}`;
      script.onload = () => { script.remove(); reject(new Error(`data/${name}.js has no data: rebuild the browser`)); };
      script.onerror = () => { script.remove(); arrived.delete(name); reject(new Error(`data/${name}.js is missing: rebuild the browser`)); };
      document.head.append(script);
    });
    arrived.set(name, entry);
  }
  return arrived.get(name).promise;
}

function unpack(value) {
  if (Array.isArray(value)) {
    if (value.length === 2 && typeof value[1] === "string" && value[0] in ARRAYS) return bytes(value[0], value[1]);
    return typeof value[0] === "object" ? value.map(unpack) : value;
  }
  if (value && typeof value === "object") for (const key of Object.keys(value)) value[key] = unpack(value[key]);
  return value;
}

function bytes(kind, text) {
  let raw;
  if (Uint8Array.fromBase64) raw = Uint8Array.fromBase64(text);
  else {
    const letters = atob(text);
    raw = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) raw[i] = letters.charCodeAt(i);
  }
  return new ARRAYS[kind](raw.buffer);
}

const starts = (counts) => {
  const found = new Uint32Array(counts.length + 1);
  for (let i = 0; i < counts.length; i++) found[i + 1] = found[i] + counts[i];
  return found;
};

// ---------------------------------------------------------------- tokens

// A token shown on its own: blank text becomes visible, and runs of spaces are counted.
const spaced = (text) => (text.trim() === "" && text.length < 3 ? text.replaceAll(" ", "\u2423") : text.replace(/ {2,}/g, (spaces) => `\u2423\u00d7${spaces.length}`)) || "\u2205";
const chip = (token) => h("bdi", { class: "token" }, token < 0 ? "\u2013" : spaced(brief(texts[token], 40)));

// ---------------------------------------------------------------- state

let run, texts, lower, numbers;
const columns = new Map(); // by folder
const LIST_ROW = 34;
let MOST_HIGH = 15e6; // pixels: Firefox cuts an element off at 17.9 million, Chromium at 33.6
const state = { sae: null, sort: "number", way: 1, filter: "all", mark: "all", query: "", order: null, latent: null, layer: null, hits: null };

async function columnsOf(sae) {
  if (!columns.has(sae.folder)) {
    const found = await load(`${sae.folder}/columns`);
    found.density = Float32Array.from(found.fired, (count) => count / Math.max(1, sae.tokens));
    found.mark = Object.keys(found.marks)[0] ?? null;
    columns.set(sae.folder, found);
  }
  return columns.get(sae.folder);
}

// ---------------------------------------------------------------- text

async function arraysOf(window_, name, windows, size) {
  const file = Math.floor(window_ / windows), start = (window_ - file * windows) * size;
  const part = await load(`${name}/${file}`);
  return Object.fromEntries(Object.entries(part).map(([key, array]) => [key, array.subarray(start, start + size)]));
}
const textOf = (window_) => arraysOf(window_, "text", run.text_windows, run.context);
const attentionOf = (window_) => arraysOf(window_, "attention", run.attention_windows, run.context * run.attention_layers.length * run.attended);
function attendedFrom(attention, at, layer) {
  // Earlier positions and their weights; for layer null, the strongest weight in any layer.
  const { attention_layers: layers, attended: keys, levels } = run;
  const found = new Map();
  layers.forEach((name, place) => {
    if (layer !== null && layer !== name) return;
    for (let key = 0; key < keys; key++) {
      const spot = (at * layers.length + place) * keys + key;
      const weight = attention.weights[spot] / levels;
      if (weight > 0) found.set(attention.positions[spot], Math.max(weight, found.get(attention.positions[spot]) ?? 0));
    }
  });
  return [...found].sort((a, b) => b[1] - a[1]);
}

// ---------------------------------------------------------------- notes

// By weights: another SAE may later get the same label, and its latents are different.
const KEY = (sae) => `saemill:notes:${sae.sha256}`;
let notes = Object.create(null), isKept = true; // if not kept, they last as long as this page
function readNotes() {
  // Also before each change, because another tab may have written.
  if (!isKept) return;
  const found = Object.create(null);
  for (const sae of run.saes) try { found[sae.label] = JSON.parse(localStorage.getItem(KEY(sae)) ?? "{}"); } catch { found[sae.label] = notes[sae.label]; /* what is here stays */ }
  notes = checkedNotes(found);
}
function checkedNotes(value) {
  const found = Object.create(null); // a label may be called __proto__
  for (const [label, latents] of Object.entries(value ?? {})) {
    if (typeof latents !== "object" || latents === null || /\p{Cs}/u.test(label)) continue; // half a character cannot be in an address
    for (const [latent, note] of Object.entries(latents)) {
      if (!/^\d+$/.test(latent) || typeof note !== "object" || note === null) continue;
      const kept = { star: note.star === true, label: typeof note.label === "string" ? note.label.slice(0, 500) : "" };
      if (kept.star || kept.label) (found[label] ??= {})[latent] = kept;
    }
  }
  return found;
}
const noteOf = (label, latent) => notes[label]?.[latent] ?? { star: false, label: "" };
function setNote(label, latent, change) {
  readNotes();
  const kept = { ...noteOf(label, latent), ...change };
  notes[label] ??= {};
  if (kept.star || kept.label) notes[label][latent] = kept; else delete notes[label][latent];
  saveNotes([label]);
}
function saveNotes(labels) {
  try { for (const label of labels) localStorage.setItem(KEY(run.saes.find((one) => one.label === label)), JSON.stringify(notes[label] ?? {})); isKept = true; }
  catch { isKept = false; say("this web browser stores no data for this page: export your notes before you leave"); }
}
let quiet;
function say(text) {
  $("said").textContent = text;
  clearTimeout(quiet);
  quiet = setTimeout(() => { $("said").textContent = ""; }, 4000);
}

// ---------------------------------------------------------------- overview

const link = (label, ...rest) => `#/sae/${[label, ...rest].map(encodeURIComponent).join("/")}`;

// These pages read other text than evaluations: its L0 is shown for all SAEs, or for none.
const isOwnL0 = () => !run.saes.some((sae) => numbers.saes?.[sae.label]?.numbers?.l0);
function facts(sae) {
  const known = numbers.saes?.[sae.label] ?? {};
  return {
    ...known.numbers,
    l0: known.numbers?.l0 ?? (isOwnL0() ? { value: sae.l0 } : undefined),
    alive: { value: sae.alive_share }, dense: { value: sae.dense_share }, width: { value: sae.width },
  };
}

let tableSort = ["l0", 1], chosenY, chosenCurve;
// An SAE's place among all of its run, which decides its colour in plots and pages.
function placeOf(sae) {
  return numbers.saes?.[sae.label]?.place ?? Object.keys(numbers.saes ?? {}).length + run.saes.indexOf(sae);
}

function showOverview() {
  document.title = `${run.run}: latents`;
  state.sae = null;
  const read = Object.entries(run.windows).map(([split, count]) => `${whole(count * run.context)} of the ${split} split`).join(", ");
  const page = h("div", { class: "page" },
    h("div", { class: "intro" },
      h("h1", {}, run.run),
      h("p", { class: "quiet" }, `${run.saes.length === 1 ? "One SAE" : `${run.saes.length} SAEs`} of ${run.model}, read on ${run.corpus}: tokens ${read}. Choose one to see its latents.`),
      run.without_words && h("p", { class: "warn small" }, `Tokens are shown as their ids: ${run.without_words}`),
      run.without_model && h("p", { class: "warn small" }, run.without_model),
      run.attention_layers.length === 0 && h("p", { class: "warn small" }, "The store holds no attention: what tokens look back at cannot be shown.")),
    table(), charts(), densities(), fidelities().length === 0 && curvesCard());
  $("main").replaceChildren(page);
}

function table() {
  const rows = run.saes.map((sae) => ({ sae, facts: facts(sae) }));
  const known = [["width", "width", "latents"], ...(numbers.columns ?? [["l0", "L0", "active latents per token"]]), ["alive", "alive", "share of latents that fired on the text read for these pages"], ["dense", "dense", `share of latents that fire on more than ${share(run.saes[0].dense)} of its tokens`]]
    .filter(([key]) => rows.some((row) => row.facts[key]?.value !== undefined && row.facts[key]?.value !== null));
  const value = (row) => tableSort[0] === "sae" ? row.sae.label : row.facts[tableSort[0]]?.value ?? -Infinity;
  rows.sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * tableSort[1]);
  const head = (key, text, meaning) => h("th", { scope: "col", title: meaning, "aria-sort": tableSort[0] === key ? (tableSort[1] > 0 ? "ascending" : "descending") : "none" },
    h("button", { type: "button", on: { click: () => { tableSort = [key, tableSort[0] === key ? -tableSort[1] : key === "sae" ? 1 : -1]; renew(); } } }, text));
  const renew = () => { const fresh = table(); card.replaceWith(fresh); fresh.querySelector("th:not([aria-sort=none]) button").focus(); }; // keeps the keyboard's place
  const cell = (key, fact) => {
    const shown = fact?.value ?? null;
    const text = ["alive", "dense"].includes(key) && shown !== null ? share(shown) : key === "width" ? whole(shown) : number(shown, 4);
    return h("td", {}, text, fact?.low !== undefined && fact.low !== null && h("small", { title: "95 % of resamples of documents" }, `${number(fact.low, 3)} to ${number(fact.high, 3)}`));
  };
  const card = h("section", { class: "card" }, h("div", { class: "wide" }, h("table", { id: "saes" },
    h("thead", {}, h("tr", {}, head("sae", "SAE", "name in the run"), known.map(([key, text, meaning]) => head(key, text, meaning)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, h("td", {}, swatch(colourOf(placeOf(row.sae)), dashOf(placeOf(row.sae))), h("a", { href: link(row.sae.label) }, brief(row.sae.label, 40)), row.sae.variant !== row.sae.label && h("small", {}, row.sae.variant)), known.map(([key]) => cell(key, row.facts[key]))))))),
    [...(numbers.notes ?? []), ...(isOwnL0() ? ["L0 is measured on the text that was read for these pages."] : [])].map((note) => h("p", { class: "small quiet" }, note)));
  return card;
}

const fidelities = () => (numbers.columns ?? []).filter(([key, , , fidelity]) => fidelity && run.saes.some((sae) => Number.isFinite(facts(sae)[key]?.value)));
function charts() {
  const choices = fidelities();
  const box = h("section", { class: "card" });
  if (!choices.length) return h("section", { class: "card quiet" }, "No evaluation has measured fidelity yet: sae-eval RUN --evals core puts these SAEs on a chart.");
  const draw = () => {
    chosenY = choices.find(([key]) => key === chosenY)?.[0] ?? choices[0][0];
    const [, name] = choices.find(([key]) => key === chosenY);
    const points = run.saes.map((sae) => ({ name: sae.label, colour: colourOf(placeOf(sae)), x: facts(sae).l0?.value, y: facts(sae)[chosenY]?.value, low: facts(sae)[chosenY]?.low, high: facts(sae)[chosenY]?.high })).filter((point) => point.x > 0 && Number.isFinite(point.y));
    box.replaceChildren(h("div", { class: "row-of between" }, h("h2", {}, "Sparsity and fidelity"), chooser("fidelity", choices, chosenY, (key) => { chosenY = key; draw(); box.querySelector("select").focus(); })), points.length ? scatter(points, ["L0 (active latents per token)", name]) : h("p", { class: "quiet" }, "no numbers"));
  };
  draw();
  return h("div", { class: "pair" }, box, curvesCard());
}

function curvesCard() {
  const names = [...new Set(run.saes.flatMap((sae) => Object.keys(numbers.saes?.[sae.label]?.curves ?? {})))];
  const box = h("section", { class: "card" });
  const draw = () => {
    chosenCurve = names.includes(chosenCurve) ? chosenCurve : names[0];
    const series = run.saes.map((sae) => ({ name: sae.label, colour: colourOf(placeOf(sae)), dash: dashOf(placeOf(sae)), curve: numbers.saes?.[sae.label]?.curves?.[chosenCurve] })).filter((one) => one.curve).map((one) => ({ ...one, x: one.curve[0], y: one.curve[1] }));
    box.replaceChildren(h("div", { class: "row-of between" }, h("h2", {}, "Training batches"), names.length > 0 && chooser("curve", names.map((name) => [name, name.replaceAll("_", " ")]), chosenCurve, (name) => { chosenCurve = name; draw(); box.querySelector("select").focus(); })),
      series.length ? lines(series, ["step", chosenCurve.replaceAll("_", " "), chosenCurve === "loss" ? "log" : ""]) : h("p", { class: "quiet" }, "The run's folder has no training log."));
  };
  draw();
  return box;
}

function densities() {
  return h("section", { class: "card" }, h("h2", {}, "How often latents fire"), h("div", { class: "many" }, run.saes.map((sae) => {
    const { edges, counts } = sae.density;
    const dead = Math.round(sae.width * (1 - sae.alive_share));
    return h("div", {}, h("div", { class: "row-of between small" }, h("a", { href: link(sae.label) }, brief(sae.label, 30)), h("span", { class: "quiet" }, dead ? `${whole(dead)} never fired` : "all fired")),
      bars(counts, { width: 300, height: 70, label: `densities of ${sae.label}`, hot: (place) => 10 ** edges[place] >= sae.dense,
        title: (place) => `${whole(counts[place])} latents fire on ${share(10 ** edges[place])} to ${share(10 ** edges[place + 1])} of tokens`,
        ticks: [-6, -4, -2, 0].map((power) => [(power + 6) * 4, power === 0 ? "all tokens" : `10^${power}`, power === 0 ? "end" : power === -6 ? "start" : "middle"]) }));
  })), h("p", { class: "small quiet" }, "Latents by the share of tokens they fire on; dense ones are orange."));
}

// ---------------------------------------------------------------- list

let rows, inner, pool = [], split, detail, selecting = 0, visits = 0;

async function showSae(label, latent, place) {
  const sae = run.saes.find((one) => one.label === label);
  if (!sae) return showMissing(`There is no SAE ${label} in this run.`);
  const mine = visits;
  if (state.sae !== sae) state.order = null; // the previous SAE's
  state.sae = sae;
  const found = await columnsOf(sae);
  if (mine !== visits) return;
  const isNew = !split?.isConnected || split.dataset.sae !== label;
  if (isNew) {
    Object.assign(state, { mark: "all", filter: "all", hits: null, order: null });
    buildList(sae, found);
  }
  while (!state.order && mine === visits) await arrange(); // again if the query changed during the search
  if (mine !== visits) return;
  split.dataset.shows = latent === null ? "list" : "latent";
  document.title = latent === null ? `${label}: latents` : `${label} ${latent}`;
  if (latent === null) {
    state.latent = null;
    drawRows();
    detail.replaceChildren(h("div", { class: "latent quiet" }, h("p", {}, "Choose a latent: click one, or step with ", h("kbd", {}, "j"), " and ", h("kbd", {}, "k"), ".")));
    if (matchMedia("(min-width: 1021px)").matches && state.order.length) await showLatent(sae, state.order[0], null, false);
    return;
  }
  if (!(latent >= 0 && latent < sae.width)) return detail.replaceChildren(h("div", { class: "latent" }, h("p", { class: "warn" }, `${label} has latents 0 to ${whole(sae.width - 1)}.`)));
  await showLatent(sae, latent, place, isNew);
}

function buildList(sae, found) {
  inner = h("div", {});
  rows = h("div", { class: "rows", role: "listbox", tabindex: 0, "aria-label": "latents", on: { scroll: drawRows } }, inner);
  pool = [];
  detail = h("section", { class: "detail", id: "detail", tabindex: -1, "aria-label": "latent" });
  const head = (key, text, meaning) => h("button", { type: "button", "data-key": key, title: meaning, on: { click: () => sortBy(key) } }, text);
  const filters = [["all", "all latents"], ["alive", "that fire"], ["dead", "that never fired here"], ["dense", "dense"], ["sparse", "not dense"], ["starred", "starred"], ["labelled", "labelled"]];
  const marks = found.mark === null ? [] : [...new Set(found.marks[found.mark])].sort((a, b) => a - b);
  split = h("div", { class: `split ${found.mark ? "has-mark" : ""}`, "data-shows": "list", "data-sae": sae.label },
    h("section", { class: "list", "aria-label": `latents of ${sae.label}` },
      h("div", { class: "list-top" }, h("div", { class: "row-of between" },
        chooser("which latents", filters, state.filter, (key) => { state.filter = key; arrange(); }),
        found.mark && chooser(found.mark, [["all", `every ${found.mark}`], ...marks.map((mark) => [String(mark), markName(found.mark, mark)])], state.mark, (key) => { state.mark = key; arrange(); }),
        h("span", { class: "small quiet" }, `${whole(sae.width)} latents, L0 ${number(sae.l0)} on this text`)),
        h("p", { class: "found", id: "found", role: "status" })),
      h("div", { class: "heads" }, head("number", "latent", "by number"), head("token", "fires on", "the token of most of its strongest examples"), head("density", "density, log bar", "share of tokens on which it fires; its bar is on a logarithmic scale from a millionth to all"), head("mean", "mean", "of its activations"), found.mark && head("mark", found.mark, found.mark)),
      rows),
    detail);
  $("main").replaceChildren(split);
}
const markName = (name, mark) => mark < 0 ? `no ${name}` : `${name} ${mark + 1}`;

function sortBy(key) {
  const first = key === "number" || key === "token" || key === "mark" ? 1 : -1;
  state.way = state.sort === key ? -state.way : first;
  state.sort = key;
  arrange();
}

async function arrange() {
  const { sae } = state, found = columns.get(sae.folder), query = state.query.trim();
  if (!found) return; // still loading, and arranged when it is there
  const hits = query ? await search(sae, found, query) : null;
  if (state.sae !== sae || state.query.trim() !== query || !split?.isConnected) return;
  state.hits = hits;
  const chosen = [];
  const noted = notes[sae.label] ?? {};
  for (let latent = 0; latent < sae.width; latent++) {
    const fired = found.fired[latent];
    if (hits && !hits.score[latent]) continue;
    if (state.filter !== "all" && !{ alive: fired > 0, dead: fired === 0, dense: found.density[latent] > sae.dense, sparse: found.density[latent] <= sae.dense, starred: noted[latent]?.star, labelled: noted[latent]?.label }[state.filter]) continue;
    if (state.mark !== "all" && found.marks[found.mark][latent] !== Number(state.mark)) continue;
    chosen.push(latent);
  }
  const key = sortKey(found, hits);
  if (key) { const way = hits && state.sort === "number" ? -1 : state.way; chosen.sort((a, b) => (key[a] - key[b]) * way || a - b); }
  else if (state.way < 0) chosen.reverse();
  state.order = chosen;
  for (const button of split.querySelectorAll(".heads button")) {
    if (button.dataset.key === state.sort && !(hits && state.sort === "number")) button.dataset.way = state.way > 0 ? "up" : "down"; else delete button.dataset.way;
  }
  $("found").textContent = hits ? `${whole(chosen.length)} found${hits.said}${state.sort === "number" && chosen.length > 1 ? "; best first" : ""}` : chosen.length === sae.width ? "" : `${whole(chosen.length)} of ${whole(sae.width)}`;
  inner.style.height = `${Math.min(MOST_HIGH, chosen.length * LIST_ROW)}px`;
  rows.scrollTop = 0;
  drawRows();
  revealSelected();
}

function sortKey(found, hits) {
  if (state.sort === "number") return hits?.score ?? null;
  if (state.sort === "token") { const rank = tokenRanks(); return Int32Array.from(found.token, (token) => token < 0 ? 2 ** 30 : rank[token]); }
  return state.sort === "mark" ? found.marks[found.mark] : found[state.sort];
}
let ranks;
function tokenRanks() {
  if (!ranks) {
    ranks = new Int32Array(texts.length);
    const compare = new Intl.Collator("en").compare;
    [...texts.keys()].filter((token) => texts[token]).sort((a, b) => compare(texts[a].trim(), texts[b].trim())).forEach((token, place) => { ranks[token] = place; });
  }
  return ranks;
}

function pace() {
  // Pixels of the list per scrolled pixel: more than one if the list is higher than MOST_HIGH.
  const long = state.order.length * LIST_ROW, seen = rows.clientHeight;
  return long > MOST_HIGH ? (long - seen) / (MOST_HIGH - seen) : 1;
}

function drawRows() {
  if (!rows?.isConnected || !state.order) return;
  const { sae, order, hits } = state, found = columns.get(sae.folder), top = rows.scrollTop * pace();
  const first = Math.max(0, Math.floor(top / LIST_ROW) - 6), count = Math.min(order.length - first, Math.ceil(rows.clientHeight / LIST_ROW) + 12);
  while (pool.length < count) {
    const row = h("a", { class: "r", role: "option", tabindex: -1 }, ["n", "t", "v spark", "v", "v"].slice(0, found.mark ? 5 : 4).map((name) => h("span", { class: name })));
    pool.push(row);
    inner.append(row);
  }
  pool.forEach((row, place) => {
    row.hidden = place >= count;
    if (row.hidden) return;
    const latent = order[first + place], note = noteOf(sae.label, latent), [n, t, density, mean, mark] = row.children;
    row.style.transform = `translateY(${(first + place) * LIST_ROW - top + rows.scrollTop}px)`;
    row.href = link(sae.label, latent);
    row.id = `row-${latent}`;
    row.classList.toggle("dead", found.fired[latent] === 0);
    row.setAttribute("aria-selected", latent === state.latent);
    row.setAttribute("aria-posinset", first + place + 1);
    row.setAttribute("aria-setsize", order.length);
    n.textContent = (note.star ? "\u2605 " : "") + latent;
    n.classList.toggle("starred", note.star);
    const why = hits?.why(latent);
    t.replaceChildren(...[note.label ? h("span", { class: "own" }, brief(note.label, 60)) : found.fired[latent] ? chip(found.token[latent]) : "never fired here", why && h("span", { class: "why" }, why)].filter(Boolean));
    density.textContent = found.fired[latent] ? share(found.density[latent]) : "\u2013";
    density.style.setProperty("--p", found.fired[latent] ? Math.max(.02, 1 + Math.log10(found.density[latent]) / 6) : 0);
    mean.textContent = found.fired[latent] ? number(found.mean[latent]) : "\u2013";
    if (mark) mark.textContent = found.marks[found.mark][latent] < 0 ? "\u2013" : found.marks[found.mark][latent] + 1;
  });
  if (state.latent !== null) rows.setAttribute("aria-activedescendant", `row-${state.latent}`); else rows.removeAttribute("aria-activedescendant");
}

function revealSelected() {
  const place = state.order?.indexOf(state.latent) ?? -1;
  if (place < 0 || !rows?.isConnected) return;
  const top = place * LIST_ROW, from = rows.scrollTop * pace();
  if (top < from || top + LIST_ROW > from + rows.clientHeight) rows.scrollTop = Math.max(0, top - rows.clientHeight / 2) / pace();
  drawRows();
}

// ---------------------------------------------------------------- search

const BEFORE = 16, AFTER = 8; // tokens shown around an example's own until it is expanded

async function search(sae, found, query) {
  const score = new Float32Array(sae.width), fires = new Uint8Array(sae.width), promotes = new Uint8Array(sae.width), named = new Uint8Array(sae.width);
  const wanted = query.toLowerCase();
  let isExact = -1;
  if (/^\d+$/.test(query) && Number(query) < sae.width) { isExact = Number(query); score[isExact] = 1e6; }
  lower ??= texts.map((text) => text.toLowerCase());
  const has = Uint8Array.from(lower, (text) => text.trim() === wanted ? 2 : text.includes(wanted) ? 1 : 0);
  const each = found.promoted ? found.promoted.length / sae.width : 0;
  for (let latent = 0; latent < sae.width; latent++) {
    if (found.token[latent] >= 0 && has[found.token[latent]]) { fires[latent] = 1; score[latent] += 1000 * has[found.token[latent]]; }
    for (let place = 0; place < each; place++) if (has[found.promoted[latent * each + place]]) { promotes[latent] = 1; score[latent] += 100; break; }
  }
  for (const [latent, note] of Object.entries(notes[sae.label] ?? {})) if (note.label.toLowerCase().includes(wanted) && latent < sae.width) { named[latent] = 1; score[latent] += 5000; }
  const inText = await searchTexts(sae, wanted);
  for (let latent = 0; latent < sae.width; latent++) score[latent] += inText[latent];
  const count = (flags) => flags.reduce((sum, flag) => sum + (flag ? 1 : 0), 0);
  const parts = [[count(fires), "fire on it"], [count(promotes), "promote it"], [count(inText), "have it in an example"], [count(named), "by your label"]].filter(([many]) => many).map(([many, what]) => `${whole(many)} ${what}`);
  return {
    score, said: parts.length ? `: ${parts.join(", ")}` : "",
    why: (latent) => latent === isExact ? "this number" : named[latent] ? "your label" : fires[latent] ? "" : promotes[latent] ? "promotes it" : inText[latent] ? `in ${inText[latent]} example${inText[latent] > 1 ? "s" : ""}` : "",
  };
}

let joined; // for every file of text: its characters, and where tokens start in them
async function allTexts() {
  if (!joined) {
    const total = Object.values(run.windows).reduce((a, b) => a + b, 0);
    const found = [];
    for (let file = 0; file * run.text_windows < total; file++) {
      const { tokens } = await load(`text/${file}`);
      const begins = new Uint32Array(tokens.length), parts = new Array(tokens.length);
      let place = 0;
      for (let i = 0; i < tokens.length; i++) {
        if (i % run.context === 0) place += 1; // windows are separated by a character that no query contains
        begins[i] = place;
        parts[i] = (i % run.context === 0 ? "\u0000" : "") + lower[tokens[i]];
        place += lower[tokens[i]].length;
      }
      found.push({ text: parts.join(""), begins, first: file * run.text_windows * run.context });
    }
    joined = { files: found, tokens: total * run.context };
  }
  return joined;
}

async function searchTexts(sae, wanted) {
  const { files: parts, tokens } = await allTexts();
  const near = new Uint8Array(tokens);
  for (const part of parts) {
    for (let at = part.text.indexOf(wanted); at >= 0; at = part.text.indexOf(wanted, at + 1)) {
      let low = 0, high = part.begins.length - 1;
      while (low < high) { const middle = (low + high + 1) >> 1; if (part.begins[middle] <= at) low = middle; else high = middle - 1; }
      const token = part.first + low, begin = Math.floor(token / run.context) * run.context;
      near.fill(1, Math.max(begin, token - AFTER), Math.min(begin + run.context, token + BEFORE + 1));
    }
  }
  const counts = new Uint16Array(sae.width);
  for (let first = 0, file = 0; first < sae.width; first += 1 << 14, file++) {
    const places = await load(`${sae.folder}/places/${file}`);
    let place = 0;
    places.counts.forEach((many, row) => { for (let i = 0; i < many; i++, place++) counts[first + row] += near[places.window[place] * run.context + places.at[place]]; });
  }
  return counts;
}

// ---------------------------------------------------------------- latent

const TOP = 1, SAMPLE = 2, LOW = 4, RANDOM = 8;
const cut = new Map(); // by file of latents: where its ragged arrays start
async function latentData(sae, latent) {
  const file = Math.floor(latent / run.file_latents), name = `${sae.folder}/latents/${file}`;
  const data = await load(name);
  if (!cut.has(name)) cut.set(name, { items: starts(data.counts), values: starts(data.lengths), bins: starts(data.bins_count) });
  const { items, values, bins } = cut.get(name), row = latent - file * run.file_latents;
  const found = columns.get(sae.folder);
  const examples = [];
  for (let item = items[row]; item < items[row + 1]; item++) {
    examples.push({ window: data.window[item], at: data.at[item], peak: data.peak[item], reasons: data.reasons[item],
      positions: data.positions.subarray(values[item], values[item + 1]), levels: data.levels.subarray(values[item], values[item + 1]) });
  }
  const slice = (array) => array.subarray(row * array.length / data.counts.length, (row + 1) * array.length / data.counts.length);
  const near = (one) => one && { latents: slice(one.latents), scores: slice(one.scores), tokens: one.tokens };
  return {
    latent, examples, highest: found.highest[latent], fired: found.fired[latent],
    bins: { first: data.bins_first[row], counts: [...data.bins.subarray(bins[row], bins[row + 1])] },
    parts: [...slice(data.parts)],
    byDirection: near(data.by_direction), byFiring: near(data.by_firing), madeOf: near(data.made_of), partOf: near(data.part_of),
    // By weights: another SAE may have this label by now.
    others: data.others.filter((one) => one.sha256 && run.saes.some((other) => other.label === one.label && other.sha256 === one.sha256)).map((one) => ({ ...one, ...near(one) })),
    promoted: data.promoted && { tokens: slice(data.promoted.tokens), values: slice(data.promoted.values) },
    suppressed: data.suppressed && { tokens: slice(data.suppressed.tokens), values: slice(data.suppressed.values) },
  };
}

async function showLatent(sae, latent, place, isNew) {
  const mine = ++selecting;
  state.latent = latent;
  if (isNew) revealSelected(); else drawRows();
  const data = await latentData(sae, latent);
  await Promise.all(data.examples.map(async (example) => { example.text = await textOf(example.window); }));
  if (mine !== selecting || state.sae !== sae) return;
  const found = columns.get(sae.folder);
  detail.replaceChildren(h("article", { class: "latent" }, title(sae, latent, found), factsOf(sae, data, found), ...(data.fired ? body(sae, data, found) : [h("p", { class: "quiet" }, `It never fired on the ${whole(sae.tokens)} tokens that were read.`), related(sae, data, found), logits(sae, data)])));
  detail.scrollTop = 0;
  detail.dataset.latent = latent;
  if (place !== null) openExample(place);
  if (data.fired && run.attention_layers.length) addAttention(sae, data, mine);
}

function title(sae, latent, found) {
  const note = noteOf(sae.label, latent), marks = Object.entries(found.marks);
  const star = h("button", { type: "button", "aria-pressed": note.star, title: "star (s)", id: "star", on: { click: () => toggleStar() } }, note.star ? "\u2605 starred" : "\u2606 star");
  const own = h("input", { class: "own-label", id: "own-label", placeholder: "your label", "aria-label": "your label for this latent", value: note.label, maxlength: 500,
    on: { change: (event) => { setNote(sae.label, latent, { label: event.target.value.trim() }); drawRows(); } } });
  return h("div", { class: "top" }, h("a", { class: "back", href: link(sae.label) }, "\u2190 all latents"),
    h("h1", {}, `${latent} `, found.fired[latent] > 0 && h("span", {}, chip(found.token[latent]))),
    found.fired[latent] === 0 && h("span", { class: "flag" }, "never fired here"), found.density[latent] > sae.dense && h("span", { class: "flag" }, "dense"),
    marks.map(([name, values]) => h("span", { class: "flag" }, markName(name, values[latent]))),
    explanationOf(sae, latent),
    h("div", { class: "row-of" }, own, star, h("button", { type: "button", title: "previous (k)", "aria-label": "previous latent", on: { click: () => step(-1) } }, "\u2191"), h("button", { type: "button", title: "next (j)", "aria-label": "next latent", on: { click: () => step(1) } }, "\u2193"),
      h("button", { type: "button", title: "copy a link to this latent", on: { click: copyLink } }, "link")));
}
function explanationOf(sae, latent) {
  const { judge, latents } = numbers.saes?.[sae.label]?.explanations ?? {}, [text, score, control] = latents?.[latent] ?? [];
  if (!text) return null;
  const scored = [typeof score === "number" && `${share(score)} of passages right`, typeof control === "number" && `${share(control)} with another latent's explanation`].filter(Boolean);
  return h("p", { class: "explanation", id: "explanation" }, h("bdi", {}, brief(text, 300)), " ", h("span", { class: "small quiet" }, `explained by ${brief(judge, 60)}${scored.length ? `: ${scored.join(", ")}` : ""}`));
}
function toggleStar() {
  setNote(state.sae.label, state.latent, { star: !noteOf(state.sae.label, state.latent).star });
  drawNote();
}
function drawNote() {
  const { star, label } = noteOf(split.dataset.sae, detail.dataset.latent), own = $("own-label");
  $("star").textContent = star ? "\u2605 starred" : "\u2606 star";
  $("star").setAttribute("aria-pressed", star);
  if (own !== document.activeElement) own.value = label;
  drawRows();
}
function notesChanged(event) { // in another tab
  if (!run.saes.some((sae) => event.key === KEY(sae))) return;
  readNotes();
  if ($("star")) drawNote();
  else if ($("notes-file")) showNotes();
  else drawRows();
}
async function copyLink() {
  const address = location.href.split("#")[0] + link(state.sae.label, state.latent);
  try { await navigator.clipboard.writeText(address); say("link copied"); } catch { say(address); }
}

function factsOf(sae, data, found) {
  const { latent } = data, fact = (value, text) => h("li", {}, h("b", {}, value), ` ${text}`);
  return h("ul", { class: "facts" }, fact(share(found.density[latent]), `of tokens (${whole(data.fired)} of ${whole(sae.tokens)})`), fact(number(found.mean[latent]), "mean activation"), fact(number(data.highest), "highest"));
}

function body(sae, data, found) {
  const { edges } = run, bins = data.bins, parts = data.parts.map((count, place) => count / Math.max(1, found.part_tokens[place]));
  const each = run.context / parts.length;
  const marks = [0, .25, .5, .75, 1].map((part) => Math.round(part * bins.counts.length));
  const charts_ = h("div", { class: "pair" },
    h("section", { class: "card" }, h("h2", {}, "Activations"), bars(bins.counts, { log: true, label: "histogram of activations",
      title: (place) => `${whole(bins.counts[place])} between ${number(edges[bins.first + place])} and ${number(edges[bins.first + place + 1] ?? Infinity)}`, top: `at most ${whole(Math.max(...bins.counts))} in a bar; both scales are logarithmic`,
      ticks: [...new Set(marks)].map((place) => [place, number(edges[bins.first + place] ?? edges.at(-1), 2), place === 0 ? "start" : place === bins.counts.length ? "end" : "middle"]) })),
    h("section", { class: "card" }, h("h2", {}, "Position in the window"), bars(parts, { label: "density by position",
      title: (place) => `positions ${Math.ceil(place * each)} to ${Math.ceil((place + 1) * each) - 1}: fires on ${share(parts[place])} of tokens`, top: `up to ${share(Math.max(...parts))} of tokens`,
      ticks: [[0, "0", "start"], [parts.length / 2, String(run.context / 2)], [parts.length, String(run.context - 1), "end"]] })));
  return [examplesCard(sae, data), attentionCard(), charts_, related(sae, data, found), logits(sae, data)];
}

function pairs(items, empty) {
  return items.length ? h("ul", { class: "pairs" }, items.map(([left, middle, right]) => h("li", {}, left, middle, h("span", {}, right)))) : h("p", { class: "small quiet" }, empty);
}

function logits(sae, data) {
  const why = sae.target_layers.length > 1 ? "This SAE writes to several layers, so it has no single place in front of the model's head."
    : run.without_model ?? "The model was not available when this SAE was read: name this SAE too when you rebuild the browser.";
  if (!data.promoted) return h("section", { class: "card" }, h("h2", {}, "Promoted tokens"), h("p", { class: "small quiet" }, why));
  const listed = ({ tokens, values }) => pairs([...tokens].map((token, place) => [chip(token), "", number(values[place])]), "none");
  return h("section", { class: "card", id: "logits" }, h("h2", { title: "the decoder's direction through the model's final norm and unembedding" }, "Through the model's head"), h("div", { class: "three" }, h("div", {}, h("h3", {}, "promotes"), listed(data.promoted)), h("div", {}, h("h3", {}, "suppresses"), listed(data.suppressed))));
}

function related(sae, data, found) {
  const entry = (target, columns_, latent, score) => [h("a", { href: link(target.label, latent) }, `${latent}`), columns_ ? h("span", {}, noteOf(target.label, latent).label || chip(columns_.token[latent])) : "", number(score, 2)];
  const together = ({ tokens }) => `fires on the same tokens${tokens === undefined ? "" : ` (of ${whole(tokens)})`}`; // older pages do not say
  const listed = (near, empty) => pairs([...near.latents].map((latent, place) => [latent, near.scores[place]]).filter(([latent]) => latent >= 0).map(([latent, score]) => entry(sae, found, latent, score)), empty);
  const groups = [];
  if (data.byDirection) groups.push(h("div", {}, h("h3", { title: "cosine of decoder rows" }, "writes in a similar direction (cosine)"), listed(data.byDirection, "none")));
  groups.push(h("div", {}, h("h3", { title: "tokens on which both fire, over the geometric mean of those on which each does" }, together(data.byFiring)), listed(data.byFiring, "none often enough to tell")));
  if (data.madeOf) groups.push(h("div", {}, h("h3", {}, "made of, in the tier below"), listed(data.madeOf, "nothing below it")), h("div", {}, h("h3", {}, "part of, in the tier above"), listed(data.partOf, "nothing above it")));
  const box = h("section", { class: "card", id: "related" }, h("h2", {}, "Related latents"), h("div", { class: "three" }, groups));
  const labels = [...new Set(data.others.map((one) => one.label))];
  if (labels.length) {
    const others = h("div", { class: "three" });
    box.append(h("h2", { class: "again" }, "In the other SAEs"));
    if (sae.not_compared) box.append(h("p", { class: "small quiet" }, `Those most like this SAE in layer, variant and width; ${whole(sae.not_compared)} others were not compared with it.`));
    box.append(others);
    for (const label of labels) {
      const target = run.saes.find((one) => one.label === label), place = h("div", {}, h("h3", {}, brief(label, 30)));
      others.append(place);
      columnsOf(target).then((columns_) => {
        for (const one of data.others.filter((other) => other.label === label)) {
          const there = [...one.latents].map((latent, rank) => [latent, one.scores[rank]]).filter(([latent, score]) => latent >= 0 && score > 0);
          if (there.length) place.append(h("p", { class: "small quiet tight" }, one.by === "direction" ? "cosine" : together(one)), pairs(there.map(([latent, score]) => entry(target, columns_, latent, score))));
        }
        if (place.children.length === 1) place.append(h("p", { class: "small quiet" }, "no counterpart"));
      });
    }
  }
  return box;
}

// ---------------------------------------------------------------- examples

let shown = []; // examples on the page

function examplesCard(sae, data) {
  const sample = data.examples.filter((example) => example.reasons & SAMPLE), rest = sample.filter((example) => !(example.reasons & RANDOM));
  const quarter = (place) => rest.slice(Math.floor(place * rest.length / 4), Math.floor((place + 1) * rest.length / 4));
  const groups = [["Strongest", data.examples.filter((example) => example.reasons & TOP)]];
  const isFew = data.examples.every((example) => example.reasons & TOP);
  if (!isFew) {
    ["highest quarter of its activations", "second quarter", "third quarter", "lowest quarter"].forEach((name, place) => groups.push([`Sampled from the ${name}`, quarter(place)]));
    groups.push(["Random tokens on which it fires", sample.filter((example) => example.reasons & RANDOM)], ["Windows in which even its highest activation is low", data.examples.filter((example) => example.reasons & LOW).reverse()]);
  }
  shown = [];
  const box = h("section", { class: "card", id: "examples", on: { pointerover: hover, pointerout: leave, click: pick, keydown: exampleKeys, focusin: focusExample } },
    h("div", { class: "row-of between" }, h("h2", {}, "Where it fires"), h("span", { class: "row-of" }, h("span", { class: "legend" }, number(0), h("i"), number(data.highest)), run.attention_layers.length > 0 && layerChooser())),
    groups.filter(([, list]) => list.length).map(([name, list]) => [h("h3", {}, name), h("ul", { class: "examples" }, list.map((example) => exampleLine({ ...example, highest: data.highest })))]));
  return box;
}

function layerChooser() {
  const choices = [[null, "all"], ...run.attention_layers.map((layer) => [layer, String(layer)]), [-1, "off"]];
  return h("span", { class: "legend" }, h("span", { title: "Underlined: earlier tokens that the model attended to from the token that fired, heads averaged; the token itself and special tokens are left out" }, h("u", {}, "looks back"), " in layer"),
    h("span", { class: "layers", role: "group", "aria-label": "layer of attention" }, choices.map(([layer, text]) => h("button", { type: "button", "aria-pressed": state.layer === layer, "data-layer": String(layer), on: { click: (event) => { state.layer = layer; for (const one of event.target.parentNode.children) one.setAttribute("aria-pressed", one === event.target); drawAttention(); event.stopPropagation(); } } }, text))));
}

function exampleLine(example) {
  const line = h("li", { class: "ex", tabindex: 0, "data-place": shown.length, "aria-expanded": "false" }, h("span", { class: "peak", title: "activation" }, number(example.peak)), h("div", { class: "ctx" }), h("div", { class: "where", hidden: true }));
  shown.push(Object.assign(example, { line, from: Math.max(0, example.at - BEFORE), to: Math.min(run.context, example.at + AFTER + 1), look: example.at }));
  drawExample(example);
  return line;
}

function drawExample(example) {
  const { tokens, marks } = example.text, values = new Map([...example.positions].map((position, place) => [position, example.levels[place] / 65535]));
  const wanted = state.query.trim().toLowerCase();
  const spans = [];
  for (let at = example.from; at < example.to; at++) {
    const value = values.get(at), text = texts[tokens[at]], span = document.createElement("span");
    if (text.length > 1 && /[\n\r\t]/.test(text)) {
      for (const part of text.split(/([\n\r\t])/)) if (part) span.append(/[\n\r\t]/.test(part) ? h("span", { class: "sign" }, visible(part)) : brief(part));
    } else span.textContent = brief(text);
    if (wanted.length > 1 && text.toLowerCase().includes(wanted)) { const mark = document.createElement("mark"); mark.append(...span.childNodes); span.append(mark); }
    span.dataset.at = at;
    if (value) { span.className = "on"; span.style.setProperty("--a", (.06 + .94 * value) * HEAT_MOST); }
    if (at === example.at) span.classList.add("hit");
    if (marks[at] & 1 && value === undefined) span.classList.add("out");
    if (marks[at] & 2) span.classList.add("begin");
    spans.push(span);
  }
  example.line.children[1].replaceChildren(...spans);
  if (example.attention) underline(example);
}

function expand(example, isOpen) {
  example.from = isOpen ? 0 : Math.max(0, example.at - BEFORE);
  example.to = isOpen ? run.context : Math.min(run.context, example.at + AFTER + 1);
  example.line.setAttribute("aria-expanded", isOpen);
  drawExample(example);
  const where = example.line.children[2];
  where.hidden = !isOpen;
  where.replaceChildren(h("span", {}, `window ${example.window}, position ${example.at}`), h("a", { href: link(state.sae.label, state.latent, example.window, example.at) }, "link to this example"));
}

function openExample([window_, at]) {
  const ofWindow = shown.filter((one) => one.window === window_), example = ofWindow.find((one) => one.at === at) ?? ofWindow[0];
  if (!example) return say(`this latent has no example in window ${window_}`);
  example.line.setAttribute("aria-current", "true");
  expand(example, true);
  example.line.scrollIntoView({ block: "center" });
}

const exampleAt = (target) => { const line = target.closest?.(".ex"); return line ? shown[Number(line.dataset.place)] : null; };
function pick(event) {
  const example = exampleAt(event.target);
  if (!example || event.target.closest("a")) return;
  if (matchMedia("(hover: none)").matches && event.target.closest("[data-at]") && example.touched !== event.target.closest("[data-at]").dataset.at) {
    example.touched = event.target.closest("[data-at]").dataset.at;
    return hover(event);
  }
  expand(example, example.line.getAttribute("aria-expanded") !== "true");
}
function hover(event) {
  const span = event.target.closest?.(".ctx [data-at]"), example = exampleAt(event.target);
  if (!span || !example) return;
  point(example, Number(span.dataset.at), span);
}
function leave(event) {
  const example = exampleAt(event.target);
  if (!example || example.line.contains(event.relatedTarget)) return;
  $("tip").hidden = true;
  unpoint(example);
}
function unpoint(example) {
  for (const one of example.line.querySelectorAll(".cur")) one.classList.remove("cur");
  example.cursor = undefined;
  if (example.look !== example.at) { example.look = example.at; underline(example); }
}
function focusExample(event) { if (!event.target.closest?.(".ex")) $("tip").hidden = true; }
function exampleKeys(event) {
  const example = exampleAt(event.target);
  if (!example || event.target.closest("a, button") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); expand(example, example.line.getAttribute("aria-expanded") !== "true"); }
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    event.preventDefault();
    const at = Math.min(example.to - 1, Math.max(example.from, (example.cursor ?? example.at) + (example.cursor === undefined ? 0 : event.key === "ArrowLeft" ? -1 : 1)));
    for (const one of example.line.querySelectorAll(".cur")) one.classList.remove("cur");
    example.cursor = at;
    const span = example.line.querySelector(`[data-at="${at}"]`);
    span.classList.add("cur");
    point(example, at, span);
  }
}

function point(example, at, span) {
  const place = example.positions.indexOf(at), text = texts[example.text.tokens[at]], tip = $("tip");
  const activation = place >= 0 ? `activation ${number(at === example.at ? example.peak : example.levels[place] / 65535 * example.highest)}` : example.text.marks[at] & 1 ? "left out by some SAE: special, or an outlier" : "does not fire";
  const lines_ = [h("div", {}, h("code", {}, spaced(brief(text, 300))), ` at ${at}`), h("div", { class: "big" }, activation)];
  if (example.attention && state.layer !== -1) {
    const seen = attendedFrom(example.attention, at, state.layer).slice(0, 4);
    lines_.push(h("div", {}, seen.length ? "looks back at " : "looks back at nothing that was stored", ...seen.flatMap(([position, weight], rank) => [rank ? ", " : "", h("code", {}, spaced(brief(texts[example.text.tokens[position]], 24))), ` ${Math.round(100 * weight)} %`])));
  }
  tip.replaceChildren(...lines_);
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(innerWidth - size.width - 6, box.left + box.width / 2 - size.width / 2))}px`;
  tip.style.top = `${box.top - size.height - 8 > 0 ? box.top - size.height - 8 : box.bottom + 8}px`;
  if (example.look !== at) { example.look = at; underline(example); }
}

// ---------------------------------------------------------------- attention

const attentionCard = () => run.attention_layers.length ? h("section", { class: "card", id: "attention" }, h("h2", {}, "What the model looks back at where it fires"), h("p", { class: "small quiet" }, "reading\u2026"))
  : h("section", { class: "card" }, h("h2", {}, "What the model looks back at"), h("p", { class: "small quiet" }, "The store holds no attention: harvest with --attention-layers to see it."));

async function addAttention(sae, data, mine) {
  await Promise.all(shown.map(async (example) => { example.attention = await attentionOf(example.window); }));
  if (mine === selecting) drawAttention();
}
function drawAttention() {
  for (const example of shown) if (example.attention) underline(example);
  const box = $("attention");
  if (box) box.replaceChildren(h("h2", {}, "What the model looks back at where it fires"), ...attentionSummary());
}
const LEAST_LOOK = .06; // weight below which nothing is underlined
function underline(example) {
  const { line, attention } = example;
  for (const span of line.querySelectorAll(".att")) span.classList.remove("att");
  if (!attention || state.layer === -1) return;
  for (const [position, weight] of attendedFrom(attention, example.look, state.layer)) {
    const span = weight >= LEAST_LOOK && line.querySelector(`[data-at="${position}"]`);
    if (span) { span.classList.add("att"); span.style.setProperty("--w", `${(1 + 4 * Math.min(1, weight * 1.5)).toFixed(1)}`); }
  }
}
function attentionSummary() {
  // Over distinct examples: strong ones that were also sampled would count twice.
  const seen = [...new Map(shown.map((example) => [`${example.window} ${example.at}`, example])).values()].filter((example) => example.attention);
  const columns_ = run.attention_layers.filter((layer) => state.layer === null || state.layer === -1 || state.layer === layer).map((layer) => {
    const sums = new Map();
    let distance = 0, mass = 0;
    for (const example of seen) for (const [position, weight] of attendedFrom(example.attention, example.at, layer)) {
      const token = example.text.tokens[position];
      sums.set(token, (sums.get(token) ?? 0) + weight);
      distance += weight * (example.at - position);
      mass += weight;
    }
    const top = [...sums].sort((a, b) => b[1] - a[1]).slice(0, 6);
    return h("div", {}, h("h3", { title: `weight on earlier tokens ${share(mass / Math.max(1, seen.length))} on average` }, `layer ${layer}`, mass ? `, ${number(distance / mass, 2)} tokens back` : ""), pairs(top.map(([token, sum]) => [chip(token), "", share(sum / seen.length)]), "nothing that was stored"));
  });
  return [h("div", { class: "three" }, columns_), h("p", { class: "small quiet note" }, `Mean attention from the token that fired, over ${seen.length} examples; heads averaged, the token itself and special tokens left out. Hover a token above to see where the model looked from there.`)];
}

// ---------------------------------------------------------------- notes page

function showNotes() {
  document.title = "notes";
  state.sae = null;
  const listed = Object.entries(notes).flatMap(([label, latents]) => Object.entries(latents).map(([latent, note]) => ({ sae: label, latent: Number(latent), ...note })));
  const file = h("input", { type: "file", accept: "application/json,.json", id: "notes-file", hidden: true, on: { change: importNotes } });
  $("main").replaceChildren(h("div", { class: "page" }, h("h1", {}, "Notes"),
    h("p", { class: "quiet" }, "Stars and labels are kept in this web browser. Export them to keep or share them; imported notes are added to those here."),
    h("div", { class: "row-of" }, h("button", { type: "button", id: "export-notes", on: { click: exportNotes } }, "export as JSON"), h("button", { type: "button", on: { click: () => file.click() } }, "import"), file),
    h("section", { class: "card listed" }, listed.length ? h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "latent"), h("th", {}, "label"))), h("tbody", {}, listed.map((note) => h("tr", {}, h("td", {}, h("a", { href: link(note.sae, note.latent) }, `${note.star ? "\u2605 " : ""}${brief(note.sae, 30)} ${note.latent}`)), h("td", {}, brief(note.label, 200)))))) : h("p", { class: "quiet" }, "Nothing yet: press ", h("kbd", {}, "s"), " on a latent to star it, ", h("kbd", {}, "l"), " to label it."))));
}
function exportNotes() {
  const weights = Object.fromEntries(run.saes.map((sae) => [sae.label, sae.sha256]));
  const text = JSON.stringify({ saemill_notes: 1, run: run.run, cache_id: run.cache_id, weights, notes }, null, 1);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const anchor = h("a", { href: address, download: `${run.run}_notes.json` });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
async function importNotes(event) {
  const [file] = event.target.files;
  event.target.value = ""; // otherwise choosing the same file again is not reported
  try {
    const given = JSON.parse(await file.text());
    if (given.saemill_notes !== 1) throw new Error("this is not a file of exported notes");
    const taken = new Set(), others = [];
    readNotes();
    for (const [label, latents] of Object.entries(checkedNotes(given.notes))) {
      const sae = run.saes.find((one) => one.sha256 && one.sha256 === given.weights?.[label]);
      if (!sae) { others.push(brief(label, 30)); continue; }
      for (const [latent, note] of Object.entries(latents)) notes[sae.label] = { ...notes[sae.label], [latent]: note };
      taken.add(sae.label);
    }
    if (others.length && !taken.size) throw new Error(`these notes are for other weights than the ones shown here: ${others.join(", ")}`);
    saveNotes(taken);
    showNotes();
    say(others.length ? `notes imported, except those for other weights than the ones shown here: ${others.join(", ")}` : "notes imported");
  } catch (error) { say(`not imported: ${error.message}`); }
}

// ---------------------------------------------------------------- navigation

function showMissing(text) {
  state.sae = null;
  $("main").replaceChildren(h("div", { class: "page" }, h("h1", {}, "Not found"), h("p", {}, text), h("p", {}, h("a", { href: "#/" }, "all SAEs of the run"))));
}

async function route() {
  $("tip").hidden = true;
  const mine = ++visits;
  const parts = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
  try {
    if (!parts.length) showOverview();
    else if (parts[0] === "notes") showNotes();
    else if (parts[0] === "sae" && parts[1]) await showSae(parts[1], parts[2] === undefined ? null : /^\d+$/.test(parts[2]) ? Number(parts[2]) : -1, /^\d+$/.test(parts[3]) ? parts.slice(3).map(Number) : null);
    else showMissing(`There is no page ${parts.join("/")}.`);
  } catch (error) { if (mine === visits) showMissing(error.message); }
  $("sae").value = state.sae?.label ?? "";
  $("search").placeholder = `number, token or text${state.sae || run.saes.length < 2 ? "" : ` in ${brief(run.saes[0].label, 20)}`}`; // which SAE typing searches
}

function go(hash, isNew = true) {
  if (isNew) location.hash = hash; else { history.replaceState(null, "", hash); route(); }
}
function step(by) {
  if (!state.order?.length) return;
  const at = state.order.indexOf(state.latent), next = state.order[at < 0 ? 0 : Math.min(state.order.length - 1, Math.max(0, at + by))];
  go(link(state.sae.label, next), state.latent === null);
  state.latent = next;
  revealSelected();
}

function keys(event) {
  const isWriting = event.target.matches?.("input, textarea, select");
  if (event.key === "Escape") { $("tip").hidden = true; if (event.target === $("search")) { event.target.value = ""; find(); } event.target.blur?.(); return; }
  if (event.target === $("search") && (event.key === "Enter" || event.key === "ArrowDown") && state.sae) { event.preventDefault(); openFirst(); return; }
  if (isWriting || event.altKey || event.ctrlKey || event.metaKey || $("keys")?.open) return;
  const inList = state.sae !== null;
  if (event.key === "/") { event.preventDefault(); $("search").focus(); $("search").select(); }
  else if (event.key === "?") showKeys();
  else if (event.key === "o") go("#/");
  else if (event.key === "n") go("#/notes");
  else if (event.key === "t") turnTheme();
  else if (inList && (event.key === "j" || (event.key === "ArrowDown" && !event.target.closest?.(".detail")))) { event.preventDefault(); step(1); }
  else if (inList && (event.key === "k" || (event.key === "ArrowUp" && !event.target.closest?.(".detail")))) { event.preventDefault(); step(-1); }
  else if (inList && event.key === "s" && state.latent !== null && $("star")) toggleStar();
  else if (inList && event.key === "l" && $("own-label")) { event.preventDefault(); $("own-label").focus(); }
  else if (inList && event.key === "u") go(link(state.sae.label));
}

function showKeys() {
  const listed = [["/", "search"], ["j k \u2193 \u2191", "next and previous latent"], ["Enter", "open an example, or the first one found"], ["\u2190 \u2192", "token by token in an example"], ["s", "star"], ["l", "label"], ["u", "back to the list"], ["o", "overview"], ["n", "notes"], ["t", "light or dark"], ["Esc", "leave"]];
  $("keys")?.remove();
  const box = h("dialog", { id: "keys", "aria-label": "keys" }, h("h2", {}, "Keys"), h("dl", {}, listed.flatMap(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])), h("button", { type: "button", on: { click: () => box.close() } }, "close"));
  document.body.append(box);
  box.showModal();
}

let HEAT_MOST = .8, waits;
function find() {
  clearTimeout(waits);
  waits = setTimeout(() => {
    state.query = $("search").value;
    if (state.sae) arrange();
  }, 120);
}
async function openFirst() {
  const { sae } = state, typed = $("search").value;
  clearTimeout(waits);
  state.query = typed;
  await arrange();
  if (state.sae !== sae || $("search").value !== typed || !state.order?.length) return;
  $("search").blur();
  go(link(sae.label, state.order[0]));
  rows.focus();
}

async function begin() {
  document.addEventListener("theme", () => {
    HEAT_MOST = Number(getComputedStyle(document.documentElement).getPropertyValue("--heat-most"));
    for (const example of shown) drawExample(example);
  });
  beginTheme();
  try {
    let words;
    [run, words, numbers] = await Promise.all([load("run"), load("words"), load("numbers", true)]);
    texts = new Array(words.ids.at(-1) + 1).fill(""); // by id; empty if the token was not read
    words.ids.forEach((id, place) => { texts[id] = words.texts[place]; });
  }
  catch (error) { return $("main").replaceChildren(h("div", { class: "page" }, h("h1", {}, "Nothing to show"), h("p", { class: "warn" }, error.message))); }
  readNotes();
  $("run").textContent = brief(run.run, 40);
  $("sae").append(h("option", { value: "" }, "all SAEs"), ...run.saes.map((sae) => h("option", { value: sae.label }, brief(sae.label, 40))));
  $("sae").addEventListener("change", (event) => { location.hash = event.target.value ? link(event.target.value) : "#/"; event.target.blur(); });
  $("search").addEventListener("input", () => { if (!state.sae && $("search").value) { location.hash = link(run.saes[0].label); } find(); });
  $("theme").addEventListener("click", turnTheme);
  $("help").addEventListener("click", showKeys);
  document.addEventListener("keydown", keys);
  window.addEventListener("hashchange", route);
  window.addEventListener("storage", notesChanged);
  window.addEventListener("resize", drawRows);
  document.addEventListener("scroll", () => { $("tip").hidden = true; }, true);
  await route();
}
begin().finally(() => { document.documentElement.dataset.ready = "true"; });
