/** Images as the service reads them: pixels as they are stored, whatever a camera says about its rotation. */

import { element } from "./dom.js";

/**
 * Decodes an image; null if this browser does not know the format.
 * @param {Blob} file @returns {Promise<ImageBitmap | null>}
 */
export async function bitmapOf(file) {
  try {
    return await createImageBitmap(await withoutRotation(file));
  } catch {
    return null;
  }
}

/** A JPEG without its Exif segments, in which the rotation is. @param {Blob} file */
async function withoutRotation(file) {
  const bytes = new DataView(await file.arrayBuffer());
  if (bytes.byteLength < 4 || bytes.getUint16(0) !== 0xffd8) return file;
  const kept = [file.slice(0, 2)];
  let place = 2;
  while (place + 4 <= bytes.byteLength && bytes.getUint8(place) === 0xff && bytes.getUint8(place + 1) !== 0xda) {
    const end = place + 2 + bytes.getUint16(place + 2);
    if (bytes.getUint8(place + 1) !== 0xe1) kept.push(file.slice(place, end));
    place = end;
  }
  return new Blob([...kept, file.slice(place)], { type: "image/jpeg" });
}

/** A small copy of an image. @param {ImageBitmap | null} bitmap */
export function thumbnail(bitmap) {
  const canvas = element("canvas", { className: "thumbnail", "aria-hidden": "true" });
  if (!bitmap) return canvas;
  const factor = Math.min(1, 320 / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * factor));
  canvas.height = Math.max(1, Math.round(bitmap.height * factor));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}
