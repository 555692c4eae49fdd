// Asks for the state each second and hands it to the parts of the page.

import { fill, meter, spark, stack } from "./charts.js";
import { $, count, h, keyed, percent, rate, s, seconds, set, short, tenant, text } from "./dom.js";
import { ClusterMap, keyOf, LEGENDS } from "./map.js";
import { Detail, list, replicas } from "./panel.js";
import { Try } from "./try.js";

const PERIOD = 1000;
const SLOWEST = 8000;
const ALL = "\u0000all"; // no namespace is called so: names are printable

const paints = new Map();
const chosen = { namespace: "", all: false, cluster: null };
let state = null;
let heard = 0;
let failures = 0;
let paused = false;
let locked = false;
let timer = 0;
let asking = null;
let offered = false; // whether the trial knows of the cluster that the address names

/** Fetch from this service with the API key, if there is one. */
async function call(path, init = {}) {
  const secret = sessionStorage.getItem("key");
  const headers = { ...init.headers, ...(secret && { Authorization: `Bearer ${secret}` }) };
  const response = await fetch(path, { ...init, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `The service answered ${response.status}.`);
  error.status = response.status;
  throw error;
}

async function poll() {
  clearTimeout(timer);
  asking?.abort();
  asking = new AbortController();
  const signal = AbortSignal.any([asking.signal, AbortSignal.timeout(SLOWEST)]);
  const query = new URLSearchParams();
  if (chosen.all) query.set("all", "true");
  else if (chosen.namespace) query.set("namespace", chosen.namespace);
  if (chosen.cluster != null) query.set("cluster", chosen.cluster);
  const mine = asking;
  try {
    const response = await call(`console/state?${query}`, { signal });
    state = await response.json();
    heard = Date.now();
    failures = 0;
    trouble();
    draw();
  } catch (error) {
    if (mine.signal.aborted) return; // another poll has taken its place
    failures += 1;
    refused(error);
  }
  if (!paused && !locked && !document.hidden) timer = setTimeout(poll, PERIOD * Math.min(5, 1 + failures));
}

function refused(error) {
  if (error.status === 401) {
    set($("status"), { "data-is": "locked" });
    text($("status"), "No access");
    $("key").hidden = false;
    text($("door-note"), sessionStorage.getItem("key") ? `${error.message} It may have been removed.` : "It is kept in this tab until you close it, and sent to this service only.");
    if (!$("door").open) $("door").showModal();
    locked = true;
    return;
  }
  if (error.status === 403) {
    Object.assign(chosen, { namespace: "", all: false, cluster: null });
    remember();
    offer(null);
  }
  const ago = heard ? ` Figures are ${Math.round((Date.now() - heard) / 1000)} s old.` : "";
  const what = error.status ? error.message : "The service does not answer.";
  trouble(`${what}${ago} Trying again.`);
}

function trouble(message) {
  $("trouble").hidden = !message;
  text($("trouble"), message ?? "");
  document.body.classList.toggle("stale", Boolean(message));
  set($("status"), { "data-is": message ? "trouble" : paused ? "paused" : "live" });
  text($("status"), message ? "Reconnecting" : paused ? "Paused" : "Live");
}

function draw() {
  const { totals, series } = state;
  $("key").hidden = !sessionStorage.getItem("key");
  $("model").hidden = false;
  text($("model"), state.model.name);
  text(document.querySelector("title"), `${rate(totals.requests)} req/s · ChameleonLLM`);
  tenants();
  tiles(totals, series);
  replicas(state);
  list(state, $("order").value, open);
  $("list").classList.toggle("none", !state.clusters.length);
  $("map").classList.toggle("none", !state.clusters.length);
  drawMap();
  detail();
  flow();
  if (!offered) offer(state.cluster);
}

function drawMap() {
  const mode = $("colour").value;
  map.draw(state, mode, chosen.cluster == null ? null : `${chosen.of}\n${chosen.cluster}`);
  const legend = mode === "namespace"
    ? state.namespaces.slice(0, 8).map((one, index) => [`n${index}`, tenant(one.name)])
    : LEGENDS[mode];
  keyed($("legend"), legend, (one) => one.join(), ([shade, name]) => h("span", {}, h("i", { class: shade }), name), () => {});
  const version = state.namespaces.find((one) => one.name === state.namespace)?.version;
  const moving = version == null ? "" : ` · snapshot ${version}`;
  text($("map-note"), state.clusters.length ? `${state.clusters.length}${moving} · near means alike, size is prompts` : "");
}

function tenants() {
  const options = state.namespaces.map((one) => [one.name, tenant(one.name)]);
  if (state.replicas && options.length > 1) options.unshift([ALL, "All"]);
  $("tenant").hidden = options.length < 2;
  keyed($("namespace"), options, (one) => one[0], ([value, name]) => h("option", { value }, name), () => {});
  $("namespace").value = state.namespace == null ? ALL : state.namespace;
}

function tiles(totals, series) {
  const errors = totals.errors_recent;
  const modes = totals.modes;
  const all = Math.max(1, modes.cluster + modes.static + modes.off);
  const engines = state.replicas?.engines ?? [];
  const waiting = engines.reduce((sum, one) => sum + one.waiting, 0);
  const full = Math.max(0, ...engines.map((one) => one.kv_use));
  const hits = series.prompt_tokens.map((tokens, index) => (tokens ? series.cached_tokens[index] / tokens : null));
  const shown = [
    ["Requests", rate(totals.requests), "/s", `${count(totals.requests_recent)} in 15 min, ${errors ? `${count(errors)} failed` : "none failed"}`, series.requests, errors > 0.01 * totals.requests_recent],
    ["Answer tokens", rate(totals.output_tokens), "/s", `${rate(totals.prompt_tokens)} prompt tokens/s`, series.output_tokens],
    ["First token", seconds(totals.first_token_s[0]), "", `p95 ${seconds(totals.first_token_s[1])}, last minute`, series.first_token_p50],
    ["Prompt cache hits", percent(totals.cached_share), "", "of prompt tokens, 15 min", hits],
    ["Adapted by a cluster", totals.requests_recent ? percent(modes.cluster / all) : "–", "", `${percent(modes.static / all)} shared, ${percent(modes.off / all)} off`, [modes.cluster / all, modes.static / all, modes.off / all]],
    ["Waiting", state.replicas ? count(waiting) : "–", "", state.replicas ? `KV cache ${percent(full)} at most` : "not shown to bound keys", full],
  ];
  keyed($("tiles"), shown, (one) => one[0], tile, (node, [name, value, unit, note, drawing, bad]) => {
    const [, figure, more, place] = node.children;
    text(figure.firstChild, value);
    text(figure.lastChild, unit);
    text(more, note);
    set(more, { "data-high": bad });
    if (name === "Waiting") fill(place.firstChild, drawing);
    else if (name === "Adapted by a cluster") [...place.firstChild.children].forEach((part, index) => (part.style.width = `${100 * drawing[index]}%`));
    else spark(place, drawing, `${name} in the last 15 minutes`);
  });
}

function tile([name]) {
  const drawing = {
    Waiting: () => meter("KV cache in use, fullest replica"),
    "Adapted by a cluster": () => h("span", { class: "shares", "aria-hidden": "true" }, h("i"), h("i"), h("i")),
  }[name];
  return h("div", { class: "card tile", role: "group", "aria-label": name }, h("h3", {}, name), h("p", { class: "value" }, h("b"), h("span")),
    h("p", { class: "note" }), h("div", { class: "plot" }, drawing?.()));
}

function flow() {
  const top = state.top;
  $("flow").classList.toggle("none", !top.length);
  if (!top.length) {
    $("flow").replaceChildren();
    text($("flow-note"), "");
    return;
  }
  if (!$("flow").firstChild) $("flow").append(h("div", { class: "plot" }), h("ol", { class: "keys note" }));
  paint(top);
  const named = top.map((one) => ({ ...one, name: nameOf(one), colour: paints.get(keyOf(one)), values: one.output_tokens }));
  const most = stack($("flow").firstChild, named, `Answer tokens per second of the ${top.length} busiest clusters, last 15 minutes`);
  text($("flow-note"), `The ${top.length} busiest, last 15 min · up to ${rate(most)}/s`);
  keyed($("flow").lastChild, named, keyOf, (one) => h("li", {}, h("i", { class: one.colour }), h("span")), (node, one) => text(node.lastChild, one.name));
}

/** Give each a colour that stays its own while it is among the busiest; grey is no cluster's. */
function paint(top) {
  const keys = new Set(top.map(keyOf));
  for (const key of paints.keys()) if (!keys.has(key)) paints.delete(key);
  const free = ["c0", "c1", "c2", "c3", "c4", "c5"].filter((one) => ![...paints.values()].includes(one));
  for (const one of top) {
    if (!paints.has(keyOf(one))) paints.set(keyOf(one), one.id == null || one.id < 0 ? "c7" : free.shift());
  }
}

function nameOf({ namespace, id }) {
  if (id == null) return "no cluster";
  if (id < 0) return "others";
  const cluster = state.clusters.find((one) => one.id === id && one.namespace === namespace);
  return cluster ? `${id % 1e9} ${short(cluster)}` : `${id % 1e9}`;
}

function detail() {
  const shown = chosen.cluster != null;
  $("detail").hidden = !shown;
  $("clusters").hidden = $("replicas").hidden = shown;
  if (!shown) return;
  if (state.cluster) panel.show(state.cluster, state);
  else panel.gone(chosen.cluster);
}

/** Let the trial adapt by `cluster`, which is shown; null is none. */
function offer(cluster) {
  offered = true;
  trial.offer(cluster);
}

async function open(cluster) {
  Object.assign(chosen, { cluster: cluster.id, of: cluster.namespace });
  if (chosen.all) Object.assign(chosen, { all: false, namespace: cluster.namespace });
  remember();
  offer(cluster);
  await poll();
  $("detail-title")?.focus();
}

function close() {
  const key = `${chosen.of}\n${chosen.cluster}`;
  chosen.cluster = null;
  remember();
  offer(null);
  draw();
  map.focus(key);
}

async function download(cluster) {
  const query = cluster.namespace ? `?namespace=${encodeURIComponent(cluster.namespace)}` : "";
  const response = await call(`v1/clusters/${cluster.id}/adapter${query}`);
  const url = URL.createObjectURL(await response.blob());
  h("a", { href: url, download: `cluster-${cluster.id}.zip` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

/** What is chosen lives in the address, so that it can be shared and gone back to. */
function remember() {
  const query = new URLSearchParams();
  if (chosen.all) query.set("all", "true");
  if (chosen.namespace) query.set("namespace", chosen.namespace);
  if (chosen.cluster != null) query.set("cluster", chosen.cluster);
  const hash = query.size ? `#${query}` : "";
  if (hash !== location.hash) history.pushState(null, "", hash || location.pathname);
}

function recall() {
  const query = new URLSearchParams(location.hash.slice(1));
  chosen.all = query.get("all") === "true";
  chosen.namespace = query.get("namespace") ?? "";
  chosen.of = chosen.namespace;
  chosen.cluster = query.has("cluster") ? Number(query.get("cluster")) : null;
  offer(null);
  offered = false; // the next answer says whether there is such a cluster
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("theme", name);
}

function wait() {
  for (const name of ["Requests", "Answer tokens", "First token", "Prompt cache hits", "Adapted by a cluster", "Waiting"]) {
    const node = tile([name]);
    node.dataset.key = name;
    $("tiles").append(node);
  }
}

const map = new ClusterMap($("map"), open);
const panel = new Detail({ close, tryIt: () => { $("try").scrollIntoView({ block: "nearest" }); $("prompt").focus(); }, download });
const trial = new Try(call, () => state);

wait();
recall();
$("theme").value = localStorage.getItem("theme") ?? "";
theme($("theme").value);
$("theme").addEventListener("change", (event) => theme(event.target.value));
$("colour").addEventListener("change", () => state && drawMap());
$("order").addEventListener("change", () => state && list(state, $("order").value, open));
$("namespace").addEventListener("change", ({ target }) => {
  Object.assign(chosen, { all: target.value === ALL, namespace: target.value === ALL ? "" : target.value, cluster: null });
  remember();
  offer(null);
  poll();
});
$("pause").addEventListener("click", () => {
  paused = !paused;
  set($("pause"), { "aria-pressed": paused });
  text($("pause"), paused ? "Resume" : "Pause");
  trouble();
  if (paused) clearTimeout(timer);
  else poll();
});
$("key").addEventListener("click", () => $("door").showModal());
$("door").addEventListener("close", () => {
  const [answer, secret] = [$("door").returnValue, $("secret").value.trim()];
  $("secret").value = $("door").returnValue = "";
  if (answer === "forget") sessionStorage.removeItem("key");
  else if (answer === "ok" && secret) sessionStorage.setItem("key", secret);
  else return; // closed without an answer: the page stays as it is
  locked = false;
  poll();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chosen.cluster != null && !$("door").open) close();
});
document.addEventListener("visibilitychange", () => !document.hidden && !paused && !locked && poll());
addEventListener("popstate", () => {
  recall();
  poll();
});
poll();
