"""What is allowed, by pretended ``/proc`` and ``/sys``; what is needed, against peaks measured."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGURATION, PLANS, make_bundle

from ichseg.model import bundle
from ichseg.predict import memory, prepare
from ichseg.predict.memory import Limit, Part
from ichseg.scan import volume
from ichseg.scan.volume import Volume

ROOT = Path(__file__).parents[2]
MB = 1024**2
NO_LIMIT = resource.RLIM_INFINITY


@pytest.fixture
def limits():
    """Resource limits by kind."""
    return {resource.RLIMIT_DATA: NO_LIMIT, resource.RLIMIT_AS: NO_LIMIT}


@pytest.fixture
def root(tmp_path, monkeypatch, limits):
    """A system where the process holds 100 MB and 10 000 MB are free, without limits."""
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (limits[kind], NO_LIMIT))
    write(
        tmp_path / "proc/self/status",
        "Name:\tpython\nVmHWM:\t 307200 kB\nVmRSS:\t 102400 kB\nVmData:\t 204800 kB\n"
        "VmSize:\t 512000 kB\nThreads:\t7\n",
    )
    write(tmp_path / "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {10_000 * 1024} kB\n")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def version_2(root, folder, allowed, taken=50 * MB, caches=(20 * MB, 10 * MB)):
    place = root / "sys/fs/cgroup" / folder
    write(place / "memory.max", f"{allowed}\n")
    write(place / "memory.current", f"{taken}\n")
    write(
        place / "memory.stat",
        f"anon 7\nfile 9\ninactive_file {caches[0]}\nactive_file {caches[1]}\n",
    )


def version_1(root, folder, allowed, taken=50 * MB, caches=(20 * MB, 10 * MB)):
    place = root / "sys/fs/cgroup/memory" / folder
    write(place / "memory.limit_in_bytes", f"{allowed}\n")
    write(place / "memory.usage_in_bytes", f"{taken}\n")
    write(
        place / "memory.stat",
        f"cache 5\ninactive_file 1\n"
        f"total_inactive_file {caches[0]}\ntotal_active_file {caches[1]}\n",
    )


def test_free_memory_is_a_limit(root):
    assert memory.limit(root) == Limit(10_100 * MB, "the free memory")
    assert (memory.resident(root), memory.peak(root)) == (100 * MB, 300 * MB)


def test_version_2_counts_no_caches_and_asks_the_groups_above(root):
    write(root / "proc/self/cgroup", "0::/kube/pod/job\n")
    version_2(root, "", "max")
    version_2(root, "kube/pod", 1000 * MB, taken=400 * MB)
    version_2(root, "kube/pod/job", 2000 * MB, taken=50 * MB)
    # 1000 - (400 - 30) may be added
    assert memory.limit(root) == Limit((100 + 630) * MB, "the cgroup")
    version_2(root, "kube/pod/job", 200 * MB, taken=50 * MB)
    assert memory.limit(root) == Limit((100 + 180) * MB, "the cgroup")


def test_in_a_container_the_mount_is_the_group_whatever_the_kernel_calls_it(root):
    write(root / "proc/self/cgroup", "0::/../../docker/abc\n")
    version_2(root, "", 1000 * MB)
    assert memory.limit(root) == Limit(1080 * MB, "the cgroup")
    write(root / "proc/self/cgroup", "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    (root / "sys/fs/cgroup/memory.max").unlink()
    version_1(root, "", 700 * MB)
    assert memory.limit(root) == Limit(780 * MB, "the cgroup")


def test_version_1_and_its_word_for_no_limit(root):
    write(root / "proc/self/cgroup", "11:hugetlb:/x\n4:memory:/x/y\n1:name=systemd:/x\n")
    version_1(root, "", 9223372036854771712)
    version_1(root, "x/y", 500 * MB)
    assert memory.limit(root) == Limit(580 * MB, "the cgroup")
    version_1(root, "x/y", 9223372036854771712)
    assert memory.limit(root).by == "the free memory"


def test_a_group_that_is_full_leaves_what_is_held(root):
    write(root / "proc/self/cgroup", "0::/\n")
    version_2(root, "", 100 * MB, taken=200 * MB)
    assert memory.limit(root) == Limit(100 * MB, "the cgroup")


def test_resource_limits_are_of_address_space_not_of_what_is_held(root, limits):
    limits[resource.RLIMIT_DATA] = 1000 * MB
    assert memory.limit(root) == Limit((100 + 1000 - 200) * MB, "RLIMIT_DATA")
    limits[resource.RLIMIT_AS] = 1100 * MB
    assert memory.limit(root) == Limit((100 + 1100 - 500) * MB, "RLIMIT_AS")


def test_where_nothing_is_known_there_is_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (NO_LIMIT, NO_LIMIT))
    assert memory.limit(tmp_path) is None
    assert memory.resident(tmp_path) == 0


def test_bytes_of_weights_are_those_of_fp32(tmp_path):
    model = make_bundle(tmp_path, folds=1)
    state = bundle.load_state(tmp_path, model.members[0])
    path = tmp_path / model.members[0].file
    assert memory.weights_bytes(path) == sum(array.nbytes for array in state.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_this_process_is_really_allowed():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30));"
        "from ichseg.predict import memory; found = memory.limit();"
        "print(found.by, found.total - (3 << 30), memory.peak() >= memory.resident() > 1 << 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    by, difference, held = done.stdout.rsplit(maxsplit=2)
    assert (by, held) == ("RLIMIT_DATA", "True")
    assert abs(int(difference)) < 300 * MB  # address space that is not held


def part(shape, *, sums=1, networks=1):
    """The tiny configuration, tile 4x16x16, on a scan whose grid has this shape."""
    scan = Volume(np.zeros(shape, np.uint8), (5.0, 1.0, 1.0))
    placement = prepare.place([scan], PLANS, CONFIGURATION)
    assert placement.grid_shape == shape
    return Part(CONFIGURATION, placement, weights=100 * MB, sums=sums, networks=networks)


def needed(*parts, kind="openvino", on_host=False):
    return memory.estimate(
        kind, PLANS, parts, file_bytes=7 * MB, scan_bytes=20 * MB, on_host=on_host
    )


def test_what_a_case_needs_by_hand():
    """Of 100x128x256 voxels, 3 276 800: 12.5 MB a float32 channel; two labels, 25 MB of scores."""
    found = needed(part((100, 128, 256)))
    assert found.opening == (20 + max(2 * 7 + 20, 12.5 + 30)) * MB
    assert found.predicting == (20 + 12.5 + 25) * MB
    assert found.writing == (20 + 25 + 6.25 + 30) * MB
    assert found.network == (3.05 * 100 + 55) * MB
    assert found.alone == found.network + found.writing
    assert found.device == 0


def test_several_networks_need_a_second_sum_and_what_each_found():
    one, five = needed(part((100, 128, 256))), needed(part((100, 128, 256), sums=2, networks=5))
    assert five.predicting - one.predicting == (25 + 5 * 3.125) * MB


def test_what_is_smaller_than_a_tile_is_padded():
    found = needed(part((2, 10, 16)))  # to 4x16x16
    assert found.predicting - 20 * MB == 4 * (2 * 10 * 16 + 4 * 16 * 16 + 2 * 4 * 16 * 16)


def test_scores_lie_where_the_networks_run_unless_the_gpu_does_not_hold_them():
    on_gpu = needed(part((100, 128, 256)), kind="cuda")
    on_host = needed(part((100, 128, 256)), kind="cuda", on_host=True)
    assert on_gpu.device - on_host.device == (12.5 + 25) * MB
    assert on_host.predicting - on_gpu.predicting == 25 * MB
    assert on_gpu.predicting == (20 + 12.5) * MB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_estimate_of_a_run_is_near_its_peak(tmp_path):
    """30 MB of scan, in a process of its own; smooth, lest there be a lesion for each voxel."""
    make_bundle(tmp_path / "weights")
    voxels = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 5)).astype(np.int16)
    voxels = voxels.repeat(10, 0).repeat(100, 1).repeat(100, 2)
    volume.write(Volume(voxels, (5.0, 0.2, 0.2)), tmp_path / "input" / "scan.mha")
    flags = ["--preset", "fast", "--device", "cpu"]
    for name in ("input", "output", "weights"):
        flags += [f"--{name}", str(tmp_path / name)]
    code = "import process; from ichseg.predict import memory; process.main(); print(memory.peak())"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True, cwd=ROOT
    )
    (estimate_gb,) = re.findall(r"about ([\d.]+) GB of memory", done.stderr)
    assert float(estimate_gb) == pytest.approx(int(done.stdout) / memory.GB, rel=0.25)
