/** Zooms and pans the layers of a stage together, by wheel, pointers, buttons and keys. */

const STEP = 1.25;
const MOST = 40;

export class Zoom {
  /** @param {HTMLElement} stage @param {HTMLElement} layers */
  constructor(stage, layers) {
    [this.stage, this.layers] = [stage, layers];
    [this.width, this.height, this.scale, this.x, this.y] = [1, 1, 1, 0, 0];
    /** Whether pointers and arrow keys pan; a brush takes them. */
    this.pans = true;
    /** @type {Map<number, {x: number, y: number}>} */
    this.pointers = new Map();
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    stage.addEventListener("pointerdown", (event) => this.#down(event));
    stage.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) {
      stage.addEventListener(end, (event) => this.pointers.delete(event.pointerId));
    }
    stage.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.fit()).observe(stage);
  }

  /** Shows an image of a size, whole. @param {number} width @param {number} height */
  show(width, height) {
    [this.width, this.height] = [width, height];
    this.layers.style.width = `${width}px`;
    this.layers.style.height = `${height}px`;
    this.fit();
  }

  get #least() {
    return Math.min(this.stage.clientWidth / this.width, this.stage.clientHeight / this.height);
  }

  fit() {
    this.scale = this.#least;
    this.x = (this.stage.clientWidth - this.width * this.scale) / 2;
    this.y = (this.stage.clientHeight - this.height * this.scale) / 2;
    this.#apply();
  }

  /** Zooms around a point of the stage. @param {number} factor @param {number} [x] @param {number} [y] */
  by(factor, x = this.stage.clientWidth / 2, y = this.stage.clientHeight / 2) {
    const scale = Math.min(Math.max(this.scale * factor, this.#least), Math.max(MOST, this.#least));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.#apply();
  }

  /** Brings a pixel of the image into sight, if it is not. @param {{x: number, y: number}} pixel */
  reveal(pixel) {
    const within = (place, stage) => Math.min(Math.max(place, 0), stage);
    const [x, y] = [this.x + pixel.x * this.scale, this.y + pixel.y * this.scale];
    this.x += within(x, this.stage.clientWidth) - x;
    this.y += within(y, this.stage.clientHeight) - y;
    this.#apply();
  }

  /** The image's pixel under a pointer. @param {PointerEvent} event */
  pixel(event) {
    const box = this.stage.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left - this.stage.clientLeft, event.clientY - box.top - this.stage.clientTop];
    return { x: (x - this.x) / this.scale, y: (y - this.y) / this.scale };
  }

  #apply() {
    // Some of the image stays in sight.
    const held = (offset, size, stage) => Math.min(Math.max(offset, 40 - size * this.scale), stage - 40);
    this.x = held(this.x, this.width, this.stage.clientWidth);
    this.y = held(this.y, this.height, this.stage.clientHeight);
    this.layers.style.setProperty("--scale", String(this.scale));
    this.layers.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
    this.layers.querySelector("canvas")?.classList.toggle("sharp", this.scale >= 3);
  }

  #wheel(event) {
    event.preventDefault();
    if (!event.deltaY) return; // sideways
    const box = this.stage.getBoundingClientRect();
    this.by(event.deltaY < 0 ? STEP : 1 / STEP, event.clientX - box.left, event.clientY - box.top);
  }

  #down(event) {
    if (!this.pans && event.pointerType !== "touch") return;
    this.stage.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  }

  #move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const others = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (others.length === 0 && this.pans) {
      this.x += event.clientX - before.x;
      this.y += event.clientY - before.y;
      this.#apply();
    } else if (others.length === 1) {
      const [other] = others;
      const far = (point) => Math.hypot(point.x - other.x, point.y - other.y);
      const box = this.stage.getBoundingClientRect();
      const factor = far({ x: event.clientX, y: event.clientY }) / Math.max(far(before), 1);
      this.by(factor, (event.clientX + other.x) / 2 - box.left, (event.clientY + other.y) / 2 - box.top);
    }
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
    if (event.key in moves && this.pans) {
      this.x += moves[event.key][0];
      this.y += moves[event.key][1];
      this.#apply();
    } else if (event.key === "+" || event.key === "=") this.by(STEP);
    else if (event.key === "-") this.by(1 / STEP);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
  }
}
