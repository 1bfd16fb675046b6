// The form: its fields are those of a job's request, within the limits of the model.

import { keepForm, keptForm } from "./store.js";

const $ = (id) => document.getElementById(id);

const FIELDS = ["prompt", "negative", "model", "size", "n", "width", "height", "steps", "guidance", "sampler", "seed"];
const CUSTOM = "custom";
const SHAPES = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];

/** Advice for models that draw little, by name. */
const HINTS = {
  demo: "The demo draws animals, plants, food and drinks, such as “owl on a pink background”.",
};

/** Fields by the name that the server gives in an error. */
const BY_PARAM = {
  prompt: "prompt", negative_prompt: "negative", model: "model", size: "size", width: "size",
  height: "size", n: "n", num_inference_steps: "steps", steps: "steps", guidance_scale: "guidance",
  sampler: "sampler", seed: "seed", strength: "strength", image: "choose", mask: "mask-open",
  depth_map: "depth-choose",
};

export class Form {
  #models = new Map();
  #limits = null;

  constructor(changed) {
    this.changed = changed;
    $("form").addEventListener("input", (event) => this.#input(event.target));
    $("model").addEventListener("change", () => this.#showModel());
    $("size").addEventListener("change", () => this.#showCustom());
    $("accelerated").addEventListener("change", () => this.#showPlan());
    $("defaults").addEventListener("click", () => this.reset());
    if (matchMedia("(max-width: 56rem)").matches) $("settings").open = $("source").open = false;
  }

  /** Offer the models of the server, and restore what the form held before a reload. */
  offer({ models, limits }) {
    const values = this.#models.size ? this.values() : keptForm();
    this.#models = new Map(models.map((model) => [model.id, model]));
    this.#limits = limits;
    $("model").replaceChildren(...models.map(({ id }) => new Option(id)));
    if (this.#models.has(values.model)) $("model").value = values.model;
    $("prompt").maxLength = $("negative").maxLength = limits.prompt_characters;
    $("n").max = limits.images;
    this.#showModel();
    this.set(values);
    $("generate").disabled = models.length === 0;
  }

  get model() {
    return this.#models.get($("model").value);
  }

  values() {
    return Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  }

  /** Set fields, as far as the model allows their values. */
  set(values) {
    for (const [name, value] of Object.entries(values)) {
      const field = $(name);
      if (name === "size") this.#setSize(value);
      else if (field.tagName !== "SELECT" || hasOption(field, value)) field.value = value;
    }
    this.#showCustom();
    this.#noteGuidance();
    keepForm(this.values());
  }

  /** Set the model's defaults, but for the texts. */
  reset() {
    const { defaults } = this.model;
    $("accelerated").checked = true;
    this.#showPlan();
    this.set({
      size: defaults.size, n: 1, steps: defaults.num_inference_steps,
      guidance: defaults.guidance_scale, sampler: defaults.sampler, seed: "",
    });
  }

  /** Return the size of the request: its text, and the width and height in pixels. */
  size() {
    const text = $("size").value === CUSTOM ? `${$("width").value}x${$("height").value}` : $("size").value;
    const [width, height] = text.split("x").map(Number);
    return { text, width, height };
  }

  /** Return the request, without an image. */
  request() {
    const negative = $("negative").value.trim();
    return {
      model: $("model").value,
      prompt: $("prompt").value.trim(),
      ...(negative ? { negative_prompt: negative } : {}),
      n: Number($("n").value),
      size: this.size().text,
      num_inference_steps: Number($("steps").value),
      guidance_scale: Number($("guidance").value),
      sampler: $("sampler").value,
      ...($("seed").value === "" ? {} : { seed: Number($("seed").value) }),
      ...(this.model.accelerated && !$("accelerated").checked ? { unaccelerated: true } : {}),
    };
  }

  /** Fill the form with the request of an entry, and its seed. */
  take({ request, seed, size }) {
    if (this.#models.has(request.model)) $("model").value = request.model;
    $("accelerated").checked = !request.unaccelerated;
    this.#showModel();
    this.set({
      prompt: request.prompt, negative: request.negative_prompt ?? "", size, n: 1,
      steps: request.num_inference_steps, guidance: request.guidance_scale,
      sampler: request.sampler, seed,
    });
  }

  /** Return the message of an error, with the label of the field that it begins with. */
  labelled({ param, message }) {
    const label = document.querySelector(`label[for="${BY_PARAM[param] ?? ""}"]`);
    return label && message.startsWith(`${param}:`) ? label.firstChild.data.trim() + message.slice(param.length) : message;
  }

  /** Mark the field that an error is about, and move there. */
  blame(param) {
    const field = $(BY_PARAM[param] ?? "");
    if (!field) return;
    this.reveal(field);
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-errormessage", "problem");
    field.focus();
  }

  /** Open the section of a field, where a message about it could not be shown otherwise. */
  reveal(field) {
    const section = field?.closest("details");
    if (section) section.open = true;
  }

  #input(field) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
    this.#noteGuidance();
    keepForm(this.values());
    this.changed();
  }

  #showModel() {
    const model = this.model;
    if (!model) return;
    const [width, height] = [sides(model, "width", this.#limits), sides(model, "height", this.#limits)];
    $("model").closest(".field").hidden = this.#models.size < 2;
    $("prompt-note").textContent = HINTS[model.name] ?? "";
    fill($("sampler"), model.samplers.map((name) => [name, name]), model.defaults.sampler);
    fill($("size"), sizes(model).map((size) => [size, size.replace("x", " × ")]), model.defaults.size);
    if (width.min < width.max || height.min < height.max) $("size").append(new Option("Custom", CUSTOM));
    Object.assign($("width"), width);
    Object.assign($("height"), height);
    $("size").closest(".field").hidden = model.tasks.includes("enlarging"); // the image has its size
    $("steps").value ||= model.defaults.num_inference_steps;
    $("guidance").value ||= model.defaults.guidance_scale;
    this.#showPlan();
    this.#showCustom();
    this.#noteGuidance();
  }

  /** Fix the steps and the sampler to those of the acceleration plan while it is in effect. */
  #showPlan() {
    const { accelerated, defaults } = this.model;
    const fixed = accelerated && $("accelerated").checked;
    $("plan").hidden = !accelerated;
    $("steps").readOnly = fixed;
    $("sampler").disabled = fixed;
    if (!fixed) return;
    $("steps").value = defaults.num_inference_steps;
    $("sampler").value = defaults.sampler;
  }

  #setSize(text) {
    if (!text) return;
    const [width, height] = text.split("x");
    if (hasOption($("size"), text)) $("size").value = text;
    else if (height && hasOption($("size"), CUSTOM)) {
      $("size").value = CUSTOM;
      this.set({ width, height });
    }
  }

  #showCustom() {
    const custom = $("size").value === CUSTOM;
    $("custom").hidden = $("custom").disabled = !custom;
    const [width, height] = (this.model?.defaults.size ?? "").split("x");
    $("width").value ||= width;
    $("height").value ||= height;
    this.changed();
  }

  #noteGuidance() {
    const idle = $("negative").value.trim() !== "" && Number($("guidance").value) <= 1;
    $("negative-note").textContent = idle ? "A negative prompt needs a guidance above 1." : "";
  }
}

const hasOption = (select, value) => [...select.options].some((option) => option.value === value);

function fill(select, options, fallback) {
  const earlier = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  select.value = hasOption(select, earlier) ? earlier : fallback;
}

/** Return the limits of a side over all sizes that the engines were built for. */
function sides({ sizes: built, multiple }, name, limits) {
  const ranges = built.map((size) => size[name]);
  const min = ranges.length ? Math.min(...ranges.map((range) => range.min)) : multiple;
  const max = ranges.length ? Math.max(...ranges.map((range) => range.max)) : limits.picture_side;
  return { min, max, step: multiple };
}

/** Return sizes to choose from: the default, those built, and common shapes of the same area. */
function sizes({ sizes: built, multiple, defaults }) {
  const fixed = built.filter(({ width, height }) => width.min === width.max && height.min === height.max);
  const [width, height] = defaults.size.split("x").map(Number);
  const shapes = SHAPES.map(([wide, high]) => {
    const unit = Math.sqrt((width * height) / (wide * high));
    return [wide, high].map((side) => Math.round((side * unit) / multiple) * multiple);
  });
  const fits = ([wide, high]) => built.length === 0 || built.some((size) => within(wide, size.width) && within(high, size.height));
  return [...new Set([
    defaults.size,
    ...fixed.map((size) => `${size.width.min}x${size.height.min}`),
    ...shapes.filter(fits).map((sides) => sides.join("x")),
  ])];
}

const within = (value, { min, max }) => min <= value && value <= max;
