// Scores one image: node score.mjs URL CLASS IMAGE. The key is in the environment variable SPRUE_KEY.
// Exit status 0: good. 1: anomalous. 2: there is no decision, and a part without a decision is not a good part.
import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";

const WITHIN_MS = 5000; // so long an answer is of use; upload, waiting and retries included
const STATION = "line-7";
const AGAIN = [408, 429, 500, 502, 503]; // after others the same request would fail again

async function score(url, className, image) {
  const end = Date.now() + WITHIN_MS;
  const requestId = `${STATION}:${randomUUID()}`; // of the kept decision, and of the service's log
  for (;;) {
    const left = Math.max(1, end - Date.now());
    let pause = 500;
    let problem;
    try {
      const answer = await fetch(`${url}/v1/classes/${encodeURIComponent(className)}/score`, {
        method: "POST",
        body: image,
        headers: {
          Authorization: `Bearer ${process.env.SPRUE_KEY ?? ""}`,
          "Content-Type": "application/octet-stream",
          "X-Request-Timeout-Ms": String(left),
          "X-Request-Id": requestId,
          "X-Station": STATION,
        },
        signal: AbortSignal.timeout(left + 1000),
      });
      if (answer.ok) return await answer.json();
      problem = new Error(`${answer.status} ${await answer.text()}`);
      if (!AGAIN.includes(answer.status)) throw Object.assign(problem, { final: true });
      pause = 1000 * Number(answer.headers.get("Retry-After") ?? 0.5);
    } catch (error) {
      if (error.final) throw error;
      problem = error; // no network, or the service is starting
    }
    if (Date.now() + pause >= end) {
      throw new Error(`${requestId}: no answer in ${WITHIN_MS} ms: ${problem.cause ?? problem}`);
    }
    await sleep(pause);
  }
}

const [url, className, file] = process.argv.slice(2);
try {
  const result = await score(url, className, await readFile(file));
  console.log(JSON.stringify(result));
  process.exitCode = result.is_anomalous ? 1 : 0;
} catch (error) {
  console.error(error.message);
  process.exitCode = 2;
}
