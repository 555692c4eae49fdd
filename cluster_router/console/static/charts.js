// Charts, drawn as SVG paths over a box of 100 x 100 that stretches with its place.

import { h, s, set } from "./dom.js";

const frame = (label, name, ...parts) =>
  s("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": label, class: name }, ...parts);

const x = (index, length) => ((100 * index) / Math.max(1, length - 1)).toFixed(2);
const y = (value, most) => (98 - (94 * value) / most).toFixed(2);

/** Path through the values that are there; null breaks it. */
function line(values, most) {
  let path = "";
  let pen = "M";
  values.forEach((value, index) => {
    if (value == null) pen = "M";
    else {
      path += `${pen}${x(index, values.length)} ${y(value, most)}`;
      pen = "L";
    }
  });
  return path;
}

function area(low, high, most) {
  const there = high.map((value, i) => `${x(i, high.length)} ${y(value, most)}`);
  const back = low.map((value, i) => `${x(i, low.length)} ${y(value, most)}`).reverse();
  return `M${there.join("L")}L${back.join("L")}Z`;
}

/** Replace what `place` shows. */
function put(place, svg) {
  place.replaceChildren(svg);
}

/** Means over three neighbours: five seconds alone are restless. */
export function calm(values) {
  return values.map((_, index) => {
    const near = values.slice(Math.max(0, index - 2), index + 1).filter((value) => value != null);
    return near.length ? near.reduce((sum, value) => sum + value, 0) / near.length : null;
  });
}

export function spark(place, raw, label) {
  const values = calm(raw);
  const most = Math.max(...values.map((value) => value ?? 0)) || 1;
  const filled = values.map((value) => value ?? 0);
  const flat = values.map(() => 0);
  put(place, frame(label, "chart", s("path", { class: "area", d: area(flat, filled, most) }), s("path", { class: "line", d: line(values, most) })));
}

/** Points at times of their own, as [time, value] pairs. */
export function steps(place, pairs, label) {
  const [first, last] = [pairs[0]?.[0] ?? 0, pairs.at(-1)?.[0] ?? 1];
  const values = pairs.map((pair) => pair[1]);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const at = (time) => ((100 * (time - first)) / Math.max(1, last - first)).toFixed(2);
  const up = (value) => (high === low ? 50 : 94 - (88 * (value - low)) / (high - low)).toFixed(2);
  let path = "";
  pairs.forEach(([time, value], index) => (path += index ? `H${at(time)}V${up(value)}` : `M0 ${up(value)}`));
  put(place, frame(label, "chart", s("path", { class: "line", d: `${path}H100` })));
}

export function histogram(place, counts, label) {
  const most = Math.max(...counts) || 1;
  const width = 100 / counts.length;
  put(place, frame(label, "chart bars", ...counts.map((value, index) => {
    const tall = value ? Math.max(2, (96 * value) / most) : 0;
    return s("rect", { x: (index * width + width * 0.1).toFixed(2), y: (100 - tall).toFixed(2), width: (width * 0.8).toFixed(2), height: tall.toFixed(2) });
  })));
}

/** Layers on top of each other, the first lowest: [{ values, colour, label }]. */
export function stack(place, layers, label) {
  const length = layers[0]?.values.length ?? 0;
  let low = new Array(length).fill(0);
  const tops = layers.map(({ values }) => {
    const own = calm(values);
    return (low = low.map((value, index) => value + own[index]));
  });
  const most = Math.max(...low, 0) || 1;
  const floors = [new Array(length).fill(0), ...tops];
  put(place, frame(label, "chart stacked", ...layers.map((layer, index) => s("path", { d: area(floors[index], tops[index], most), class: layer.colour }))));
  return most;
}

/** A bar that fills with `share` of it. */
export function meter(label) {
  return h("span", { class: "meter", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 }, h("i"));
}

export function fill(node, share, warn = 0.9) {
  const value = Math.round(100 * Math.min(1, Math.max(0, share)));
  set(node, { "aria-valuenow": value, "data-high": share >= warn });
  node.firstChild.style.width = `${value}%`;
}
