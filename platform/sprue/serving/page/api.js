/** What the page asks the service; the key stays in this tab. */

import { hasText, t } from "./texts.js";

const KEY = "sprue.key";

/** Seconds that a request waits for its key's rate limit; the images of a list come all at once. */
const PATIENCE_S = 10;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  /** @param {string} value */
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** An answer that is not a success; the message is for people, in their language. */
export class ServiceError extends Error {
  /** @param {string} code @param {string} message @param {string} [name] What it is about. */
  constructor(code, message, name = "") {
    const known = `error.${code}`;
    super(hasText(known) ? t(known, { name, message }) : t("error.other", { message }));
    this.code = code;
  }
}

/** @param {string} path @param {RequestInit} options */
async function patientFetch(path, options) {
  for (let left = PATIENCE_S; ; ) {
    const response = await fetch(path, options);
    const seconds = Number(response.headers.get("Retry-After"));
    left -= seconds;
    if (response.status !== 429 || left < 0) return response;
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  }
}

/**
 * @param {string} path @param {RequestInit} [options] @param {string} [name] What the request is about, for messages.
 * @returns {Promise<Response>}
 */
async function request(path, options = {}, name = "") {
  const headers = { ...options.headers, ...(key.get() ? { Authorization: `Bearer ${key.get()}` } : {}) };
  let response;
  try {
    response = await patientFetch(path, { ...options, headers });
  } catch {
    throw new ServiceError("unreachable", "");
  }
  if (response.ok) return response;
  const error = (await response.json().catch(() => null))?.error;
  throw new ServiceError(error?.code ?? "other", error?.message ?? `status ${response.status}`, name);
}

const of = (model) => `v1/classes/${encodeURIComponent(model)}`;

/** @returns {Promise<Class[]>} */
export const classes = async () => (await (await request("v1/classes")).json()).classes;

/** The calibrations of versions, by their digests. @type {Map<string, Calibration>} */
const calibrations = new Map();

/** What a version that has scored compares with. @param {Model} model @returns {Promise<Calibration>} */
export async function calibration(model) {
  const known = calibrations.get(model.digest);
  if (known) return known;
  const found = await (await request(`${of(model.name)}/calibration`)).json();
  calibrations.set(found.model.digest, found); // of another version, if that has just replaced it
  return found;
}

/**
 * Scores a sample: a file for each of the class's views.
 * @param {Class} served @param {Blob[]} files @param {string} name
 * @param {boolean} record Whether the service keeps and counts the decision.
 * @returns {Promise<Score>}
 */
export async function score(served, files, name, record) {
  const form = new FormData();
  files.forEach((file, index) => form.append(served.views?.[index] ?? "image", file, `image-${index}`));
  const options = { method: "POST", body: form };
  return (await request(`${of(served.model.name)}/score?maps=true&record=${record}`, options, name)).json();
}

/** @param {string} model @param {boolean} queue @returns {Promise<PastDecision[]>} */
export const decisions = async (model, queue) =>
  (await (await request(`${of(model)}/decisions?queue=${queue}&limit=${queue ? 30 : 60}`)).json()).decisions;

/** @param {PastDecision} decision @returns {Promise<Blob[]>} */
export const images = (decision) =>
  Promise.all(
    decision.images.map(async (digest) =>
      (await request(`v1/images/${digest}?at=${encodeURIComponent(decision.at)}`)).blob(),
    ),
  );

/** @param {string} model @param {object} review @returns {Promise<Review>} */
export const sendReview = async (model, review) =>
  (
    await request(`${of(model)}/reviews`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(review),
    })
  ).json();

/**
 * @typedef {{name: string, version: number, digest: string}} Model
 * @typedef {{dataset: string, class_name: string, model: Model, views?: string[]}} Class
 * @typedef {{model: Model, scores: number[], alpha: number, threshold: number, guarantee: "marginal" | "conditional",
 *   confidence: number, folds: number, low: number, high: number, pixel_threshold: number}} Calibration
 * @typedef {{view: string, rows: number, columns: number, scores: string}} AnomalyMap
 * @typedef {{score: number, p_value: number, alpha: number, threshold: number, is_anomalous: boolean, model: Model,
 *   images?: {view: string, score: number}[], maps: AnomalyMap[]}} Score
 * @typedef {{verdict: string, reviewer: string, at: string}} Review
 * @typedef {{key: string, at: string, request_id: string, station: string, model: Model, score: number,
 *   p_value: number, alpha: number, threshold: number, is_anomalous: boolean, kept: string, images: string[],
 *   review?: Review}} PastDecision
 */
