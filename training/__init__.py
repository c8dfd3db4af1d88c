# SPDX-License-Identifier: Apache-2.0
"""Training pipeline: train, distil and validate detectors. `training.study` holds the experiments."""
