"""What a pass is: a named rewrite of a graph with stated needs and effects."""

import abc
from typing import ClassVar

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult


class Pass(abc.ABC):
    """One rewrite of a converted graph.

    Attributes:
        requires: names of passes that must have run before this one.
    """

    requires: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Name in reports and in other passes' `requires`: the class name."""
        return type(self).__name__

    @abc.abstractmethod
    def rewrite(self, graph_module: GraphModule) -> int:
        """Rewrite in place; return how many places changed."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Rewrite, clean up and check the graph where something changed."""
        changed = self.rewrite(graph_module)
        if changed:
            graph_module.graph.eliminate_dead_code()
            graph_module.graph.lint()
            graph_module.recompile()
        return PassResult(graph_module, changed > 0)
