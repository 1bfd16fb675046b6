// Thumbnails of the session's images, the newest first.

import { show } from "./source.js";
import { state } from "./text.js";

const $ = (id) => document.getElementById(id);

export class Gallery {
  #items = new Map(); // list items by key

  constructor(selected) {
    this.selected = selected;
  }

  /** Show all entries in their order. */
  showAll(entries, current) {
    for (const [key, item] of this.#items) {
      if (entries.has(key)) continue;
      URL.revokeObjectURL(item.querySelector("img").src);
      this.#items.delete(key);
    }
    $("thumbs").replaceChildren(...[...entries.values()].map((entry) => this.#item(entry)));
    $("clear").hidden = entries.size === 0;
    $("gallery-empty").hidden = entries.size > 0;
    this.mark(current);
  }

  /** Show the latest state of an entry. */
  update(entry) {
    const item = this.#items.get(entry.key);
    if (!item) return;
    const image = item.querySelector("img");
    const blob = entry.blob ?? entry.preview ?? null;
    if (blob && blob !== item.blob) show(image, blob);
    item.blob = blob;
    image.hidden = !blob;
    image.classList.toggle("small", Boolean(entry.blob) && parseInt(entry.size) < 64);
    item.querySelector(".state").textContent = state(entry);
    item.firstElementChild.setAttribute("aria-label", [state(entry), entry.request.prompt].filter(Boolean).join(": "));
  }

  mark(current) {
    for (const [key, item] of this.#items) {
      item.firstElementChild.setAttribute("aria-current", String(key === current));
    }
  }

  focus(key) {
    this.#items.get(key)?.firstElementChild.focus();
  }

  #item(entry) {
    let item = this.#items.get(entry.key);
    if (!item) {
      item = $("thumb").content.firstElementChild.cloneNode(true);
      item.firstElementChild.addEventListener("click", () => this.selected(entry.key));
      this.#items.set(entry.key, item);
      this.update(entry);
    }
    return item;
  }
}
