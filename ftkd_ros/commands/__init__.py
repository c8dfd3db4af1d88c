# SPDX-License-Identifier: Apache-2.0
"""The commands of `ftkd`, as functions whose options carry their help; `ftkd_ros.cli` lists them."""
