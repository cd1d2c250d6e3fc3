/** An image with its anomaly map over it: opacity, outline, views, zoom and pan; in the review also a brush. */

import { Brush, maskOf } from "./brush.js";
import { announce, element } from "./dom.js";
import { decode, drawHeat, drawOutline, drawnSize, upsample } from "./maps.js";
import { percent, t, translate } from "./texts.js";
import { Zoom } from "./zoom.js";

/** @typedef {import("./api.js").Calibration} Calibration */
/** @typedef {{name: string, bitmap: ImageBitmap | null, map: import("./api.js").AnomalyMap | null}} View */

/** A sample's views. @param {import("./api.js").Score} score @param {(ImageBitmap | null)[]} bitmaps @returns {View[]} */
export const viewsOf = (score, bitmaps) =>
  score.maps.map((map, index) => ({ name: map.view, bitmap: bitmaps[index], map }));

export class Viewer {
  /** @param {HTMLElement} root @param {boolean} marks Whether defects can be marked. */
  constructor(root, marks) {
    const canvas = () => element("canvas");
    [this.base, this.heat, this.outline, this.marks] = [canvas(), canvas(), canvas(), canvas()];
    this.layers = element("div", { className: "layers" }, this.base, this.heat, this.outline, this.marks);
    this.stage = element("div", { className: "stage", tabIndex: 0, role: "group", "data-label": "stage" }, this.layers);
    this.described = element("p", { className: "quiet" });
    this.viewButtons = element("div", { className: "tools", role: "group", "data-label": "views" });
    root.append(this.viewButtons, this.stage, this.#tools(), ...(marks ? [this.#brushTools()] : []), this.described);
    this.zoom = new Zoom(this.stage, this.layers);
    this.brush = marks ? new Brush(this.zoom, this.marks) : null;
    /** @type {View[]} */
    this.views = [];
    this.masks = [];
    translate(root);
  }

  #tools() {
    const button = (label, sign, action) =>
      element("button", { onclick: action, "data-label": label, textContent: sign });
    const opacity = element("input", { type: "range", min: "0", max: "100", value: "100" });
    opacity.oninput = () => (this.heat.style.opacity = String(opacity.value / 100));
    const outline = element("input", { type: "checkbox", checked: true });
    outline.onchange = () => (this.outline.hidden = !outline.checked);
    return element(
      "div",
      { className: "tools" },
      element("label", {}, element("span", { "data-text": "opacity" }), opacity),
      element("label", {}, outline, element("span", { "data-text": "outline" })),
      button("zoom.in", "+", () => this.zoom.by(1.5)),
      button("zoom.out", "−", () => this.zoom.by(1 / 1.5)),
      element("button", { onclick: () => this.zoom.fit(), "data-text": "zoom.fit" }),
    );
  }

  #brushTools() {
    const tool = (name) => {
      const attributes = { "aria-pressed": "false", "data-text": name, onclick: () => this.toggleTool(name) };
      return element("button", attributes);
    };
    this.tools = { brush: tool("brush"), eraser: tool("eraser") };
    this.size = element("input", { type: "range", min: "5", max: "150", value: "30" });
    this.size.oninput = () => (this.brush.size = this.size.value / 1000);
    return element(
      "div",
      { className: "tools" },
      this.tools.brush,
      this.tools.eraser,
      element("label", {}, element("span", { "data-text": "brush.size" }), this.size),
      element("button", { "data-text": "unmark", onclick: () => this.unmark() }),
    );
  }

  /** Switches a tool on, or off if it is on. @param {"brush" | "eraser"} name */
  toggleTool(name) {
    this.brush.use(this.brush.tool === name ? "" : name);
    for (const [each, button] of Object.entries(this.tools)) button.ariaPressed = String(each === this.brush.tool);
    this.stage.dataset.label = this.brush.tool ? "stage.brush" : "stage";
    translate(this.stage.parentElement);
    if (!this.brush.tool) return;
    this.stage.focus({ preventScroll: true }); // where keys move it
    announce(t("stage.brush"));
  }

  /** @param {number} factor */
  resizeBrush(factor) {
    this.size.value = String(Math.round(this.size.value * factor));
    this.brush.size = this.size.value / 1000;
  }

  unmark() {
    this.marks.getContext("2d").clearRect(0, 0, this.marks.width, this.marks.height);
  }

  /**
   * Shows a sample, at first the view with the highest map.
   * @param {View[]} views @param {Calibration} calibration
   */
  show(views, calibration) {
    for (const { bitmap } of this.views) bitmap?.close();
    [this.views, this.calibration, this.index] = [views, calibration, -1];
    this.masks = views.map(() => null);
    const hottest = views.map((each) => (each.map ? Math.max(...decode(each.map).scores) : -Infinity));
    const buttons = views.map((each, index) =>
      element("button", { textContent: each.name, onclick: () => this.select(index) }),
    );
    this.viewButtons.replaceChildren(...(views.length > 1 ? buttons : []));
    this.select(hottest.indexOf(Math.max(...hottest)));
  }

  /** @param {number} index Of the view. */
  select(index) {
    this.#keepMarks();
    this.index = index;
    [...this.viewButtons.children].forEach((each, place) => (each.ariaPressed = String(place === index)));
    const { bitmap, map } = this.views[index];
    const [width, height] = bitmap ? [bitmap.width, bitmap.height] : [32 * (map?.columns ?? 4), 32 * (map?.rows ?? 3)];
    for (const each of [this.base, this.marks]) [each.width, each.height] = [width, height];
    if (bitmap) this.base.getContext("2d").drawImage(bitmap, 0, 0);
    for (const each of [this.heat, this.outline]) [each.width, each.height] = drawnSize(width, height);
    this.stage.style.aspectRatio = `${width} / ${height}`;
    this.described.textContent = bitmap ? "" : t("not.shown");
    if (map) {
      const scores = upsample(decode(map), this.heat.width, this.heat.height);
      drawHeat(this.heat, scores, this.calibration);
      const part = drawOutline(this.outline, scores, this.calibration.pixel_threshold);
      this.described.textContent += t("stage.mask", { part: percent(part, 2) });
    }
    if (this.masks[index]) this.marks.getContext("2d").drawImage(this.masks[index], 0, 0);
    this.zoom.show(width, height);
    this.brush?.center();
  }

  /** The masks of all views, as `maskOf` gives them. */
  markedMasks() {
    this.#keepMarks();
    return this.masks.map((each) => (each ? maskOf(each) : ""));
  }

  #keepMarks() {
    if (!this.brush || this.index < 0) return;
    const copy = element("canvas", { width: this.marks.width, height: this.marks.height });
    copy.getContext("2d").drawImage(this.marks, 0, 0);
    this.masks[this.index] = copy;
  }
}
