// The same prompt twice, adapted and unadapted, streamed side by side.

import { $, cosine, h, seconds, set, text } from "./dom.js";

const EXAMPLES = [
  ["Refund", "I was charged twice for one transfer and the second payment has not been returned. How do I get my money back?"],
  ["SQL", "Write an SQL query that counts orders by country for the last year."],
  ["Recipe", "How do I bake bread with rye flour, water, salt and yeast?"],
  ["Python", "Write a Python function that parses a date like 2024-05-31 and returns the weekday."],
];

const SIDES = [["adapted", "Adapted"], ["off", "Unadapted"]];

export class Try {
  /** `call(path, init)` fetches with the API key, `state()` gives the last state or null. */
  constructor(call, state) {
    this.call = call;
    this.state = state;
    this.running = null;
    $("examples").append(...EXAMPLES.map(([name, prompt]) =>
      h("button", { type: "button", class: "quiet", onclick: () => this.take(prompt) }, name)));
    $("answers").append(...SIDES.map(([side, name]) =>
      h("article", { "data-side": side, "aria-labelledby": `${side}-title` },
        h("header", {}, h("h3", { id: `${side}-title` }, name), h("span", { class: "chip", hidden: true })),
        h("p", { class: "answer empty" }, side === "off" ? "The frozen model, as it is." : "The same model under its cluster's update."),
        h("footer", { class: "note" }))));
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.running.abort();
      else this.run();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
    });
  }

  take(prompt) {
    $("prompt").value = prompt;
    $("prompt").focus();
  }

  /** Offer to adapt by `cluster`, or only by the prompt's own. */
  offer(cluster) {
    const own = h("option", { value: "auto" }, "its own cluster");
    $("adaptation").replaceChildren(own, ...(cluster ? [h("option", { value: cluster.id, selected: true }, `cluster ${cluster.id}`)] : []));
    this.namespace = cluster?.namespace;
  }

  async run() {
    const state = this.state();
    if (!state) return;
    this.running = new AbortController();
    $("run").firstChild.data = "Stop ";
    text($("verdict"), "");
    const chosen = $("adaptation").value;
    const body = {
      model: state.model.name,
      messages: [{ role: "user", content: $("prompt").value }],
      max_tokens: $("tokens").valueAsNumber || 96,
      temperature: 0,
      stream: true,
      stream_options: { include_usage: true },
      learn: false,
    };
    const namespace = this.namespace ?? state.namespace;
    if (namespace) body.namespace = namespace;
    const answers = await Promise.all([
      this.stream("adapted", { ...body, adaptation: chosen === "auto" ? chosen : Number(chosen) }),
      this.stream("off", { ...body, adaptation: "off" }),
    ]);
    this.running = null;
    $("run").firstChild.data = "Run ";
    text($("verdict"), verdict(answers));
  }

  /** Stream one answer into its place; the text, or null if it did not come to its end. */
  async stream(side, body) {
    const place = document.querySelector(`[data-side="${side}"]`);
    const [answer, foot, chip] = [place.querySelector(".answer"), place.querySelector("footer"), place.querySelector(".chip")];
    set(place, { "aria-busy": true });
    set(answer, { class: "answer" });
    chip.hidden = true;
    text(answer, "");
    text(foot, "Waiting for the first token");
    const begun = performance.now();
    let first = null;
    let usage = null;
    let whole = null;
    try {
      const response = await this.call("v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: this.running.signal,
      });
      for await (const event of events(response.body)) {
        if (event.error) throw new Error(event.error.message);
        const piece = event.choices[0]?.delta?.content;
        if (event.adaptation) this.badge(chip, event.adaptation);
        usage = event.usage ?? usage;
        if (!piece) continue;
        first ??= performance.now();
        answer.append(piece);
        text(foot, `First token ${seconds((first - begun) / 1000)}`);
      }
      whole = answer.textContent;
      text(foot, summary(usage, begun, first));
      if (!whole) {
        set(answer, { class: "answer empty" });
        text(answer, "The model ended its answer at once.");
      }
    } catch (error) {
      const stopped = error.name === "AbortError";
      text(foot, stopped ? "Stopped" : `No answer: ${error.message}`);
    }
    set(place, { "aria-busy": null });
    return whole;
  }

  badge(chip, { mode, cluster, similarity, fallback }) {
    const near = similarity == null ? "" : ` · similarity ${cosine(similarity)}`;
    const named = { off: "no update", static: "the update all clusters share", cluster: `cluster ${cluster}` }[mode];
    chip.hidden = false;
    text(chip, `${named}${near}${fallback ? " · own update was late" : ""}`);
  }
}

function summary(usage, begun, first) {
  if (!usage || first == null) return "";
  const tokens = usage.completion_tokens;
  const streaming = (performance.now() - first) / 1000;
  const speed = tokens > 1 && streaming > 0 ? ` · ${((tokens - 1) / streaming).toFixed(1)} tokens/s` : "";
  const cached = usage.prompt_tokens_details?.cached_tokens;
  return `${tokens} tokens · first after ${seconds((first - begun) / 1000)}${speed}${cached ? ` · ${cached} of ${usage.prompt_tokens} prompt tokens cached` : ""}`;
}

function verdict([one, other]) {
  if (one == null || other == null) return "";
  if (one === other) return "Both answers are the same.";
  const words = [one, other].map((whole) => whole.split(/\s+/));
  const apart = words[0].findIndex((word, index) => word !== words[1][index]);
  const same = apart < 0 ? words[0].length : apart;
  return same ? `The answers part after ${same} ${same === 1 ? "word" : "words"}.` : "The answers part at the first word.";
}

/** Server-sent events of OpenAI's form, as objects. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
