"""`python -m muxrt.cli.tied VERB ...`: `muxrt VERB ...` for a process that holds its stdin open.

When that one ends, however it does, so do the command and all that it started.
"""

import os
import signal
import sys
import threading

from muxrt.cli.main import main


def _watch() -> None:
    # Not `sys.stdin`: a thread that waits in it makes the interpreter abort when it ends.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    # With all that it started, where it has a session of its own, as from the server.
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_watch, name="tied", daemon=True).start()
    main()
