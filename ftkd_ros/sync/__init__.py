# SPDX-License-Identifier: Apache-2.0
"""Camera messages to synchronised rounds."""
