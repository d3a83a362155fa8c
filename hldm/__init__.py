"""hldm: a latent-diffusion hierarchical language model.

A character-level Griffin autoencoder compresses text into one latent per variable-length chunk, a
transformer diffusion prior denoises the next chunk's latent, a small decoder writes it out.

Shapes, everywhere in docstrings, comments, einops strings and messages:

    b documents (rows)   t bytes of a document        n chunks of a document    l bytes of one chunk, padded
    c context entries    d model width                z latent width            h heads
    v vocabulary         m noise draws of a latent    t' decoder events (bytes and ends)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hldm.config import Config, load_config
    from hldm.generation.pipeline import HLDMPipeline, HLDMPipelineOutput
    from hldm.model.autoencoder import Autoencoder
    from hldm.model.griffin import Griffin
    from hldm.model.ops import linear_scan
    from hldm.model.prior import Prior

__version__ = "0.1.0"

# Where each public name lives; imported on first use (PEP 562), so that `import hldm` needs no torch.
_HOMES = {
    "Autoencoder": "model.autoencoder",
    "Config": "config",
    "Griffin": "model.griffin",
    "HLDMPipeline": "generation.pipeline",
    "HLDMPipelineOutput": "generation.pipeline",
    "Prior": "model.prior",
    "linear_scan": "model.ops",
    "load_config": "config",
}
__all__ = [
    "Autoencoder",
    "Config",
    "Griffin",
    "HLDMPipeline",
    "HLDMPipelineOutput",
    "Prior",
    "linear_scan",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hldm' has no attribute {name!r}")
    return getattr(import_module(f"hldm.{_HOMES[name]}"), name)
