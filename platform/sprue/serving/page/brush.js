/** Marks where a defect is, on a canvas of the image's size. */

const MARK = "#b400ff"; // neither the map's colours nor the outline's

export class Brush {
  /** @param {import("./zoom.js").Zoom} zoom @param {HTMLCanvasElement} canvas */
  constructor(zoom, canvas) {
    [this.zoom, this.canvas] = [zoom, canvas];
    /** @type {"brush" | "eraser" | ""} */
    this.tool = "";
    /** Radius as a part of the image's shorter side. */
    this.size = 0.03;
    this.last = null;
    zoom.stage.addEventListener("pointerdown", (event) => this.#start(event));
    zoom.stage.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) zoom.stage.addEventListener(end, () => (this.last = null));
  }

  /** @param {"brush" | "eraser" | ""} tool */
  use(tool) {
    this.tool = tool;
    this.zoom.pans = !tool;
    this.zoom.stage.classList.toggle("brush", Boolean(tool));
  }

  #start(event) {
    if (!this.tool || event.button !== 0 || this.zoom.pointers.size > 1) return;
    if (event.pointerType !== "touch") this.zoom.stage.setPointerCapture(event.pointerId);
    this.last = this.zoom.pixel(event);
    this.#line(this.last);
  }

  #move(event) {
    if (!this.last || !this.tool) return;
    if (this.zoom.pointers.size > 1) {
      this.last = null; // two fingers zoom
      return;
    }
    const point = this.zoom.pixel(event);
    this.#line(point);
    this.last = point;
  }

  #line(to) {
    const context = this.canvas.getContext("2d");
    context.globalCompositeOperation = this.tool === "eraser" ? "destination-out" : "source-over";
    context.strokeStyle = MARK;
    context.lineCap = "round";
    context.lineWidth = 2 * Math.max(1, this.size * Math.min(this.canvas.width, this.canvas.height));
    context.beginPath();
    context.moveTo(this.last.x, this.last.y);
    context.lineTo(to.x, to.y);
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
