"""What the machine allows, by pretended ``/proc`` and ``/sys`` and once for real."""

import resource
import subprocess
import sys

import pytest

from ichseg.engine import machine
from ichseg.engine.machine import MemoryLimit

MB = 1024**2
NO_LIMIT = resource.RLIM_INFINITY


@pytest.fixture
def limits():
    """Resource limits by kind."""
    return {resource.RLIMIT_DATA: NO_LIMIT, resource.RLIMIT_AS: NO_LIMIT}


@pytest.fixture
def root(tmp_path, monkeypatch, limits):
    """A system where the process holds 100 MB and 10 000 MB are free, without limits."""
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (limits[kind], NO_LIMIT))
    write(
        tmp_path / "proc/self/status",
        "Name:\tpython\nVmRSS:\t 102400 kB\nVmData:\t 204800 kB\n"
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
    assert machine.memory_limit(root) == MemoryLimit(10_100 * MB, "the free memory")
    assert machine.resident_bytes(root) == 100 * MB
    assert machine.free_memory_bytes(root) == 10_000 * MB


def test_version_2_counts_no_caches_and_asks_the_groups_above(root):
    write(root / "proc/self/cgroup", "0::/kube/pod/job\n")
    version_2(root, "", "max")
    version_2(root, "kube/pod", 1000 * MB, taken=400 * MB)
    version_2(root, "kube/pod/job", 2000 * MB, taken=50 * MB)
    # 1000 - (400 - 30) may be added
    assert machine.memory_limit(root) == MemoryLimit((100 + 630) * MB, "the cgroup")
    version_2(root, "kube/pod/job", 200 * MB, taken=50 * MB)
    assert machine.memory_limit(root) == MemoryLimit((100 + 180) * MB, "the cgroup")


def test_in_a_container_the_mount_is_the_group_whatever_the_kernel_calls_it(root):
    write(root / "proc/self/cgroup", "0::/../../docker/abc\n")
    version_2(root, "", 1000 * MB)
    assert machine.memory_limit(root) == MemoryLimit(1080 * MB, "the cgroup")
    write(root / "proc/self/cgroup", "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    (root / "sys/fs/cgroup/memory.max").unlink()
    version_1(root, "", 700 * MB)
    assert machine.memory_limit(root) == MemoryLimit(780 * MB, "the cgroup")


def test_version_1_and_its_word_for_no_limit(root):
    write(root / "proc/self/cgroup", "11:hugetlb:/x\n4:memory:/x/y\n1:name=systemd:/x\n")
    version_1(root, "", 9223372036854771712)
    version_1(root, "x/y", 500 * MB)
    assert machine.memory_limit(root) == MemoryLimit(580 * MB, "the cgroup")
    version_1(root, "x/y", 9223372036854771712)
    assert machine.memory_limit(root).by == "the free memory"


def test_a_group_that_is_full_leaves_what_is_held(root):
    write(root / "proc/self/cgroup", "0::/\n")
    version_2(root, "", 100 * MB, taken=200 * MB)
    assert machine.memory_limit(root) == MemoryLimit(100 * MB, "the cgroup")


def test_resource_limits_are_of_address_space_not_of_what_is_held(root, limits):
    limits[resource.RLIMIT_DATA] = 1000 * MB
    assert machine.memory_limit(root) == MemoryLimit((100 + 1000 - 200) * MB, "RLIMIT_DATA")
    limits[resource.RLIMIT_AS] = 1100 * MB
    assert machine.memory_limit(root) == MemoryLimit((100 + 1100 - 500) * MB, "RLIMIT_AS")


def test_where_nothing_is_known_there_is_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (NO_LIMIT, NO_LIMIT))
    assert machine.memory_limit(tmp_path) is None
    assert machine.resident_bytes(tmp_path) == 0
    assert machine.free_memory_bytes(tmp_path) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_this_process_is_really_allowed():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30));"
        "from ichseg.engine import machine; found = machine.memory_limit();"
        "print(found.by, found.total - (3 << 30), machine.resident_bytes() > 1 << 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    by, difference, held = done.stdout.rsplit(maxsplit=2)
    assert (by, held) == ("RLIMIT_DATA", "True")
    assert abs(int(difference)) < 300 * MB  # address space that is not held


@pytest.fixture
def cores(monkeypatch):
    """A machine of which affinity allows 64 CPUs."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64))


@pytest.mark.parametrize(
    ("wished", "threads"), [("4", 4), ("3,2", 3), ("99", 32), ("0", 32), ("", 32), ("many", 32)]
)
def test_threads_are_no_more_than_is_wished(cores, monkeypatch, wished, threads):
    monkeypatch.setattr(machine, "_cgroup_cpus", lambda _: ())
    monkeypatch.setenv("OMP_NUM_THREADS", wished)
    assert machine.cpu_threads() == threads


def test_a_quota_limits_cpus(tmp_path, cores, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.cpus(tmp_path) == 64
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert machine.cpus(tmp_path) == 64
    write(tmp_path / "sys/fs/cgroup/cpu.max", "150000 100000\n")
    assert machine.cpus(tmp_path) == 2
    write(tmp_path / "sys/fs/cgroup/cpu.max", "6400000 100000\n")
    assert (machine.cpus(tmp_path), machine.cpu_threads()) == (64, 32)


def test_a_quota_of_version_1(tmp_path, cores):
    write(tmp_path / "proc/self/cgroup", "4:memory:/job\n3:cpu,cpuacct:/job\n")
    place = tmp_path / "sys/fs/cgroup/cpu/job"
    write(place / "cpu.cfs_period_us", "100000\n")
    write(place / "cpu.cfs_quota_us", "-1\n")
    assert machine.cpus(tmp_path) == 64
    write(place / "cpu.cfs_quota_us", "300000\n")
    assert machine.cpus(tmp_path) == 3


def test_quotas_of_the_groups_above_count_as_well(tmp_path, cores):
    write(tmp_path / "proc/self/cgroup", "0::/slurm/job/step\n")
    write(tmp_path / "sys/fs/cgroup/slurm/job/step/cpu.max", "max 100000\n")
    write(tmp_path / "sys/fs/cgroup/slurm/job/cpu.max", "400000 100000\n")
    write(tmp_path / "sys/fs/cgroup/slurm/cpu.max", "1600000 100000\n")
    assert machine.cpus(tmp_path) == 4


def test_cpus_are_no_more_than_affinity_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(2))
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "800000 100000\n")
    assert machine.cpus(tmp_path) == 2
