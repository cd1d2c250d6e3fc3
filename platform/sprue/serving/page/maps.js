/** Anomaly maps as colours and outlines; see sprue.inference.heatmap, whose scale and colours they have. */

/** @typedef {import("./api.js").Calibration} Calibration */
/** @typedef {{rows: number, columns: number, scores: Float32Array}} Map A map at the feature maps' resolution. */

const SIDE = 1024;
/** Longer side in pixels of the drawn map. It is smooth, so that more show nothing; fewer make a coarse outline. */

/** @param {import("./api.js").AnomalyMap} map @returns {Map} */
export function decode(map) {
  const bytes = Uint8Array.from(atob(map.scores), (each) => each.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const scores = new Float32Array(map.rows * map.columns).map((_, index) => view.getFloat32(4 * index, true));
  return { rows: map.rows, columns: map.columns, scores };
}

/** Size of the drawn map of an image. @param {number} width @param {number} height */
export function drawnSize(width, height) {
  const factor = SIDE / Math.max(width, height);
  return [Math.max(1, Math.round(width * factor)), Math.max(1, Math.round(height * factor))];
}

/**
 * Upsamples a map, bilinearly between the centres of its positions.
 * @param {Map} map @param {number} width @param {number} height
 */
export function upsample(map, width, height) {
  const along = (size, positions) =>
    Array.from({ length: size }, (_, pixel) => {
      const place = Math.max(0, ((pixel + 0.5) * positions) / size - 0.5);
      const low = Math.min(Math.floor(place), positions - 1);
      return [low, Math.min(low + 1, positions - 1), place - low];
    });
  const [across, down] = [along(width, map.columns), along(height, map.rows)];
  const result = new Float32Array(width * height);
  down.forEach(([top, bottom, y], row) => {
    const [upper, lower] = [top * map.columns, bottom * map.columns];
    across.forEach(([left, right, x], column) => {
      const above = map.scores[upper + left] * (1 - x) + map.scores[upper + right] * x;
      const below = map.scores[lower + left] * (1 - x) + map.scores[lower + right] * x;
      result[row * width + column] = above * (1 - y) + below * y;
    });
  });
  return result;
}

const COLOURS = [
  [0, [0, 0, 4]],
  [140 / 255, [208, 53, 43]],
  [1, [252, 255, 164]],
];

/** @param {number} heat From 0 to 1. */
function colour(heat) {
  const [from, to] = heat < COLOURS[1][0] ? COLOURS : COLOURS.slice(1);
  const part = (heat - from[0]) / (to[0] - from[0]);
  return from[1].map((low, channel) => low + part * (to[1][channel] - low));
}

/**
 * Draws the heat: the more opaque the hotter.
 * @param {HTMLCanvasElement} canvas @param {Float32Array} scores @param {Calibration} calibration
 */
export function drawHeat(canvas, scores, calibration) {
  const { width, height } = canvas;
  const pixels = new ImageData(width, height);
  const span = 2 * Math.max(calibration.high - calibration.low, 1e-12);
  scores.forEach((score, index) => {
    const heat = Math.min(1, Math.max(0, (score - calibration.low) / span));
    const [red, green, blue] = colour(heat);
    pixels.data.set([red, green, blue, 255 * Math.min(0.75, Math.max(0, heat * 1.6 - 0.2))], 4 * index);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/**
 * Draws the predicted mask's border, blue inside white, so that it shows on any image; returns the mask's fraction.
 * @param {HTMLCanvasElement} canvas @param {Float32Array} scores @param {number} threshold
 */
export function drawOutline(canvas, scores, threshold) {
  const { width, height } = canvas;
  const pixels = new ImageData(width, height);
  const line = Math.max(1, Math.round(Math.min(width, height) / 400));
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && scores[y * width + x] > threshold;
  /** Whether all eight pixels at a distance are inside the mask. */
  const deep = (x, y, d) =>
    inside(x - d, y) && inside(x + d, y) && inside(x, y - d) && inside(x, y + d) &&
    inside(x - d, y - d) && inside(x + d, y + d) && inside(x + d, y - d) && inside(x - d, y + d);
  let count = 0;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!inside(x, y)) continue;
      count++;
      if (!deep(x, y, line)) pixels.data.set([255, 255, 255, 255], 4 * (y * width + x));
      else if (!deep(x, y, 3 * line)) pixels.data.set([21, 101, 255, 255], 4 * (y * width + x));
    }
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return count / (width * height);
}
