/** The last decisions about a class, with their images. */

import * as api from "./api.js";
import { byId, decisionClass, decisionWords, element, symbol } from "./dom.js";
import { bitmapOf, thumbnail } from "./images.js";
import { number, t, time } from "./texts.js";

/**
 * @param {() => api.Class | undefined} served @param {(error: Error) => void} fail
 * @param {(decision: api.PastDecision) => void} open Shows a decision whose images are kept.
 */
export function setUpDecisions(served, fail, open) {
  async function load() {
    const chosen = served();
    if (!chosen) return;
    try {
      const found = await api.decisions(chosen.model.name, false);
      if (served() !== chosen) return;
      byId("last-empty").hidden = found.length > 0;
      byId("last-list").replaceChildren(...found.map((each) => element("li", {}, card(each))));
    } catch (error) {
      byId("last-list").replaceChildren();
      fail(error);
    }
  }

  function card(decision) {
    const words = [
      element("span", { className: `word ${decisionClass(decision.is_anomalous)}` },
        `${symbol(decision.is_anomalous)} ${decisionWords(decision.is_anomalous)}`),
      element("span", {}, `${t("fact.p")} ${number(decision.p_value)}`),
      element("span", {}, [time(decision.at), decision.station].filter(Boolean).join(", ")),
      ...(decision.review ? [element("span", {}, verdictWords(decision.review))] : []),
    ];
    if (!decision.kept) return element("div", { className: "card" }, noImage("image.none"), ...words);
    return element("button", { className: "card", onclick: () => open(decision) }, lazyThumbnail(decision), ...words);
  }

  byId("reload-last").onclick = load;
  return { load };
}

/** @param {api.Review} review */
export function verdictWords(review) {
  const reviewer = review.reviewer || t("verdict.anonymous");
  return t("verdict.saved", { verdict: t(`verdict.${review.verdict}`), reviewer, at: time(review.at) });
}

const noImage = (key) => element("span", { className: "no-image" }, t(key));

/** A thumbnail that is loaded when it comes into sight. @param {api.PastDecision} decision */
export function lazyThumbnail(decision) {
  const place = element("span", { className: "no-image", "aria-hidden": "true" });
  const observer = new IntersectionObserver(async ([entry]) => {
    if (!entry.isIntersecting) return;
    observer.disconnect();
    try {
      const [first] = await api.images({ ...decision, images: decision.images.slice(0, 1) });
      place.replaceWith(thumbnail(await bitmapOf(first)));
    } catch {
      place.replaceWith(noImage("image.gone"));
    }
  });
  observer.observe(place);
  return place;
}
