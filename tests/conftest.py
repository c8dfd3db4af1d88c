# SPDX-License-Identifier: Apache-2.0
"""One thread a process: the models of the tests are tiny, and threads that wait only slow them down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
