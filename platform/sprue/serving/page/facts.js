/** A decision in words and colour, its numbers, and what another alpha would do. */

import { decide } from "./calibration.js";
import { decisionClass, decisionWords, element, symbol } from "./dom.js";
import { strip, summary } from "./strip.js";
import { number, percent, t } from "./texts.js";

/** @typedef {import("./api.js").Calibration} Calibration */

/** @param {boolean} isAnomalous */
export function decisionBadge(isAnomalous) {
  const sign = element("span", { className: "symbol", "aria-hidden": "true" }, symbol(isAnomalous));
  return element("p", { className: `decision ${decisionClass(isAnomalous)}` }, sign, decisionWords(isAnomalous));
}

/** @param {[string, string][]} pairs */
export const list = (pairs) =>
  element("dl", {}, ...pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));

/**
 * What stands behind a decision.
 * @param {import("./api.js").Score} score @param {Calibration} calibration
 * @param {[string, string][]} more Further numbers.
 */
export function facts(score, calibration, more = []) {
  const guarantee = t(`fact.guarantee.${calibration.folds > 1 ? "folds" : calibration.guarantee}`, {
    alpha: percent(score.alpha),
    confidence: percent(calibration.confidence),
  });
  const pairs = [
    [t("fact.p"), number(score.p_value)],
    [t("fact.score"), number(score.score)],
    [t("fact.threshold"), number(score.threshold)],
    ...(score.images ?? []).map((each) => [t("fact.view", { view: each.view }), number(each.score)]),
    [t("fact.alpha"), guarantee],
    [t("fact.model"), t("fact.version", score.model)],
    ...more,
  ];
  const why = t(score.is_anomalous ? "decision.why.bad" : "decision.why.good");
  return [element("p", {}, why), list(pairs), ...whatIf(score, calibration)];
}

/** The strip, and a slider for alpha that moves a second threshold in it. */
function whatIf(score, calibration) {
  const slider = element("input", { type: "range", min: "0", max: "100", id: `alpha-${crypto.getRandomValues(new Uint32Array(1))}` });
  // Logarithmic, from 0.1 % to 50 %.
  const alphaAt = (place) => Number((0.001 * 500 ** (place / 100)).toPrecision(2));
  slider.value = String(Math.round((100 * Math.log(calibration.alpha / 0.001)) / Math.log(500)));
  const [label, result] = [element("label", { htmlFor: slider.id }), element("output", {})];
  const chart = element("div", {});
  const update = (alpha) => {
    const other = decide(calibration, score.score, alpha);
    chart.replaceChildren(strip(calibration, score.score, score.is_anomalous, other.threshold));
    label.textContent = t("alpha.label", { alpha: percent(alpha) });
    slider.setAttribute("aria-valuetext", percent(alpha));
    const values = { threshold: number(other.threshold), decision: decisionWords(other.isAnomalous) };
    result.textContent = [
      Number.isFinite(other.threshold)
        ? t("alpha.result", values)
        : t("alpha.none", { count: calibration.scores.length }),
      Number.isFinite(other.threshold) ? t("alpha.expected", { count: Math.round(1000 * other.rate) }) : "",
      alpha === calibration.alpha ? t("alpha.same") : "",
    ].join(" ");
  };
  slider.oninput = () => update(alphaAt(Number(slider.value)));
  update(calibration.alpha);
  return [
    chart,
    element("p", { className: "quiet" }, summary(calibration, score.score)),
    element("div", { className: "what-if" }, label, slider, element("p", {}, result)),
  ];
}
