# SPDX-License-Identifier: Apache-2.0
"""Set-up of .venv (`make setup`) and tools for the repository; not part of the installed package."""
