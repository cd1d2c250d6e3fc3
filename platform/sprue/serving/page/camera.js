/** Takes images from the camera. */

import { byId, showProblem } from "./dom.js";
import { t } from "./texts.js";

/** @param {(files: File[]) => void} take Gets the images of a sample. @param {() => string[]} views Their names. */
export function setUpCamera(take, views) {
  const [panel, video] = [byId("camera-view"), byId("camera-view").querySelector("video")];
  /** @type {File[]} */
  let taken = [];

  const describe = () => {
    const names = views();
    const values = { count: taken.length, needed: names.length, view: names[taken.length] };
    byId("shots").textContent = names.length > 1 ? t("camera.shot", values) : "";
  };

  const close = () => {
    video.srcObject?.getTracks().forEach((/** @type {MediaStreamTrack} */ track) => track.stop());
    video.srcObject = null;
    panel.hidden = true;
    byId("camera").focus();
  };

  byId("camera").onclick = async () => {
    if (!navigator.mediaDevices) {
      showProblem(t("camera.insecure"));
      return;
    }
    try {
      const wanted = { facingMode: "environment", width: { ideal: 1920 } };
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted });
      await video.play();
    } catch (error) {
      showProblem(t("camera.refused", { reason: error.message }));
      return;
    }
    taken = [];
    panel.hidden = false;
    describe();
    byId("shoot").focus();
  };

  byId("shoot").onclick = async () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    const time = new Date().toISOString().slice(11, 19);
    const name = `${t("camera.name")} ${time} ${views()[taken.length] ?? ""}`.trim();
    taken.push(new File([blob], `${name}.png`, { type: "image/png" }));
    if (taken.length >= Math.max(1, views().length)) take(taken.splice(0));
    describe();
  };

  byId("camera-off").onclick = close;
}
