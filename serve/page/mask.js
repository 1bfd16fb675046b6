// Dialog in which a mask is painted, by pointer or keyboard.

const SIDE = 512; // pixels at least, so that strokes on small images are round
const UNDO = 20;

const $ = (id) => document.getElementById(id);

/** Painting over a picture. The layer is opaque where the picture is to be replaced. */
export class MaskPainter {
  #layer = $("mask-layer");
  #context = this.#layer.getContext("2d", { willReadFrequently: true });
  #picture = $("mask-picture");
  #past = [];
  #last = null; // of the stroke that is being painted
  #cursor = null; // of the keyboard

  constructor() {
    const layer = this.#layer;
    layer.addEventListener("pointerdown", (event) => this.#down(event));
    layer.addEventListener("pointermove", (event) => this.#move(event));
    for (const type of ["pointerup", "pointercancel"]) {
      layer.addEventListener(type, () => { this.#last = null; });
    }
    layer.addEventListener("keydown", (event) => this.#press(event));
    layer.addEventListener("blur", () => this.#showCursor(null));
    $("mask-undo").addEventListener("click", () => this.#undo());
    $("mask-clear").addEventListener("click", () => this.#clear());
  }

  /** Show the dialog and resolve to {mask, shown} as PNG blobs; null without paint; undefined if given up. */
  async paint(picture, width, height, earlier) {
    const scale = Math.max(1, Math.ceil(SIDE / Math.max(width, height)));
    await this.#load(picture, width, height, scale);
    if (earlier) this.#context.drawImage(await createImageBitmap(earlier), 0, 0, this.#layer.width, this.#layer.height);
    const dialog = $("mask-dialog");
    dialog.returnValue = "cancel";
    dialog.showModal();
    this.#layer.focus();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    this.#showCursor(null);
    if (dialog.returnValue !== "ok") return undefined;
    return this.#empty() ? null : this.#result(width, height);
  }

  async #load(picture, width, height, scale) {
    for (const surface of [this.#layer, this.#picture]) {
      surface.width = width * scale;
      surface.height = height * scale;
    }
    const context = this.#picture.getContext("2d");
    context.imageSmoothingEnabled = scale === 1;
    context.drawImage(await createImageBitmap(picture), 0, 0, width * scale, height * scale);
    const colour = getComputedStyle(document.documentElement).getPropertyValue("--mask").trim();
    Object.assign(this.#context, { fillStyle: colour, strokeStyle: colour, lineCap: "round" });
    this.#layer.style.opacity = ".6";
    this.#past = [];
    this.#cursor = null;
  }

  /** Return the mask, white where it is painted and black elsewhere, and the paint itself. */
  async #result(width, height) {
    const mask = new OffscreenCanvas(width, height);
    const context = mask.getContext("2d");
    context.drawImage(this.#layer, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    for (let place = 0; place < pixels.data.length; place += 4) {
      pixels.data.fill(pixels.data[place + 3] >= 128 ? 255 : 0, place, place + 3);
      pixels.data[place + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
    const shown = await new Promise((resolve) => this.#layer.toBlob(resolve, "image/png"));
    return { mask: await mask.convertToBlob({ type: "image/png" }), shown };
  }

  #empty() {
    const { data } = this.#context.getImageData(0, 0, this.#layer.width, this.#layer.height);
    return !data.some((value, index) => index % 4 === 3 && value > 0);
  }

  get #radius() {
    return (Number($("brush").value) / 200) * Math.max(this.#layer.width, this.#layer.height);
  }

  #point(event) {
    const box = this.#layer.getBoundingClientRect();
    const scale = Math.min(box.width / this.#layer.width, box.height / this.#layer.height);
    const left = box.left + (box.width - this.#layer.width * scale) / 2; // object-fit: contain
    const top = box.top + (box.height - this.#layer.height * scale) / 2;
    return { x: (event.clientX - left) / scale, y: (event.clientY - top) / scale };
  }

  #down(event) {
    this.#layer.setPointerCapture(event.pointerId);
    this.#remember();
    this.#last = this.#point(event);
    this.#stroke(this.#last, this.#last);
  }

  #move(event) {
    if (!this.#last) return;
    for (const part of event.getCoalescedEvents?.() ?? [event]) {
      const point = this.#point(part);
      this.#stroke(this.#last, point);
      this.#last = point;
    }
  }

  #stroke(from, to) {
    const erase = document.querySelector("[name=tool]:checked").value === "erase";
    this.#context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    this.#context.lineWidth = 2 * this.#radius;
    this.#context.beginPath();
    this.#context.moveTo(from.x, from.y);
    this.#context.lineTo(to.x + 0.01, to.y);
    this.#context.stroke();
  }

  #press(event) {
    const { width, height } = this.#layer;
    const at = this.#cursor ?? { x: width / 2, y: height / 2 };
    const reach = Math.max(1, this.#radius / 2);
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const sizes = { "+": 2, "=": 2, "-": -2 };
    if (event.key in moves) {
      const [x, y] = moves[event.key];
      const within = (value, end) => Math.min(end, Math.max(0, value));
      this.#showCursor({ x: within(at.x + x * reach, width), y: within(at.y + y * reach, height) });
    } else if (event.key === " ") {
      this.#remember();
      this.#stroke(at, at);
      this.#showCursor(at);
    } else if (event.key in sizes) {
      $("brush").valueAsNumber += sizes[event.key];
      this.#showCursor(at);
    } else {
      return;
    }
    event.preventDefault();
  }

  /** Show where the keyboard's brush is, by a ring over the picture. */
  #showCursor(point) {
    this.#cursor = point ?? this.#cursor;
    const ring = $("mask-ring");
    ring.toggleAttribute("hidden", point === null); // an SVG has no property of that name
    if (!point) return;
    const { width, height } = this.#layer;
    ring.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const circles = ring.querySelectorAll("circle");
    for (const circle of circles) {
      for (const [name, value] of [["cx", point.x], ["cy", point.y], ["r", this.#radius]]) circle.setAttribute(name, value);
    }
  }

  #remember() {
    this.#past.push(this.#context.getImageData(0, 0, this.#layer.width, this.#layer.height));
    if (this.#past.length > UNDO) this.#past.shift();
  }

  #undo() {
    const past = this.#past.pop();
    if (past) this.#context.putImageData(past, 0, 0);
  }

  #clear() {
    this.#remember();
    this.#context.clearRect(0, 0, this.#layer.width, this.#layer.height);
  }
}
