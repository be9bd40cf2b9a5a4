#!/usr/bin/env bash
# Proves the container image on the sample cases; see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: ./test.sh [--no-build] [--api exec|invoke] [exec] [invoke] [instance]

Builds the image and runs it as strictly as the platform does: a user that nobody knows, no network, read-only root
and /input, /input a link, /tmp empty, no capabilities and no new ones, 8 GB of memory without swap, 7 GB of data for
a process, 256 processes, 64 MB of shared memory. Tests the three ways in, or those that are named:

  exec       all samples in a plain folder; one laid out as Grand Challenge does, by the image's own user, with the
             weights from /opt/ml/model; one as a socket of DICOM slices; a damaged scan, after which the exit status and
             the last line say so
  invoke     the server, asked from inside as there is no network: health, a case as it was laid out before December
             2025, a damaged scan, a case in the layout before that, a second server stopped while idle
  instance   INSTANCE 2022's batch of .nii.gz, by the mount of /predict alone and by the challenge's own command

Each way is also stopped by SIGTERM in mid-run: it ends within the platform's 5 seconds and leaves no partial output.
After each run test/check_output.py, inside the image, compares every mask with test/sample/expected (Dice at least
0.98, or volumes within 0.1 mL where the stored mask is under 0.1 mL), its type, labels and geometry with the scan's,
reads results.json strictly, and finds stray files; the log must be plain lines, fewer than 500.

Exits 0 when all of it holds, 1 when anything differs. Needs the container engine, and no Python.

  --no-build        test the image that is there
  --api             for ./build.sh (default exec); either image is tested in all three ways

Environment:
  IMAGE             name of the image                            (default ichseg:latest)
  CONTAINER_ENGINE  docker, or what stands in for it             (default docker; see ./build.sh --help)
  PRESET            full, balanced or fast, for whole runs       (default balanced, with which the stored masks were made)
  INPUT_SLUG        the slug of the image socket                 (default head-ct)
  EXTRA_RUN_ARGS    further flags for the engine's run, split at spaces
                      EXTRA_RUN_ARGS="--gpus all" ./test.sh
                      EXTRA_RUN_ARGS="--ulimit nofile=20000:20000" CONTAINER_ENGINE=podman ./test.sh
  BASE_IMAGE, BUILD_ARGS   passed on to ./build.sh
HELP
}

fail() {
    echo "test.sh: FAILED: $*" >&2
    exit 1
}

build=(./build.sh)
ways=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --no-build) build=(true) ;;
        --api) build+=(--api "${2-}") && shift ;;
        --api=*) build+=("$1") ;;
        exec | invoke | instance) ways+=("$1") ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && fail "unknown argument: $1" ;;
    esac
    shift || true
done
[[ ${#ways[@]} -gt 0 ]] || ways=(exec invoke instance)

cd "$(dirname "${BASH_SOURCE[0]}")"
image="${IMAGE:-ichseg:latest}"
preset="${PRESET:-balanced}"
input_slug="${INPUT_SLUG:-head-ct}"
read -r -a engine <<<"${CONTAINER_ENGINE:-docker}"
read -r -a extra_run_args <<<"${EXTRA_RUN_ARGS-}"
command -v "${engine[0]}" >/dev/null || fail "no ${engine[0]} here; CONTAINER_ENGINE=podman uses podman"
"${engine[@]}" version >/dev/null || fail "${engine[0]} does not answer; is its service running?"
"${build[@]}"
"${engine[@]}" image inspect "$image" >/dev/null 2>&1 || fail "there is no image $image; run without --no-build"

uid=$((20000 + RANDOM))
sealed="ichseg-test:$$" # the image with /input as a link, made below
named="ichseg-test-$$"  # the one container that outlives its command
# shellcheck disable=SC2054 # the comma is an option's own
seal=(
    --network none --read-only --tmpfs /tmp:rw,size=1g --cap-drop ALL --security-opt no-new-privileges
    --memory 8g --memory-swap 8g --ulimit data=7516192768:7516192768 --pids-limit 256 --shm-size 64m
    ${extra_run_args[@]+"${extra_run_args[@]}"}
)

# What the containers wrote belongs to their users, in folders that only they can empty; so they open them to all.
clean_up() {
    local status=$? user
    trap - EXIT
    "${engine[@]}" rm -f "$named" || true
    for user in "$uid:$uid" "$image_user"; do
        "${engine[@]}" run --rm "${seal[@]}" --user "$user" -v "$work/out:/out" -v "$work/in:/in" --entrypoint find \
            "$image" /out /in -user "${user%%:*}" -exec chmod a+rwX {} + || true
    done
    "${engine[@]}" rmi -f "$sealed" || true
    rm -rf "$work" || true
    exit "$status"
} >/dev/null 2>&1

image_user="$("${engine[@]}" image inspect --format '{{.Config.User}}' "$image")"
case "${image_user%%:*}" in
    "" | root | 0) fail "the image's USER is '$image_user'; the platform refuses root" ;;
esac
platform="$("${engine[@]}" image inspect --format '{{.Os}}/{{.Architecture}}' "$image")"
[[ "$platform" == linux/amd64 ]] || fail "the image is for $platform; the platform runs linux/amd64"
api="$("${engine[@]}" image inspect --format '{{index .Config.Labels "org.grand-challenge.api-method"}}' "$image")"
[[ "$api" == invoke ]] || api="exec"
"${engine[@]}" image inspect --format '{{join .Config.Env "\n"}}' "$image" | grep -qx "ICHSEG_API=$api" ||
    fail "the image's label says API $api, its environment another; build it with ./build.sh --api $api"

work="$(mktemp -d)"
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

"${engine[@]}" run --name "$named" ${extra_run_args[@]+"${extra_run_args[@]}"} --network none --user 0 --entrypoint sh \
    "$image" -c 'rmdir /input && ln -s /mnt/input /input' || fail "/input cannot be made a link in $image"
entrypoint="$("${engine[@]}" image inspect --format '{{json .Config.Entrypoint}}' "$image")"
"${engine[@]}" commit --change "ENTRYPOINT $entrypoint" --change 'CMD []' --change "USER $image_user" "$named" "$sealed" \
    >/dev/null 2>&1 || fail "${engine[0]} commit"
"${engine[@]}" rm "$named" >/dev/null

# Copies, not mounts of the clone: readable by any uid even from a clone made under umask 077.
mkdir "$work/in" "$work/out" "$work/test" "$work/samples" "$work/damaged"
cp -R test/check_output.py test/dicom_slices.py test/sample/expected "$work/test/"
cp -R test/sample/input/. "$work/samples"
scan="$(find "$work/samples" -name '*.mha' | sort | head -n 1)"
other="$(find "$work/samples" -name '*.mha' | sort | tail -n 1)"
[[ -n "$scan" ]] || fail "test/sample/input has no .mha to lay out as the platform does"
head -c 100000 "$scan" >"$work/damaged/scan.mha"

# Empty folders for one run: `new NAME` makes $work/in/NAME and $work/out/NAME and sets $in and $out.
new() {
    in="$work/in/$1" out="$work/out/$1"
    mkdir -p "$in" "$out"
    chmod 0777 "$out"
}

uuid=7d1b2c44-55f0-4c1e-9a3e-0d6f3a9c2e10

# The image's name, under which key inputs.json describes the socket, of which kind it is.
write_inputs() {
    cat >"$in/inputs.json" <<JSON
[
  {
    "pk": 1, "value": null, "file": null,
    "image": {"pk": "$uuid", "name": "$1"},
    "$2": {
      "pk": 1, "title": "Head CT", "slug": "$input_slug", "kind": "$3", "super_kind": "Image",
      "relative_path": "images/$input_slug"
    }
  }
]
JSON
    chmod -R a+rX "$in"
}

# As the platform lays out a case: by inputs.json, under another name; the key is socket, or interface before
# December 2025.
lay_out() {
    mkdir -p "$in/images/$input_slug"
    cp "$1" "$in/images/$input_slug/$uuid.mha"
    write_inputs "$(basename "$1")" "${2:-socket}" Image
}

# The same case as a DICOM image set: many files, whose names are in another order than the slices.
lay_out_slices() {
    mkdir -p "$in/images"
    chmod 0777 "$in" "$in/images"
    sealed_run --user "$uid:$uid" -v "$work/test:/test:ro" -v "$work/samples:/samples:ro" -v "$in:/in" \
        --entrypoint python "$sealed" /test/dicom_slices.py "/samples/$(basename "$1")" "/in/images/$input_slug" ||
        fail "the slices cannot be written"
    write_inputs "$(basename "$1")" socket "DICOM Image Set"
}

# The arguments are those of `run` after the seal, the image among them.
sealed_run() {
    chmod -R a+rX "$work/in" "$work/test" "$work/samples" "$work/damaged"
    "${engine[@]}" run --rm "${seal[@]}" "$@"
}

# The same, with $status and its stderr in $work/log, shown as it comes.
logged_run() {
    status=0
    { sealed_run "$@" 2>&1 >&3 | tee "$work/log" >&2; } 3>&1 || status=$?
    check_log
}

check_log() {
    ! grep -q $'[\r\033]' "$work/log" || fail "the log holds control characters, such as bars are drawn with"
    [[ "$(wc -l <"$work/log")" -lt 500 ]] || fail "the log has 500 lines or more; the platform drops what is over"
    [[ "$(awk 'length > 4000' "$work/log" | wc -l)" -eq 0 ]] || fail "the log has lines over 4000 characters"
}

# Layout, see test/check_output.py.
check_output() {
    sealed_run --user "$uid:$uid" -v "$work/test:/test:ro" -v "${2:-$in}:/in:ro" -v "$out:/out:ro" \
        --entrypoint python "$sealed" /test/check_output.py "$1" /in /out /test/expected ||
        fail "the output is not what it should be"
}

check_no_mask() {
    local found
    found="$(cd "$out" && find . ! -type d ! -name results.json)"
    [[ -z "$found" ]] || fail "expected no file, found: $found"
}

start() {
    chmod -R a+rX "$work/in"
    "${engine[@]}" run -d --name "$named" "${seal[@]}" --user "$uid:$uid" "$@" >/dev/null || fail "the container does not start"
}

# How often the log of the named container says that the networks are at work.
times_at_work() {
    "${engine[@]}" logs "$named" 2>&1 | grep -c "forward passes" || true
}

wait_until_at_work() {
    local i
    for ((i = 0; i < 300; i++)); do
        [[ "$(times_at_work)" -le "$1" ]] || return 0
        [[ "$("${engine[@]}" inspect --format '{{.State.Running}}' "$named")" == true ]] || break
        sleep 0.4
    done
    "${engine[@]}" logs "$named" >&2
    fail "the networks do not begin their work"
}

# SIGTERM, and SIGKILL 5 seconds later, as the platform does it.
stop() {
    local began=$SECONDS expected="$1"
    "${engine[@]}" stop -t 5 "$named" >/dev/null 2>&1
    status="$("${engine[@]}" inspect --format '{{.State.ExitCode}}' "$named")"
    "${engine[@]}" logs "$named" >"$work/log" 2>&1
    "${engine[@]}" rm "$named" >/dev/null
    tail -n 1 "$work/log"
    [[ "$status" -ne 137 ]] || fail "it did not end within 5 seconds after SIGTERM"
    [[ "$status" -eq "$expected" ]] || fail "exit status after SIGTERM is $status, expected $expected"
    check_log
    echo "  stopped within $((SECONDS - began + 1)) s, exit status $status: ok"
}

stop_in_mid_run() {
    echo "== $way: SIGTERM in mid-run"
    start "$@" --preset full
    wait_until_at_work 0
    stop 143
    check_no_mask
}

test_seal() {
    echo "== sealed: uid $uid, image for $platform, its user $image_user, API $api"
    new seal
    # shellcheck disable=SC2016 # expanded in the container
    sealed_run --user "$uid:$uid" -e UID_WANTED="$uid" -v "$in:/mnt/input:ro" -v "$out:/output" \
        --entrypoint sh "$sealed" -euc '
        no() { echo "the seal does not hold: $*" >&2; exit 1; }
        [ "$(id -u)" = "$UID_WANTED" ] || no "uid is $(id -u)"
        grep -qE "^[^ ]+ / [^ ]+ ro[ ,]" /proc/mounts || no "the file system is not read-only"
        for folder in / /input/ /opt/algorithm /opt/algorithm/weights /home /var; do
            ! touch "$folder/.probe" 2>/dev/null || no "$folder is writable"
        done
        for folder in /tmp /output; do
            touch "$folder/.probe" && rm "$folder/.probe" || no "$folder is not writable"
        done
        [ -L /input ] || no "/input is not a link"
        [ -z "$(ls -A /tmp)" ] || no "/tmp is not empty"
        [ "$(ls /sys/class/net)" = lo ] || no "network: $(ls /sys/class/net)"
        [ "$(df -k /dev/shm | tail -n 1 | tr -s " " | cut -d " " -f 2)" = 65536 ] || no "shared memory is not 64 MB"
        grep -q "^CapBnd:[[:space:]]*0*$" /proc/self/status || no "capabilities are left"
        grep -q "^NoNewPrivs:[[:space:]]*1$" /proc/self/status || no "new privileges can be had"
        grep -qE "^Max data size +7516192768 +7516192768 " /proc/self/limits || no "data memory is not 7 GB"
        groups=/sys/fs/cgroup # version 2, or 1
        grep -qx 8589934592 $groups/memory.max $groups/memory/memory.limit_in_bytes 2>/dev/null || no "memory is not 8 GB"
        grep -qx 256 $groups/pids.max $groups/pids/pids.max 2>/dev/null || no "processes are not 256"
        python /opt/algorithm/process.py --help >/dev/null || no "process.py does not start"
        python -c "import torch, SimpleITK, scipy.ndimage, safetensors, openvino, fastapi, uvicorn" ||
            no "a package cannot be imported"
    ' || fail "sealed"
    echo "  it holds, and the program starts: ok"
}

test_exec() {
    local as_exec=(--api exec)
    [[ "$api" != exec ]] || as_exec=()

    echo "== exec: a plain folder, preset $preset"
    new flat
    logged_run --user "$uid:$uid" -v "$work/samples:/mnt/input:ro" -v "$out:/output" "$sealed" \
        ${as_exec[@]+"${as_exec[@]}"} --preset "$preset"
    [[ "$status" -eq 0 ]] || fail "exit status $status (137: out of memory)"
    check_output flat "$work/samples"

    echo "== exec: the platform's layout, user $image_user, weights from /opt/ml/model, preset $preset"
    new platform
    lay_out "$scan"
    mkdir "$work/model"
    cp weights/* "$work/model/"
    sed -E '1,/"version"/s/"version": *"[^"]*"/"version": "mounted"/' weights/model.json >"$work/model/model.json"
    chmod -R a+rX "$work/model"
    logged_run -v "$in:/mnt/input:ro" -v "$work/model:/opt/ml/model:ro" -v "$out:/output" "$sealed" \
        ${as_exec[@]+"${as_exec[@]}"} --preset "$preset"
    [[ "$status" -eq 0 ]] || fail "exit status $status (137: out of memory)"
    check_output platform
    grep -qE '"version": *"mounted"' "$out/results.json" || fail "the weights in /opt/ml/model were not used"

    echo "== exec: a socket of DICOM slices, preset $preset"
    new slices
    lay_out_slices "$scan"
    logged_run --user "$uid:$uid" -v "$in:/mnt/input:ro" -v "$out:/output" "$sealed" \
        ${as_exec[@]+"${as_exec[@]}"} --preset "$preset"
    [[ "$status" -eq 0 ]] || fail "exit status $status (137: out of memory)"
    check_output platform

    echo "== exec: a damaged scan"
    new damaged
    logged_run --user "$uid:$uid" -v "$work/damaged:/mnt/input:ro" -v "$out:/output" "$sealed" \
        ${as_exec[@]+"${as_exec[@]}"}
    [[ "$status" -eq 1 ]] || fail "exit status $status, expected 1"
    [[ "$(tail -n 1 "$work/log")" == "error: "*scan.mha* ]] || fail "the last line on stderr is not the reason"
    check_no_mask
    echo "  exit status 1, and the last line says why: ok"

    new stopped
    lay_out "$scan"
    stop_in_mid_run -v "$in:/mnt/input:ro" -v "$out:/output" "$sealed" ${as_exec[@]+"${as_exec[@]}"}
}

# The HTTP status, asked from inside; "none" when there is no answer.
ask() {
    "${engine[@]}" exec "$named" python -c '
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", 4743)
connection.request(*sys.argv[1:])
print(connection.getresponse().status)
' "$@" 2>/dev/null || echo none
}

start_server() {
    local as_invoke=(--api invoke) i
    [[ "$api" != invoke ]] || as_invoke=()
    start -v "$in:/mnt/input:ro" -v "$out:/output" "$sealed" ${as_invoke[@]+"${as_invoke[@]}"} --preset "$preset"
    for ((i = 0; i < 300; i++)); do
        [[ "$(ask GET /health)" != 200 ]] || return 0
        sleep 1
    done
    "${engine[@]}" logs "$named" >&2
    fail "/health does not answer 200 within 300 s"
}

# What the platform does between two cases.
clean_io() {
    rm -rf "${in:?}"/*
    "${engine[@]}" exec "$named" sh -c 'rm -rf /output/*'
}

expect() {
    local found
    found="$(ask "${@:2}")"
    [[ "$found" == "$1" ]] || { "${engine[@]}" logs "$named" >&2 && fail "${*:2} answers $found, expected $1"; }
    echo "  ${*:2} answers $found: ok"
}

test_invoke() {
    local before
    echo "== invoke: the server, preset $preset"
    new invoke
    start_server
    expect 200 GET /health
    lay_out "$scan" interface
    expect 201 POST /invoke
    check_output platform

    echo "== invoke: a damaged scan, and then a case in the oldest layout"
    clean_io
    lay_out "$work/damaged/scan.mha"
    expect 500 POST /invoke
    check_no_mask
    expect 200 GET /health
    clean_io
    mkdir -p "$in/images/$input_slug"
    cp "$other" "$in/images/$input_slug/"
    chmod -R a+rX "$in"
    expect 201 POST /invoke
    check_output platform

    echo "== invoke: SIGTERM in mid-run"
    clean_io
    lay_out "$scan"
    before="$(times_at_work)"
    ask POST /invoke >"$work/answer" &
    wait_until_at_work "$before"
    stop 143
    check_no_mask
    wait
    [[ "$(cat "$work/answer")" == 500 ]] || echo "  (the POST under way had no answer: $(cat "$work/answer"))"

    echo "== invoke: SIGTERM while idle"
    new idle
    start_server
    stop 0
}

test_instance() {
    echo "== instance: a batch, by /predict being mounted, preset $preset"
    new instance
    cp "$work/samples"/*.nii.gz "$in"
    logged_run --user "$uid:$uid" -v "$in:/mnt/input:ro" -v "$out:/predict" "$sealed" --preset "$preset"
    [[ "$status" -eq 0 ]] || fail "exit status $status (137: out of memory)"
    check_output challenge

    new instance-stopped
    cp "$work/samples"/*.nii.gz "$in"
    stop_in_mid_run -v "$in:/mnt/input:ro" -v "$out:/masks" "$sealed" --input_dir=/input --predict_dir=/masks
}

test_seal
for way in "${ways[@]}"; do
    "test_$way"
done
echo "test.sh: passed (${ways[*]})"
