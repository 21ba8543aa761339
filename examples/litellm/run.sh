#!/usr/bin/env bash
# A development stack, and LiteLLM with the callback on 127.0.0.1:4000. Ctrl-C ends both. PORT is LiteLLM's, options go
# to it; with ENTITLEMENT_LLM_GATEWAY it asks that gateway, and no stack is started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD"
export LITELLM_LOCAL_MODEL_COST_MAP=True # Without it LiteLLM asks the network for prices, which we have.
export ENTITLEMENT_LLM_LITELLM_CUSTOMER="${ENTITLEMENT_LLM_LITELLM_CUSTOMER:-end_user}" # The `user` of a request pays.
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

[ -x .venv-litellm/bin/litellm ] || make --no-print-directory litellm
if [ -z "${LITELLM_MASTER_KEY:-}" ]; then
    key=.entitlement/litellm-key
    mkdir -p .entitlement
    [ -s "$key" ] || (umask 077 && python -c 'import secrets; print(f"sk-{secrets.token_hex(32)}")' >"$key")
    LITELLM_MASTER_KEY="$(cat "$key")"
fi
export LITELLM_MASTER_KEY
if [ -z "${ENTITLEMENT_LLM_GATEWAY:-}" ]; then
    entitlement dev --catalog examples/llm.yaml &
fi
.venv-litellm/bin/litellm --config examples/litellm/config.yaml --host 127.0.0.1 --port "${PORT:-4000}" "$@" &
wait -n
