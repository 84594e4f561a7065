#!/usr/bin/env bash
# The whole pipeline on a small model: SFT, preferences by a verifier, a reward model, PPO on it; DPO; GRPO.
#
#   bash launch/rlhf.sh [--out DIR] [--seed N] [--stages "sft preferences ..."] [KEY=VALUE ...]
#
#   --out      folder of the run; default runs/rlhf-DATE-seedN. A stage whose folder is there already is not run again.
#   --seed     of the task, the data order and the sampling; default 0
#   --stages   default "sft preferences reward_model ppo dpo grpo"; each reads what those before it have written
#
# Everything that a stage is stands in conf/rlhf.yaml and conf/stage/; KEY=VALUE changes a setting of every stage.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
die() { printf 'rlhf.sh: %s\n' "$*" >&2; exit 2; }

run="" seed=0 stages="sft preferences reward_model ppo dpo grpo" overrides=()
while (($#)); do
    case "$1" in
        --out|--seed|--stages)
            (($# > 1)) || die "$1 needs a value"
            case "$1" in --out) run="$2" ;; --seed) seed="$2" ;; --stages) stages="$2" ;; esac
            shift 2 ;;
        -h|--help) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) die "$1 is not known; see --help" ;;
        *) overrides+=("$1"); shift ;;
    esac
done
[[ "$seed" =~ ^[0-9]+$ ]] || die "--seed $seed is not a whole number"
for stage in $stages; do
    [[ -f "$root/conf/stage/$stage.yaml" ]] || die "--stages: there is no conf/stage/$stage.yaml"
done
run="${run:-$root/runs/rlhf-$(date +%Y%m%d-%H%M%S)-seed$seed}"
mkdir -p -- "$run"
RLHF_RUN="$(cd -- "$run" && pwd -P)"
export RLHF_RUN

bash "$root/launch/environment.sh"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

ranks=2
if [[ "$ALIGNER_DEVICE" == cuda ]]; then
    ranks="$(nvidia-smi --list-gpus | grep -c '^GPU ' || true)"
    ((ranks > 0)) || die "nvidia-smi lists no GPU here; use ALIGNER_DEVICE=cpu"
    ((ranks <= 2)) || ranks=2
fi

[[ -d "$RLHF_RUN/task" ]] || python -m aligner.data.column_addition --out "$RLHF_RUN/task" --seed "$seed"
for stage in $stages; do
    if [[ -e "$RLHF_RUN/$stage/done" ]]; then
        printf '\n== %s: done before\n' "$stage"
        continue
    fi
    begin=$SECONDS
    printf '\n== %s, %s ranks\n' "$stage" "$ranks"
    bash "$root/launch/local.sh" "$ranks" --config-name rlhf "stage=$stage" "seed=$seed" overwrite=true "${overrides[@]}"
    if [[ "$stage" == preferences ]]; then  # the last tenth is held out
        rows="$(wc -l < "$RLHF_RUN/preferences.jsonl")"
        ((rows >= 20)) || die "only $rows prompts had answers of different rewards; the model is too good or too bad"
        tail -n "$((rows / 10))" "$RLHF_RUN/preferences.jsonl" > "$RLHF_RUN/heldout_preferences.jsonl"
        head -n "$((rows - rows / 10))" "$RLHF_RUN/preferences.jsonl" > "$RLHF_RUN/preferences.jsonl.part"
        mv "$RLHF_RUN/preferences.jsonl.part" "$RLHF_RUN/preferences.jsonl"
    fi
    touch "$RLHF_RUN/$stage/done"
    printf '== %s took %d s\n' "$stage" "$((SECONDS - begin))"
done

printf '\n== what was reached on held-out data\n'
reached=()
for stage in $stages; do reached+=("$RLHF_RUN/$stage"); done
python "$root/tools/report.py" --summary "${reached[@]}"
