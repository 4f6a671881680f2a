"""Lets PyPI's torchvision, which is built for CUDA, be imported beside a CPU build of torch.

Its compiled operators are missing there, and its Python part registers fakes of two of them when it is imported. They
are declared here just before that. Nothing that mmtok, vLLM or lmms-eval run calls them.
"""

import sys


class _DeclareOperators:
    """A finder that finds nothing, but sees the first import of torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                global library  # operators live as long as the library that declares them
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareOperators())
