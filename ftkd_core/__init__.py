# SPDX-License-Identifier: Apache-2.0
"""Camera-only 3D object detection: models, distillation, data and runtime. Independent of ROS."""
