#!/usr/bin/env bash
# A development stack, and a server of the OpenAI API behind the middleware on 127.0.0.1:8000. Ctrl-C ends both.
# PORT is the server's; options (--data FOLDER) go to `entitlement dev`, ENTITLEMENT_ADDRESS is the gateway's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD"
export ENTITLEMENT_LLM_GATEWAY="${ENTITLEMENT_ADDRESS:-127.0.0.1:8080}"
export ENTITLEMENT_LLM_STREAM_USAGE=continuous # Each chunk says how many tokens it is by now, as those of vLLM can.
export ENTITLEMENT_LLM_FIRST_OUTPUT=64 # Tokens that are reserved at first: few, so that bob's little credit lets him in.
folder="$(mktemp -d)"
# The server first: what it has written is charged while there is a gateway.
trap 'for job in "${server:-}" "${stack:-}"; do kill $job 2>/dev/null && wait $job || true; done; rm -r "$folder"' EXIT

mkfifo "$folder/ready"
entitlement dev --catalog examples/vllm/catalogue.yaml "$@" >"$folder/ready" &
stack=$!
read -r ready <"$folder/ready" && echo "$ready"
uvicorn --app-dir examples/vllm server:app --port "${PORT:-8000}" --no-access-log &
server=$!
wait -n
