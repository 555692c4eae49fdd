// Small helpers: elements, keyed lists, numbers for people.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Attributes that are null or false are left out; children may be text. */
export function h(name, attributes = {}, ...children) {
  return build(document.createElement(name), attributes, children);
}

/** The same, in SVG. */
export function s(name, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, name), attributes, children);
}

function build(node, attributes, children) {
  set(node, attributes);
  node.append(...children.filter((child) => child != null));
  return node;
}

export function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value == null || value === false) node.removeAttribute(name);
    else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  }
}

export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

export const $ = (id) => document.getElementById(id);

/** Make the children of `parent` match `items`, and keep those that are there: focus stays. */
export function keyed(parent, items, keyOf, create, update) {
  const held = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  let before = null;
  for (const item of items) {
    const key = String(keyOf(item));
    let node = held.get(key);
    if (!node) {
      node = create(item);
      node.dataset.key = key;
    }
    held.delete(key);
    update(node, item);
    const place = before ? before.nextSibling : parent.firstChild;
    if (node !== place) parent.insertBefore(node, place);
    before = node;
  }
  for (const node of held.values()) node.remove();
}

const whole = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (value) => (value < 10000 ? whole.format(Math.round(value)) : compact.format(value));

export function rate(value) {
  if (!value) return "0";
  return value < 10 ? value.toFixed(value < 1 ? 2 : 1) : count(value);
}

export const percent = (share) => (share == null ? "–" : `${Math.round(100 * share)} %`);

export function seconds(value) {
  if (value == null) return "–";
  if (value < 0.995) return `${Math.round(1000 * value)} ms`;
  return `${value.toFixed(value < 10 ? 1 : 0)} s`;
}

export function span(value) {
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return value < 129600 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} d`;
}

export const cosine = (value) => (value == null ? "–" : value.toFixed(2));

/** What a cluster is called where there is little room. */
export const short = (cluster) => cluster.characteristic_tokens.slice(0, 2).join(" ") || `#${cluster.id}`;

export const tenant = (name) => name || "default";
