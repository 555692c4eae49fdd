// The side panel: replicas, the list of clusters, and one cluster in detail.

import { fill, histogram, meter, spark, steps } from "./charts.js";
import { $, cosine, count, h, keyed, percent, rate, seconds, set, span, tenant, text } from "./dom.js";
import { keyOf } from "./map.js";

const ORDERS = {
  traffic: (a, b) => b.requests_recent - a.requests_recent || b.size - a.size,
  size: (a, b) => b.size - a.size,
  age: (a, b) => (b.since ?? 0) - (a.since ?? 0) || b.id - a.id,
};

export function replicas(state) {
  const found = state.replicas;
  if (!found) {
    text($("replicas-note"), "Shown to API keys that are not bound to a namespace.");
    $("engines").replaceChildren();
    $("parts").replaceChildren();
    return;
  }
  const requests = found.routers.reduce((sum, one) => sum + one.in_flight, 0);
  text($("replicas-note"), `${plural(found.engines.length, "engine")}, ${plural(found.routers.length, "router")}, ${plural(requests, "request")} in flight`);
  keyed($("engines"), found.engines, (one) => one.replica, engine, (node, one) => {
    const [name, waiting, running, use, kept] = node.querySelectorAll("[data-is]");
    text(name, one.replica.slice(-6));
    set(name, { title: `LM replica ${one.replica} on ${one.node}` });
    set(node, { "data-late": one.age_s > 4 });
    text(waiting, count(one.waiting));
    set(waiting, { "data-high": one.waiting > 0 });
    text(running, count(one.running));
    text(use, percent(one.kv_use));
    text(kept, percent(one.prompt_tokens ? one.cached_tokens / one.prompt_tokens : null));
    fill(node.querySelector(".meter"), one.kv_use);
    set(node, { title: `${count(one.tokens_ahead)} tokens ahead · ${one.updates} updates at hand · ${one.preemptions} preemptions` });
  });
  parts(state);
}

/** Generators and the learner: what each does, and what is wrong with it. */
function parts({ replicas: { generators, learners }, now }) {
  const made = (one) => `${plural(one.generated, "update")} made, ${count(one.cached)} at hand${one.in_flight ? `, ${count(one.in_flight)} under way` : ""}`;
  const learned = (one) => `${plural(one.learned, "prompt")} learned, ${one.published == null ? "nothing published yet" : `published ${span(now - one.published)} ago`}`;
  const shown = [
    ...generators.map((one) => [one, "Generator", made(one), one.failed && `${count(one.failed)} failed`]),
    ...learners.map((one) => [one, "Learner", learned(one), one.failing && `${plural(one.failing, "namespace")} cannot be published`]),
  ];
  keyed($("parts"), shown, ([one]) => one.replica, () => h("li", {}, h("b"), h("span"), h("em")), (node, [one, name, does, wrong]) => {
    const [title, what, trouble] = node.children;
    text(title, name);
    text(what, does);
    text(trouble, wrong || "");
    set(node, { title: `${one.replica} on ${one.node}`, "data-late": one.age_s > 4 });
  });
}

function engine() {
  const figure = (is, label) => h("span", { class: "figure" }, h("b", { "data-is": is }), h("small", {}, label));
  return h("li", {}, h("code", { "data-is": "name" }), figure("waiting", "waiting"), figure("running", "running"),
    h("span", { class: "figure wide" }, h("b", { "data-is": "use" }), meter("KV cache in use"), h("small", {}, "KV cache")), figure("cached", "prefix hits"));
}

const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

export function list(state, order, open) {
  const most = Math.max(1, ...state.clusters.map((one) => one.requests_recent));
  const sorted = [...state.clusters].sort(ORDERS[order]);
  const create = (one) => {
    const button = h("button", { type: "button" }, h("b"), h("span", { class: "words" }), h("span", { class: "number" }), h("i"));
    const key = keyOf(one);
    button.addEventListener("click", () => open(button.cluster, key));
    return h("li", {}, button);
  };
  keyed($("list"), sorted, keyOf, create, (node, one) => {
    const button = node.firstChild;
    const [id, words, number, bar] = button.children;
    button.cluster = one;
    text(id, `${one.id % 1e9}`);
    text(words, one.characteristic_tokens.slice(0, 4).join(" ") || "not described yet");
    set(words, { class: one.characteristic_tokens.length ? "words" : "words faint" });
    text(number, order === "traffic" ? count(one.requests_recent) : order === "size" ? count(one.size) : one.since == null ? "start" : span(state.now - one.since));
    bar.style.width = `${(100 * one.requests_recent) / most}%`;
    set(button, { title: `Cluster ${one.id} of ${tenant(one.namespace)}: ${count(one.size)} prompts, ${count(one.requests_recent)} in the last 15 min` });
  });
}

/** One cluster. Built anew when another is chosen, filled in at every poll. */
export class Detail {
  constructor({ close, tryIt, download }) {
    this.place = $("detail");
    this.actions = { close, tryIt, download };
  }

  build(cluster) {
    const chart = (name, title) => h("figure", {}, h("figcaption", {}, h("span", {}, title), h("span", { class: "note", "data-note": name })), h("div", { class: "plot", "data-chart": name }));
    this.key = keyOf(cluster);
    this.place.replaceChildren(
      h("div", { class: "head" }, h("button", { type: "button", class: "quiet", "aria-label": "Back to all clusters", onclick: this.actions.close }, "←"),
        h("h2", { id: "detail-title", tabindex: -1 }, `Cluster ${cluster.id}`), h("span", { class: "chip", hidden: !cluster.namespace }, cluster.namespace)),
      h("ul", { class: "words", "aria-label": "Characteristic tokens" }),
      h("dl", { class: "facts" }),
      h("div", { class: "charts" }, chart("tokens", "Answer tokens/s"), chart("latency", "First token"),
        chart("similarity", "Similarity"), chart("size", "Prompts, last hour")),
      h("div", { class: "row" }, h("button", { type: "button", class: "primary", onclick: this.actions.tryIt }, "Try a prompt on it"),
        h("button", { type: "button", onclick: () => this.download() }, "Download adapter")),
      h("p", { class: "trouble failed", role: "alert", hidden: true }),
    );
  }

  /** Say what went wrong until another download begins, or another cluster is shown. */
  async download() {
    const failed = this.place.querySelector(".failed");
    failed.hidden = true;
    try {
      await this.actions.download(this.cluster);
    } catch (error) {
      text(failed, `The adapter could not be downloaded: ${error.message}`);
      failed.hidden = false;
    }
  }

  show(cluster, state) {
    if (this.key !== keyOf(cluster)) this.build(cluster);
    this.cluster = cluster;
    const words = this.place.querySelector(".words");
    const tokens = cluster.characteristic_tokens;
    keyed(words, tokens.length ? tokens : ["Too few prompts to be described"], (word) => word, (word) => h("li", { class: tokens.length ? "" : "faint" }, word), () => {});
    const [low, middle, high] = cluster.similarities.quantiles;
    const facts = [
      ["Prompts", count(cluster.size)],
      ["Requests", `${rate(cluster.requests)}/s`],
      ["Prompt cache hits", percent(cluster.cached_share)],
      ["First token", seconds(cluster.first_token_s[0]), `p95 ${seconds(cluster.first_token_s[1])}`],
      ["Appeared", cluster.since == null ? "from the start" : `${span(state.now - cluster.since)} ago`],
      ["Refined", cluster.refinement ? `${cluster.refinement} ×` : "never"],
      ["Update", cluster.adapter_key.slice(0, 8), `moved at snapshot ${cluster.version}`],
    ];
    keyed(this.place.querySelector(".facts"), facts, (fact) => fact[0], ([name]) => h("div", {}, h("dt", {}, name), h("dd"), h("dd", { class: "note" })), (node, [, value, more]) => {
      text(node.children[1], value);
      text(node.children[2], more ?? "");
    });
    const { series } = cluster;
    this.chart("tokens", (place) => spark(place, series.output_tokens, `Answer tokens per second in the last 15 minutes; now ${rate(cluster.output_tokens)}`), `${rate(cluster.output_tokens)} now`);
    this.chart("latency", (place) => spark(place, series.first_token_p50, `Median time to first token in the last 15 minutes: ${seconds(cluster.first_token_s[0])}`), `${seconds(cluster.first_token_s[0])} median`);
    this.chart("similarity", (place) => similarity(place, cluster.similarities, middle), middle == null ? "no prompts lately" : `${cosine(low)} to ${cosine(high)}`);
    this.chart("size", (place) => steps(place, cluster.sizes, `Prompts over the last hour, now ${count(cluster.size)}`), `${count(cluster.size)} now`);
  }

  chart(name, draw, note) {
    draw(this.place.querySelector(`[data-chart="${name}"]`));
    text(this.place.querySelector(`[data-note="${name}"]`), note);
  }

  gone(cluster) {
    this.key = null;
    this.place.replaceChildren(
      h("div", { class: "head" }, h("button", { type: "button", class: "quiet", "aria-label": "Back to all clusters", onclick: this.actions.close }, "←"), h("h2", { id: "detail-title", tabindex: -1 }, `Cluster ${cluster}`)),
      h("p", { class: "empty" }, "It is gone: merged with another, or retired because no prompt came."),
    );
  }
}

/** From the lowest cosine there is, or 0.8, up to 1. */
function similarity(place, { from, counts }, middle) {
  const start = Math.max(0, Math.min(from.indexOf(0.8), counts.findIndex(Boolean) < 0 ? Infinity : counts.findIndex(Boolean)));
  histogram(place, counts.slice(start), `Cosine between prompts and centroid in the last 15 minutes, from ${cosine(from[start])} to 1; median ${cosine(middle)}`);
  place.append(h("span", { class: "axis" }, h("small", {}, cosine(from[start])), h("small", {}, "1.00")));
}

