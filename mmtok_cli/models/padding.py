"""Which patches of a padded square image show nothing but padding (LLaVA-1.5)."""

import torch
from torch import Tensor


def padding_mask(width: int, height: int, target_size: int = 336, patch_size: int = 14) -> Tensor:
    """True for the patches that lie wholly in the padding: bool `[side * side]` in raster order.

    LLaVA-1.5 pads an image to a square, the image in the middle, and scales the square to `target_size` pixels. As
    in MMTok's released code, the short side is rounded to whole pixels, an odd pixel of padding goes to the bottom
    or the right, and a patch that shows any of the image stays eligible. Unlike there, the short side never rounds
    to nothing: however thin the image, one row or column of patches stays eligible.
    """
    side = target_size // patch_size
    scale = target_size / max(width, height)  # the order of operations decides how ties round
    short = max(1, round(min(width, height) * scale))
    before = (target_size - short) // 2
    after = target_size - short - before
    line = torch.zeros(side, dtype=torch.bool)
    line[: before // patch_size] = True
    line[side - after // patch_size :] = True
    mask = line.unsqueeze(1) if width > height else line.unsqueeze(0)
    return mask.expand(side, side).reshape(-1)
