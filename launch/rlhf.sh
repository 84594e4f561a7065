#!/usr/bin/env bash
# The RLHF pipeline on a small model: SFT, preferences ranked by a verifier, a reward model, PPO with it; DPO; GRPO.
#
#   bash launch/rlhf.sh [--out DIR] [--seed N] [--task DIR] [--preferences FILE] [--stages "sft ..."] [KEY=VALUE ...]
#
#   --out          output folder; default runs/rlhf-DATE-seedN. Stages that are complete there are skipped.
#   --seed         of the task, the data order and the sampling; default 0
#   --task         a folder with model/, demonstrations.jsonl, prompts.jsonl and heldout.jsonl; default: column addition
#                  and a small model, generated
#   --preferences  preference rows (JSONL; the last tenth is held out); default: responses of the SFT model, ranked by the
#                  rule-based reward (stage preferences)
#   --stages       default "sft preferences reward_model ppo dpo grpo"; each reads the output of earlier ones
#
# Stages are configured in conf/rlhf.yaml and conf/stage/; KEY=VALUE changes a setting of all stages.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
die() { printf 'rlhf.sh: %s\n' "$*" >&2; exit 2; }

run="" seed=0 task="" given="" stages="sft preferences reward_model ppo dpo grpo" overrides=()
while (($#)); do
    case "$1" in
        --out|--seed|--task|--preferences|--stages)
            (($# > 1)) || die "$1 needs a value"
            case "$1" in
                --out) run="$2" ;; --seed) seed="$2" ;; --task) task="$2" ;; --preferences) given="$2" ;; *) stages="$2" ;;
            esac
            shift 2 ;;
        -h|--help) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) die "$1 is not known; see --help" ;;
        *=*) overrides+=("$1"); shift ;;
        *) die "\"$1\" is neither an option nor an override (KEY=VALUE)" ;;
    esac
done
[[ "$seed" =~ ^[0-9]+$ ]] || die "--seed $seed is not a whole number"
for stage in $stages; do
    [[ -f "$root/conf/stage/$stage.yaml" ]] || die "--stages: there is no conf/stage/$stage.yaml"
done
if [[ -n "$task" ]]; then
    for part in model/config.json demonstrations.jsonl prompts.jsonl heldout.jsonl; do
        [[ -f "$task/$part" ]] || die "--task $task has no $part"
    done
fi
[[ -z "$given" || -s "$given" ]] || die "--preferences $given is not there, or empty"
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

# FILE: its last tenth becomes the held-out preferences, the rest the training preferences.
split_preferences() {
    local rows
    rows="$(grep -c . "$1" || true)"
    ((rows >= 20)) || die "$1 has $rows preferences, too few to hold a tenth out; 20 are the least. Ranked answers are few \
where the model is so good, or so bad, that all answers to a prompt earn the same."
    # sed reads to the end, unlike head, whose early exit would end grep with a signal and so the script
    grep . "$1" | sed -n "$((rows - rows / 10 + 1)),\$p" > "$RLHF_RUN/heldout_preferences.jsonl"
    grep . "$1" | sed -n "1,$((rows - rows / 10))p" > "$RLHF_RUN/preferences.jsonl.part"
    mv "$RLHF_RUN/preferences.jsonl.part" "$RLHF_RUN/preferences.jsonl"
}

if [[ ! -e "$RLHF_RUN/task" && -n "$task" ]]; then
    ln -s "$(cd -- "$task" && pwd -P)" "$RLHF_RUN/task"
elif [[ ! -e "$RLHF_RUN/task" ]]; then
    python -m aligner.data.column_addition --out "$RLHF_RUN/task" --seed "$seed"
fi
if [[ -n "$given" ]]; then
    split_preferences "$given"
    stages="$(sed -E 's/(^| )preferences( |$)/ /' <<< "$stages")"
fi
for stage in $stages; do
    if [[ -e "$RLHF_RUN/$stage/done" ]]; then
        printf '\n== %s: done before\n' "$stage"
        continue
    fi
    begin=$SECONDS
    printf '\n== %s, %s ranks\n' "$stage" "$ranks"
    bash "$root/launch/local.sh" "$ranks" --config-name rlhf "stage=$stage" "seed=$seed" overwrite=true "${overrides[@]}"
    if [[ "$stage" == preferences ]]; then split_preferences "$RLHF_RUN/preferences.jsonl"; fi
    touch "$RLHF_RUN/$stage/done"
    printf '== %s took %d s\n' "$stage" "$((SECONDS - begin))"
done

printf '\n== what was reached on held-out data\n'
reached=()
for stage in $stages; do reached+=("$RLHF_RUN/$stage"); done
python "$root/tools/report.py" --summary "${reached[@]}"
