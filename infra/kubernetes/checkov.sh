#!/usr/bin/env bash
# Runs checkov on what the chart renders, on the Dockerfile and on the workflows. It has 100 packages of its own: install
# it in an environment of its own, as with `pipx install checkov`.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
rendered="$(mktemp -d)"
trap 'rm -r "$rendered"' EXIT
digest="sha256:$(printf '0%.0s' {1..64})"
for name in one-gpu plant; do
    helm template line infra/kubernetes/sprue --namespace plant --values "infra/kubernetes/values/$name.yaml" \
        --set "image.platform.repository=registry.example/sprue,image.platform.digest=$digest" \
        --set "image.scoring.repository=registry.example/sprue-scoring,image.scoring.digest=$digest" \
        --set "bundled.postgres.image.digest=$digest" >"$rendered/$name.yaml"
done
config=infra/kubernetes/checkov.yaml
checkov --config-file "$config" --framework kubernetes --directory "$rendered"
checkov --config-file "$config" --framework dockerfile --file infra/containers/Dockerfile
checkov --config-file "$config" --framework github_actions --directory .github
