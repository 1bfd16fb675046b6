// Image to start from: chosen, dropped, pasted or generated; fitted to the request's size.

import { MaskPainter } from "./mask.js";
import { base64, fitted, sizeOf } from "./picture.js";

const $ = (id) => document.getElementById(id);

/** Image and mask of the next request. `size` returns its width and height; `report` shows errors. */
export class Source {
  #original = null; // as it was given
  #picture = null; // as the request will have it
  #mask = null;
  #tasks = [];
  #painter = new MaskPainter();

  constructor(size, report) {
    this.size = size;
    this.report = report;
    $("choose").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => {
      this.take($("file").files[0]);
      $("file").value = "";
    });
    $("source-remove").addEventListener("click", () => {
      this.clear();
      $("choose").focus();
    });
    $("mask-open").addEventListener("click", () => this.#paint());
    this.#accept();
  }

  /** Show what a model can do with an image. */
  allow(tasks) {
    this.#tasks = tasks;
    $("source").hidden = !this.#usable;
    $("source-title").textContent = tasks.includes("text_to_image") ? "Start from an image" : "Image";
    $("strength-field").hidden = !tasks.includes("image_to_image");
    $("mask-open").hidden = !tasks.includes("inpainting");
    if (!this.#usable && this.#original) this.clear();
  }

  get #usable() {
    return this.#tasks.some((task) => task !== "text_to_image");
  }

  /** True if the model makes nothing without an image, and there is none. */
  get missing() {
    return this.#tasks.length > 0 && !this.#tasks.includes("text_to_image") && !this.#original;
  }

  async take(blob) {
    if (!blob || !this.#usable) return;
    this.report(""); // not later: a request that is sent meanwhile has errors of its own
    try {
      await this.#fit(blob);
    } catch {
      this.report("The browser cannot read this file as an image.");
      return;
    }
    this.#original = blob;
    this.#setMask(null);
    $("source").open = true;
    $("chosen").hidden = false;
    $("choose").hidden = true;
    document.dispatchEvent(new CustomEvent("announce", { detail: "Image to start from is set." }));
  }

  clear() {
    this.#original = this.#picture = null;
    this.#setMask(null);
    $("chosen").hidden = true;
    $("choose").hidden = false;
  }

  /** Fit the image again, after the size has changed; a mask of another size is gone. */
  async refit() {
    if (!this.#original) return;
    const { width, height } = this.size();
    if (this.#whole || !width || !height) return;
    if (this.#picture.width === width && this.#picture.height === height) return;
    const masked = this.#mask !== null;
    this.#setMask(null);
    await this.#fit(this.#original);
    if (masked) this.report("The size has changed, so the mask was removed: paint it again.");
  }

  /** Return the fields of the request. */
  async fields() {
    if (!this.#picture) return {};
    await this.refit();
    const strength = this.#tasks.includes("image_to_image") ? $("strength").value : "";
    return {
      image: await base64(this.#picture.blob),
      ...(this.#mask ? { mask: await base64(this.#mask.mask) } : {}),
      ...(strength === "" ? {} : { strength: Number(strength) }),
      ...(this.#whole ? { size: "auto" } : {}),
    };
  }

  /** True if the image gives the size, as an enlarged one does. */
  get #whole() {
    return this.#tasks.includes("enlarging");
  }

  async #fit(blob) {
    const { width, height } = this.#whole ? await sizeOf(blob) : this.size();
    this.#picture = { blob: await fitted(blob, width, height), width, height };
    show($("source-image"), this.#picture.blob);
    $("source-image").classList.toggle("small", width < 128);
  }

  async #paint() {
    const { blob, width, height } = this.#picture;
    const mask = await this.#painter.paint(blob, width, height, this.#mask?.shown);
    if (mask !== undefined) this.#setMask(mask);
    $("mask-open").focus();
  }

  #setMask(mask) {
    this.#mask = mask;
    $("mask-open").textContent = mask ? "Change the mask" : "Paint a mask";
    $("source-mask").hidden = !mask;
    $("strength").placeholder = mask ? "1" : "0.8";
    if (mask) show($("source-mask"), mask.shown);
  }

  #accept() {
    document.addEventListener("paste", (event) => {
      const file = imageOf(event.clipboardData);
      if (!file || !this.#usable) return;
      event.preventDefault();
      this.take(file);
    });
    document.addEventListener("dragover", (event) => {
      event.preventDefault(); // else the browser leaves the page for the file
      document.body.classList.toggle("dropping", this.#usable);
    });
    for (const type of ["dragleave", "drop"]) {
      document.addEventListener(type, () => document.body.classList.remove("dropping"));
    }
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      this.take(imageOf(event.dataTransfer));
    });
  }
}

const imageOf = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));

/** Show a blob in an image element, in place of an earlier one. */
export function show(image, blob) {
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
}
