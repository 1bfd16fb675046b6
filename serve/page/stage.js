// The selected image: its progress, its facts, and what can be done with it.

import { show } from "./source.js";
import { duration, fileName, outcome, state, timeLeft } from "./text.js";

const $ = (id) => document.getElementById(id);

const SMALL = 256; // pixels from which an enlarged image is smoothed

export class Stage {
  #shown = null; // blob in the frame

  constructor() {
    $("picture").addEventListener("load", () => this.#fitFrame());
  }

  /** Show an entry, or its latest state; null for none. */
  show(entry, model) {
    const focused = document.activeElement;
    this.#showPicture(entry?.blob ?? entry?.preview ?? null, entry);
    this.#showProgress(entry);
    this.#showCaption(entry, model);
    if ($("stage").contains(focused) && !focused.checkVisibility()) refocus();
  }

  #showPicture(blob, entry) {
    const [width, height] = (entry?.size ?? "1x1").split("x").map(Number);
    $("frame").style.aspectRatio = `${width} / ${height}`;
    $("picture").hidden = !blob;
    if (blob && blob !== this.#shown) show($("picture"), blob);
    this.#shown = blob;
    $("picture").alt = !entry?.blob ? "Preview" : entry.request.prompt;
    $("picture").classList.toggle("preview", !entry?.blob);
    const gone = entry && ["failed", "cancelled", "lost"].includes(entry.status);
    $("lost").hidden = !gone;
    $("lost").textContent = gone ? outcome(entry) : "";
    $("empty").hidden = Boolean(entry);
  }

  #fitFrame() {
    $("picture").classList.toggle("small", $("picture").naturalWidth < SMALL);
  }

  #showProgress(entry) {
    const running = entry && ["queued", "running"].includes(entry.status);
    $("progress").hidden = !running;
    if (!running) return;
    if (entry.fraction === undefined) $("bar").removeAttribute("value");
    else $("bar").value = entry.fraction;
    $("step").textContent = state(entry);
    const counted = !entry.away && Number.isFinite(entry.left);
    $("left").textContent = counted ? timeLeft(entry.left) : "";
  }

  #showCaption(entry, model) {
    $("caption").hidden = !entry;
    if (!entry) return;
    $("caption-prompt").textContent = entry.request.prompt;
    $("caption-warning").textContent = warning(entry);
    $("caption-facts").textContent = facts(entry).join(" · ");
    const done = entry.status === "completed";
    for (const name of ["download", "share", "code"]) $(name).hidden = !done;
    $("code").hidden ||= Boolean(entry.request.depth_map); // OpenAI's API has none
    $("start-from").hidden = !done || !model?.tasks.some((task) => task !== "text_to_image");
    $("again").hidden = ["queued", "running"].includes(entry.status) || done;
    if (!done) return;
    $("download").href = $("picture").src;
    $("download").download = fileName(entry);
  }
}

/** Move the focus on from a button that is gone, else the keyboard's place would be lost. */
function refocus() {
  ["cancel", "download", "again"].map($).find((button) => button.checkVisibility())?.focus();
}

/** Return what the model did not read of the texts, in sentences. */
function warning({ warnings = [] }) {
  const names = { prompt: "prompt", negative_prompt: "negative prompt" };
  return warnings.map(({ param, message }) => `The ${names[param] ?? param} is ${message}.`).join(" ");
}

function facts({ request, size, seed, seconds, count, index }) {
  return [
    ...(count > 1 ? [`Image ${index + 1} of ${count}`] : []),
    request.model, size.replace("x", " × "), `${request.num_inference_steps} steps`,
    `guidance ${request.guidance_scale}`, request.sampler,
    `seed ${seed}`,
    ...(seconds ? [(count > 1 ? `${count} images in ` : "") + duration(seconds)] : []),
  ];
}
