/** Elements. */

import { t } from "./texts.js";

/** @param {string} id @returns {any} */
export const byId = (id) => document.getElementById(id);

/**
 * Makes an element; its children are elements or text.
 * @param {string} tag @param {Record<string, any>} [attributes] Properties, or attributes that have a dash, or `role`.
 * @param {...(Node | string)} children @returns {any}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** Says something to those who listen to the page. @param {string} text */
export function announce(text) {
  byId("announcement").textContent = text;
}

/** Shows what went wrong, until it is shown again; empty for nothing. @param {string} text */
export function showProblem(text) {
  byId("problem").textContent = text;
}

/**
 * A decision in a symbol and words; the colour says it a third time.
 * @param {boolean} isAnomalous
 */
export function decisionWords(isAnomalous) {
  return t(isAnomalous ? "decision.bad" : "decision.good");
}

export const symbol = (isAnomalous) => (isAnomalous ? "▲" : "✓");
export const decisionClass = (isAnomalous) => (isAnomalous ? "bad" : "good");
