/** A histogram of the calibration's scores with a score and thresholds, as SVG. */

import { atLeast } from "./calibration.js";
import { number, t } from "./texts.js";

const [WIDTH, HEIGHT, BASE, BINS] = [340, 126, 96, 24];

/** @param {string} tag @param {Record<string, string | number>} attributes @param {string} [text] */
function svg(tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.textContent = text;
  return made;
}

/**
 * @param {import("./api.js").Calibration} calibration @param {number} score @param {boolean} isAnomalous
 * @param {number} other A threshold to compare with; infinite for none.
 */
export function strip(calibration, score, isAnomalous, other) {
  const { scores, threshold } = calibration;
  const [low, high] = [scores[0], scores[scores.length - 1]];
  const span = Math.max(high - low, 1e-9);
  // A far score would press the calibration together, so it stands at the edge.
  const [from, to] = [Math.max(Math.min(low, score), low - span / 2), Math.min(Math.max(high, score), high + span)];
  const x = (value) => 20 + ((Math.min(Math.max(value, from), to) - from) / (to - from)) * (WIDTH - 40);
  const beyond = score > to ? ` (${t("strip.beyond")}) »` : "";
  const label = `${t("strip.title", { count: scores.length })}. ${summary(calibration, score)}`;
  const root = svg("svg", { class: "strip", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });

  const counts = new Array(BINS).fill(0);
  for (const each of scores) counts[Math.min(BINS - 1, Math.floor(((each - low) / span) * BINS))]++;
  const width = (x(high) - x(low)) / BINS;
  counts.forEach((count, bin) => {
    const height = (count / Math.max(...counts)) * 44;
    const place = { x: x(low) + bin * width, y: BASE - height, width: Math.max(1, width - 1), height };
    root.append(svg("rect", { class: "bar", ...place }));
  });
  root.append(svg("line", { class: "axis", x1: 20, x2: WIDTH - 20, y1: BASE, y2: BASE }));
  const line = (kind, value) =>
    root.append(svg("line", { class: kind, x1: x(value), x2: x(value), y1: 38, y2: BASE + 6 }));
  line("threshold", threshold);
  if (Number.isFinite(other) && other !== threshold) line("other", other);
  root.append(anchored(x(threshold), BASE + 20, `${t("strip.threshold")} ${number(threshold)}`, "quiet"));
  const mark = x(score);
  const kind = `mark ${isAnomalous ? "bad" : "good"}`;
  root.append(svg("path", { class: kind, d: `M${mark} ${BASE - 46} l-8 -14 h16 z` }));
  root.append(svg("rect", { class: kind, x: mark - 1, y: BASE - 46, width: 2, height: 46 }));
  root.append(anchored(mark, 24, `${t("strip.this")} ${number(score)}${beyond}`, ""));
  return root;
}

/** @param {import("./api.js").Calibration} calibration @param {number} score */
export const summary = (calibration, score) =>
  t("strip.summary", { above: atLeast(calibration.scores, score), count: calibration.scores.length });

function anchored(x, y, text, kind) {
  const anchor = x < WIDTH / 3 ? "start" : x > (2 * WIDTH) / 3 ? "end" : "middle";
  const shift = { start: -10, middle: 0, end: 10 }[anchor];
  return svg("text", { x: x + shift, y, "text-anchor": anchor, class: kind }, text);
}
