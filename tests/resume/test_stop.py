"""A forked worker ends by SIGTERM, however early it comes: lm-eval's bootstrap waits for its workers to end so."""

import os
import subprocess
import sys

import pytest

FORKS = """
import os, signal, time
from lminf_eval.resume.shutdown import Stop

Stop().listen()
deaths = 0
for _ in range(100):
    pid = os.fork()
    if not pid:
        time.sleep(1)
        os._exit(0)
    os.kill(pid, signal.SIGTERM)  # most often before the child has run at all
    deaths += os.waitpid(pid, 0)[1] == signal.SIGTERM
print(deaths, signal.getsignal(signal.SIGTERM).__self__.asked == "", signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_signal_to_a_worker_just_forked_ends_it():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["100", "True", "set()"]  # and the parent listens on, and holds nothing back
