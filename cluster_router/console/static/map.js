// The map of the clusters: places from the service, sizes and colours from what they do now.

import { count, keyed, rate, s, set, short, tenant, text } from "./dom.js";

const PAD = 46;
const GAP = 3;
const WORD = 6.1; // width of a letter of a label, about

export const keyOf = (cluster) => `${cluster.namespace}\n${cluster.id}`;

/** Shades 0 (pale) to 4 (strong). */
function shade(cluster, mode, state, hottest) {
  if (mode === "namespace") return `n${Math.max(0, state.namespaces.findIndex((one) => one.name === cluster.namespace)) % 8}`;
  if (mode === "age") {
    if (cluster.since == null) return "a0";
    const age = state.now - cluster.since;
    return age < 60 ? "a4" : age < 600 ? "a3" : age < 3600 ? "a2" : "a1";
  }
  if (!cluster.requests_recent) return "t0";
  return `t${1 + Math.round((3 * Math.log1p(cluster.requests_recent)) / Math.log1p(hottest))}`;
}

export const LEGENDS = {
  traffic: [["t0", "none in 15 min"], ["t1", "little"], ["t4", "most"]],
  age: [["a0", "there from the start"], ["a1", "over 1 h"], ["a2", "1 h"], ["a3", "10 min"], ["a4", "new this minute"]],
};

export class ClusterMap {
  /** `open(cluster)` is called when one is chosen. */
  constructor(place, open) {
    this.open = open;
    this.clusters = [];
    this.nodes = s("g");
    this.labels = s("g", { class: "labels", "aria-hidden": "true" });
    this.svg = s("svg", { role: "group", "aria-label": "Map of the clusters. Arrow keys move between them, Enter opens one." }, this.nodes, this.labels);
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    place.append(this.svg, this.tip);
    this.svg.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(([entry]) => {
      ({ width: this.width, height: this.height } = entry.contentRect);
      if (this.last) this.draw(...this.last);
    }).observe(place);
  }

  draw(state, mode, chosen) {
    this.last = [state, mode, chosen];
    if (!this.width) return;
    const hottest = Math.max(1, ...state.clusters.map((one) => one.requests_recent));
    const seen = new Map(this.clusters.map((one) => [one.key, one.cluster.requests_recent]));
    this.clusters = this.placed(state.clusters);
    set(this.svg, { viewBox: `0 0 ${this.width} ${this.height}` });
    if (!this.clusters.some((one) => one.key === this.current)) this.current = this.clusters[0]?.key;
    keyed(this.nodes, this.clusters, (one) => one.key, (one) => this.create(one), (node, one) => {
      const { cluster } = one;
      node.style.transform = `translate(${one.x.toFixed(1)}px, ${one.y.toFixed(1)}px)`;
      set(node, {
        class: `node ${shade(cluster, mode, state, hottest)}`,
        tabindex: one.key === this.current ? 0 : -1,
        "aria-pressed": one.key === chosen,
        "aria-label": describe(cluster, state),
      });
      for (const circle of node.querySelectorAll(".dot, .ring")) set(circle, { r: (one.r + (circle.matches(".ring") ? 5 : 0)).toFixed(1) });
      if (seen.has(one.key) && cluster.requests_recent > seen.get(one.key)) this.pulse(node, one.r);
    });
    this.label(chosen);
    if (this.shown) this.show(this.clusters.find((one) => one.key === this.shown));
  }

  /** Positions in pixels, circles moved apart. The same clusters always give the same picture. */
  placed(clusters) {
    const [w, t] = [this.width / 2, this.height / 2];
    const up = Math.max(20, t - PAD);
    const wide = Math.max(20, Math.min(w - PAD, 2.1 * up));
    const largest = Math.max(1, ...clusters.map((one) => one.size));
    // Circles cover no more than a part of the map, however many there are.
    const shares = clusters.reduce((sum, one) => sum + one.size / largest, 0);
    const most = Math.min(30, Math.max(7, Math.sqrt((0.17 * this.width * this.height) / (Math.PI * Math.max(1, shares)))));
    const all = clusters.map((cluster) => ({
      cluster,
      key: keyOf(cluster),
      r: 4 + (most - 4) * Math.sqrt(cluster.size / largest),
      x: w + wide * cluster.x,
      y: t - up * cluster.y,
    }));
    for (let round = 0; round < 60; round++) {
      let apart = true;
      for (let i = 0; i < all.length; i++) {
        for (let j = 0; j < i; j++) {
          const [a, b] = [all[i], all[j]];
          const [dx, dy] = [a.x - b.x || 0.01 * (i - j), a.y - b.y || 0.01];
          const [near, far] = [Math.hypot(dx, dy), a.r + b.r + GAP];
          if (near >= far) continue;
          apart = false;
          const push = (0.5 * (far - near)) / near;
          a.x += dx * push;
          a.y += dy * push;
          b.x -= dx * push;
          b.y -= dy * push;
        }
      }
      for (const one of all) {
        one.x = Math.min(this.width - one.r - 4, Math.max(one.r + 4, one.x));
        one.y = Math.min(this.height - one.r - 4, Math.max(one.r + 4, one.y));
      }
      if (apart) break;
    }
    return all;
  }

  create(one) {
    const find = () => this.clusters.find((other) => other.key === one.key);
    const node = s("g", { role: "button" }, s("circle", { class: "ring" }), s("circle", { class: "dot" }));
    node.addEventListener("click", () => this.choose(find()));
    node.addEventListener("focus", () => node.matches(":focus-visible") && this.show(find()));
    node.addEventListener("blur", () => this.show());
    node.addEventListener("pointerenter", () => this.show(find()));
    node.addEventListener("pointerleave", () => this.show());
    return node;
  }

  choose(one) {
    this.current = one.key;
    this.open(one.cluster);
  }

  pulse(node, radius) {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    const ring = s("circle", { class: "pulse", r: radius.toFixed(1) });
    ring.addEventListener("animationend", () => ring.remove());
    node.prepend(ring);
  }

  /** Names beside circles, the largest and busiest first, as long as there is room. */
  label(chosen) {
    const taken = this.clusters.map((one) => [one.x - one.r, one.y - one.r, one.x + one.r, one.y + one.r]);
    const worth = (one) => (one.key === chosen ? 1e9 : 0) + 1e3 * Math.log1p(one.cluster.requests_recent) + one.r;
    const named = [];
    for (const one of [...this.clusters].sort((a, b) => worth(b) - worth(a))) {
      const half = (WORD * short(one.cluster).length) / 2;
      const spot = [one.r + 13, -one.r - 6].map((dy) => [one.x - half, one.y + dy - 10, one.x + half, one.y + dy + 3, dy])
        .find(([l, t, r, b]) => l > 2 && r < this.width - 2 && t > 0 && b < this.height && !taken.some((box) => l < box[2] && r > box[0] && t < box[3] && b > box[1]));
      if (!spot) continue;
      taken.push(spot);
      named.push({ ...one, dy: spot[4] });
    }
    keyed(this.labels, named, (one) => one.key, () => s("text"), (node, one) => {
      node.style.transform = `translate(${one.x.toFixed(1)}px, ${(one.y + one.dy).toFixed(1)}px)`;
      text(node, short(one.cluster));
    });
  }

  show(one) {
    this.shown = one?.key;
    this.tip.hidden = !one;
    if (!one) return;
    const { cluster } = one;
    const words = cluster.characteristic_tokens.slice(0, 6).join(", ");
    this.tip.replaceChildren(
      strong(`Cluster ${cluster.id}${cluster.namespace ? `, ${cluster.namespace}` : ""}`),
      words || "too few prompts to be described",
      strong(`${count(cluster.size)} prompts · ${rate(cluster.requests)} req/s · ${rate(cluster.output_tokens)} tok/s`),
    );
    const { offsetWidth: wide, offsetHeight: tall } = this.tip;
    const beside = one.x > this.width / 2 ? one.x - one.r - 10 - wide : one.x + one.r + 10;
    const within = (value, most) => `${Math.max(4, Math.min(most, value))}px`;
    this.tip.style.left = within(beside, this.width - wide - 4);
    this.tip.style.top = within(one.y - tall / 2, this.height - tall - 4);
  }

  /** Arrow keys go to the nearest cluster on that side. */
  move(event) {
    const here = this.clusters.find((one) => one.key === this.current);
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!here) return;
    if (event.key === "Escape") this.show();
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.choose(here);
    } else if (way) {
      event.preventDefault();
      const cost = (one) => {
        const [dx, dy] = [one.x - here.x, one.y - here.y];
        const ahead = dx * way[0] + dy * way[1];
        return ahead <= 0 ? Infinity : ahead + 2 * Math.abs(dx * way[1] + dy * way[0]);
      };
      const next = this.clusters.reduce((best, one) => (cost(one) < cost(best) ? one : best), here);
      if (cost(next) < Infinity) this.focus(next.key);
    }
  }

  focus(key) {
    this.current = key;
    for (const node of this.nodes.children) {
      set(node, { tabindex: node.dataset.key === key ? 0 : -1 });
      if (node.dataset.key === key) node.focus();
    }
  }
}

function strong(value) {
  const node = document.createElement("strong");
  node.textContent = value;
  return node;
}

function describe(cluster, state) {
  const words = cluster.characteristic_tokens.slice(0, 4).join(", ");
  const whose = state.namespaces.length > 1 ? `, namespace ${tenant(cluster.namespace)}` : "";
  return `Cluster ${cluster.id}${whose}${words ? `: ${words}` : ""}. ${count(cluster.size)} prompts, ${rate(cluster.requests)} requests per second.`;
}
