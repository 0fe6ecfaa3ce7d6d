#!/bin/bash
# A real SLURM on this machine, for tests: a controller and emulated nodes with pretended GPUs.
#
#   bash tests/slurm_cluster.sh start FOLDER   prints the path of slurm.conf, for SLURM_CONF
#   bash tests/slurm_cluster.sh stop FOLDER
#
# Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Everything lies in FOLDER. Jobs
# of the partition `urgent` push those of `gpu` back into the queue.
set -euo pipefail
action=${1:?start or stop} folder=${2:?a folder}
export SLURM_CONF=$folder/slurm.conf

stop() {
  local file
  for file in "$folder"/run/slurmd-*.pid "$folder"/run/slurmctld.pid "$folder"/run/munged.pid; do
    [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null && rm -f "$file"
  done
  return 0
}
if [ "$action" = stop ]; then stop; exit 0; fi

[ "$(id -u)" = 0 ] || { echo "SLURM's daemons need root"; exit 3; }
for program in slurmctld slurmd sbatch munged; do
  command -v "$program" >/dev/null || { echo "$program is not installed"; exit 3; }
done
mkdir -p "$folder"/{run,log,state,spool/node1,spool/node2}
chmod 755 "$folder" "$folder/run"
(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.sock" \
  --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" \
  --seed-file="$folder/munge.seed"
host=$(hostname -s)
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${PORT:-26900}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.sock
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,requeue_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
MinJobAge=3600
SlurmdTimeout=30
SlurmdParameters=config_overrides
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobs.log
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((${PORT:-26900} + 1)) CPUs=64 RealMemory=8000 Gres=gpu:8
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((${PORT:-26900} + 2)) CPUs=64 RealMemory=8000 Gres=gpu:8
PartitionName=gpu Nodes=node[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
touch "$folder"/gpu{0..7} && echo "Name=gpu File=$folder/gpu[0-7]" >"$folder/gres.conf"
: >"$folder/log/slurmctld.log"
trap 'stop; tail -n 5 "$folder"/log/slurm*.log' ERR
slurmctld -c -f "$SLURM_CONF"
for node in node1 node2; do slurmd -f "$SLURM_CONF" -N "$node"; done
for _ in $(seq 60); do
  [ "$(sinfo -h -N -p gpu -t idle | wc -l)" != 2 ] || { echo "$SLURM_CONF"; exit 0; }
  sleep 0.5
done
echo "the nodes do not come up: $(sinfo -h -N -l)"
stop
exit 3
