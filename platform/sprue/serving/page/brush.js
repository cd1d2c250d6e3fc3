/** Marks where a defect is, on a canvas of the image's size, by pointers or keys. */

import { element } from "./dom.js";

const MARK = "#b400ff"; // neither the map's colours nor the outline's

export class Brush {
  /** @param {import("./zoom.js").Zoom} zoom @param {HTMLCanvasElement} canvas */
  constructor(zoom, canvas) {
    [this.zoom, this.canvas] = [zoom, canvas];
    /** @type {"brush" | "eraser" | ""} */
    this.tool = "";
    this.ring = element("div", { className: "ring" });
    canvas.after(this.ring);
    /** What draws a stroke: both at once would connect the pointer's place with the keys'. @type {"pointer" | "key" | ""} */
    this.stroke = "";
    this.size = 0.03;
    zoom.stage.addEventListener("pointerdown", (event) => this.#start(event));
    zoom.stage.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) zoom.stage.addEventListener(end, () => this.#end("pointer"));
    zoom.stage.addEventListener("keydown", (event) => this.#key(event));
    zoom.stage.addEventListener("keyup", (event) => event.key === " " && this.#end("key"));
    zoom.stage.addEventListener("blur", () => this.#end("key"));
  }

  /** @param {"brush" | "eraser" | ""} tool */
  use(tool) {
    this.tool = tool;
    this.zoom.pans = !tool;
    this.zoom.stage.classList.toggle("brush", Boolean(tool));
  }

  /** Waits in the middle of an image that is shown. */
  center() {
    this.stroke = "";
    this.#place({ x: this.canvas.width / 2, y: this.canvas.height / 2 });
  }

  /** Radius as a part of the image's shorter side. */
  get size() {
    return this.part;
  }

  set size(part) {
    this.part = part;
    this.#place(this.at ?? { x: 0, y: 0 });
  }

  get #radius() {
    return Math.max(1, this.size * Math.min(this.canvas.width, this.canvas.height));
  }

  #place(at) {
    this.at = at;
    const [x, y] = [at.x - this.#radius, at.y - this.#radius];
    this.ring.style.width = this.ring.style.height = `${2 * this.#radius}px`;
    this.ring.style.translate = `${x}px ${y}px`;
  }

  #end(stroke) {
    if (this.stroke === stroke) this.stroke = "";
  }

  #start(event) {
    if (!this.tool || this.stroke || event.button !== 0 || this.zoom.pointers.size > 1) return;
    if (event.pointerType !== "touch") this.zoom.stage.setPointerCapture(event.pointerId);
    this.stroke = "pointer";
    this.#place(this.zoom.pixel(event));
    this.#line(this.at);
  }

  #move(event) {
    if (!this.tool || this.stroke === "key") return;
    if (this.zoom.pointers.size > 1) {
      this.stroke = ""; // two fingers zoom
      return;
    }
    this.#go(this.zoom.pixel(event));
  }

  /** Arrow keys move it by its radius, with Shift by a pixel; it marks while the space bar is held. */
  #key(event) {
    if (!this.tool || this.stroke === "pointer" || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = event.shiftKey ? 1 : Math.max(1, Math.round(this.#radius));
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const within = (value, size) => Math.min(Math.max(value, 0), size);
    if (event.key in moves) {
      const [x, y] = moves[event.key];
      this.#go({ x: within(this.at.x + x, this.canvas.width), y: within(this.at.y + y, this.canvas.height) });
      this.zoom.reveal(this.at);
    } else if (event.key === " ") {
      this.stroke = "key";
      this.#line(this.at);
    } else return;
    event.preventDefault();
  }

  #go(to) {
    const from = this.at;
    this.#place(to);
    if (this.stroke) this.#line(from);
  }

  #line(from) {
    const context = this.canvas.getContext("2d");
    context.globalCompositeOperation = this.tool === "eraser" ? "destination-out" : "source-over";
    context.strokeStyle = MARK;
    context.lineCap = "round";
    context.lineWidth = 2 * this.#radius;
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(this.at.x, this.at.y);
    context.stroke();
  }
}

/**
 * A mark as a mask, white on black, a PNG in base64; empty if nothing is marked.
 * @param {HTMLCanvasElement} canvas
 */
export function maskOf(canvas) {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height);
  const opacities = new Uint8Array(width * height).map((_, index) => pixels.data[4 * index + 3]);
  if (!opacities.some((each) => each > 127)) return "";
  const values = new Uint32Array(pixels.data.buffer);
  opacities.forEach((each, index) => (values[index] = each > 127 ? 0xffffffff : 0xff000000));
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [width, height];
  copy.getContext("2d").putImageData(pixels, 0, 0);
  return copy.toDataURL("image/png").split(",")[1];
}
