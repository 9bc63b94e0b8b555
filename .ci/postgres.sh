#!/usr/bin/env bash
# The tests of the accounts against PostgreSQL: starts a server of its own on a temporary folder, which ends with this script.
#
#   .ci/postgres.sh [CARGO'S SELECTION OF PACKAGES, --workspace if none: what the other stages of CI have built]
#
# Says so and succeeds where PostgreSQL's programs are not installed, unless ERNIE_CI_POSTGRES=1 demands them.
set -euo pipefail
cd "$(dirname "$0")/.."

programs=
for folder in "$(pg_config --bindir 2>/dev/null || true)" /usr/lib/postgresql/*/bin; do
  if [ -x "$folder/initdb" ] && [ -x "$folder/pg_ctl" ]; then
    programs=$folder
  fi
done
if [ -z "$programs" ]; then
  echo "skipped: no PostgreSQL here (Debian: apt-get install postgresql)"
  [ "${ERNIE_CI_POSTGRES:-}" != 1 ]
  exit
fi

folder=$(mktemp -d)
# It does not run as root.
as=()
if [ "$(id -u)" -eq 0 ]; then
  chown postgres "$folder"
  as=(runuser -u postgres --)
fi
postgres() {
  (cd "$folder" && ${as[@]+"${as[@]}"} "$programs/$@")
}
end() {
  postgres pg_ctl --pgdata="$folder/data" --mode=immediate stop > /dev/null 2>&1 || true
  rm -rf "$folder"
}
trap end EXIT
postgres initdb --pgdata="$folder/data" --username=ernie --auth=trust --no-sync > "$folder/initdb.log"

# Tests stop it and start it again with this.
cat > "$folder/control" <<CONTROL
#!/bin/sh
cd "$folder"
exec ${as[*]-} "$programs/pg_ctl" --pgdata="$folder/data" --log="$folder/log" --wait --mode=immediate --options="-c listen_addresses= -c unix_socket_directories=$folder -c fsync=off" "\$1" > /dev/null
CONTROL
chmod 755 "$folder" "$folder/control"
"$folder/control" start

export ERNIE_TEST_POSTGRES="postgres://ernie@localhost/postgres?host=$folder"
selection=("${@:---workspace}")
cargo test --release --locked "${selection[@]}" --test it -- accounts store limits cors
# Alone, for it takes the server away.
ERNIE_TEST_POSTGRES_CONTROL="$folder/control" cargo test --release --locked "${selection[@]}" --test it -- --ignored postgres_goes_away
