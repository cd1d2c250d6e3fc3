/** The page's texts, in one file for each language, and numbers and times as that language writes them. */

const LANGUAGES = ["en", "de"];

/** @type {Record<string, string>} */
let texts = {};
let language = "en";

/** The language that was chosen here, else the browser's, else English. */
export function preferredLanguage() {
  const wanted = [localStorage.getItem("sprue.language"), ...navigator.languages.map((each) => each.slice(0, 2))];
  return wanted.find((each) => LANGUAGES.includes(each)) ?? "en";
}

/**
 * Loads a language, and writes its texts into the page.
 * @param {string} name
 */
export async function useLanguage(name) {
  texts = await (await fetch(`page/texts.${name}.json`)).json();
  language = name;
  document.documentElement.lang = name;
  translate(document);
}

/**
 * Writes the texts of elements that name them: `data-text` their content, `data-label` their accessible name.
 * @param {ParentNode} root
 */
export function translate(root) {
  for (const each of root.querySelectorAll("[data-text]")) each.textContent = t(each.dataset.text);
  for (const each of root.querySelectorAll("[data-label]")) each.setAttribute("aria-label", t(each.dataset.label));
}

/**
 * A text with its `{values}`.
 * @param {string} key
 * @param {Record<string, string | number>} [values]
 */
export function t(key, values = {}) {
  return (texts[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

/** Whether there is a text. @param {string} key */
export const hasText = (key) => key in texts;

/** A number of up to four significant digits. @param {number} value */
export const number = (value) => new Intl.NumberFormat(language, { maximumSignificantDigits: 4 }).format(value);

/** @param {number} value @param {number} [digits] After the point. */
export const percent = (value, digits = 1) =>
  new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: digits }).format(value);

/** @param {string} iso */
export const time = (iso) =>
  new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "medium" }).format(new Date(iso));
