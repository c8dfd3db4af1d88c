# SPDX-License-Identifier: Apache-2.0
"""Official metrics and timing."""
