#!/usr/bin/env bash
# From a fresh checkout to a learning curve: installs, creates a small model and a task, and trains by SFT and then GRPO.
#
#   bash launch/quickstart.sh [--seed N] [--out DIR] [--device cpu|cuda] [OVERRIDES OF THE GRPO JOB...]
#   bash launch/quickstart.sh --seed 3 train.steps=20
#
# On GPUs: the same small model in bfloat16, one rank per GPU (1, 2, 4 or 8); a rank needs 2 GB of memory and what CUDA takes.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
die() { printf '%s\n' "$1" >&2; exit 2; }

seed=0
run=
overrides=()
while (($# > 0)); do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --seed | --out | --device)
            (($# > 1)) || die "$1 needs a value"
            case "$1" in
                --seed) seed="$2" ;;
                --out) run="$2" ;;
                --device) export ALIGNER_DEVICE="$2" ;;
            esac
            shift 2
            ;;
        -*) die "unknown option $1; see bash launch/quickstart.sh --help" ;;
        *=*) overrides+=("$1"); shift ;;
        *) die "\"$1\" is neither an option nor an override like train.steps=20" ;;
    esac
done
[[ "$seed" =~ ^[0-9]+$ ]] || die "--seed $seed is not a whole number"
run="${run:-$root/runs/quickstart-$(date +%Y%m%d-%H%M%S)-seed$seed}"
[[ ! -e "$run" || -z "$(ls -A -- "$run")" ]] || die "--out $run already holds something; choose a new folder"
mkdir -p -- "$run"
run="$(cd -- "$run" && pwd -P)"

# Hydra parses an override's value as an expression; quoted, so that a path may contain spaces and commas.
quoted() { printf "'%s'" "${1//\'/\\\'}"; }

phases=()
phase() {
    local title="$1" begin=$SECONDS
    shift
    printf '\n== %s\n' "$title"
    "$@"
    phases+=("$(printf '%-28s %4d s' "$title" "$((SECONDS - begin))")")
}

phase "environment" bash "$root/launch/environment.sh"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

# The two jobs; all other settings are in conf/.
sft_job=(
    --config-name quickstart_sft
    "model.path=$(quoted "$run/task/model")"
    "data.path=$(quoted "$run/task/demonstrations.jsonl")"
    "run_dir=$(quoted "$run/sft")"
    "seed=$seed"
)
grpo_job=(
    --config-name quickstart
    "model.path=$(quoted "$run/sft/model")"
    "data.path=$(quoted "$run/task/prompts.jsonl")"
    "data.eval_path=$(quoted "$run/task/heldout.jsonl")"
    "run_dir=$(quoted "$run/grpo")"
    "seed=$seed"
)

# Two ranks on the CPU, so that the job is distributed there too; a power of two on GPUs, so that 64 rows divide evenly.
ranks=2
if [[ "$ALIGNER_DEVICE" == cuda ]]; then
    gpus="$(nvidia-smi --list-gpus | grep -c '^GPU ' || true)"
    ((gpus > 0)) || die "nvidia-smi lists no GPU here; use --device cpu"
    for ranks in 8 4 2 1; do
        ((gpus < ranks)) || break
    done
    # Activations of 657 thousand parameters fit anywhere, and compiling the engine would take longer than its 60 steps gain.
    sft_job+=(policy.recompute=none)
    grpo_job+=(policy.recompute=none rollout.enforce_eager=true)
fi

phase "task and model" python -m aligner.data.column_addition --out "$run/task" --seed "$seed"
phase "SFT, $ranks ranks" bash "$root/launch/local.sh" "$ranks" "${sft_job[@]}"
phase "GRPO, $ranks ranks" bash "$root/launch/local.sh" "$ranks" "${grpo_job[@]}" "${overrides[@]}"

printf '\n== seconds\n'
printf '%s\n' "${phases[@]}" "$(printf '%-28s %4d s' all "$SECONDS")"
printf '\n== results\n'
find "$run/grpo" -maxdepth 1 \( -name '*.png' -o -name '*.html' \) | sort
