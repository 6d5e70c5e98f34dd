"""Stands where the model builder stands and is killed, as by a machine without memory."""

import os
import signal

os.kill(os.getpid(), signal.SIGKILL)
