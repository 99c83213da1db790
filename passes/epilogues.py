"""What an integer operator does behind its own arithmetic, as nodes of a graph."""

from typing import Any

import torch
from torch.fx import Node

import qmir_ao.ops.conv2d
import qmir_ao.ops.linear
import qmir_ao.ops.ss2d_scan_q  # noqa: F401  (define the operators named below)
from qmir_ao.ops._epilogue import Epilogue
from qmir_ao.quant.patterns import arguments

qmir = torch.ops.qmir

MOMENTS: dict[Any, Any] = {
    qmir.linear.default: qmir.linear_moments.default,
    qmir.conv2d.default: qmir.conv2d_moments.default,
    qmir.ss2d_scan_q.default: qmir.ss2d_scan_q_moments.default,
}
"""The form of an integer operator that also gives the statistics of its result."""
PLAIN: dict[Any, Any] = {moments: plain for plain, moments in MOMENTS.items()}
"""The inverse of `MOMENTS`."""
OWN_ARGUMENTS: dict[Any, int] = {
    qmir.linear.default: 9,
    qmir.linear_moments.default: 9,
    qmir.conv2d.default: 14,
    qmir.conv2d_moments.default: 14,
}
"""How many arguments an integer operator with an epilogue has before those of the epilogue."""
_WITHOUT_EPILOGUE: dict[Any, int] = {qmir.ss2d_scan_q_moments.default: 18}
"""The same of operators that have none, but an offset of moments."""


def own_arguments(node: Node) -> tuple[Any, ...]:
    """Arguments of an integer operator without its epilogue: its result before it."""
    return arguments(node)[: OWN_ARGUMENTS.get(node.target, _WITHOUT_EPILOGUE.get(node.target))]


def epilogue_of(node: Node) -> Epilogue:
    """The epilogue of an integer operator; tensors are nodes. Of scans, which have none, too."""
    count = OWN_ARGUMENTS.get(node.target)
    own = () if count is None else arguments(node)[count : count + len(Epilogue._fields)]
    return Epilogue(*own)


def plain_target(node: Node) -> Any:
    """What an integer operator calls, without the statistics of its result."""
    return PLAIN.get(node.target, node.target)


def epilogue_parts(node: Node) -> list[str]:
    """Names of the float operators that the epilogue of an integer operator stands for."""
    end = epilogue_of(node)
    return [
        *(["add"] if end.residual is not None else []),
        *(["mul"] if end.residual_scale is not None else []),
        *([end.activation] if end.activation != "none" else []),
    ]
