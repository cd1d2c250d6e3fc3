/** The service's decision rule for any alpha; see sprue.inference.calibration, which it repeats. */

/** @typedef {import("./api.js").Calibration} Calibration */

/**
 * Which calibration score, counted from the highest, is the threshold; 0 if there are too few samples.
 * @param {Calibration} calibration @param {number} alpha
 */
export function thresholdRank(calibration, alpha) {
  const count = calibration.scores.length;
  if (calibration.guarantee === "marginal") return Math.floor(alpha * (count + 1) + 1e-9);
  // The rate of the k-th highest score is at most alpha with the probability that Binomial(n, alpha) reaches k.
  let rank = 0;
  let below = 0;
  for (let k = 1; k <= count; k++) {
    below += binomial(count, k - 1, alpha);
    if (1 - below < calibration.confidence) break;
    rank = k;
  }
  return rank;
}

/** Probability of k successes in n trials. @param {number} n @param {number} k @param {number} p */
function binomial(n, k, p) {
  let log = k * Math.log(p) + (n - k) * Math.log1p(-p);
  for (let i = 1; i <= k; i++) log += Math.log((n - k + i) / i);
  return Math.exp(log);
}

/**
 * What an alpha decides about a score; the threshold is infinite where there are too few samples.
 * @param {Calibration} calibration @param {number} score @param {number} alpha
 */
export function decide(calibration, score, alpha) {
  const { scores } = calibration;
  const rank = thresholdRank(calibration, alpha);
  const threshold = rank ? scores[scores.length - rank] : Infinity;
  return { threshold, isAnomalous: atLeast(scores, score) < rank, rate: rank / (scores.length + 1) };
}

/** Number of calibration scores that are at least as high. @param {number[]} scores @param {number} score */
export const atLeast = (scores, score) => scores.filter((each) => each >= score).length;
