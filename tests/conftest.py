# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests: one thread, one ROS domain per process, and a temporary cache."""

import atexit
import os
import shutil
import tempfile

# The test models are tiny; more threads would make them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# With several processes (`make test` starts one per core) each uses its own ROS domain: the first uses
# ROS_DOMAIN_ID, the others the numbers after it.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
if "ROS_DOMAIN_ID" in os.environ:
    os.environ["ROS_DOMAIN_ID"] = str(int(os.environ["ROS_DOMAIN_ID"]) + int(_WORKER))

# Engines export models into a cache. Tests never use the user's; processes of one run share a folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["FTKD_CACHE"] = tempfile.mkdtemp(prefix="ftkd-tests-")
    atexit.register(shutil.rmtree, os.environ["FTKD_CACHE"], ignore_errors=True)
