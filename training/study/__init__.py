# SPDX-License-Identifier: Apache-2.0
"""The distillation study: run the experiment, score its runs and analyse them."""
