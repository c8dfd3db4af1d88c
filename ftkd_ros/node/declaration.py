# SPDX-License-Identifier: Apache-2.0
"""Declaration of the detector's parameters on a ROS node, with descriptions for `ros2 param describe`."""

from dataclasses import fields
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from ftkd_ros.node.parameter_tables import CHOICES, DESCRIPTIONS, RANGES, RUN_TIME
from ftkd_ros.node.parameters import DetectorParameters, typed_value


def declare_parameters(node: Node) -> DetectorParameters:
    """Declare all parameters on the node and return their values. Raises UserError for a bad value."""
    values: dict[str, Any] = {}
    for entry in fields(DetectorParameters):
        # dynamic_typing, because rclpy would refuse `sync_slop_s: 1` and cannot type an empty list.
        descriptor = ParameterDescriptor(dynamic_typing=True)
        default: Any = list(entry.default) or None if isinstance(entry.default, tuple) else entry.default
        given = node.declare_parameter(entry.name, default, descriptor).value
        values[entry.name] = typed_value(entry.name, given, entry.default)
    parameters = DetectorParameters(**values)
    for name in values:  # afterwards, because errors of rclpy do not contain what to do
        node.set_descriptor(name, make_descriptor(name))
    return parameters


def make_descriptor(name: str) -> ParameterDescriptor:
    """Return the descriptor for `ros2 param describe`: description, range or allowed values."""
    descriptor = ParameterDescriptor(
        name=name, description=DESCRIPTIONS[name], read_only=name not in RUN_TIME, dynamic_typing=True
    )
    if name in CHOICES:
        descriptor.additional_constraints = f"one of: {', '.join(CHOICES[name])}"
    if name in RANGES:
        lowest, highest = RANGES[name]
        if isinstance(lowest, int):
            descriptor.integer_range = [IntegerRange(from_value=lowest, to_value=int(highest), step=1)]
        else:
            descriptor.floating_point_range = [FloatingPointRange(from_value=lowest, to_value=highest)]
    return descriptor
