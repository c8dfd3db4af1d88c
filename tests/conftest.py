# SPDX-License-Identifier: Apache-2.0
"""How all tests run: in one thread a process, and in a ROS domain a process."""

import os

# The models of the tests are tiny, and threads that wait only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Of several processes (`make test` has one a core) each has whole files, and talks on a domain of its own:
# the first on the one that was given, the others on those after it.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
if "ROS_DOMAIN_ID" in os.environ:
    os.environ["ROS_DOMAIN_ID"] = str(int(os.environ["ROS_DOMAIN_ID"]) + int(_WORKER))
