#!/usr/bin/env bash
# Proves the container image on the sample cases; see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: ./test.sh [--no-build]

Builds the image and runs it as strictly as the platform does: no network, read-only file system, no privileges,
8 GB of memory without swap, 256 processes, 64 MB of shared memory, a user that is not root. Three runs:

  1. sealed      does the seal hold, and does the program start under a uid that nobody knows?
  2. samples     test/sample/input as a plain folder, as uid 65534; each mask is compared, inside the image,
                 with the one in test/sample/expected: Dice at least 0.98, or volumes within 0.1 mL
                 where the stored mask is under 0.1 mL; geometry, type and labels equal
  3. platform    one sample laid out as Grand Challenge does (inputs.json), as the image's own user and with
                 the platform's limit on data memory: exactly one .mha and a results.json come out

Exits 0 when all of it holds, 1 when anything differs. Needs the container engine, and no Python.

  --no-build        test the image that is there

Environment:
  IMAGE             name of the image                            (default ichseg:latest)
  CONTAINER_ENGINE  docker, or what stands in for it             (default docker; see ./build.sh --help)
  PRESET            full, balanced or fast, for run 2            (default balanced, with which the stored masks were made)
  INPUT_SLUG        the image socket's slug, for run 3           (default head-ct)
  OUTPUT_SLUG       the slug the mask must come out under        (default intracranial-hemorrhage-segmentation)
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

build=yes
for argument in "$@"; do
    case "$argument" in
        --no-build) build=no ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && fail "unknown argument: $argument" ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")"
image="${IMAGE:-ichseg:latest}"
preset="${PRESET:-balanced}"
input_slug="${INPUT_SLUG:-head-ct}"
output_slug="${OUTPUT_SLUG:-intracranial-hemorrhage-segmentation}"
read -r -a engine <<<"${CONTAINER_ENGINE:-docker}"
read -r -a extra_run_args <<<"${EXTRA_RUN_ARGS-}"
[[ "$build" == no ]] || ./build.sh
"${engine[@]}" image inspect "$image" >/dev/null 2>&1 || fail "there is no image $image; run without --no-build"

sealed_run() {
    "${engine[@]}" run --rm --network none --memory 8g --memory-swap 8g --pids-limit 256 --shm-size 64m \
        --read-only --tmpfs /tmp:rw,size=1g --cap-drop ALL --security-opt no-new-privileges \
        ${extra_run_args[@]+"${extra_run_args[@]}"} "$@"
}

# What the container wrote belongs to its users, in folders that only they can empty; so they open them to all.
clean_up() {
    local status=$?
    trap - EXIT
    sealed_run --user 65534:65534 -v "$work/out:/output" --entrypoint chmod "$image" -R a+rwX /output || true
    sealed_run -v "$work/platform-out:/output" --entrypoint chmod "$image" -R a+rwX /output || true
    rm -rf "$work" || true
    exit "$status"
} 2>/dev/null

# Copies, not mounts of the clone: readable by any uid even from a clone made under umask 077.
work="$(mktemp -d)"
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$work/test" "$work/out" "$work/platform-in" "$work/platform-out"
cp -R test/sample/input "$work/input"
cp -R test/compare.py test/sample/expected "$work/test/"

platform_case="$(find test/sample/input -name '*.mha' | sort | head -n 1)"
[[ -n "$platform_case" ]] || fail "test/sample/input has no .mha to lay out as the platform does"
uuid=7d1b2c44-55f0-4c1e-9a3e-0d6f3a9c2e10
mkdir -p "$work/platform-in/images/$input_slug"
cp "$platform_case" "$work/platform-in/images/$input_slug/$uuid.mha"
cat >"$work/platform-in/inputs.json" <<JSON
[
  {
    "pk": 1,
    "value": null,
    "file": null,
    "image": {"pk": "$uuid", "name": "$(basename "$platform_case")"},
    "interface": {
      "pk": 1,
      "title": "Head CT",
      "slug": "$input_slug",
      "kind": "Image",
      "super_kind": "Image",
      "relative_path": "images/$input_slug"
    }
  }
]
JSON
chmod -R a+rX "$work/test" "$work/input" "$work/platform-in"
chmod 0777 "$work/out" "$work/platform-out"

echo "== sealed"
user="$("${engine[@]}" image inspect --format '{{.Config.User}}' "$image")"
case "${user%%:*}" in
    "" | root | 0) fail "the image's USER is '$user'; the platform refuses root" ;;
esac
platform="$("${engine[@]}" image inspect --format '{{.Os}}/{{.Architecture}}' "$image")"
[[ "$platform" == linux/amd64 ]] || fail "the image is for $platform; the platform runs linux/amd64"
# shellcheck disable=SC2016 # expanded in the container
sealed_run --user 54321:54321 -v "$work/input:/input:ro" -v "$work/out:/output" --entrypoint sh "$image" -euc '
    no() { echo "the seal does not hold: $*" >&2; exit 1; }
    [ "$(id -u)" = 54321 ] || no "uid is $(id -u)"
    grep -qE "^[^ ]+ / [^ ]+ ro[ ,]" /proc/mounts || no "the file system is not read-only"
    for folder in / /input /opt/algorithm /opt/algorithm/weights /home /var; do
        ! touch "$folder/.probe" 2>/dev/null || no "$folder is writable"
    done
    for folder in /tmp /output; do
        touch "$folder/.probe" && rm "$folder/.probe" || no "$folder is not writable"
    done
    [ "$(ls /sys/class/net)" = lo ] || no "network: $(ls /sys/class/net)"
    [ "$(df -k /dev/shm | tail -n 1 | tr -s " " | cut -d " " -f 2)" = 65536 ] || no "shared memory is not 64 MB"
    grep -q "^CapBnd:[[:space:]]*0*$" /proc/self/status || no "capabilities are left"
    grep -q "^NoNewPrivs:[[:space:]]*1$" /proc/self/status || no "new privileges can be had"
    python /opt/algorithm/process.py --help >/dev/null || no "process.py does not start"
    python -c "import torch, SimpleITK, scipy.ndimage, safetensors, openvino" || no "a package cannot be imported"
' || fail "run 1, sealed"
echo "  image user $user, $platform; starts as an unknown uid, nothing writable but /output and /tmp, no network"

echo "== samples, preset $preset"
SECONDS=0
sealed_run --user 65534:65534 -v "$work/input:/input:ro" -v "$work/out:/output" "$image" --preset "$preset" ||
    fail "run 2, samples: exit status $? (137: out of memory)"
echo "  took $SECONDS s"
sealed_run --user 65534:65534 -v "$work/test:/test:ro" -v "$work/out:/out:ro" --entrypoint python "$image" \
    /test/compare.py /test/expected /out || fail "run 2, samples: the masks differ from test/sample/expected"

echo "== platform, preset fast"
SECONDS=0
sealed_run --ulimit data=7516192768:7516192768 -v "$work/platform-in:/input:ro" -v "$work/platform-out:/output" \
    "$image" --preset fast || fail "run 3, platform: exit status $? (137: out of memory)"
echo "  took $SECONDS s"
written="$(cd "$work/platform-out" && find . -type f | sort)"
shopt -s extglob
case "$written" in
    "./images/$output_slug/"+([!/$'\n'])".mha"$'\n'"./results.json") ;;
    *) fail "run 3, platform: expected one images/$output_slug/*.mha and results.json, found:"$'\n'"$written" ;;
esac
echo "  ${written//$'\n'/, }: ok"

echo "test.sh: passed"
