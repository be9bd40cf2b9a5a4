"""The engine beside what else its process does."""

import subprocess
import sys

SIGNAL_AFTER_ENGINES = """
import gc, os, signal
from ichseg.engine import openvino_engine

first, second = openvino_engine.engine(1), openvino_engine.engine(1)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("told"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_is_handled_after_engines_have_come_and_gone():
    """OpenVINO's own stack for signals, which ends with its core, is not left behind."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_AFTER_ENGINES], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "told\n")
