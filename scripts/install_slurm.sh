#!/usr/bin/env bash
# Slurm's daemons from Debian's or Ubuntu's packages, for the tests that start a cluster of their
# own. Where they cannot be had it says why and succeeds: those tests are then skipped.
set -uo pipefail

missing=
for program in slurmctld slurmd munged sbatch; do
  command -v "$program" >/dev/null || missing=yes
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "Slurm is not installed, and only root can, with apt-get: its tests will be skipped"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# Packages need not start services: the tests start their own.
if ! { timeout 300 apt-get update && timeout 600 apt-get install -y --no-install-recommends \
  slurmctld slurmd slurm-client munge; } >"$log" 2>&1; then
  echo "apt-get could not install Slurm, its tests will be skipped: $(tail -n 1 "$log")"
fi
rm -f "$log"
