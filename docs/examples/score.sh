#!/bin/sh
# Scores one image: sh score.sh URL CLASS IMAGE. The key is in the environment variable SPRUE_KEY.
# Exit status 0: good. 1: anomalous. 2: there is no decision, and a part without a decision is not a good part.
# curl retries after 408, 429, 500, 502, 503 and 504, and keeps to Retry-After; retries end 5 s after the start.
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
curl --silent --show-error --fail-with-body --retry 5 --retry-connrefused --retry-max-time 5 --max-time 6 \
    --header "Authorization: Bearer $SPRUE_KEY" \
    --header "Content-Type: application/octet-stream" \
    --header "X-Request-Timeout-Ms: 5000" \
    --header "X-Station: line-7" \
    --data-binary "@$3" --output "$answer" "$1/v1/classes/$2/score" || {
    cat "$answer" >&2
    exit 2
}
cat "$answer"
if grep -q '"is_anomalous":false' "$answer"; then exit 0; fi
if grep -q '"is_anomalous":true' "$answer"; then exit 1; fi
exit 2
