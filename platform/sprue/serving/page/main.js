/** The inspection page: its tabs, the class, the language, the colours and the key. */

import * as api from "./api.js";
import { setUpDecisions } from "./decisions.js";
import { byId, element, showProblem } from "./dom.js";
import { setUpInspect } from "./inspect.js";
import { setUpReview } from "./review.js";
import { preferredLanguage, t, useLanguage } from "./texts.js";

const TABS = ["inspect", "last", "review"];

/** @type {api.Class[]} */
let classes = [];
const served = () => classes.find((each) => each.model.name === byId("class").value);

/** @param {Error & {code?: string}} error */
function fail(error) {
  if (error.code === "unauthorized") askForKey();
  else showProblem(error.message);
}

let review;
const inspect = setUpInspect(served, fail);
const decisions = setUpDecisions(served, fail, (decision) => openTab("review", () => review.load(decision)));
review = setUpReview(served, fail);
const loaders = { inspect: () => {}, last: decisions.load, review: () => review.load() };

/** @param {string} name @param {() => void} [load] */
function openTab(name, load = loaders[name]) {
  showProblem("");
  for (const each of TABS) {
    byId(each).hidden = each !== name;
    byId(`tab-${each}`).ariaSelected = String(each === name);
    byId(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  document.title = t("title", { tab: t(`tab.${name}`) });
  history.replaceState(null, "", `#${name}`);
  load();
}

const openedTab = () => TABS.find((each) => !byId(each).hidden);

for (const [index, name] of TABS.entries()) {
  byId(`tab-${name}`).onclick = () => openTab(name);
  byId(`tab-${name}`).onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = TABS[(index + step + TABS.length) % TABS.length];
    openTab(next);
    byId(`tab-${next}`).focus();
  };
}

async function loadClasses() {
  try {
    classes = await api.classes();
  } catch (error) {
    fail(error);
    return;
  }
  byId("change-key").hidden = !api.key.get();
  const before = byId("class").value || sessionStorage.getItem("sprue.class");
  byId("class").replaceChildren(...classes.map(({ model }) => element("option", { value: model.name }, model.name)));
  if (classes.some((each) => each.model.name === before)) byId("class").value = before;
  inspect.refresh();
  loaders[openedTab()]();
}

byId("class").onchange = () => {
  sessionStorage.setItem("sprue.class", byId("class").value);
  showProblem("");
  inspect.clear();
  inspect.refresh();
  loaders[openedTab()]();
};

function askForKey() {
  const dialog = byId("key-dialog");
  byId("key-problem").textContent = classes.length || !api.key.get() ? "" : t("key.wrong");
  byId("key").value = "";
  if (!dialog.open) dialog.showModal();
}

byId("change-key").onclick = askForKey;
byId("key-dialog").onclose = () => {
  if (byId("key-dialog").returnValue !== "ok") {
    if (!classes.length) showProblem(t("error.unauthorized"));
    return;
  }
  api.key.set(byId("key").value.trim());
  showProblem("");
  loadClasses();
};

function useTheme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("sprue.theme", name);
}
byId("theme").onchange = () => useTheme(byId("theme").value);
byId("theme").value = localStorage.getItem("sprue.theme") ?? "";
useTheme(byId("theme").value);

byId("language").onchange = async () => {
  localStorage.setItem("sprue.language", byId("language").value);
  await useLanguage(byId("language").value);
  inspect.refresh();
  document.title = t("title", { tab: t(`tab.${openedTab()}`) });
  if (openedTab() === "last") decisions.load();
  if (openedTab() === "review") review.refresh();
};
byId("language").value = preferredLanguage();
await useLanguage(byId("language").value);
const wanted = location.hash.slice(1);
openTab(TABS.includes(wanted) ? wanted : "inspect", () => {});
await loadClasses();
