# SPDX-License-Identifier: Apache-2.0
"""How all tests run: in one thread a process, and which of them in the same process."""

import os

import pytest

# The models of the tests are tiny, and threads that wait only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes (`make test` has one a core) one runs all tests that talk over DDS, which are of
    one domain and would hear each other; other files stay whole, for what their tests share."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = "dds" if item.get_closest_marker("ros") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
