/** The review queue: alarms and near misses, each of which gets a verdict. */

import * as api from "./api.js";
import { lazyThumbnail, verdictWords } from "./decisions.js";
import { announce, byId, decisionWords, element, showProblem, symbol } from "./dom.js";
import { decisionBadge, facts } from "./facts.js";
import { bitmapOf } from "./images.js";
import { t, time } from "./texts.js";
import { Viewer, viewsOf } from "./viewer.js";

/** @param {() => api.Class | undefined} served @param {(error: Error) => void} fail */
export function setUpReview(served, fail) {
  const viewer = new Viewer(byId("review-viewer"), true);
  /** @type {api.PastDecision[]} */
  let queue = [];
  let shown = -1;
  let busy = false;
  /** The decision whose images are seen: only that one can be judged. @type {api.PastDecision | null} */
  let seen = null;

  /** Loads the queue, with a decision to show at its head if there is one. @param {api.PastDecision} [first] */
  async function load(first) {
    const chosen = served();
    if (!chosen) return;
    try {
      const found = await api.decisions(chosen.model.name, true);
      if (served() !== chosen) return;
      queue = first ? [first, ...found.filter((each) => each.key !== first.key)] : found;
      await show(queue.length ? 0 : -1);
    } catch (error) {
      queue = [];
      byId("review-work").hidden = true;
      fail(error);
    }
  }

  async function show(index) {
    shown = index;
    seen = null;
    byId("review-work").hidden = index < 0;
    describeQueue();
    if (index < 0) return;
    const decision = queue[index];
    byId("review-decision").replaceChildren(decisionBadge(decision.is_anomalous));
    byId("review-facts").replaceChildren();
    byId("reviewed").textContent = decision.review ? verdictWords(decision.review) : "";
    try {
      showProblem("");
      const chosen = served();
      const files = await api.images(decision);
      const score = await api.score(chosen, files, decision.request_id, false);
      const [calibration, ...bitmaps] = await Promise.all([api.calibration(score.model), ...files.map(bitmapOf)]);
      if (queue[shown] !== decision) return;
      const versions = { then: decision.model.version, now: score.model.version };
      const more = [
        [t("fact.at"), time(decision.at)],
        ...(decision.station ? [[t("fact.station"), decision.station]] : []),
        ...(versions.then === versions.now ? [] : [[t("fact.decided"), t("version.other", versions)]]),
      ];
      byId("review-facts").replaceChildren(...facts({ ...score, ...recorded(decision) }, calibration, more));
      viewer.show(viewsOf(score, bitmaps), calibration);
      seen = decision;
    } catch (error) {
      if (queue[shown] === decision) fail(error);
    }
  }

  function describeQueue() {
    const open = queue.filter((each) => !each.review).length;
    byId("queue-count").textContent = open ? t("queue.count", { count: open }) : t("queue.empty");
    byId("queue").replaceChildren(
      ...queue.map((each, index) => {
        const verdict = each.review ? t(`verdict.${each.review.verdict}`) : t(`kept.${each.kept}`);
        const attributes = { onclick: () => show(index), "aria-current": String(index === shown) };
        const words = `${symbol(each.is_anomalous)} ${decisionWords(each.is_anomalous)}`;
        return element("li", {}, element("button", attributes, lazyThumbnail(each), words, element("span", {}, verdict)));
      }),
    );
    byId("queue").querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  async function judge(verdict) {
    const decision = queue[shown];
    if (!decision || busy || seen !== decision) return;
    const masks = viewer.markedMasks();
    if (verdict === "good" && masks.some(Boolean)) {
      showProblem(t("verdict.marked"));
      return;
    }
    busy = true;
    try {
      const { key, at } = decision;
      decision.review = await api.sendReview(decision.model.name, { key, at, verdict, masks });
      announce(verdictWords(decision.review));
      const next = queue.findIndex((each, index) => index > shown && !each.review);
      await show(next < 0 ? shown : next);
    } catch (error) {
      fail(error);
    } finally {
      busy = false;
    }
  }

  for (const each of document.querySelectorAll("[data-verdict]")) each.onclick = () => judge(each.dataset.verdict);
  byId("reload-queue").onclick = () => load();
  const step = (by) => show(Math.min(Math.max(shown + by, 0), queue.length - 1));
  const keys = {
    g: () => judge("good"),
    d: () => judge("defective"),
    u: () => judge("unsure"),
    j: () => step(1),
    k: () => step(-1),
    b: () => viewer.toggleTool("brush"),
    e: () => viewer.toggleTool("eraser"),
    x: () => viewer.unmark(),
    "[": () => viewer.resizeBrush(1 / 1.3),
    "]": () => viewer.resizeBrush(1.3),
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("select, dialog, input:not([type=range], [type=checkbox])");
    if (byId("review-work").hidden || byId("review").hidden || typing || event.repeat) return;
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key.toLowerCase()]) return;
    event.preventDefault();
    keys[event.key.toLowerCase()]();
  });
  return { load, refresh: () => queue.length && show(shown) };
}

/** What was decided then, which stands where another version decides now. @param {api.PastDecision} decision */
const recorded = ({ score, p_value, alpha, threshold, is_anomalous, model }) =>
  ({ score, p_value, alpha, threshold, is_anomalous, model });
