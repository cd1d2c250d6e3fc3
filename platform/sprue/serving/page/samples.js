/** Sorts files into samples: one image each, or one for each of the class's views. */

/**
 * A file belongs to the view whose name is in its own. If that is not so for all of them, they are taken in the order
 * of their names. Null if the number of files does not fit.
 * @param {File[]} files @param {string[]} views Empty where samples have one image.
 * @returns {File[][] | null}
 */
export function samplesOf(files, views) {
  const sorted = [...files].sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  if (views.length < 2) return sorted.map((each) => [each]);
  if (files.length === 0 || files.length % views.length) return null;
  const named = views.map((view) => sorted.filter((each) => each.name.toLowerCase().includes(view.toLowerCase())));
  const count = files.length / views.length;
  if (named.every((each) => each.length === count) && new Set(named.flat()).size === files.length) {
    return Array.from({ length: count }, (_, index) => named.map((each) => each[index]));
  }
  return Array.from({ length: count }, (_, index) => sorted.slice(index * views.length, (index + 1) * views.length));
}
