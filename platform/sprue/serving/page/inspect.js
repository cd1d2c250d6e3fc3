/** Inspects images that people drop, paste, pick or take. */

import * as api from "./api.js";
import { setUpCamera } from "./camera.js";
import { announce, byId, decisionWords, element, showProblem, symbol } from "./dom.js";
import { decisionBadge, facts } from "./facts.js";
import { bitmapOf, thumbnail } from "./images.js";
import { samplesOf } from "./samples.js";
import { number, t } from "./texts.js";
import { Viewer, viewsOf } from "./viewer.js";

/**
 * @param {() => api.Class | undefined} served The chosen class.
 * @param {(error: Error) => void} fail Shows an error.
 */
export function setUpInspect(served, fail) {
  const viewer = new Viewer(byId("inspect-viewer"), false);
  const list = byId("samples");
  /** @type {{name: string, files: File[], small: Node, score: api.Score, calibration: api.Calibration}[]} */
  let inspected = [];
  let shown = -1;
  const views = () => served()?.views ?? [];

  async function inspect(files) {
    const chosen = served();
    if (!chosen || !files.length) return;
    showProblem("");
    const samples = samplesOf(files, views());
    if (!samples) {
      const values = { count: views().length, views: views().join(", "), given: files.length };
      showProblem(t("wrong.count", values));
      return;
    }
    announce(t("scoring"));
    document.body.setAttribute("aria-busy", "true");
    const problems = [];
    for (const sample of samples) {
      try {
        const found = await inspectSample(chosen, sample);
        if (served() !== chosen) break;
        inspected.push(found);
        await show(inspected.length - 1);
      } catch (error) {
        problems.push(error);
      }
    }
    document.body.removeAttribute("aria-busy");
    if (problems.length) fail(problems.length === 1 ? problems[0] : new Error(problems.map((e) => e.message).join("\n")));
  }

  async function show(index) {
    shown = index;
    byId("result").hidden = byId("clear").hidden = index < 0;
    list.hidden = inspected.length < 2;
    list.replaceChildren(...inspected.map(button));
    if (index < 0) return;
    const { name, files, score, calibration } = inspected[index];
    const heading = [element("h2", {}, name), decisionBadge(score.is_anomalous)];
    byId("inspect-facts").replaceChildren(...heading, ...facts(score, calibration));
    const bitmaps = await Promise.all(files.map(bitmapOf)); // those of all samples would fill the memory
    if (inspected[shown]?.score !== score) return;
    viewer.show(viewsOf(score, bitmaps), calibration);
    announce(t("announce", { name, decision: decisionWords(score.is_anomalous), p: number(score.p_value) }));
  }

  function button(sample, index) {
    const name = element("span", { className: "name" }, sample.name);
    const word = `${symbol(sample.score.is_anomalous)} ${decisionWords(sample.score.is_anomalous)}`;
    const attributes = { onclick: () => show(index), "aria-current": String(index === shown) };
    return element("li", {}, element("button", attributes, sample.small, name, word));
  }

  function clear() {
    inspected = [];
    show(-1);
  }

  const input = byId("files");
  byId("pick").onclick = () => input.click();
  input.onchange = () => {
    inspect([...input.files]);
    input.value = "";
  };
  byId("clear").onclick = () => {
    clear();
    byId("pick").focus();
  };
  document.addEventListener("paste", (event) => {
    if (!byId("inspect").hidden) inspect([...event.clipboardData.files]);
  });
  setUpDrop(inspect);
  setUpCamera(inspect, views);
  return {
    clear,
    refresh: () => {
      const values = { count: views().length, views: views().join(", ") };
      byId("views-needed").textContent = views().length > 1 ? t("drop.views", values) : "";
      show(shown);
    },
  };
}

async function inspectSample(chosen, sample) {
  const name = sample.map((each) => each.name).join(", ");
  const score = await api.score(chosen, sample, name, true);
  const [calibration, bitmap] = await Promise.all([api.calibration(score.model), bitmapOf(sample[0])]);
  return { name: sample[0].name, files: sample, small: thumbnail(bitmap), score, calibration };
}

/** Takes files that are dropped anywhere on the page. @param {(files: File[]) => void} take */
function setUpDrop(take) {
  const over = (event, is) => {
    if (byId("inspect").hidden) return;
    event.preventDefault();
    byId("drop").classList.toggle("over", is);
  };
  document.addEventListener("dragover", (event) => over(event, true));
  document.addEventListener("dragleave", (event) => over(event, false));
  document.addEventListener("drop", (event) => {
    over(event, false);
    if (!byId("inspect").hidden) take([...event.dataTransfer.files]);
  });
}
