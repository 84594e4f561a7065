#!/bin/bash
# A real Slurm (slurmctld, slurmd, munge) of a head and two nodes on this machine, as root:
#
#   slurm_cluster.sh start DIR              returns when both nodes are idle; DIR is short, for the sockets' paths
#   slurm_cluster.sh run DIR COMMAND...     on the head, in the present folder
#   slurm_cluster.sh node DIR N COMMAND...  on node N
#   slurm_cluster.sh crash DIR N            as when the power of node N goes
#   slurm_cluster.sh boot DIR N             node N is back
#   slurm_cluster.sh stop DIR               ends every process of the cluster and of its jobs
#
# slurmd refuses two nodes of one host name unless it was built for that, so a node is a network, UTS and mount namespace of its own,
# with a name, an address and a cable to a bridge. All are in one PID namespace: its first process takes the others with it. Of the
# machine's own network, /etc and processes nothing changes. Each node has two "GPUs": device files that are none.
set -euo pipefail
what="$1" dir="$2"
shift 2

# The namespaces' first process, as this machine numbers it.
inside() { pgrep -P "$(<"$dir/unshare.pid")"; }
enter() { exec nsenter -t "$(inside)" -m -n -u -i -p --wd="$PWD" -- env SLURM_CONF="$dir/slurm.conf" "$@"; }
# On the head: in the namespaces of a node.
on_node() {
    local number="$1"
    shift
    nsenter -t "$(<"$dir/node$number.pid")" -m -n -u --wd="$PWD" -- "$@"
}
start_slurmd() { on_node "$1" setsid slurmd -D -N "node$1" >>"$dir/slurmd-$1.out" 2>&1 </dev/null & }

configure() {
    printf '127.0.0.1 localhost\n10.77.0.254 head\n10.77.0.1 node1\n10.77.0.2 node2\n' >"$dir/hosts"
    printf 'NodeName=node[1-2] Name=gpu File=/dev/%s\n' null zero >"$dir/gres.conf"
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    mkdir -p "$dir/state"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=tested
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=20
KillWait=30
MinJobAge=7200
MaxArraySize=10
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
GresTypes=gpu
NodeName=node[1-2] CPUs=2 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

case "$what" in
    start)
        configure
        setsid unshare --mount --net --uts --ipc --pid --fork --mount-proc --kill-child bash "$0" init "$dir" >"$dir/init.out" 2>&1 </dev/null &
        echo "$!" >"$dir/unshare.pid"
        for ((i = 0; i < 120; i++)); do
            sleep 0.25
            kill -0 "$(<"$dir/unshare.pid")" 2>/dev/null || break
            [[ "$(bash "$0" run "$dir" sinfo -h -t idle -o %D 2>/dev/null)" != 2 ]] || exit 0
        done
        tail -n 20 "$dir"/*.out "$dir"/*.log >&2
        exit 1
        ;;
    init)
        export SLURM_CONF="$dir/slurm.conf"
        mount --bind "$dir/hosts" /etc/hosts
        hostname head
        ip link set lo up
        ip link add br0 type bridge
        ip addr add 10.77.0.254/24 dev br0
        ip link set br0 up
        munged -F --force -S "$dir/munge.socket" --key-file="$dir/munge.key" --log-file="$dir/munged.log" \
            --pid-file="$dir/munged.pid" --seed-file="$dir/munged.seed" >"$dir/munged.out" 2>&1 &
        until [[ -S "$dir/munge.socket" ]]; do sleep 0.1; done
        slurmctld -D >"$dir/slurmctld.out" 2>&1 &
        for n in 1 2; do
            mkdir -p "$dir/spool-node$n"
            # shellcheck disable=SC2016  # expanded inside
            unshare --net --uts --mount bash -c 'hostname "node$1"; echo "$$" >"$2/node$1.pid"; exec sleep infinity' node "$n" "$dir" &
            until [[ -s "$dir/node$n.pid" ]]; do sleep 0.1; done
            ip link add "to$n" type veth peer name eth0 netns "$(<"$dir/node$n.pid")"
            ip link set "to$n" master br0 up
            on_node "$n" ip link set lo up
            on_node "$n" ip addr add "10.77.0.$n/24" dev eth0
            on_node "$n" ip link set eth0 up
            start_slurmd "$n"
        done
        while :; do sleep 3600 & wait "$!" || true; done  # the first process of a PID namespace reaps the others' orphans
        ;;
    run) enter "$@" ;;
    node) enter bash "$0" on-head-node "$dir" "$@" ;;
    crash) enter bash "$0" on-head-crash "$dir" "$1" ;;
    boot) enter bash "$0" on-head-boot "$dir" "$1" ;;
    on-head-node) on_node "$@" ;;
    on-head-crash)
        ip link set "to$1" down
        holder="$(<"$dir/node$1.pid")"
        network="$(readlink "/proc/$holder/ns/net")"
        for process in /proc/[0-9]*; do
            pid="${process#/proc/}"
            [[ "$pid" == "$holder" || "$(readlink "$process/ns/net" 2>/dev/null)" != "$network" ]] || kill -KILL "$pid" || true
        done
        ;;
    on-head-boot)
        ip link set "to$1" up
        start_slurmd "$1"
        ;;
    stop)
        first="$(inside || true)"
        [[ -z "$first" ]] || kill -KILL "$first"
        kill -TERM "$(<"$dir/unshare.pid")" 2>/dev/null || true
        ;;
esac
