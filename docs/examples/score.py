"""Scores one image: ``python score.py URL CLASS IMAGE``. The key is in the environment variable SPRUE_KEY.

Exit status 0: good. 1: anomalous. 2: there is no decision, and a part without a decision is not a good part.
"""

import json
import os
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import quote

import requests

WITHIN_S = 5.0  # so long an answer is of use; upload, waiting and retries included
STATION = "line-7"


def score(session: requests.Session, url: str, class_name: str, image: bytes) -> dict:
    """The service's answer; raises RuntimeError if there is none in time, or the request is wrong."""
    end, request_id = time.monotonic() + WITHIN_S, f"{STATION}:{uuid.uuid4().hex}"
    while True:
        left_s = end - time.monotonic()
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Request-Timeout-Ms": str(max(1, int(1000 * left_s))),
            "X-Request-Id": request_id,  # of the kept decision, and of the service's log
            "X-Station": STATION,
        }
        try:
            path = f"{url}/v1/classes/{quote(class_name)}/score"
            answer = session.post(path, image, headers=headers, timeout=left_s + 1)
            if answer.status_code == 200:
                return answer.json()
            problem = f"{answer.status_code} {answer.text}"
            if answer.status_code not in (408, 429, 500, 502, 503):
                raise RuntimeError(problem)  # the same request would fail again
            pause_s = float(answer.headers.get("Retry-After", 0.5))
        except requests.RequestException as error:  # no network, or the service is starting
            problem, pause_s = str(error), 0.5
        if time.monotonic() + pause_s >= end:
            raise RuntimeError(f"{request_id}: no answer in {WITHIN_S:g} s: {problem}")
        time.sleep(pause_s)


def main() -> int:
    """Scores the image that the command line names."""
    url, class_name, image = sys.argv[1:]
    with requests.Session() as session:  # keep it: a connection for each image costs more than a small image
        session.headers["Authorization"] = f"Bearer {os.environ.get('SPRUE_KEY', '')}"
        try:
            result = score(session, url, class_name, Path(image).read_bytes())
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 2
    print(json.dumps(result))
    return int(result["is_anomalous"])


if __name__ == "__main__":
    sys.exit(main())
