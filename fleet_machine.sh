#!/usr/bin/env bash
# What a machine of a fleet is made of, and how: the other half of `setup_resources.sh --instances`.
#
#   fleet_machine.sh pack ZIP QUEUE_URL           where the fleet is ordered: prints the SHA-256 of ZIP
#   fleet_machine.sh install REGION GROUP [SPOT]  at a machine's first boot, where ZIP was unpacked
#   fleet_machine.sh follow REGION GROUP          as its service nanogrid-fleet, from then on
set -euo pipefail

# The agent, its settings and its unit, and boto3 for the machine's Python. Files have fixed times, so
# that a zip of the same files has the same sum.
pack() {
  local zip="$1" here bundle
  here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
  bundle="$zip.files"
  grep -F "queueUrl: $2" application.yml >/dev/null || {
    echo "application.yml, which the machines get, does not name $2" >&2
    exit 1
  }
  mkdir -p "$bundle/wheels"
  cp application.yml "$here"/{nanogrid.py,nanogrid.service,fleet_machine.sh} "$bundle"
  python3 -m pip download -q --only-binary :all: --python-version 3.12 --dest "$bundle/wheels" boto3 ||
    echo "boto3 cannot be fetched here: each machine will fetch it from PyPI" >&2
  find "$bundle" -exec touch -t 202001010000 {} +
  python3 -m zipfile -c "$zip" "$bundle"/*
  python3 -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$zip"
}

# Run in the folder where the zip was unpacked.
install_agent() {
  local units=/etc/systemd/system setting=""
  python3.12 -m venv venv
  # The wheels of boto3 are in the zip, unless whoever made it could not fetch them.
  venv/bin/pip install -q --no-index wheels/*.whl || venv/bin/pip install -q boto3
  install -m 644 -t "$units" nanogrid.service
  if [ -n "$SPOT" ]; then setting="Environment=AGENT_AWS_SPOTINTERRUPTION=true"; fi
  mkdir -p "$units/nanogrid.service.d"
  printf '%s\n' '[Service]' "$setting" >"$units/nanogrid.service.d/fleet.conf"
  printf '%s\n' '[Unit]' After=nanogrid.service '[Service]' \
    "ExecStart=bash $PWD/fleet_machine.sh follow $REGION $GROUP" Restart=on-failure RestartSec=5 \
    '[Install]' WantedBy=multi-user.target >"$units/nanogrid-fleet.service"
  systemctl daemon-reload
  systemctl enable --now nanogrid  # fails unless the agent says that it works
  systemctl enable --now nanogrid-fleet
}

# The group waits for both: it gives a machine up that is not ready within ten minutes, and takes one
# away only when its runs have ended, or after ten minutes.
follow() {
  go_on ready || true  # a machine that has booted again was ready before
  until [ "$(metadata autoscaling/target-lifecycle-state)" = Terminated ]; do sleep 5; done
  systemctl stop nanogrid
  go_on taken-away
}

go_on() {
  aws autoscaling complete-lifecycle-action --region "$REGION" --auto-scaling-group-name "$GROUP" \
    --lifecycle-hook-name "$1" --lifecycle-action-result CONTINUE --instance-id "$(metadata instance-id)"
}

metadata() {
  local address=http://169.254.169.254/latest token
  token="$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$address/api/token")"
  curl -sf -H "X-aws-ec2-metadata-token: $token" "$address/meta-data/$1"
}

main() {
  REGION="${2:-}" GROUP="${3:-}" SPOT="${4:-}"
  case "${1:-}" in
    pack) pack "$2" "$3" ;;
    install) install_agent ;;
    follow) follow ;;
    *) echo "fleet_machine.sh: pack, install or follow" >&2; exit 2 ;;
  esac
}

main "$@"
