// Depth map of the image to start from, for models that need one.

import { base64, fitted, sizeOf } from "./picture.js";
import { show } from "./source.js";

const $ = (id) => document.getElementById(id);

/** Depth map of the next request. `size` returns its width and height; `report` shows errors. */
export class DepthMap {
  #file = null;
  #needed = false;

  constructor(size, report) {
    this.size = size;
    this.report = report;
    $("depth-choose").addEventListener("click", () => $("depth-file").click());
    $("depth-file").addEventListener("change", () => {
      this.take($("depth-file").files[0]);
      $("depth-file").value = "";
    });
    $("depth-remove").addEventListener("click", () => {
      this.#set(null);
      $("depth-choose").focus();
    });
  }

  /** Offer the map to a model that needs one. */
  allow(model) {
    this.#needed = model.depth_map;
    $("depth").hidden = !this.#needed;
    if (!this.#needed) this.#set(null);
  }

  /** True if the model makes nothing without a depth map, and there is none. */
  get missing() {
    return this.#needed && !this.#file;
  }

  async take(file) {
    if (!file) return;
    this.report("");
    try {
      await sizeOf(file);
    } catch {
      this.report("The browser cannot read this file as a depth map.");
      return;
    }
    this.#set(file);
    document.dispatchEvent(new CustomEvent("announce", { detail: "The depth map is set." }));
  }

  /** Return the fields of the request. */
  async fields() {
    return this.#file ? { depth_map: await base64(await this.#cropped()) } : {};
  }

  /**
   * Return the part of the map that belongs to the part of the image that is used. A map of the
   * request's shape stays as it is: its levels may have 16 bits, and a browser draws 8.
   */
  async #cropped() {
    const { width, height } = this.size();
    const map = await sizeOf(this.#file);
    const same = Math.abs(map.width * height - map.height * width) < Math.max(map.width, map.height);
    return same ? this.#file : fitted(this.#file, width, height);
  }

  #set(file) {
    this.#file = file;
    $("depth-chosen").hidden = !file;
    $("depth-choose").hidden = Boolean(file);
    if (file) show($("depth-image"), file);
  }
}
